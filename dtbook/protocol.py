"""What everything is decided by: the returns and timesteps that a model is run at, and the bars of the claims."""

import operator
from dataclasses import dataclass

HIGH = 0.9
"""The return that the post calls high."""
RTGS = (-1.0, 0.0, HIGH)
"""The three returns that the post's Table 1 asks for."""
TIMESTEPS = (0, 5, 10, 20, 40)
"""The timesteps that P(F | situation, R) is averaged over."""
TIMESTEP = 10
"""The timestep at which single runs are compared (the obstacle-head rule's)."""
LAST_TRAINED = 299
"""The last timestep of an episode, and so the last that a model is trained on."""
ACTING = ("greedy", "sampled")
"""Ways of acting: take the likeliest action, or draw one by the probabilities."""

AVOIDS, DOES_NOT = 0.05, 1 / 3
"""P(F) up to which a situation is avoided, and from which on it is not, which is chance; between: unclear."""
TABLE_1 = {
    -1.0: {"wall": True, "obstacle": False, "goal": True},
    0.0: {"wall": True, "obstacle": True, "goal": True},
    HIGH: {"wall": True, "obstacle": True, "goal": False},
}
"""The post's Table 1: what is avoided at which RTG."""

_COMPARISONS = {
    ">=": (operator.ge, "≥"),
    ">": (operator.gt, ">"),
    "<=": (operator.le, "≤"),
    "<": (operator.lt, "<"),
}


@dataclass(frozen=True)
class Bar:
    """A bar that a number must meet; as text it is what the scorecard prints: "≥ 0.3".

    Raises ValueError for a comparison that is not one of ">=", ">", "<=" and "<".
    """

    comparison: str
    number: float

    def __post_init__(self) -> None:
        if self.comparison not in _COMPARISONS:
            allowed = ", ".join(map(repr, _COMPARISONS))
            raise ValueError(f"comparison is {self.comparison!r}; it must be one of {allowed}.")

    def meets(self, value: float) -> bool:
        """Return whether a value meets the bar; one that is not a number does not."""
        return bool(_COMPARISONS[self.comparison][0](value, self.number))

    @property
    def is_upper(self) -> bool:
        """Return whether small numbers meet the bar."""
        return self.comparison.startswith("<")

    def __str__(self) -> str:
        return f"{_COMPARISONS[self.comparison][1]} {printed(self.number)}"


def printed(number: float) -> str:
    """Return a number as prose writes it, with a true minus and no needless digits: "−0.9", "1e−6", "1/3"."""
    if number == 1 / 3:
        return "1/3"
    return f"{number:g}".replace("e-0", "e-").replace("-", "−")
