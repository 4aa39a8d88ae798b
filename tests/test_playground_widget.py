"""The playground as a reader meets it, in a real browser: played, edited, intervened in, by pointer and by keys."""

import json
import re

import numpy as np
import pytest
import torch
from browser import served, visit

from dtbook import playground
from dtbook.analysis.attribution import contrast
from dtbook.analysis.interventions import ablate, constant, patch
from dtbook.analysis.weights import ov_circuit
from dtbook.artifacts import ArtifactStore
from dtbook.gridworld import GridState, Task, observe, reset
from dtbook.model import DecisionTransformer, DTConfig

OUTSIDE = "<script data-outside-the-book>"
STATE = GridState(  # at (3, 3) facing east, an obstacle in front
    np.array([27], np.uint8),
    np.array([0], np.uint8),
    np.array([[28, 42, 22, 49]], np.uint8),
    np.zeros(1, np.int32),
)
SCENE = playground.scene(STATE, rtg=0.9, timestep=10)
PRESET = {"name": "No head 1", "note": "As in Fig. 9.", "scene": SCENE | {"parts": {"L0H1": "zero"}}}
PAGE = """<!doctype html><html lang="en" data-theme="{theme}" data-content_root="./"><meta charset="utf-8">
<title>p</title><meta name="viewport" content="width=device-width"><link rel="icon" href="data:,">
<body style="margin: 16px; background: {paper}">{html}<p id="below">What follows.</p>"""


@pytest.fixture(scope="module")
def models():
    first = DecisionTransformer.from_pretrained(ArtifactStore().path("seed_10/model"))
    return {"seed 0": first, "another": DecisionTransformer(DTConfig(), seed=3).eval()}


@pytest.fixture(scope="module")
def pages(tmp_path_factory, models):
    """A folder of pages with a playground, as in the book: the second model's weights lie in a file."""
    folder = tmp_path_factory.mktemp("pages")
    html = playground.show(models, presets=[PRESET], scene=SCENE)._repr_html_()
    inside, _, outside = html.partition(OUTSIDE)
    weights = outside.removesuffix("</script>\n")
    (folder / "_static").mkdir()
    (folder / "_static" / f"playground-{re.search('[0-9a-f]{16}', weights)[0]}.js").write_text(weights)
    for theme, paper in (("light", "#ffffff"), ("dark", "#14181e")):
        (folder / f"{theme}.html").write_text(PAGE.format(theme=theme, paper=paper, html=inside))
    twice = PAGE.format(theme="light", paper="#ffffff", html=inside + inside + '<div id="other"></div>')
    (folder / "twice.html").write_text(twice)
    light = (folder / "light.html").read_text()
    (folder / "lost.html").write_text(light.replace('data-content_root="./"', 'data-content_root="gone/"'))
    (folder / "short.html").write_text(re.sub(r'"weights": "[^"]{400}', '"weights": "', light, count=1))
    return folder


@pytest.fixture(scope="module")
def address(pages):
    with served(pages) as url:
        yield url


@pytest.fixture
def page(browser, address):
    with visit(browser, address, "light.html") as opened:
        opened.page.wait_for_selector(".dtp-room svg")
        yield opened.page
        assert opened.problems() == []


def message(page):
    return page.locator(".dtp-message").inner_text()


def scene_of(page):
    return page.evaluate(
        "(() => { const w = document.querySelector('.dtp-stage').playground; return w.scene; })()"
    )


def logits_of(page):
    return page.evaluate("document.querySelector('.dtp-stage').playground.result.logits")


def settle(page):
    """Wait until what is out of sight is redrawn as well."""
    page.wait_for_function("document.querySelector('.dtp-stage').playground.behind.size === 0")


def inputs(state=STATE, rtg=0.9, timestep=10):
    return torch.from_numpy(observe(state))[:, None], torch.tensor([[rtg]]), torch.tensor([[timestep]])


@torch.no_grad()
def logits(model, *arguments):
    return model(*(arguments or inputs()))[0, 0].numpy()


def close(found, expected):
    np.testing.assert_allclose(found, expected, atol=1e-4, rtol=0)


