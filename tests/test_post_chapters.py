"""Chapters that show the post's weights, executed without them: every number of the post's is that of `data/post`.

The expected numbers are taken from the shipped tables here, and from the scorecard's findings where there are some.
`test_elsewhere.py` holds each chapter to them, executed under the parameters that are shipped.
"""

from functools import cache
from pathlib import Path

import nbformat
import numpy as np
import pandas as pd
import pytest
from safetensors.numpy import load_file

from dtbook.artifacts import ArtifactStore, post_weights
from dtbook.gridworld import FRONT
from dtbook.pages.notebooks import run_notebook, small_parameters
from dtbook.pipeline.sweep import glued
from dtbook.protocol import AVOIDS, DOES_NOT, HIGH, TABLE_1

pytestmark = pytest.mark.slow  # notebooks

ROOT = Path(__file__).parent.parent
TAGS = {-1.0: "low", 0.0: "zero", HIGH: "high"}
CELLS = {"empty": (1, 0), "wall": (2, 5), "obstacle": (6, 2), "goal": (8, 1)}  # minigrid's object and colour
ABLATIONS = {
    "C08": ("goal from the top", -1.0, "L0H0"),
    "C09": ("obstacle", HIGH, "L0H1"),
    "C10": ("goal from the left", -1.0, "L0 MLP"),
}
WORDS = {True: "supported", False: "refuted"}
SAID = "The post's weights cannot be had here: shown as measured before.\n"


@cache
def shipped(name):
    artifact, _, table = f"post/{name}.parquet".partition("circuit/")
    path = ArtifactStore().path(f"{artifact}circuit") / table if table else ArtifactStore().path(artifact)
    return pd.read_parquet(path)


def findings(*claims):
    """The scorecard's effects and words for these claims."""
    table = shipped("claims").set_index("claim").loc[list(claims)]
    return {id: (row["effect"], WORDS[bool(row["passed"])]) for id, row in table.iterrows()}


def forward(situation, rtg, ablated="none", how="zero", column="forward"):
    """Mean over the timesteps."""
    table, how = shipped("situations"), "none" if ablated == "none" else how
    at = (table["situation"] == situation) & (table["rtg"] == rtg)
    return table[at & (table["ablated"] == ablated) & (table["how"] == how)][column].mean()


def table_1():
    """Chapter 5's first table."""
    table = shipped("situations").query("ablated == 'none'")
    by_time = table.pivot_table(index=["situation", "rtg"], columns="timestep", values="forward")
    spread = by_time.max(axis=1) - by_time.min(axis=1)
    found = {"H2": WORDS[bool(spread.max() <= 0.1)], "spread": spread.max()}
    found["spread_at"] = "{} at RTG {:g}".format(*spread.idxmax()).replace("-", "−")
    for rtg, tag in TAGS.items():
        for thing, avoided in TABLE_1[rtg].items():
            p = forward(thing, rtg)
            kept = p <= AVOIDS if avoided else p >= DOES_NOT
            word = "unclear" if AVOIDS < p < DOES_NOT else WORDS[bool(kept)]
            found |= {
                f"{thing}_{tag}": p,
                f"{thing}_{tag}_word": word,
                f"{thing}_{tag}_t": spread[thing, rtg],
            }
        found |= {f"{pose}_{tag}": forward(f"goal from the {pose}", rtg) for pose in ("top", "left")}
    found["supported"] = int(shipped("claims").query("claim.str.fullmatch('C05[a-i]')")["passed"].sum())
    return found


def never():
    """Chapter 5's certificates."""
    exceptions, every, found = shipped("exceptions"), shipped("over_time"), {}
    counts = [
        ((exceptions["situation"] == thing) & (exceptions["rtg"] == rtg)).sum()
        for rtg, row in TABLE_1.items()
        for thing, avoided in row.items()
        if avoided
    ]
    found |= {"never": counts.count(0), "H1": WORDS[not any(counts)]}
    for rtg, tag in TAGS.items():
        one = every[(every["situation"] == "obstacle") & (every["rtg"] == rtg)]
        early, late = one[one["timestep"] <= 100], one[one["timestep"] > 100]
        found |= {f"worst_{tag}": early["high"].max(), f"worst_{tag}_late": late["high"].max()}
        found |= {f"worst_{tag}_t": early.set_index("timestep")["high"].idxmax()}
        found |= {f"worst_{tag}_share": early["over"].max(), f"worst_{tag}_n": early["n_over"].max()}
        found[f"worst_{tag}_any"] = (
            (exceptions["situation"] == "obstacle") & (exceptions["rtg"] == rtg)
        ).sum()
    goal = every[(every["situation"] == "goal") & (every["rtg"] == -1)].set_index("timestep")["forward"]
    early = goal[goal.index <= 100].max()
    return found | {"goal_late_first": goal[0], "goal_late_early": early, "goal_late_last": goal.max()}


