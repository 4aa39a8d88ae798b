"""The playground's numbers and rules, computed in a real browser, against PyTorch and `gridworld`."""

import base64
import json
from functools import partial

import numpy as np
import pytest
import torch
from browser import served
from scipy.stats import chisquare
from test_gridworld import CASES as DRAWN
from test_gridworld import drawn

from dtbook import playground
from dtbook.analysis.attribution import contrast, decompose, preference_direction
from dtbook.analysis.interventions import STATE_TOKENS, Site, ablate, constant, edited, patch
from dtbook.analysis.weights import CELLS, ov_circuit, qk_circuit, state_maps
from dtbook.artifacts import ArtifactStore
from dtbook.gridworld import GOAL, WALL, GridState, Task, observe, reset, step
from dtbook.model import DecisionTransformer, DTConfig
from dtbook.playground.scenes import check_scene

TASK = Task(random_start=True)
N_SCENES = 1000
TOLERANCE = 1e-4  # logits; what the issue of this widget asks for


@pytest.fixture(scope="module")
def page(browser, tmp_path_factory):
    """A page of which `evaluate(script)` has all that the module exports, as `pg`."""
    folder = tmp_path_factory.mktemp("playground")
    (folder / "index.html").write_text("<!doctype html><title>numbers</title><link rel=icon href=data:,>")
    (folder / "module.js").write_text(playground.module())
    with served(folder) as address:
        opened = browser.new_page()
        opened.goto(address)
        opened.evaluate("async () => { globalThis.pg = await import('./module.js'); }")
        yield opened


def ask(page, script, *arguments):
    """What a JavaScript function of these arguments returns; as one text each way, which is quicker than piecewise."""
    text = page.evaluate(f"(text) => JSON.stringify(({script})(...JSON.parse(text)))", json.dumps(arguments))
    return json.loads(text)


def reference():
    return DecisionTransformer.from_pretrained(ArtifactStore().path("seed_10/model"))


def other_shape(**shape):
    """A model with other sizes, its weights scaled up so that nothing in it is small."""
    model = DecisionTransformer(DTConfig(**shape), seed=1).eval()
    with torch.no_grad():
        for name, value in model.named_parameters():
            scale = 0.3 if "b_" in name else 6 if "blocks" in name else 1
            value.copy_(
                torch.randn(value.shape, generator=torch.Generator().manual_seed(len(name))) * 0.3
            ) if ("b_" in name) else value.mul_(scale)
    return model


MODELS = {
    "reference": reference,
    "post": DecisionTransformer.from_post_checkpoint,
    "two layers, three heads": lambda: other_shape(n_layers=2, n_heads=3, d_head=5, d_model=24, d_mlp=17),
    "one-hot": lambda: other_shape(encoding="one-hot", d_model=16, d_mlp=9, n_heads=1, d_head=7),
}


class Subject:
    """A model here and in the page, with random scenes: uniform states, RTGs and timesteps."""

    def __init__(self, page, model, n=N_SCENES, seed=0):
        rng = np.random.default_rng(seed)
        self.page, self.model, self.n = page, model, n
        self.inputs = self.draw(rng)
        self.sources = self.draw(rng)
        self.means = playground.means(model, Task())
        entry = playground.data(model)["models"][0]
        ask(page, "(entry) => { globalThis.model = pg.loadModel(entry, entry.weights); return 0; }", entry)
        for name, inputs in (("inputs", self.inputs), ("sources", self.sources)):
            views, rtgs, timesteps = inputs
            rows = {"view": views.reshape(self.n, -1).tolist()}
            rows |= {"rtg": rtgs[:, 0].double().tolist(), "t": timesteps[:, 0].tolist()}
            script = """(name, rows) => { globalThis[name] = rows.view.map((view, n) =>
              ({ view: Uint8Array.from(view), rtg: rows.rtg[n], t: rows.t[n] })); return 0; }"""
            ask(page, script, name, rows)

    def draw(self, rng):
        images = torch.from_numpy(observe(reset(TASK, self.n, rng)))
        rtgs = torch.from_numpy(rng.uniform(-1, 1, (self.n, 1)).astype(np.float32))
        return images[:, None], rtgs, torch.from_numpy(rng.integers(0, 300, (self.n, 1)))

    def logits_in_page(self, parts=None, steer=None):
        """The logits of every scene, as the page computes them."""
        return self.in_page(parts, steer, full=False)[0]

    def in_page(self, parts=None, steer=None, full=True):
        """(logits, parts of the logits, patterns) of every scene, as the page computes them."""
        found = ask(
            self.page,
            """(parts, steer, full) => {
              const patched = Object.values(parts).includes("patch");
              let push = null;
              return inputs.map((input, n) => {
                const source = patched ? pg.run(model, sources[n]) : null;
                push ??= steer && { ...steer, vector: pg.direction(model, steer.direction) };
                const r = pg.run(model, input, { parts, source, steer: push });
                if (!full) return { logits: r.logits, parts: {}, pattern: [] };
                const plain = Object.fromEntries(Object.entries(r.parts).map(([k, v]) => [k, Array.from(v)]));
                return { logits: r.logits, parts: plain, pattern: r.layers.map((l) => l.pattern) };
              });
            }""",
            parts or {},
            steer,
            full,
        )
        logits = np.array([row["logits"] for row in found])
        names = found[0]["parts"]
        return (
            logits,
            {name: np.array([row["parts"][name] for row in found]) for name in names},
            np.array([row["pattern"] for row in found]),
        )

    @torch.no_grad()
    def logits(self):
        return self.model(*self.inputs)[:, 0].numpy()

    @torch.no_grad()
    def source(self):
        return self.model.run_with_cache(*self.sources)[1]