def test_it_begins_with_the_scene_and_the_models_numbers(page, models):
    close(logits_of(page), logits(models["seed 0"]))
    shown = page.locator(".dtp-probabilities tbody tr .dtp-number:nth-child(3)").all_inner_texts()
    assert shown[3:] == [f"{x:.2f}".replace("-", "−") for x in logits(models["seed 0"])]
    assert "facing east, obstacle in front" in message(page)


def test_a_whole_episode_by_keys_by_the_model_and_back(page):
    page.get_by_role("button", name="New game").click()
    first = scene_of(page)["state"]
    page.locator(".dtp-room").focus()
    page.keyboard.press("ArrowRight")
    assert message(page).startswith("You turned right. Step 1.")
    page.keyboard.press("m")
    assert message(page).startswith("The model ")
    page.keyboard.press("r")  # it plays on by itself
    page.wait_for_function("/[Rr]eturn (−1|0)/.test(document.querySelector('.dtp-message').textContent)")
    assert page.get_by_role("button", name="Forward").is_disabled()
    page.keyboard.press("ArrowUp")
    assert "The episode is over" in message(page)
    while page.get_by_role("button", name="Undo", exact=True).is_enabled():
        page.keyboard.press("u")
        if scene_of(page)["state"] == first:
            break
    assert scene_of(page)["state"] == first
    page.get_by_label("Seed").fill("-3")
    page.get_by_role("button", name="New game").click()
    assert "Seed must be a whole number from 0" in message(page)


def test_the_same_seed_is_the_same_game(page):
    def play():
        page.get_by_label("Seed").fill("12")
        page.get_by_role("button", name="New game").click()
        page.get_by_text("a sampled action").click()
        for _ in range(4):
            page.get_by_role("button", name="Model step").click()
        return scene_of(page)["state"]

    assert play() == play()


def test_each_intervention_is_pytorchs(page, models):
    model = models["seed 0"]
    for component in ("L0H0", "L0H1", "L0 MLP"):
        page.get_by_label(component, exact=True).select_option("zero")
        with ablate(model, component):
            close(logits_of(page), logits(model))
        page.get_by_label(component, exact=True).select_option("")
    settle(page)
    name = page.locator(".dtp-neurons .dtp-link").first.inner_text()
    page.get_by_label(f"ablate {name}").check()
    with ablate(model, name):
        close(logits_of(page), logits(model))
    page.get_by_role("button", name="Undo all interventions").click()
    close(logits_of(page), logits(model))
    means = playground.means(model, Task())
    page.get_by_label("L0H1", exact=True).select_option("mean")
    page.get_by_label("Neuron", exact=True).fill("L0N7")
    page.get_by_label("becomes").select_option("mean")
    with (
        ablate(model, "L0H1", to=constant(means["mean.0.z"][1])),
        ablate(model, "L0N7", to=constant(means["mean.0.post"][7])),
    ):
        close(logits_of(page), logits(model))
    page.get_by_label("Neuron", exact=True).fill("L0N256")
    page.get_by_label("becomes").select_option("zero")
    assert message(page) == "This model has no neuron “L0N256”: they run from L0N0 to L0N255."
    page.get_by_role("button", name="Undo all interventions").click()
    page.get_by_role("button", name="Remember this scene").click()
    page.locator(".dtp-room").focus()
    page.keyboard.press("e")
    page.keyboard.press("ArrowRight")
    page.keyboard.press(" ")  # the obstacle in front goes
    page.keyboard.press("Escape")
    cleared = STATE._replace(obstacles=STATE.obstacles[:, 1:])
    close(logits_of(page), logits(model, *inputs(cleared)))
    page.get_by_label("L0H1", exact=True).select_option("patch")
    _, source = model.run_with_cache(*inputs())
    with patch(model, source, "L0H1"):
        close(logits_of(page), logits(model, *inputs(cleared)))
    page.get_by_role("button", name="Undo all interventions").click()
    page.get_by_label("Steer along").select_option("obstacle")  # once: as if the obstacle were back
    close(logits_of(page), logits(model))
    settle(page)
    assert page.locator(".dtp-contributions tr", has_text="steering").is_visible()


def test_rtg_timestep_and_preference_change_at_once(page, models):
    page.get_by_label("RTG asked for").fill("-1")
    page.get_by_label("Timestep").fill("285")
    close(logits_of(page), logits(models["seed 0"], *inputs(rtg=-1.0, timestep=285)))
    page.get_by_label("Preference", exact=True).select_option("R-L")
    last = page.locator(".dtp-sum .dtp-number").first.inner_text()
    left, right, _ = logits(models["seed 0"], *inputs(rtg=-1.0, timestep=285))
    assert last == f"{right - left:.2f}".replace("-", "−")


