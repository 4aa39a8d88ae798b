"""Claims and findings: the registry that the rules add themselves to, and a model's findings by all of them.

The rules were fixed before the replications were run. They stand in the modules beside this one, by what they are
about; adding a claim is adding a function under `@claim`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from dtbook.claims.evidence import Evidence
from dtbook.protocol import Bar

FIRST_EDITION, LOG_ODDS = "first edition", "log odds"
"""Kinds of rules that stand beside a claim's own: the one that it replaced, and the same asked of the log odds."""


class Finding(NamedTuple):
    """A claim's effect in a model, and whether it passes."""

    effect: float
    """In the claim's unit; NaN where it is a share of nothing, which passes nowhere."""
    passed: bool


A_SHARE_OF_NOTHING = Finding(np.nan, False)


Rule = Callable[[Evidence], Finding | None]
"""It returns None where the evidence is not there."""
Effect = Callable[[Evidence], float | Finding | None]
"""A rule as it is written: the effect, which must meet the claim's bar; or a finding, where more than that decides."""


@dataclass(frozen=True)
class Claim:
    """A claim of the post; numbers are the post's."""

    id: str
    group: str
    statement: str
    """In our words."""
    where: str
    """Figure, table or section of the post."""
    effect: str
    """What the effect is, and its unit."""
    rule: str
    """What passes."""
    none: float
    """The effect that speaks against the claim, which the interval must exclude: no effect; for a claim that something
    is small, its bar; for avoidance, chance (1/3)."""
    section: str
    """The page, and the heading on it, that shows it."""
    post: str = ""
    """The post's number, or "" where it prints none."""
    needs_head: bool = False
    """Is about head 1, and fails for a model without an obstacle head."""
    needs_learnt: bool = False
    """Is about the RTG embedding, and undecided for a model that has not learnt it (`Evidence.has_learnt_rtg`)."""
    same_sign: bool = False
    """Replications that pass on one side of zero count, those on the other side do not."""
    of: str = ""
    """The claim beside whose rule this one stands; "" for a claim's own rule."""
    kind: str = ""
    """What stands beside it: `FIRST_EDITION` or `LOG_ODDS`."""
    bar: Bar | None = None
    """What the effect must meet; None where a rule looks at more than one number."""


CLAIMS: dict[str, Claim] = {}
"""All claims, in order, and after each the rules that stand beside its own ("C08 log odds")."""
RULES: dict[str, Rule] = {}
"""The functions of those that a single model decides."""


def claim(
    id: str,
    section: str,
    *,
    bar: Bar | None = None,
    rule: str = "{bar}",
    none: float | None = None,
    **others: Any,
) -> Callable[[Effect], Effect]:
    """Add a claim, and the function that decides it; "{bar}" in the `rule` is the bar as text."""
    if none is None:
        none = bar.number if bar and bar.is_upper else 0.0
    CLAIMS[id] = Claim(id, section=section, rule=rule.format(bar=bar), none=none, bar=bar, **others)

    def add(effect: Effect) -> Effect:
        def decide_one(evidence: Evidence) -> Finding | None:
            try:
                result = effect(evidence)
            except ZeroDivisionError:
                return A_SHARE_OF_NOTHING
            found = (
                result
                if result is None or isinstance(result, Finding)
                else Finding(result, meets(id, result))
            )
            return found if found is None or np.isfinite(found.effect) else A_SHARE_OF_NOTHING

        RULES[id] = decide_one
        return effect

    return add


def beside(
    id: str,
    kind: str,
    *,
    bar: Bar | None = None,
    rule: str = "{bar}",
    none: float | None = None,
    **others: Any,
) -> Callable[[Effect], Effect]:
    """Add a rule that stands beside a claim's own, and says what in it is another: its bar, rule or effect."""
    own = CLAIMS[id]
    texts = {
        name: getattr(own, name) for name in ("group", "statement", "where", "post", "effect", "needs_head")
    }
    given = {**texts, **others, "of": id, "kind": kind}
    return claim(f"{id} {kind}", own.section, bar=bar, rule=rule, none=none, **given)


def own_rules() -> list[str]:
    """Return the claims by their own rules, without those that stand beside."""
    return [id for id, claim in CLAIMS.items() if not claim.of]


def meets(id: str, effect: float) -> bool:
    """Return whether an effect meets a claim's bar; raises ValueError for a claim that has none."""
    bar = CLAIMS[id].bar
    if bar is None:
        raise ValueError(f"{id} has no single bar; its rule is: {CLAIMS[id].rule}.")
    return bar.meets(effect)


def decide_claim(id: str, evidence: Evidence) -> tuple[float, float]:
    """Return a claim's effect in a model, and whether it passes: 1.0, 0.0, or NaN where it is not decided."""
    finding = RULES[id](evidence)
    if finding is None:
        return np.nan, np.nan
    if CLAIMS[id].needs_learnt and not evidence.has_learnt_rtg:
        return finding.effect, np.nan
    has_head = evidence.has_obstacle_head or not CLAIMS[id].needs_head
    return finding.effect, float(finding.passed and has_head)


def decide_claims(evidence: Evidence) -> pd.DataFrame:
    """Return a model's findings, one row a rule: `claim`, `effect`, `passed` (as 1.0, 0.0; NaN: not decided)."""
    rows = [(id, *decide_claim(id, evidence)) for id in RULES]
    return pd.DataFrame(rows, columns=["claim", "effect", "passed"])