NAMES = [pytest.param(name, marks=pytest.mark.post_weights if name == "post" else ()) for name in MODELS]


@pytest.fixture(scope="module", params=NAMES)
def subject(request, page):
    return Subject(page, MODELS[request.param](), N_SCENES if request.param in ("reference", "post") else 100)


def assert_close(found, expected):
    expected = torch.as_tensor(expected).detach().numpy()
    assert np.isfinite(found).all()
    np.testing.assert_allclose(found, expected, rtol=0, atol=TOLERANCE)


def test_logits_contributions_and_attention_are_the_models(subject):
    logits, parts, pattern = subject.in_page()
    assert_close(logits, subject.logits())
    expected = decompose(subject.model, *subject.inputs)
    assert list(parts) == list(expected), "the same names, in the same order"
    for name, value in expected.items():
        assert_close(parts[name], value[:, 0])
    assert_close(sum(parts.values()), logits)
    _, cache = subject.model.run_with_cache(*subject.inputs)
    for layer in range(subject.model.cfg.n_layers):
        assert_close(pattern[:, layer], cache["pattern", layer][:, :, 1])


def components(cfg):
    last = cfg.n_layers - 1
    heads = [f"L{layer}H{head}" for layer in range(cfg.n_layers) for head in range(cfg.n_heads)]
    return [*heads, "L0 MLP", f"L{last} MLP", "L0N3", f"L{last}N{cfg.d_mlp - 1}"]


def test_ablations_to_zero_are_those_of_interventions(subject):
    for names in ([name] for name in components(subject.model.cfg)):
        with ablate(subject.model, *names):
            expected, by_part = subject.logits(), decompose(subject.model, *subject.inputs)
        logits, parts, _ = subject.in_page(dict.fromkeys(names, "zero"))
        assert_close(logits, expected)
        for name, value in by_part.items():
            assert_close(parts[name], value[:, 0])


def mean_of(subject, name):
    layer = name[1]
    if name.endswith("MLP"):
        return subject.means[f"mean.{layer}.mlp_out"]
    kind, index = ("z", name.split("H")[1]) if "H" in name else ("post", name.split("N")[1])
    return subject.means[f"mean.{layer}.{kind}"][int(index)]


def test_ablations_to_the_mean_are_those_of_interventions(subject):
    for name in components(subject.model.cfg):
        with ablate(subject.model, name, to=constant(mean_of(subject, name))):
            assert_close(subject.logits_in_page({name: "mean"}), subject.logits())