def test_what_is_in_sight_is_redrawn_first_and_the_rest_follows(page, models):
    page.set_viewport_size({"width": 1280, "height": 700})
    page.wait_for_function("document.querySelector('.dtp-stage').playground.away.size > 0")
    label = page.locator(".dtp-scan svg").get_attribute("aria-label")
    at_once = page.evaluate(
        """() => {
          document.querySelector(".dtp-stage").playground.handlers().t(285);
          return [".dtp-scan svg", ".dtp-probabilities tr:nth-child(3) .dtp-number"].map((name) => {
            const shown = document.querySelector(name);
            return shown.getAttribute("aria-label") ?? shown.textContent;
          });
        }"""
    )
    asked = [torch.tensor(logits(models["seed 0"], *inputs(rtg=r, timestep=285))) for r in (-1.0, 0.0, 0.9)]
    forward = [100 * each.softmax(0)[2].item() for each in asked]
    assert at_once[0] == label
    assert float(at_once[1].removesuffix(" %")) == pytest.approx(forward[2], abs=0.51)
    settle(page)
    found = re.findall(r"([\d.]+) % at", page.locator(".dtp-scan svg").get_attribute("aria-label"))
    assert [float(number) for number in found] == pytest.approx(forward, abs=0.51)


def middle_of(page, x, y):
    """Where cell (x, y) of the board is, once that has been scrolled into sight."""
    page.evaluate("document.querySelector('.dtp-room').scrollIntoView({ block: 'center' })")
    box = page.locator(".dtp-room svg").bounding_box()
    return box["x"] + (x + 0.5) * box["width"] / 8, box["y"] + (y + 0.5) * box["height"] / 8


def test_clicking_edits_the_room(page):
    def click(x, y):
        page.mouse.click(*middle_of(page, x, y))

    click(3, 3)
    assert scene_of(page)["state"]["direction"] == 1
    click(4, 3)
    assert scene_of(page)["state"]["obstacles"] == [42, 22, 49]
    click(1, 1)
    assert scene_of(page)["state"]["obstacles"] == [42, 22, 49, 9]
    page.get_by_text("moves the agent").click()
    click(5, 5)  # 5 + 8·5
    assert scene_of(page)["state"]["agent"] == 45
    click(0, 3)
    assert "stay where they are" in message(page)


def press(page, name):
    page.get_by_role("button", name=name, exact=True).click()


def slide(page, name, *keys):
    page.get_by_role("slider", name=name, exact=True).focus()
    for key in keys:
        page.keyboard.press(key)


def begins(page, words):
    page.wait_for_function(
        "(words) => document.querySelector('.dtp-message').textContent.startsWith(words)", arg=words
    )


def choose(page, label, value):
    page.get_by_label(label, exact=True).select_option(value)


def choose_another(page):
    choose(page, "Model", "another")
    begins(page, "This is another")


CHANGES = {
    "a step": lambda page: press(page, "Turn left"),
    "a step of the model": lambda page: press(page, "Model step"),
    "an edit": lambda page: page.mouse.click(*middle_of(page, 1, 1)),
    "RTG, in three moves": lambda page: slide(page, "RTG asked for", *3 * ["ArrowLeft"]),
    "the timestep, in two moves": lambda page: slide(page, "Timestep", "ArrowRight", "End"),
    "how it acts": lambda page: page.get_by_text("a sampled action").click(),
    "the preference": lambda page: choose(page, "Preference", "R-L"),
    "a new game": lambda page: press(page, "New game"),
    "the remembered scene": lambda page: press(page, "Remember this scene"),
    "an ablation": lambda page: choose(page, "L0H0", "zero"),
    "steering": lambda page: choose(page, "Steer along", "goal"),
    "how far, in two moves": lambda page: slide(page, "times", "ArrowRight", "ArrowRight"),
    "the model": choose_another,
    "a preset": lambda page: press(page, PRESET["name"]) or begins(page, PRESET["name"]),
    "the end": lambda page: press(page, "↑ Forward"),
}