def turns():
    """Chapter 5's correlations of left and right."""
    r = {}
    for of, m in shipped("turns").groupby("of")[["left", "right", "left²", "right²", "left·right"]]:
        m = m.mean()
        variances = m["left²"] - m["left"] ** 2, m["right²"] - m["right"] ** 2
        r[of] = (m["left·right"] - m["left"] * m["right"]) / np.sqrt(np.prod(variances))
    return {"r": r["logits"], "r_centred": r["centred"], "C06": WORDS[bool(r["logits"] >= 0.8)]}


def along_walls():
    """Chapter 5: which way it turns, at 0.9 unless the name says otherwise."""
    table = shipped("along_walls").set_index(["situation", "wall at", "rtg"])
    bias = (table["right"] - table["left"]) / (table["right"] + table["left"])
    found = {f"bias_{tag}": bias["empty", "any", rtg] for rtg, tag in TAGS.items()}
    found |= {"bias_wall": bias["wall", "any", HIGH], "bias_corner": bias["wall", "left", HIGH]}
    found |= {f"on_{hand}": table["forward"]["empty", hand, HIGH] for hand in ("left", "right")}
    along = found["on_left"] > found["on_right"] and found["bias_corner"] > 0
    return found | {"along": "yes" if along else "no", "M3": findings("M3")["M3"][1]}


def ablations():
    """Chapter 6: its claims, contributions and ways to ablate."""
    found, decided = {}, findings(*(f"C{n:02}" for n in range(7, 14)))
    for id, (effect, word) in decided.items():
        found |= {id: effect, f"{id}_word": word}
    for id, (situation, rtg, removed) in ABLATIONS.items():
        found |= {f"{id}_before": forward(situation, rtg), f"{id}_after": forward(situation, rtg, removed)}
    found["supported"] = sum(word == "supported" for _, word in decided.values())
    found |= {f"goal_ahead_{n[-2:]}": forward("goal", HIGH, n) for n in ("none", "L0H0")}
    columns = {"state": "state", "MLP": "L0 MLP", "H0": "L0H0"}
    left = {name: forward("obstacle", HIGH, "L0H1", column=of) for name, of in columns.items()}
    left |= {"left": sum(left.values()), "H1": forward("obstacle", HIGH, column="L0H1")}
    left["MLP_before"] = forward("obstacle", HIGH, column="L0 MLP")
    found |= {f"obstacle_{name}": value for name, value in left.items()}
    found["left_MLP"] = forward("goal from the left", -1.0, column="L0 MLP")
    ways = {how: {id: rise(id, how) for id in ABLATIONS} for how in ("zero", "mean", "feature mean")}
    flips = [id for id in ("C09", "C08", "C10") if (ways["mean"][id] >= 0.3) != (ways["zero"][id] >= 0.3)]
    found |= {"H1": WORDS[not flips], "flips": ", ".join(flips) or "none"}
    found["feature_apart"] = max(abs(ways["feature mean"][id] - ways["zero"][id]) for id in ABLATIONS)
    for how in ("zero", "mean", "resample", "feature mean"):
        found[how.split()[0]] = forward("obstacle", HIGH, "L0H1", how)
    return found


def rise(id, how="zero"):
    situation, rtg, removed = ABLATIONS[id]
    return forward(situation, rtg, removed, how) - forward(situation, rtg)


def frames():
    """Chapter 6: single frames, what means keep, directions."""
    found = {}
    for id, rows in shipped("frames").groupby("claim"):
        found |= {f"{id}_{name}": rows[name].iloc[0] for name in ("over", "below")}
    means, along = shipped("means"), shipped("directions").iloc[0]
    found |= {"kept_max": means["feature mean"].max(), "similar_max": means["data mean"].max()}
    return found | {"along": along["along"], "random": along["random"], "random_p": along["p"]}


def neurons():
    """Chapter 6, neuron by neuron."""
    found = {}
    for id, (situation, rtg, _) in ABLATIONS.items():
        table = shipped("neurons").query("situation == @situation and rtg == @rtg")
        by_way = {how: part.set_index("neuron") for how, part in table.groupby("how")}
        zero = by_way["zero"]
        found |= {f"{id}_neuron": zero["rise"].idxmax(), f"{id}_neuron_rise": zero["rise"].max()}
        whole = forward(situation, rtg, "L0 MLP") - forward(situation, rtg)
        found |= {f"{id}_mlp": whole, f"{id}_active": (zero["active"] > 0.01).sum()}
    found |= {f"C10_neuron_{how}": part["rise"].max() for how, part in by_way.items()}
    return found | {"H3": WORDS[bool(zero["rise"].max() < whole / 2)]}