def test_the_means_are_means():
    model = reference()
    found = playground.means(model, Task())
    rng = np.random.default_rng(5)
    images = torch.from_numpy(observe(reset(TASK, 4000, rng)))[:, None]
    _, cache = model.run_with_cache(
        images.repeat(3, 1, 1, 1, 1),
        torch.tensor([-1.0, 0.0, 0.9]).repeat_interleave(4000)[:, None],
        torch.full((12000, 1), 10),
    )
    z, mlp_out = cache["z", 0][:, 1], cache["mlp_out", 0][:, 1]
    for name, values in {"mean.0.z": z, "mean.0.mlp_out": mlp_out}.items():
        error = (found[name] - values.mean(0)).abs() / (
            values.std(0) / 40 + 1e-6
        )  # two samples of ~2,000 states
        assert error.max() < 6, name


def patch_sites(cfg):
    last = cfg.n_layers - 1
    sites = {"rtg": "hook_rtg_embed", "state": "hook_state_embed", "time": "hook_time_embed"}
    sites |= {name: name for name in components(cfg)}
    for layer in {0, last}:
        head = cfg.n_heads - 1
        sites[f"L{layer}H{head} pattern"] = Site(f"blocks.{layer}.attn.hook_pattern", head)
        sites[f"L{layer}H{head} V"] = Site(f"blocks.{layer}.attn.hook_v", head)
    return sites


def test_patches_are_those_of_interventions(subject):
    source = subject.source()
    sites = patch_sites(subject.model.cfg)
    for name, where in sites.items():
        with patch(subject.model, source, where):
            assert_close(subject.logits_in_page({name: "patch"}), subject.logits())
    with patch(subject.model, source, *(sites[name] for name in ("rtg", "state", "time"))):
        everything = subject.logits_in_page(dict.fromkeys(("rtg", "state", "time"), "patch"))
    with torch.no_grad():
        assert_close(everything, subject.model(*subject.sources)[:, 0])


def test_edits_add_up_as_nested_contexts_do(subject):
    source, last = subject.source(), subject.model.cfg.n_layers - 1
    head = f"L{last}H0"
    with ablate(subject.model, head), patch(subject.model, source, "hook_state_embed", "L0N3"):
        expected = subject.logits()
    logits, parts, _ = subject.in_page({head: "zero", "state": "patch", "L0N3": "patch"})
    assert_close(logits, expected)
    assert_close(sum(parts.values()), logits)


def direction_of(model, name):
    if name == "rtg":
        return model.W_E_rtg.detach()
    if name not in CELLS:
        return preference_direction(model, name)
    views = torch.zeros(2, 7, 7, 3, dtype=torch.uint8)
    views[0, 3, 5], views[1, 3, 5] = torch.tensor(CELLS[name]), torch.tensor(CELLS["empty"])
    with torch.no_grad():
        full, empty = model.embed_states(views)
    return full - empty


def test_steering_adds_to_the_state_token(subject):
    last = subject.model.cfg.n_layers - 1
    hooks = {"resid_pre": "blocks.0.", "resid_mid": f"blocks.{last}.", "resid_post": f"blocks.{last}."}
    names = ["F-R", "F-L", "R-L", "rtg", "obstacle", "wall", "goal"]
    for name, (site, block) in zip(
        names, 3 * list(hooks.items()), strict=False
    ):  # each place, each direction
        push = 1.7 * direction_of(subject.model, name)
        where = Site(f"{block}hook_{site}", positions=STATE_TOKENS)
        with edited(subject.model, (where, partial(torch.add, push))):
            expected = subject.logits()
        steer = {"direction": name, "at": site, "amount": 1.7}
        assert_close(subject.logits_in_page(steer=steer), expected)


def test_view_maps_are_those_of_weights(subject):
    model = subject.model

    def in_page(what, preference="F-R"):
        return subject.page.evaluate(
            "([what, preference]) => Array.from(pg.weightMap(model, what, preference))", [what, preference]
        )

    for preference in ("F-R", "R-L", "F"):
        assert_close(in_page("embedding", preference), state_maps(model, preference).flatten())
    for head in range(model.cfg.n_heads):
        qk = qk_circuit(model, 0, head, model.W_E_state, model.W_E_rtg[None]).weight[:, 0]
        assert_close(in_page(f"L0H{head} QK"), qk)
        towards = preference_direction(model, "F-R")[:, None]
        ov = ov_circuit(model, 0, head, model.W_E_state, towards).weight[:, 0]
        assert_close(in_page(f"L0H{head} OV"), ov)
    neuron = (model.W_E_state @ model.blocks[0].mlp.W_in[:, 3]).detach()
    assert_close(in_page("L0N3"), neuron)