def test_undo_brings_back_the_scene_before_each_change(page):
    before = []
    for change in CHANGES.values():
        before.append((scene_of(page), logits_of(page)))
        change(page)
        assert scene_of(page) != before[-1][0]
    assert "It walked into obstacle" in scene_of(page)["over"]
    for name, (scene, logits) in zip(reversed(CHANGES), reversed(before), strict=True):
        press(page, "Undo")
        assert scene_of(page) == scene, name
        assert logits_of(page) == logits, name
    assert page.get_by_role("button", name="Undo", exact=True).is_disabled()
    assert page.get_by_label("Model", exact=True).input_value() == "seed 0"
    for _ in range(2):  # after an undo, a slider's next move is a change of its own
        slide(page, "RTG asked for", "ArrowLeft")
        press(page, "Undo")
    assert scene_of(page) == before[0][0]


def test_on_the_goal_the_episode_stays_over(page):
    page.evaluate(
        """() => { const w = document.querySelector(".dtp-stage").playground;
          w.change({ state: { agent: 53, direction: 0, obstacles: [9], t: 10 } }); }"""
    )
    press(page, "↑ Forward")
    assert "The goal is reached at step 11" in message(page)
    ended = scene_of(page)
    for change in (
        lambda: slide(page, "Timestep", "ArrowRight"),
        lambda: page.mouse.click(*middle_of(page, 6, 6)),
        lambda: page.mouse.click(*middle_of(page, 1, 1)),
        lambda: press(page, "Remember this scene"),
    ):
        page.evaluate("document.querySelector('.dtp-stage').playground.say('')")
        change()
        assert message(page) == ("The agent is on the goal, where no scene begins: undo the last step first.")
        assert scene_of(page) == ended
    assert page.get_by_role("slider", name="Timestep").input_value() == "11"
    assert page.get_by_role("button", name="Forward").is_disabled()
    page.get_by_text("moves the agent").click()
    page.mouse.click(*middle_of(page, 2, 2))
    assert page.get_by_role("button", name="Forward").is_enabled()


def test_sliders_and_choices_are_announced_when_they_rest(page):
    page.evaluate(
        """() => {
          globalThis.said = [];
          const line = document.querySelector("[role=status]");
          new MutationObserver(() => said.push(line.textContent)).observe(line, { childList: true });
        }"""
    )

    def said(words):
        page.wait_for_function("said.length > 0")
        page.wait_for_timeout(600)
        probabilities = page.locator(".dtp-probabilities tbody tr .dtp-number:nth-child(3)").all_inner_texts()
        left, right, forward = probabilities[:3]
        assert page.evaluate("said.splice(0)") == [
            f"{words} The model: left {left}, right {right}, forward {forward}."
        ]

    drag = """(input) => { for (const value of [0.5, 0.2, -0.1, -0.4]) {
      input.value = value; input.dispatchEvent(new Event("input")); } }"""
    page.get_by_role("slider", name="RTG asked for").evaluate(drag)
    said("RTG −0.40.")
    slide(page, "Timestep", "ArrowRight")
    said("Timestep 11.")
    page.get_by_text("a sampled action").click()
    said("It now takes a sampled action.")


def test_the_mean_says_what_it_is_of(page):
    ways = page.get_by_label("L0H1", exact=True).locator("option").all_inner_texts()
    assert ways == ["as it is", "zero", "data-set mean", "from remembered"]
    note = "The data-set mean is that over 2,048 random states at timestep 10, each at RTG −1, 0 and 0.9."
    assert page.get_by_text(note).is_visible()


def captions(page):
    settle(page)
    return page.locator(".dtp-maps figcaption:visible").all_inner_texts()


