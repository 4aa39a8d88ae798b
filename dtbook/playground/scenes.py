"""The checks of a playground's scene: those of scene.js, for what Python is given."""

import re
from collections.abc import Mapping
from reprlib import repr as shortened
from typing import Any

from dtbook.gridworld.rules import Task
from dtbook.model.config import DTConfig
from dtbook.protocol import ACTING

__all__ = ["COMPASS", "check_scene"]

COMPASS = ("east", "south", "west", "north")
PREFERENCES = ("F-R", "F-L", "R-L", "F", "R", "L")
DIRECTIONS = ("F-R", "F-L", "R-L", "rtg", "obstacle", "wall", "goal")
SITES = ("resid_pre", "resid_mid", "resid_post")
INSTEAD = ("zero", "mean", "patch")
FIELDS = (
    *("model", "agent", "direction", "obstacles", "t", "rtg"),
    *("random", "acting", "preference", "parts", "steer", "source"),
)


def check_scene(what: str, scene: Any, task: Task, models: Mapping[str, DTConfig]) -> None:
    """Raise ValueError unless the widget can show a scene: one sentence that names `what`, the field and its value.

    `models` are the configurations of those on offer, by name; the first is that of a scene that names none.
    """
    _Check(what, task).scene(scene, models)


class _Check:
    """The checks, each of which refuses or returns."""

    def __init__(self, what: str, task: Task) -> None:
        self.what, self.task = what, task

    def need(self, fine: bool, name: str, value: Any, allowed: str) -> None:
        if not fine:
            raise ValueError(
                f"{self.what} cannot be shown: its {name} is {shortened(value)}; it must be {allowed}."
            )

    def one_of(self, name: str, value: Any, allowed: tuple[str, ...]) -> None:
        self.need(isinstance(value, str) and value in allowed, name, value, f"one of {', '.join(allowed)}")

    def number(self, name: str, value: Any, low: int, high: int, integer: bool = False) -> None:
        plain = isinstance(value, int | float) and not isinstance(value, bool)
        fine = plain and low <= value <= high and (not integer or value == int(value))
        kind = "whole number" if integer else "number"
        self.need(fine, name, value, f"a {kind} from {str(low).replace('-', '−')} to {high}")

    def mapping(self, name: str, value: Any, holds: tuple[str, ...]) -> None:
        self.need(isinstance(value, dict), name, value, f"a dict of {', '.join(holds)}")
        for key in value:
            self.one_of(f"{name}'s key", key, holds)

    def cell(self, name: str, value: Any) -> None:
        last = self.task.size - 2
        pair = isinstance(value, list | tuple) and len(value) == 2 and all(type(k) is int for k in value)
        free = pair and all(1 <= k <= last for k in value) and tuple(value) != (last, last)
        self.need(free, name, value, f"a free cell [x, y] from [1, 1] to [{last}, {last}], the goal aside")

    def scene(self, scene: Any, models: Mapping[str, DTConfig]) -> None:
        self.mapping("description", scene, FIELDS)
        self.room(scene)
        self.number("timestep t", scene.get("t", 0), 0, self.task.max_steps - 1, integer=True)
        self.number("rtg", scene.get("rtg", 0.9), -1, 1)
        self.number("random", scene.get("random", 0), 0, 2**32 - 1, integer=True)
        model = scene.get("model", next(iter(models)))
        self.one_of("model", model, tuple(models))
        self.one_of("acting", scene.get("acting", "greedy"), ACTING)
        self.one_of("preference", scene.get("preference", "F-R"), PREFERENCES)
        source, steer = scene.get("source"), scene.get("steer")
        self.parts(scene.get("parts", {}), models[model], source is not None)
        if steer is not None:
            self.steer(steer)
        if source is not None:
            _Check(f"{self.what}, in its source,", self.task).scene(source, models)

    def room(self, scene: Mapping[str, Any]) -> None:
        most, obstacles = self.task.size // 2 + 1, scene.get("obstacles")
        few = isinstance(obstacles, list | tuple) and len(obstacles) <= most
        self.need(few, "obstacles", obstacles, f"a list of at most {most} cells")
        self.cell("agent", scene.get("agent"))
        for obstacle in obstacles or ():
            self.cell("obstacle", obstacle)
        taken = {tuple(cell) for cell in (scene["agent"], *scene["obstacles"])}
        apart = len(taken) == 1 + len(scene["obstacles"])
        self.need(apart, "obstacles", obstacles, "on cells that differ from each other and from the agent's")
        self.one_of("direction", scene.get("direction"), COMPASS)

    def parts(self, parts: Any, cfg: DTConfig, has_source: bool) -> None:
        self.need(isinstance(parts, dict), "parts", parts, "a dict of components to zero, mean or patch")
        ways = editable(cfg)
        for name, way in parts.items():
            neuron = re.fullmatch(r"L(\d+)N(\d+)", str(name), re.ASCII)
            is_neuron = neuron and int(neuron[1]) < cfg.n_layers and int(neuron[2]) < cfg.d_mlp
            allowed = INSTEAD if is_neuron else ways.get(name, ())
            self.need(bool(allowed), "parts", name, "components of this model, such as L0H1, L0 MLP or L0N17")
            self.one_of(f"edit of {name}", way, allowed)
            remembered = "a remembered scene, since something is patched from it"
            self.need(way != "patch" or has_source, "source", None, remembered)

    def steer(self, steer: Any) -> None:
        self.mapping("steer", steer, ("direction", "at", "amount"))
        self.one_of("direction of steering", steer.get("direction"), DIRECTIONS)
        self.one_of("place of steering", steer.get("at"), SITES)
        self.number("amount of steering", steer.get("amount"), -4, 4)


def editable(cfg: DTConfig) -> dict[str, tuple[str, ...]]:
    """Return the components of a model that can be edited, neurons aside, with the ways: `editable` of engine.js."""
    ways: dict[str, tuple[str, ...]] = dict.fromkeys(("rtg", "state", "time"), ("patch",))
    for layer in range(cfg.n_layers):
        for head in range(cfg.n_heads):
            name = f"L{layer}H{head}"
            ways |= {name: INSTEAD, f"{name} pattern": ("patch",), f"{name} V": ("patch",)}
        ways[f"L{layer} MLP"] = INSTEAD
    return ways