def edits_of(cfg):
    """Every kind of edit, one at a time, and some at once."""
    kinds = [({name: way}, None) for name in components(cfg) for way in ("zero", "mean", "patch")]
    kinds += [({name: "patch"}, None) for name in patch_sites(cfg)]
    steers = [
        {"direction": "goal", "at": at, "amount": -1.3} for at in ("resid_pre", "resid_mid", "resid_post")
    ]
    kinds += [({}, steer) for steer in steers]
    everything = dict.fromkeys(components(cfg), "zero")
    return [*kinds, ({"L0H0": "mean", "L0 MLP": "patch"}, steers[0]), (everything, steers[1])]


def test_the_scan_is_a_run_at_each_rtg_whatever_is_edited(subject):
    """The scan of a one-layer model takes a shorter way than a run, which the tests above hold to PyTorch."""
    worst = ask(
        subject.page,
        """(kinds, rtgs) => kinds.map(([parts, steer]) => Math.max(...inputs.slice(0, 10).map((input, n) => {
          const push = steer && { ...steer, vector: pg.direction(model, steer.direction) };
          const edits = { parts, source: pg.run(model, sources[n]), steer: push };
          const runs = rtgs.map((rtg) => pg.run(model, { ...input, rtg }, edits).probs);
          const found = pg.scan(model, input, edits, rtgs);
          return Math.max(...found.flatMap((row, k) => row.map((p, action) => Math.abs(p - runs[k][action]))));
        })))""",
        edits_of(subject.model.cfg),
        [-1, -0.3, 0, 0.9],
    )
    assert len(worst) > 10
    assert max(worst) < 1e-9, worst


def test_the_scan_and_the_neurons_are_the_models(subject):
    rtgs = [-1.0, -0.35, 0.0, 0.9]
    found = subject.page.evaluate("(rtgs) => pg.scan(model, inputs[0], pg.INTACT, rtgs)", rtgs)
    state, _, timestep = (value[:1] for value in subject.inputs)
    with torch.no_grad():
        logits = subject.model(
            state.repeat(4, 1, 1, 1, 1), torch.tensor(rtgs)[:, None], timestep.repeat(4, 1)
        )
    assert_close(found, logits[:, 0].softmax(-1))
    listed = subject.page.evaluate(
        "pg.neuronContributions(model, pg.run(model, inputs[0]), pg.contrast('F-R'))"
    )
    _, cache = subject.model.run_with_cache(*(value[:1] for value in subject.inputs))
    for layer, block in enumerate(subject.model.blocks):
        effects = cache["post", layer][0, 1] * (block.mlp.W_out @ subject.model.W_U @ contrast("F-R"))
        ours = {row["name"]: row["effect"] for row in listed}
        assert_close([ours[f"L{layer}N{n}"] for n in range(len(effects))], effects)
    sizes = [abs(row["effect"]) for row in listed]
    assert sizes == sorted(sizes, reverse=True)


# The rules


def plain(state, row):
    return {
        "agent": int(state.agent[row]),
        "direction": int(state.direction[row]),
        "obstacles": state.obstacles[row].tolist(),
        "t": int(state.step_count[row]),
    }


def columns(states):
    return GridState(
        np.array([s["agent"] for s in states], np.uint8),
        np.array([s["direction"] for s in states], np.uint8),
        np.array([s["obstacles"] for s in states], np.uint8).reshape(len(states), -1),
        np.array([s["t"] for s in states], np.int32),
    )


@pytest.mark.parametrize(
    "task", [TASK, Task(5, 2, 90), Task(16, 8, 300, True)], ids=lambda task: f"size {task.size}"
)
def test_views_are_those_of_gridworld(page, task):
    states = reset(Task(task.size, task.n_obstacles, task.max_steps, True), 500, np.random.default_rng(1))
    rows = [plain(states, row) for row in range(500)]
    script = "(task, rows) => rows.map((state) => Array.from(pg.observe(task, state)))"
    found = ask(page, script, vars(task), rows)
    np.testing.assert_array_equal(np.array(found).reshape(-1, 7, 7, 3), observe(states, task.size))