@torch.no_grad()
def test_maps_of_this_scene_stand_side_by_side_before_and_after(page, models):
    model = models["seed 0"]
    towards = (model.W_U @ contrast("F-R"))[:, None]
    weight = ov_circuit(model, 0, 1, model.W_E_state, towards).weight[:, 0].reshape(3, 49)
    cleared = STATE._replace(obstacles=STATE.obstacles[:, 1:])

    def expected(name, channel, rtg, state=STATE, seen=STATE):
        """The caption of a channel: what head 1, as it looks in one scene, would bring of the cells of another."""
        share = model.run_with_cache(*inputs(state, rtg))[1]["pattern", 0][0, 1, 1, 1].item()
        cells = torch.from_numpy(observe(seen)).reshape(49, 3)[:, channel] * weight[channel] * share
        return f"{name}: front {cells[26]:.2f}, sum {cells.sum():.2f}".replace("-", "−").replace(
            "−0.00", "0.00"
        )

    def pair(before, after):
        return [
            expected(name if where is before else "after", k, **where)
            for k, name in enumerate(("object", "colour", "state"))
            for where in (before, after)
        ]

    press(page, "Remember this scene")  # at RTG 0.9
    page.get_by_label("RTG asked for").fill("-0.2")
    choose(page, "Map", "L0H1 OV")
    page.get_by_text("weights × what is there").click()
    now = {"rtg": -0.2}
    assert captions(page) == pair(now, now)[::2]
    choose(page, "L0H1 pattern", "patch")
    assert captions(page) == pair(now, {"rtg": 0.9})
    label = page.locator(".dtp-maps svg:visible").nth(1).get_attribute("aria-label")
    assert label.startswith("object channel, after: front cell ")
    choose(page, "L0H1", "zero")
    assert captions(page)[1::2] == 3 * ["after: front 0.00, sum 0.00"]
    assert captions(page)[::2] == pair(now, now)[::2]
    page.get_by_text("weights", exact=True).click()
    assert len(captions(page)) == 3
    page.get_by_text("weights × what is there").click()
    press(page, "Undo all interventions")
    page.mouse.click(*middle_of(page, 4, 3))  # the obstacle in front goes, and stands in the remembered scene
    away = now | {"state": cleared, "seen": cleared}
    choose(page, "state embedding", "patch")
    assert captions(page) == pair(away, now)
    choose(page, "state embedding", "")
    choose(page, "L0H1", "patch")
    assert captions(page) == pair(away, {"rtg": 0.9})
    choose(page, "L0H1", "")
    choose(page, "L0H1 values", "patch")
    assert captions(page) == pair(away, away | {"seen": STATE})


def test_fingers_play_and_edit(browser, address):
    context = browser.new_context(has_touch=True, viewport={"width": 360, "height": 740})
    page = context.new_page()
    page.goto(address + "light.html")
    page.wait_for_selector(".dtp-room svg")
    page.get_by_role("button", name="Forward").tap()
    assert message(page).startswith("You went forward. It walked into obstacle")
    page.get_by_role("button", name="Undo", exact=True).tap()
    page.get_by_role("button", name="Edit with keys").tap()
    page.touchscreen.tap(*middle_of(page, 4, 3))
    assert message(page) == "The obstacle at column 4, row 3 is gone."
    assert scene_of(page)["state"]["obstacles"] == [42, 22, 49]
    page.touchscreen.tap(*middle_of(page, 3, 3))
    assert scene_of(page)["state"]["direction"] == 1
    context.close()


def test_presets_models_and_links(page, browser, address, models):
    page.get_by_role("button", name="No head 1").click()
    page.wait_for_function("document.querySelector('.dtp-message').textContent.startsWith('No head 1')")
    with ablate(models["seed 0"], "L0H1"):
        close(logits_of(page), logits(models["seed 0"]))
    page.get_by_label("Model", exact=True).select_option("another")  # its weights are in a file
    page.wait_for_function("document.querySelector('.dtp-message').textContent.startsWith('This is another')")
    with ablate(models["another"], "L0H1"):
        close(logits_of(page), logits(models["another"]))
    page.get_by_role("button", name="Copy link").click()
    page.wait_for_function("document.querySelector('.dtp-stage').playground.copied")
    link = page.evaluate("document.querySelector('.dtp-stage').playground.copied")
    with visit(browser, address, link.removeprefix(address)) as again:
        again.page.wait_for_selector(".dtp-room svg")
        assert scene_of(again.page) == scene_of(page)
        assert again.problems() == []
    with visit(browser, address, link.removeprefix(address).replace("?scene=e", "?scene=f")) as changed:
        changed.page.wait_for_selector(".dtp-room svg")
        assert message(changed.page).startswith("This link's scene cannot be read")