def play():
    """Chapter 6, ablation in play."""
    at = shipped("ablated_play").query("acting == 'sampled' and rtg == 0.9").set_index("ablated")
    short = {"none": "ne", "L0H0": "H0", "L0H1": "H1", "L0 MLP": "LP"}
    found = {f"deaths_{key}": at.loc[name, "obstacle"] for name, key in short.items()}
    found |= {f"goal_{key}": at.loc[name, "goal"] for name, key in short.items()}
    deaths = at.loc["L0H1", "obstacle"] - at.loc["none", "obstacle"]
    return found | {"length_H1": at.loc["L0H1", "length"], "H2": WORDS[bool(deaths >= 0.1)]}


def circuit():
    """Chapter 8: effects, weights by cell, attention, neurons, claims."""
    effects, maps = shipped("circuit/effects").set_index("situation"), circuit_maps()
    row, f_r = effects.loc["obstacle"], np.array([0, -1, 1])
    found = {"score": row["head"] / row["whole"], "whole": row["whole"], "head": row["head"], "n": row["n"]}
    found |= {"qk": row["QK"], "ov": row["OV"], "qk_share": row["QK"] / row["head"]}
    found |= {"ov_share": row["OV"] / row["head"], "direct": row["direct F-R"], "mlp": row["MLP F-R"]}
    found |= {"pattern": row["pattern"], "pattern_empty": row["pattern empty"]}
    found |= {"amplified": row["MLP F-R"] / row["direct F-R"]}
    found["way"] = "what it finds where it looks"  # OV above QK
    found["pattern_word"] = "lowers"  # by more than 0.02
    front, to_actions = maps["QK"][:, *FRONT], maps["OV"][:, *FRONT]
    found |= {"qk_object": front[0], "qk_colour": front[1], "qk_bias": maps["QK bias"][0]}
    found |= {"ov_object": to_actions[0][2], "ov_colour": to_actions[1][2]}
    return found | {f"ov_{thing}": np.array(code) @ to_actions[:2] @ f_r for thing, code in CELLS.items()}


def circuit_maps():
    return load_file(ArtifactStore().path("post/circuit") / "maps.safetensors")


def attention():
    """Chapter 8: where head 1 looks, at 0.9."""
    table = shipped("circuit/attention").query("head == 1 and rtg == 0.9")
    at = table.groupby("situation")["mean"].mean()
    found = {f"at_{thing}": at[thing] for thing in CELLS}
    return found | {f"fall_{thing}": at["empty"] - at[thing] for thing in ("wall", "obstacle", "goal")}


def amplifiers():
    """Chapter 8: the share of the MLP's change that eight neurons carry, in three orders, and the verdicts."""
    table = shipped("circuit/neurons")
    change, rng = table["change"].to_numpy(), np.random.default_rng(0)

    def share(order):
        return change[order[:8]].sum() / change.sum()

    by = {"few": table["written"].abs(), "both": (table["written"] * table["output"]).abs()}
    found = {key: share(np.argsort(-values.to_numpy(), kind="stable")) for key, values in by.items()}
    found["chance"] = np.mean([share(rng.permutation(len(change))) for _ in range(20)])
    decided = findings("C20", "C21a", "C21b", "C21c", "C22", "C23", "C24")
    found |= {"aligned": by["few"].max(), "H1": WORDS[bool(found["few"] >= 0.5)]}
    found |= {id: word for id, (_, word) in decided.items()} | {"C22_effect": decided["C22"][0]}
    return found | {"supported": sum(word == "supported" for _, word in decided.values()), "undecided": 0}


def token():
    """Chapter 8: the parts of the RTG token through head 1; of its embedding, the circuit's own map."""
    table = shipped("writes").set_index(["head", "token", "what"])
    parts = (table["forward"] - table["right"]).loc[1].loc["RTG"]
    found = {f"token_{part}": value for part, value in parts.items()}
    assert found["token_embedding"] == pytest.approx(HIGH * circuit_maps()["OV rtg"] @ [0, -1, 1], rel=1e-4)
    return found | {"token": findings("C23")["C23"][0]}