@pytest.mark.parametrize("random_start", [False, True])
def test_first_states_are_those_of_gridworld(page, random_start):
    task, draws = Task(5, 2, random_start=random_start), 20_000
    script = """(task, draws) => { const random = pg.generator(7);
      return Array.from({ length: draws }, () => pg.reset(task, random)); }"""
    found = ask(page, script, vars(task), draws)
    ours = columns(found)
    theirs = reset(task, draws, np.random.default_rng(7))
    assert_same_distribution(signature(ours), signature(theirs))


def signature(state, *more):
    """One number for each distinct row of a state (obstacles in their order) and what came with it."""
    rows = np.column_stack([state.agent, state.direction, state.obstacles, state.step_count, *more])
    return rows.astype(np.float64).round(6)


def assert_same_distribution(ours, theirs, p_least=1e-4):
    """Both samples are of one distribution: two-sample chi-squared on the outcomes seen, rare ones together."""
    outcomes, index = np.unique(np.vstack([ours, theirs]), axis=0, return_inverse=True)
    index = index.ravel()
    a = np.bincount(index[: len(ours)], minlength=len(outcomes)).astype(float)
    b = np.bincount(index[len(ours) :], minlength=len(outcomes)).astype(float)
    rare = a + b < 20
    if rare.any():
        a, b = np.append(a[~rare], a[rare].sum()), np.append(b[~rare], b[rare].sum())
    a, b = a[a + b > 0], b[a + b > 0]
    if len(a) == 1:
        return
    share = len(ours) / (len(ours) + len(theirs))
    expected = np.concatenate([(a + b) * share, (a + b) * (1 - share)])
    statistic = chisquare(np.concatenate([a, b]), expected, ddof=len(a)).pvalue  # 2k cells, k − 1 free
    assert statistic > p_least, (statistic, outcomes[:5], a[:5], b[:5])


def cell(x, y, size=8):
    return x + size * y


# name: (agent, direction, obstacles, step) on the 8×8 task; each with each of the three actions
CASES = {
    "open room": (cell(3, 3), 0, [cell(5, 5), cell(2, 5), cell(6, 2), cell(1, 6)], 0),
    "obstacle in front": (cell(3, 3), 0, [cell(4, 3), cell(2, 5), cell(6, 2), cell(1, 6)], 4),
    "obstacle in front that cannot leave": (
        cell(2, 1),
        2,
        [cell(1, 1), cell(1, 2), cell(2, 2), cell(6, 1)],
        4,
    ),
    "obstacle may move in front": (cell(3, 3), 3, [cell(3, 1), cell(4, 1), cell(2, 1), cell(5, 3)], 9),
    "wall in front": (cell(1, 1), 2, [cell(4, 3), cell(2, 5), cell(6, 2), cell(1, 6)], 12),
    "wall in front, in the corner": (cell(6, 1), 3, [cell(6, 2), cell(5, 1), cell(5, 2), cell(4, 1)], 0),
    "goal in front, from the top": (cell(6, 5), 1, [cell(5, 6), cell(5, 5), cell(2, 2), cell(3, 3)], 100),
    "goal in front, from the left": (cell(5, 6), 0, [cell(6, 5), cell(4, 6), cell(2, 2), cell(3, 3)], 17),
    "the last step": (cell(3, 3), 1, [cell(5, 5), cell(2, 5), cell(6, 2), cell(1, 6)], 299),
    "the last step, at the goal": (cell(6, 5), 1, [cell(1, 6), cell(2, 5), cell(6, 2), cell(1, 4)], 299),
    "the last step, at an obstacle": (cell(3, 3), 0, [cell(4, 3), cell(2, 5), cell(6, 2), cell(1, 6)], 299),
    "obstacles that crowd": (cell(2, 2), 1, [cell(1, 1), cell(1, 2), cell(2, 1), cell(1, 3)], 50),
}


@pytest.mark.parametrize("action", [0, 1, 2], ids=["left", "right", "forward"])
@pytest.mark.parametrize("case", CASES)
def test_transitions_are_those_of_gridworld(page, case, action):
    agent, direction, obstacles, at = CASES[case]
    state = columns([{"agent": agent, "direction": direction, "obstacles": obstacles, "t": at}])
    assert_same_steps(page, Task(), state, action)