ALONE = """async () => { // a third, of a module of its own, as a widget's host loads it
  const data = JSON.parse(document.querySelector("script[type='application/json']").textContent);
  const address = URL.createObjectURL(new Blob([atob(data.module)], { type: "text/javascript" }));
  const { render } = await import(address), model = { get: (name) => data[name], on() {} };
  await render({ model, el: document.querySelector("#other") });
}"""
IDS = """[...document.querySelectorAll("[id]")].map((e) => e.id)"""
GROUPS = """[...document.querySelectorAll(".dtp")].map((e) =>
  [...new Set([...e.querySelectorAll("input[type=radio]")].map((radio) => radio.name))])"""
ALL_LOGITS = "[...document.querySelectorAll('.dtp-stage')].map((e) => [...e.playground.result.logits])"


def test_several_in_one_page_keep_apart(browser, address, models):
    with visit(browser, address, "twice.html") as opened:
        page = opened.page
        page.wait_for_function("document.querySelectorAll('.dtp-stage .dtp-room svg').length === 2")
        page.evaluate(ALONE)
        assert page.locator(".dtp-room svg").count() == 3
        assert re.findall(r"<[^>]*\bid=", playground.show(models)._repr_html_().partition("<script")[0]) == []
        ids, groups = page.evaluate(IDS), page.evaluate(GROUPS)
        assert len(ids) == len(set(ids)), sorted(ids)
        assert {"playground", "playground-2"} < set(ids)
        assert [len(names) for names in groups] == [3, 3, 3]
        assert len({name for names in groups for name in names}) == 9
        assert page.evaluate(UNNAMED) == []
        second = page.locator("#playground-2")
        second.get_by_label("L0H1", exact=True).select_option("zero")
        second.get_by_text("a sampled action").click()
        checked = page.locator(".dtp").get_by_label("the likeliest action")
        assert [radio.is_checked() for radio in checked.all()] == [True, False, True]
        first, changed = page.evaluate(ALL_LOGITS)
        close(first, logits(models["seed 0"]))
        with ablate(models["seed 0"], "L0H1"):
            close(changed, logits(models["seed 0"]))
        second.get_by_role("button", name="Copy link").click()
        page.wait_for_function("document.querySelectorAll('.dtp-stage')[1].playground.copied")
        link = page.evaluate("document.querySelectorAll('.dtp-stage')[1].playground.copied")
        assert opened.problems() == []
    for place, expected in (("playground-2", (first, changed)), ("below", (changed, first))):
        elsewhere = link.removeprefix(address).replace("#playground-2", f"#{place}")
        with visit(browser, address, elsewhere) as again:
            again.page.wait_for_function("document.querySelectorAll('.dtp-stage .dtp-room svg').length === 2")
            for found, wanted in zip(again.page.evaluate(ALL_LOGITS), expected, strict=True):
                close(found, wanted)


def test_faults_are_sentences(browser, address):
    with visit(browser, address, "short.html") as opened:
        opened.page.wait_for_selector(".dtp-message")
        assert re.match("The weights of seed 0 (do not fit|are damaged)", message(opened.page))
    with visit(browser, address, "lost.html") as opened:
        opened.page.wait_for_selector(".dtp-room svg")
        opened.page.get_by_label("Model", exact=True).select_option("another")
        opened.page.wait_for_function(
            "document.querySelector('.dtp-message').textContent.includes('could not be loaded')"
        )
        assert opened.page.get_by_label("Model", exact=True).input_value() == "seed 0"


CONTRAST = """() => {
  const number = (text) => {
    const c = text.match(/[\\d.]+/g).map(Number);
    return { rgb: c.slice(0, 3), a: c[3] ?? 1 };
  };
  const light = (rgb) => rgb.map((v) => v / 255).map((v) => (v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4))
    .reduce((sum, v, k) => sum + v * [0.2126, 0.7152, 0.0722][k], 0);
  const behind = (e) => {
    const c = e ? number(getComputedStyle(e).backgroundColor) : { rgb: [255, 255, 255], a: 1 };
    return c.a ? c.rgb : behind(e.parentElement);
  };
  const bad = [];
  for (const e of document.querySelectorAll(".dtp *")) {
    const own = [...e.childNodes].some((n) => n.nodeType === 3 && n.textContent.trim());
    if (!own || e.closest("style, option, :disabled") || !e.getClientRects().length) continue;
    const style = getComputedStyle(e), svg = e.namespaceURI.endsWith("svg");
    const [a, b] = [light(number(svg ? style.fill : style.color).rgb), light(behind(e))];
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    if (ratio < 4.5) bad.push([e.textContent, ratio]);
  }
  return bad;
}"""
UNNAMED = """() => [...document.querySelectorAll(".dtp :is(button, input, select, [tabindex], svg[role=img])")]
  .filter((e) => !(e.getAttribute("aria-label") || e.labels?.length || e.textContent.trim())).map((e) => e.outerHTML)"""


