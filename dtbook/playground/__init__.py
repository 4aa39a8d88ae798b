"""The in-browser playground: the game, the model and its circuit in one HTML output, without a kernel or a server.

`show(model)` at the end of a cell is all a notebook needs. What it shows is plain HTML: the data, the weights
(float32, base64) and one ES module in anywidget's shape, `export default { render({ model, el }) }`, bundled from the
scripts in this folder. The module alone is `module()`; it asks its host for `model.get("models")`, "task", "mean",
"presets" and "scene", which is what `data(...)` returns.

The scripts compute what `DecisionTransformer`, `analysis.attribution` and `analysis.interventions` compute, and play
by the rules of `gridworld.rules`; tests/test_playground.py holds them to it in a real browser.
"""

import base64
import hashlib
import html
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from functools import lru_cache
from importlib import resources
from typing import Any

import numpy as np
import torch

from dtbook.analysis.interventions import STATE_TOKENS, Site, mean_output
from dtbook.artifacts.parameters import check_finite
from dtbook.gridworld.env import ObservationSet, to_minigrid
from dtbook.gridworld.rules import GridState, Task, check_state, observe, reset
from dtbook.model.config import DTConfig
from dtbook.model.transformer import DecisionTransformer
from dtbook.playground.scenes import COMPASS, check_scene

__all__ = ["Playground", "data", "module", "scene", "show"]

SCRIPTS = ("engine.js", "game.js", "scene.js", "draw.js", "panels.js", "controls.js", "widget.js")
MEAN_RTGS, MEAN_TIMESTEP, MEAN_STATES = (-1.0, 0.0, 0.9), 10, 2048

Models = DecisionTransformer | Mapping[str, DecisionTransformer]


def _source(name: str) -> str:
    return resources.files(__package__).joinpath(name).read_text(encoding="utf-8")


@lru_cache
def module() -> str:
    """Return the widget as one ES module: the scripts in order, their imports from each other left out."""
    lines = [
        line for name in SCRIPTS for line in _source(name).splitlines() if not line.startswith("import ")
    ]
    return "\n".join([f"const CSS = {json.dumps(_source('playground.css'))};", *lines, ""])


def scene(
    state: GridState, index: int = 0, *, rtg: float, timestep: int = 0, size: int = 8, **more: Any
) -> dict[str, Any]:
    """Return state `index` of a batch as the plain data of a scene, for `presets` and for `show(scene=...)`.

    `more` may name "model", "acting" ("greedy" or "sampled"), "preference" ("F-R"), "parts" (component → "zero", "mean"
    or "patch"), "steer" and "source" (another scene to patch from); dtbook/playground/scene.js lists what they hold.
    Raises ValueError for a state the task does not have, the agent on the goal, or an RTG outside −1 to 1.
    """
    check_state(Task(size, state.obstacles.shape[1]), state)
    if not -1 <= rtg <= 1:
        raise ValueError(f"rtg must be from −1 to 1, not {rtg}.")
    agent = divmod(int(state.agent[index]), size)[::-1]
    if agent == (size - 2, size - 2):
        raise ValueError("agent must not be on the goal: there the episode is over.")
    obstacles = [list(divmod(cell, size))[::-1] for cell in state.obstacles[index].tolist()]
    where = {"agent": list(agent), "direction": COMPASS[int(state.direction[index])], "obstacles": obstacles}
    return where | {"t": int(timestep), "rtg": float(rtg)} | more


def data(
    models: Models,
    *,
    presets: Sequence[Mapping[str, Any]] = (),
    task: Task | None = None,
    scene: Mapping[str, Any] | str | None = None,
) -> dict[str, Any]:
    """Return all that the module asks its host for, as JSON-like values; arguments as for `show`."""
    named = {"the model": models} if isinstance(models, DecisionTransformer) else dict(models)
    if not named:
        raise ValueError("models must hold at least one model, not none.")
    first = next(iter(named.values()))
    task = task or Task(max_steps=first.cfg.max_steps)
    for name, model in named.items():
        _check_model(name, model, task)
    configs = {name: model.cfg for name, model in named.items()}
    for preset in presets:
        _check_preset(preset, task, configs)
    if scene is not None and not isinstance(scene, str):
        check_scene("scene", scene, task, configs)
    entries = [_entry(name, model, task) for name, model in named.items()]
    return {
        "models": entries,
        "task": asdict(task),
        "mean": _of_the_mean(task),
        "presets": [dict(preset) for preset in presets],
        "scene": scene,
    }