@pytest.mark.parametrize("at", [7, 49], ids=["", "last step"])
@pytest.mark.parametrize("case", DRAWN)
def test_drawn_transitions_are_those_of_gridworld(page, case, at):
    """The cases in which `gridworld` is held to minigrid, in a room so small that every outcome is drawn often."""
    action, *rows = DRAWN[case]
    ours, theirs = assert_same_steps(page, *drawn(rows, at), action)
    assert_same_distribution(ours, theirs)


def assert_same_steps(page, task, state, action, draws=4_000):
    """Steps from a state in the page and here have one distribution; returns all outcomes of both."""
    found = ask(
        page,
        """(task, state, action, draws) => {
          const random = pg.generator(action + 11), before = JSON.stringify(state);
          const all = Array.from({ length: draws }, () => pg.step(task, state, action, random));
          if (JSON.stringify(state) !== before) throw new Error("step changed its input");
          return all;
        }""",
        vars(task),
        plain(state, 0),
        action,
        draws,
    )
    got = [[row[key] for row in found] for key in ("reward", "terminated", "truncated")]
    many = GridState(*(np.repeat(value, draws, axis=0) for value in state))
    after, *fixed = step(task, many, np.full(draws, action), np.random.default_rng(3))
    mine = columns([row["state"] for row in found])
    # Each obstacle's way and what the agent got; four obstacles at once have more outcomes than draws.
    for k in range(task.n_obstacles):
        one = mine._replace(obstacles=mine.obstacles[:, [k]])
        other = after._replace(obstacles=after.obstacles[:, [k]])
        assert_same_distribution(signature(one, *got), signature(other, *fixed))
    assert_same_distribution(mine.obstacles[:, :2].astype(float), after.obstacles[:, :2].astype(float))
    return signature(mine, *got), signature(after, *fixed)


def test_every_transition_case_is_among_them():
    fronts = set()
    for agent, direction, obstacles, _ in CASES.values():
        state = GridState(
            *(np.array([v], np.uint8) for v in (agent, direction)),
            np.array([obstacles], np.uint8),
            np.zeros(1, np.int32),
        )
        fronts.add(int(observe(state)[0, 3, 5, 0]))
    assert fronts == {1, WALL, 6, GOAL}


def test_the_generator_is_uniform_and_can_go_on_from_its_state(page):
    numbers = np.array(
        page.evaluate("(() => { const r = pg.generator(3); return Array.from({ length: 100000 }, r); })()")
    )
    assert chisquare(np.bincount((numbers * 100).astype(int), minlength=100)).pvalue > 1e-4
    pairs = (numbers[::2] * 20).astype(int) * 20 + (numbers[1::2] * 20).astype(int)
    assert chisquare(np.bincount(pairs, minlength=400)).pvalue > 1e-4
    assert page.evaluate(
        "(() => { const a = pg.generator(5); a(); a(); const b = pg.generator(a.state); return a() === b(); })()"
    )


# What the page refuses


def test_weights_that_do_not_fit_get_a_sentence(page):
    entry = playground.data(reference())["models"][0]
    short = entry | {"weights": base64.b64encode(base64.b64decode(entry["weights"])[:-400]).decode()}
    nan = entry | {"weights": "AADAfwAA" + entry["weights"][8:]}  # 0x7fc00000 is NaN
    swapped = json.loads(json.dumps(entry))
    swapped["cfg"]["d_mlp"] = 128
    absent = json.loads(json.dumps(entry))
    absent["tensors"][5][0] = "W_V"
    longer = entry | {"cfg": entry["cfg"] | {"n_timesteps": 3}}
    said = [
        page.evaluate("(e) => { try { pg.loadModel(e, e.weights); } catch (x) { return x.message; } }", wrong)
        for wrong in (short, nan, swapped, absent, longer, entry | {"weights": "%%%"})
    ]
    wanted = [
        "do not fit",
        "not a finite number",
        "asks for (128,128)|asks for (128)",
        "is missing",
        "one timestep",
        "not base64",
    ]
    for sentence, words in zip(said, wanted, strict=True):
        assert sentence
        assert any(word in sentence for word in words.split("|")), (sentence, words)
        assert "the model" in sentence