@pytest.mark.parametrize(("theme", "width"), [("light", 1280), ("dark", 1280), ("light", 360), ("dark", 360)])
def test_it_is_readable_named_and_still(browser, address, tmp_path, theme, width):
    with visit(browser, address, f"{theme}.html", theme, width) as opened:
        page = opened.page
        page.wait_for_selector(".dtp-room svg")
        assert page.evaluate("shift") == 0
        assert page.evaluate("document.scrollingElement.scrollWidth - innerWidth") <= 0
        page.get_by_label("L0H1", exact=True).select_option("zero")
        below = page.evaluate("document.querySelector('#below').offsetTop")
        page.get_by_label("Steer along").select_option("F-R")
        settle(page)
        assert page.evaluate("document.querySelector('#below').offsetTop") == below
        assert page.evaluate(CONTRAST) == []
        assert page.evaluate(UNNAMED) == []
        page.get_by_text("weights × what is there").click()
        settle(page)
        assert page.locator(".dtp-maps figure:visible").count() == 6
        height, reserved = page.evaluate(
            """() => [document.querySelector(".dtp").offsetHeight,
              parseFloat(getComputedStyle(document.querySelector(".dtp-stage")).minHeight)]"""
        )
        assert 0.9 * reserved < height <= reserved
        assert page.evaluate("document.querySelector('#below').offsetTop") == below
        assert len(page.screenshot(path=tmp_path / f"{theme}-{width}.png", full_page=True)) > 50_000
        assert opened.problems() == []


CONTROLS = """[...document.querySelectorAll(".dtp :is(button, input, select, [tabindex='0'])")]
  .filter((e) => !e.disabled && (e.type !== "radio" || e.checked))"""  # of radio buttons, the tab key stops at one


def test_every_control_is_reached_by_the_tab_key_in_its_order(page):
    wanted = page.evaluate(f"{CONTROLS}.length")
    page.evaluate("scrollTo(0, 0); document.activeElement.blur()")
    reached = []
    for _ in range(wanted + 3):  # what scrolls is reached too
        page.keyboard.press("Tab")
        reached.append(page.evaluate(f"{CONTROLS}.indexOf(document.activeElement)"))
    assert [k for k in reached if k >= 0][:wanted] == list(range(wanted))


def test_reduced_motion_is_honoured(browser, address):
    context = browser.new_context(reduced_motion="reduce")
    page = context.new_page()
    page.goto(address + "light.html")
    page.wait_for_selector(".dtp-room svg")
    moving = """[...document.querySelectorAll(".dtp *")]
      .filter((e) => parseFloat(getComputedStyle(e).transitionDuration) > 0).length"""
    page.locator(".dtp-room").focus()
    page.keyboard.press("ArrowRight")
    page.get_by_label("L0H1", exact=True).select_option("zero")
    assert page.evaluate(moving) == 0
    assert page.evaluate("document.getAnimations().length") == 0
    context.close()


def test_without_javascript_there_is_a_picture_and_a_sentence(browser, address):
    with visit(browser, address, "light.html", scripts=False) as opened:
        assert opened.page.locator("noscript img, .dtp-stage img").first.is_visible()
        assert "needs JavaScript" in opened.page.locator(".dtp-stage").inner_text()
        assert not opened.page.locator(".dtp-loading").is_visible()


COLAB = """<!doctype html><html lang="en"><title>c</title><link rel="icon" href="data:,">
<iframe sandbox="allow-scripts allow-same-origin allow-forms allow-popups" src="{outputs}colab_frame.html" width="900"
height="2400"></iframe>"""
COLAB_FRAME = """<!doctype html><html lang="en" theme="dark"><title>f</title><link rel="icon" href="data:,">
<body><div id="output-area"></div><script type="module">
const area = document.querySelector("#output-area");
area.innerHTML = await (await fetch("colab_output.html")).text(); // which runs no script: each is put in again
for (const old of area.querySelectorAll("script")) {
  const script = document.createElement("script");
  for (const { name, value } of old.attributes) script.setAttribute(name, value);
  script.textContent = old.textContent;
  old.replaceWith(script);
}
</script>"""


