"""The scorecard: every claim of the post, what each replication says to it, and the verdict."""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import pandas as pd

from dtbook.analysis.stats import Interval, bootstrap_interval
from dtbook.artifacts.parameters import Whole, checked
from dtbook.claims.rules import CLAIMS

REPLICATED, MIXED, NOT_REPLICATED, UNDECIDED = "replicated", "mixed", "not replicated", "undecided"


class Verdict(NamedTuple):
    """The verdict on a claim over replications."""

    verdict: str
    passed: int
    n: int
    effect: Interval
    """Mean over the replications, with its 95 % bootstrap interval."""


@checked
def decide(id: str, effects: np.ndarray, passed: np.ndarray, seed: Whole = 0) -> Verdict:
    """Return the verdict over replications, by the rule that was fixed for all claims.

    *Replicated* if at least 8 of 10 pass and the 95 % bootstrap interval of the mean effect excludes `Claim.none`; *not
    replicated* if at most 2 of 10 do; else *mixed*. Replications that do not decide the claim (NaN) do not count.
    Raises KeyError for an unknown claim, ValueError where no replication decides it, or by a number that is not finite.
    """
    against, decided = CLAIMS[id].none, ~np.isnan(passed)
    wrong = decided & ~np.isfinite(effects) & (np.isinf(effects) | (passed > 0))
    if wrong.any():
        raise ValueError(
            f"effects of {id} hold {effects[wrong][0]} where it is decided; that must be a finite number."
        )
    n, count = int(decided.sum()), int(np.nansum(passed))
    interval = bootstrap_interval(effects[decided], seed)
    if count <= 0.2 * n:
        return Verdict(NOT_REPLICATED, count, n, interval)
    replicated = count >= 0.8 * n and interval.excludes(against)
    return Verdict(REPLICATED if replicated else MIXED, count, n, interval)


def scorecard(
    replications: pd.DataFrame,
    post: pd.DataFrame,
    controls: pd.DataFrame,
    experiments: pd.DataFrame | None = None,
) -> pd.DataFrame:
    """Return one row a claim, in order.

    `replications` has columns `model`, `claim`, `effect`, `passed` of `claims.decide_claims`; `post` those of the
    post's own weights; `controls` those of untrained models and models trained on shuffled actions; `experiments` the
    runs that decide C25 to C28, in the same columns (`model` says which run).

    Columns: `claim`, `group`, `statement`, `post` (its number), `where`, `effect_is`, `rule`, `none`; the effect on the
    post's weights and whether it passes, `posts_weights` and `posts_passed`; `passed` of `n` replications, their mean
    `effect` with its interval `low`, `high`, and the `verdict`; `controls_passed` of `controls_n`, and `controls`, the
    two in words; `section`, the page that shows it.
    """
    decided = pd.concat([replications, experiments]) if experiments is not None else replications
    return pd.DataFrame([_row(id, decided, post, controls) for id in CLAIMS])


def _row(id: str, decided: pd.DataFrame, post: pd.DataFrame, controls: pd.DataFrame) -> Mapping[str, object]:
    claim = CLAIMS[id]
    ours, theirs, control = (table[table["claim"] == id] for table in (decided, post, controls))
    row = {
        "claim": id,
        "group": claim.group,
        "statement": claim.statement,
        "post": claim.post,
        "where": claim.where,
        "effect_is": claim.effect,
        "rule": claim.rule,
        "none": claim.none,
        "posts_weights": float(theirs["effect"].iloc[0]) if len(theirs) else np.nan,
        "posts_passed": float(theirs["passed"].iloc[0]) if len(theirs) else np.nan,
    }
    effects, passed = (ours[name].to_numpy(dtype=np.float64) for name in ("effect", "passed"))
    verdict = Verdict(UNDECIDED, 0, 0, Interval(np.nan, np.nan, np.nan))
    if not np.isnan(passed).all():
        verdict = decide(id, effects, passed)
    row |= {"passed": verdict.passed, "n": verdict.n, **_interval(verdict.effect), "verdict": verdict.verdict}
    tried = control["passed"].dropna()
    section = f"notebooks/{claim.section}.ipynb"
    controls_passed, controls_n = int(tried.sum()), len(tried)
    row |= {"controls_passed": controls_passed, "controls_n": controls_n, "section": section}
    return row | {"controls": f"{controls_passed} of {controls_n}" if controls_n else ""}


def _interval(interval: Interval) -> dict[str, float]:
    return {"effect": interval.value, "low": interval.low, "high": interval.high}