def head_0():
    """Chapter 8: where head 0 looks, what it writes, and its share of two effects, head 1 beside it."""
    table = shipped("writes").set_index(["head", "token", "what"]).loc[(0, "RTG", "embedding")]
    found, causal = {"h0_rtg": table["forward"] - table["right"]}, shipped("causal")
    names = {"empty": "empty", "top": "goal from the top", "obstacle": "obstacle"}
    for name, situation in names.items():
        for rtg, tag in TAGS.items():
            found[f"h0_{name}_{tag}"] = forward(situation, rtg, column="attention L0H0")
            found[f"h0_{name}_{tag}_writes"] = forward(situation, rtg, column="L0H0")
    for name, rtg in (("obstacle", HIGH), ("top", -1.0)):
        here = causal[(causal["situation"] == names[name]) & (causal["rtg"] == rtg)]
        here = here[(here["change"] == "front cell → empty") & (here["direction"] == "into the clean run")]
        here = here[here["token"] == "state"].set_index(["kind", "site"])
        for head in (0, 1):
            for key, site in {"share": "", "qk": " pattern", "ov": " V"}.items():
                row = here.loc[("activation", f"L0H{head}{site}")]
                found[f"{name}_{head}_{key}"] = row["logits"] / row["whole_logits"]
            without = here.loc[("ablation", f"L0H{head}")]
            found[f"{name}_{head}_p"] = without["clean"]
            found[f"{name}_{head}_without"] = without["clean"] + without["probability"]
    return found


CHAPTERS = {
    "05_behaviours": (table_1, never, turns, along_walls),
    "06_ablations": (ablations, frames, neurons, play),
    "08_the_obstacle_circuit": (circuit, attention, amplifiers, token, head_0),
}


def execute(name, tmp_path, **parameters):
    notebook = ROOT / "notebooks" / f"{name}.ipynb"
    run_notebook(notebook, tmp_path / notebook.name, small_parameters(notebook) | parameters, "inputs")
    return nbformat.read(tmp_path / notebook.name, as_version=4)


def of_the_post(executed):
    return {key.removeprefix("posts_"): v for key, v in glued(executed).items() if key.startswith("posts_")}


def printed(executed):
    outputs = [output for cell in executed.cells for output in cell.get("outputs", [])]
    return "".join(output["text"] for output in outputs if output.get("name") == "stdout")


def figures(executed):
    """What the cells with a caption show, by the figure's name."""
    with_caption = {
        cell.metadata["mystnb"]["figure"]["name"]: cell.outputs
        for cell in executed.cells
        if "figure" in cell.metadata.get("mystnb", {})
    }
    return {
        name: [sorted(output.get("data", {})) for output in shown] for name, shown in with_caption.items()
    }


def assert_numbers_are_shipped(executed, name):
    expected = {}
    for part in CHAPTERS[name]:
        assert not expected.keys() & part().keys()
        expected |= part()
    found = of_the_post(executed)
    assert sorted(found) == sorted(expected)
    assert found == {
        key: v if isinstance(v, str) else pytest.approx(v, rel=1e-5) for key, v in expected.items()
    }


@pytest.fixture
def without(tmp_path, monkeypatch):
    monkeypatch.delenv(post_weights.COPY, raising=False)
    monkeypatch.setenv(post_weights.REFUSED, "They cannot be had.")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))  # where nothing was fetched


def assert_shown_as_shipped(executed, name):
    """A chapter executed without the weights; `test_elsewhere.py` executes each of them."""
    assert_numbers_are_shipped(executed, name)
    assert all(shown and shown[0] for shown in figures(executed).values()), "no panel is left out"
    assert printed(executed) == (SAID if name == "06_ablations" else "")


OTHERWISE = {
    "05_behaviours": ({"preference": "F-L"}, "fig-scan-post"),
    "06_ablations": ({"timestep": 11}, "fig-before-after-post"),
    "08_the_obstacle_circuit": ({"rtg": 0.5}, "fig-qk-post"),
}


@pytest.mark.parametrize("name", CHAPTERS)
def test_without_the_weights_a_panel_that_is_not_shipped_is_left_out_and_says_why(name, without, tmp_path):
    parameters, panel = OTHERWISE[name]
    executed = execute(name, tmp_path, **parameters)
    (cell,) = (
        c for c in executed.cells if c.metadata.get("mystnb", {}).get("figure", {}).get("name") == panel
    )
    said = "The post's model is left out here: with these parameters it is not shipped, and its weights cannot be had."
    assert [output.get("text") for output in cell.outputs] == [f"{said}\n"]
    whole = {key for part in CHAPTERS[name] for key in part()}
    assert of_the_post(executed).keys() < whole or name == "05_behaviours", "scans glue nothing"


@pytest.mark.post_weights
def test_with_the_weights_the_same_numbers_are_measured_again(tmp_path):
    executed = execute("06_ablations", tmp_path)
    assert_numbers_are_shipped(executed, "06_ablations")
    assert printed(executed) == ""
    assert executed.metadata["dtbook"]["post_weights"] == post_weights.POST_MODEL_SHA256