def _check_preset(preset: Mapping[str, Any], task: Task, configs: Mapping[str, DTConfig]) -> None:
    if not {"name", "scene"} <= set(preset) <= {"name", "scene", "group", "note"}:
        raise ValueError(
            f"a preset must have name and scene, may have group and note, but has {list(preset)}."
        )
    for key in ("name", "group", "note"):
        if not isinstance(preset.get(key, ""), str):
            raise ValueError(f"preset {preset['name']!r} must have a {key} of text, not {preset[key]!r}.")
    check_scene(f"preset {preset['name']!r}", preset["scene"], task, configs)


def _check_model(name: str, model: DecisionTransformer, task: Task) -> None:
    if not isinstance(model, DecisionTransformer):
        raise TypeError(
            f"models must be a DecisionTransformer or map names to some; {name!r} is {type(model).__name__}."
        )
    cfg = model.cfg
    if cfg.n_timesteps != 1 or cfg.n_layers < 1 or cfg.view_size != 7 or cfg.n_actions != 3:
        raise ValueError(
            f"{name!r} has n_timesteps {cfg.n_timesteps}, n_layers {cfg.n_layers}, view_size {cfg.view_size} and "
            f"n_actions {cfg.n_actions}; the playground plays models with 1, at least 1, 7 and 3."
        )
    if task.max_steps > cfg.max_steps:
        raise ValueError(
            f"task.max_steps is {task.max_steps}; {name!r} embeds timesteps up to {cfg.max_steps}."
        )
    check_finite(repr(name), model.state_dict())


def _entry(name: str, model: DecisionTransformer, task: Task) -> dict[str, Any]:
    """Return a model as the module reads it; `id` is the hash of its numbers, `weights` the numbers themselves."""
    tensors = {key: value.detach() for key, value in model.state_dict().items()} | means(model, task)
    numbers = np.concatenate([value.float().cpu().numpy().ravel() for value in tensors.values()]).astype(
        "<f4"
    )
    shapes = [[key, list(value.shape)] for key, value in tensors.items()]
    return {
        "name": name,
        "id": hashlib.sha256(numbers.tobytes()).hexdigest()[:16],
        "cfg": asdict(model.cfg),
        "tensors": shapes,
        "weights": base64.b64encode(numbers.tobytes()).decode(),
    }


def means(model: DecisionTransformer, task: Task) -> dict[str, torch.Tensor]:
    """Return what stands in for a component ablated to its mean: "mean.L.z", "mean.L.post" and "mean.L.mlp_out".

    Means over `MEAN_STATES` states of the task, each as likely as any, at `MEAN_TIMESTEP` and each of `MEAN_RTGS`.
    """
    states = reset(replace(task, random_start=True), MEAN_STATES, np.random.default_rng(0))
    seen = ObservationSet(observe(states, task.size), np.ones(MEAN_STATES, np.int64), states)
    timestep = min(MEAN_TIMESTEP, task.max_steps - 1)

    def mean(component: str | Site) -> torch.Tensor:
        return torch.stack([mean_output(model, component, seen, rtg, timestep) for rtg in MEAN_RTGS]).mean(0)

    stored = {}
    for layer in range(model.cfg.n_layers):
        heads = [mean(f"L{layer}H{head}") for head in range(model.cfg.n_heads)]
        stored[f"mean.{layer}.z"] = torch.stack(heads)
        stored[f"mean.{layer}.post"] = mean(Site(f"blocks.{layer}.mlp.hook_post", positions=STATE_TOKENS))
        stored[f"mean.{layer}.mlp_out"] = mean(f"L{layer} MLP")
    return stored


def _of_the_mean(task: Task) -> str:
    """Return in words what `means` are taken over, for the note beside the controls."""
    *rtgs, last = (f"{rtg:g}".replace("-", "−") for rtg in MEAN_RTGS)
    timestep = min(MEAN_TIMESTEP, task.max_steps - 1)
    return f"{MEAN_STATES:,} random states at timestep {timestep}, each at RTG {', '.join(rtgs)} and {last}"