def test_python_refuses_what_the_page_could_not_play():
    model = reference()
    with pytest.raises(ValueError, match="n_timesteps 3"):
        playground.show(DecisionTransformer(DTConfig(n_timesteps=3)))
    with pytest.raises(ValueError, match=r"task.max_steps is 400; 'the model' embeds timesteps up to 300"):
        playground.show(model, task=Task(max_steps=400))
    with pytest.raises(TypeError, match="str"):
        playground.show({"seed 0": "model"})
    with pytest.raises(ValueError, match="at least one"):
        playground.show({})
    with pytest.raises(ValueError, match="a preset must have name and scene"):
        playground.show(model, presets=[{"title": "x"}])
    state = reset(Task(), 1, np.random.default_rng(0))
    with pytest.raises(ValueError, match="rtg must be from −1 to 1, not nan"):
        playground.scene(state, rtg=float("nan"))
    on_goal = state._replace(agent=np.array([54], np.uint8))
    with pytest.raises(ValueError, match="agent must not be on the goal"):
        playground.scene(on_goal, rtg=0.9)
    with torch.no_grad():
        model.b_U[0] = float("nan")
    with pytest.raises(ValueError, match="the model' has numbers in b_U that are not finite"):
        playground.show(model)


def test_scenes_come_back_from_their_links(page):
    rng, task = np.random.default_rng(4), Task()
    states = reset(TASK, 50, rng)
    for row in range(50):
        more = {"model": "a", "random": int(rng.integers(2**32)), "acting": "sampled", "preference": "R-L"}
        more |= {
            "parts": {"L0H1": "zero", "L0N255": "patch"},
            "steer": {"direction": "goal", "at": "resid_mid", "amount": -1.5},
        }
        source = playground.scene(states, (row + 1) % 50, rtg=0.25, timestep=3)
        given = playground.scene(
            states, row, rtg=round(rng.uniform(-1, 1), 2), timestep=row, source=source, **more
        )
        back = page.evaluate(
            """([given, task, cfg]) => { const check = (raw) => pg.checkScene(raw, task, { a: cfg }, "a");
              const code = pg.encodeScene(pg.describeScene(task, check(given)));
              if (!/^[\\w.-]+$/.test(code)) throw new Error(code);
              return pg.describeScene(task, check(pg.decodeScene(code))); }""",
            [given, vars(task), vars(DTConfig())],
        )
        assert back == given
        check_scene("scene", given, task, {"a": DTConfig()})


RIGHT_SCENE = {"agent": [3, 3], "direction": "east", "obstacles": [[1, 1]], "t": 0, "rtg": 0.9}
WRONG_SCENES = {
    "agent": ({"agent": [0, 3]}, "agent is [0,3]; it must be a free cell"),
    "agent on the goal": ({"agent": [6, 6]}, "the goal aside"),
    "half a cell": ({"agent": [1.5, 3]}, "agent is [1.5,3]"),
    "obstacle on the agent": ({"obstacles": [[3, 3]]}, "differ"),
    "six obstacles": ({"obstacles": [[1, k] for k in range(1, 7)]}, "at most 5"),
    "direction": ({"direction": "up"}, 'direction is "up"; it must be one of east'),
    "rtg": ({"rtg": 2}, "rtg is 2; it must be a number from −1 to 1"),
    "rtg that is text": ({"rtg": "0.9"}, 'rtg is "0.9"'),
    "rtg that is none": ({"rtg": None}, "rtg is null; it must be a number from −1 to 1"),
    "rtg that is true": ({"rtg": True}, "rtg is true"),
    "no timestep": ({"t": None}, "timestep t is null"),
    "half a timestep": ({"t": 1.5}, "timestep t is 1.5"),
    "random numbers": ({"random": None}, "random is null"),
    "no acting": ({"acting": None}, "acting is null"),
    "a list of acting": ({"acting": ["greedy"]}, 'acting is ["greedy"]'),
    "no preference": ({"preference": None}, "preference is null"),
    "no model": ({"model": None}, "model is null"),
    "no parts": ({"parts": None}, "parts is null"),
    "parts that are a list": ({"parts": ["L0H1"]}, "parts is"),
    "a part that objects have": ({"parts": {"constructor": "zero"}}, "components of this model"),
    "no amount": ({"steer": {"direction": "F-R", "at": "resid_pre"}}, "amount of steering is"),
    "steering by name": ({"steer": "F-R"}, 'steer is "F-R"'),
    "a source that is false": ({"source": False}, "is false"),
    "a source without rtg": (
        {"source": {"agent": [1, 2], "direction": "east", "obstacles": [], "rtg": None}},
        "rtg is null",
    ),
    "timestep": ({"t": 300}, "whole number from 0 to 299"),
    "model": ({"model": "b"}, 'model is "b"'),
    "component": ({"parts": {"L0H2": "zero"}}, "L0H2"),
    "neuron": ({"parts": {"L0N256": "zero"}}, "L0N256"),
    "way": ({"parts": {"L0H1": "half"}}, "one of zero, mean, patch"),
    "nothing to patch from": ({"parts": {"L0H1": "patch"}}, "a remembered scene"),
    "steering": ({"steer": {"direction": "F-R", "at": "resid_pre", "amount": 1e9}}, "from −4 to 4"),
}