def test_it_plays_in_a_frame_as_colabs(browser, pages, address, models):
    """Colab shows an output in a sandboxed frame of another origin, whose page puts it in with its scripts."""
    (pages / "colab_output.html").write_text(
        playground.show({"mine": models["another"]}, scene=SCENE)._repr_html_()
    )
    (pages / "colab_frame.html").write_text(COLAB_FRAME)
    with served(pages) as outputs:  # another port: another origin
        (pages / "colab.html").write_text(COLAB.format(outputs=outputs))
        context = browser.new_context(viewport={"width": 1000, "height": 800})
        page, errors = context.new_page(), []
        page.on("pageerror", lambda error: errors.append(error))
        page.goto(address + "colab.html")
        frame = page.frames[1]
        frame.wait_for_selector(".dtp-room svg")
        close(logits_of(frame), logits(models["another"]))
        assert (
            frame.evaluate("getComputedStyle(document.querySelector('.dtp')).color") == "rgb(206, 214, 221)"
        )
        frame.get_by_label("L0H1", exact=True).select_option("zero")
        with ablate(models["another"], "L0H1"):
            close(logits_of(frame), logits(models["another"]))
        frame.locator(".dtp-room").focus()
        page.keyboard.press("ArrowRight")
        assert message(frame).startswith("You turned right. Step 11.")
        frame.get_by_role("button", name="Copy link").click()
        frame.wait_for_function("document.querySelector('.dtp-stage').playground.copied")
        assert re.match("(This scene is copied as text|Copying is not allowed here)", message(frame))
        assert errors == []
        context.close()


def test_it_opens_from_a_file(browser, pages):
    with visit(browser, pages.as_uri() + "/", "light.html") as opened:
        opened.page.wait_for_selector(".dtp-room svg")
        opened.page.get_by_label("Model", exact=True).select_option("another")
        opened.page.wait_for_function(
            "document.querySelector('.dtp-message').textContent.startsWith('This is another')"
        )
        assert opened.problems() == []


def test_the_room_is_drawn_as_minigrid_draws_it(page):
    from dtbook.gridworld import to_minigrid

    state = reset(Task(random_start=True), 1, np.random.default_rng(8))
    env = to_minigrid(Task(random_start=True), state, render_mode="rgb_array").unwrapped
    where = [int(state.agent[0]), int(state.direction[0]), state.obstacles[0].tolist()]
    pixels = page.evaluate(
        """async ([agent, direction, obstacles]) => {
          const w = document.querySelector(".dtp-stage").playground;
          w.change({ state: { agent, direction, obstacles, t: 0 } });
          const draw = async (svg, side) => {
            const size = `<svg xmlns="http://www.w3.org/2000/svg" width="${side}" height="${side}"`;
            const text = svg.outerHTML.replace("<svg", size);
            const image = new Image();
            image.src = "data:image/svg+xml;base64," + btoa(text);
            await image.decode();
            const context = new OffscreenCanvas(side, side).getContext("2d");
            context.drawImage(image, 0, 0);
            return Array.from(context.getImageData(0, 0, side, side).data);
          };
          const [room, view] = [".dtp-room svg", ".dtp-view svg"].map((name) => document.querySelector(name));
          return [await draw(room, 256), await draw(view, 224)];
        }""",
        where,
    )
    for found, picture in zip(pixels, (env.get_full_render(True, 32), env.get_pov_render(32)), strict=True):
        rgb = np.array(found, dtype=float).reshape(*picture.shape[:2], 4)[..., :3]
        assert np.abs(rgb - picture).mean() < 3  # of 255: edges are smoothed in another way
        assert np.abs(rgb - picture)[16::32, 16::32].max() <= 2, "the middle of every tile has its colour"


def test_a_notebook_holds_the_same_bytes_twice(models):
    html = [playground.show({"seed 0": models["seed 0"]})._repr_html_() for _ in range(2)]
    assert html[0] == html[1]
    assert len(html[0]) < 1.3e6
    assert (
        json.loads(re.search(r'<script type="application/json">(.*?)</script>', html[0], re.DOTALL)[1])[
            "scene"
        ]
        is None
    )