def show(
    models: Models,
    *,
    presets: Sequence[Mapping[str, Any]] = (),
    task: Task | None = None,
    scene: Mapping[str, Any] | str | None = None,
) -> "Playground":
    """Return the playground of a model, or of several by name; the last line of a cell shows it.

    `presets` are scenes one click away: mappings with "name", "scene" (see `scene`) and, if wanted, "group" and "note".
    `task` is the game (default: 8×8 with four obstacles, as long as the first model's time embedding reaches).
    `scene` is what it begins with: a scene, or the text that the playground's copy button gives outside the book.

    Raises ValueError or TypeError in one sentence for a model of another shape (context of more than one timestep, no
    layer), weights that are not finite, a task that outlasts a model, and a preset or scene that cannot be shown.
    """
    return Playground(data(models, presets=presets, task=task, scene=scene))


class Playground:
    """The result of `show`: plain HTML that runs wherever HTML does. Two of the same models have the same bytes."""

    def __init__(self, contents: dict[str, Any]) -> None:
        """Hold the data of a playground, as `data` returns it."""
        self.data = contents

    def _repr_html_(self) -> str:
        first, *others = self.data["models"]
        inside = [first, *({**entry, "weights": None} for entry in others)]
        contents = {**self.data, "models": inside, "module": base64.b64encode(module().encode()).decode()}
        picture, words = _still(Task(**self.data["task"]))
        page = _PAGE.format(
            picture=picture,
            words=html.escape(words),
            wide=2080 + min(350, 75 * len(self.data["presets"])),
            narrow=3460 + min(540, 75 * len(self.data["presets"])),
            json=_script_safe(contents),
            boot=_source("boot.js"),
        )
        return page + "".join(_OUTSIDE.format(id=e["id"], weights=e["weights"]) for e in others)

    def __repr__(self) -> str:
        names = ", ".join(entry["name"] for entry in self.data["models"])
        return f"Playground of {names}: an HTML output, to be seen in a notebook or the book"


def _script_safe(contents: Mapping[str, Any]) -> str:
    """Return JSON in which nothing can end the script element that holds it; raise ValueError for NaN."""
    return json.dumps(contents, allow_nan=False, ensure_ascii=False).replace("<", "\\u003c")


def _still(task: Task) -> tuple[str, str]:
    """Return a picture of a first state and of the agent's view of it (PNG, base64), and the words beside it."""
    from dtbook.figures.display import picture

    state = reset(task, 1, np.random.default_rng(0))
    env: Any = to_minigrid(task, state, render_mode="rgb_array").unwrapped
    panels = env.get_full_render(True, 24), env.get_pov_render(24)
    return base64.b64encode(picture(*panels).data).decode(), (
        "A still picture of the game: on the left the room with the agent (red), obstacles (blue) and the goal "
        "(green), on the right what the agent sees. Playing it against the model, with its circuit beside it, needs "
        "JavaScript, which is not running here."
    )


# The box has its height before anything is in it, so that nothing moves when the module fills it.
_PAGE = """<div class="dtp-host">
<style>
.dtp-host {{ container-type: inline-size; }}
.dtp-stage {{ display: flow-root; min-height: {wide}px; }}
@container (max-width: 659px) {{ .dtp-stage {{ min-height: {narrow}px; }} }}
.dtp-loading {{ margin: 0; }}
@media (scripting: none) {{ .dtp-stage {{ min-height: 0; }} .dtp-loading {{ display: none; }} }}
</style>
<div class="dtp-stage"><p class="dtp-loading">The playground is loading.</p>
<noscript><img src="data:image/png;base64,{picture}" alt="{words}"><p>{words}</p></noscript></div>
<script type="application/json">{json}</script>
<script>{boot}</script>
</div>
"""

# The first such script and all after it stay out of the book's pages (book/_ext/running_book.py), which load these
# weights from files of their own when a reader asks for them.
_OUTSIDE = (
    '<script data-outside-the-book>(globalThis.dtbookPlayground ??= {{}})["{id}"] = "{weights}";</script>\n'
)