@pytest.mark.parametrize("wrong", WRONG_SCENES)
def test_wrong_scenes_get_a_sentence(page, wrong):
    changes, words = WRONG_SCENES[wrong]
    scene = RIGHT_SCENE | changes
    said = page.evaluate(
        """([scene, task, cfg]) => { try { pg.checkScene(scene, task, { a: cfg }, "a"); } catch (error) {
          return error instanceof pg.PlaygroundError ? error.message : "not ours: " + error.message; } }""",
        [scene, vars(Task()), vars(DTConfig())],
    )
    assert said
    assert words in said
    assert said.startswith("This scene cannot be shown: ")
    in_python = said.removeprefix("This scene cannot be shown: ").partition(" is ")[0]
    with pytest.raises(ValueError, match=f"preset 'x'.* cannot be shown: {in_python} is "):
        playground.data({"a": DecisionTransformer(DTConfig())}, presets=[{"name": "x", "scene": scene}])


NOT_FOR_JSON = {
    "rtg": ({"rtg": float("nan")}, "its rtg is nan; it must be a number from −1 to 1."),
    "timestep": ({"t": float("inf")}, "its timestep t is inf; it must be a whole number from 0 to 299."),
    "number of NumPy": ({"rtg": np.float32(0.5)}, "its rtg is "),
    "cell of NumPy": ({"agent": np.array([3, 3])}, "its agent is array"),
    "cells": ({"obstacles": [[1, float("nan")]]}, r"its obstacle is \[1, nan\]"),
    "amount": (
        {"steer": {"direction": "F-R", "at": "resid_pre", "amount": float("nan")}},
        "its amount of steering is nan; it must be a number from −4 to 4.",
    ),
    "unknown": ({"rtgs": float("nan")}, "its description's key is 'rtgs'; it must be one of model, agent, "),
}


@pytest.mark.parametrize("wrong", NOT_FOR_JSON)
def test_python_names_the_preset_or_scene_that_no_page_can_hold(wrong):
    changes, words = NOT_FOR_JSON[wrong]
    model, scene = DecisionTransformer(DTConfig()), RIGHT_SCENE | changes
    for named, given in (
        ("preset 'x'", {"presets": [{"name": "x", "scene": scene}]}),
        ("scene", {"scene": scene}),
        ("scene, in its source,", {"scene": RIGHT_SCENE | {"source": scene}}),
    ):
        with pytest.raises(ValueError, match=f"^{named} cannot be shown: {words}"):
            playground.show(model, **given)
    with pytest.raises(ValueError, match="preset 'x' must have a note of text, not nan"):
        playground.show(model, presets=[{"name": "x", "note": float("nan"), "scene": RIGHT_SCENE}])
    playground.show(model, presets=[{"name": "x", "scene": RIGHT_SCENE}], scene=RIGHT_SCENE)


def test_a_link_that_was_tampered_with_gets_a_sentence(page):
    code = page.evaluate("pg.encodeScene({ agent: [1, 1] })")
    for changed in (code[:-1] + "x", "A" + code[1:], code[4:], code + ".1", "", "€", code.replace(".", "")):
        said = page.evaluate(
            "(code) => { try { pg.decodeScene(code); } catch (error) { return error.message; } }", changed
        )
        assert said == (
            "This link's scene cannot be read: part of the link is missing or was changed. "
            "The first scene is shown instead."
        )
    assert page.evaluate("(code) => pg.decodeScene(code)", code) == {"agent": [1, 1]}
