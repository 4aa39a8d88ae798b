"""The scorecard: every claim of the post, what each replication says to it, and the verdicts."""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import pandas as pd

from dtbook.analysis.stats import Interval, bootstrap_interval
from dtbook.artifacts.parameters import Whole, checked
from dtbook.claims.rules import CLAIMS

REPLICATED, MIXED, NOT_REPLICATED, UNDECIDED = "replicated", "mixed", "not replicated", "undecided"
UNINFORMATIVE = "uninformative"
"""At least half of the controls, which learnt nothing, pass the rule: it says nothing, whatever models do."""
VERDICTS = (REPLICATED, MIXED, NOT_REPLICATED, UNINFORMATIVE, UNDECIDED)


class Verdict(NamedTuple):
    """The verdict on a claim over replications."""

    verdict: str
    passed: int
    n: int
    effect: Interval
    """Mean over the replications, with its 95 % interval (`stats.bootstrap_interval`)."""


@checked
def decide(id: str, effects: np.ndarray, passed: np.ndarray, seed: Whole = 0) -> Verdict:
    """Return the verdict over replications, by the rule that was fixed for all claims.

    *Replicated* if at least 8 of 10 pass and the 95 % interval of the mean effect excludes `Claim.none`; *not
    replicated* if at most 2 of 10 do; else *mixed*. Replications that do not decide the claim (NaN) do not count; of a
    claim with `Claim.same_sign` those pass that lie on the side of zero where more do. *Undecided* where none decides
    it. Raises KeyError for an unknown claim, ValueError for a number that is not finite where it is decided.
    """
    claim, decided = CLAIMS[id], ~np.isnan(passed)
    wrong = decided & ~np.isfinite(effects) & (np.isinf(effects) | (passed > 0))
    if wrong.any():
        raise ValueError(
            f"effects of {id} hold {effects[wrong][0]} where it is decided; that must be a finite number."
        )
    n, sides = int(decided.sum()), (effects > 0, effects < 0) if claim.same_sign else (decided,)
    count = max(int(np.nansum(passed[side])) for side in sides)
    if not np.isfinite(effects[decided]).any():
        return Verdict(NOT_REPLICATED if n else UNDECIDED, count, n, Interval(np.nan, np.nan, np.nan))
    interval = bootstrap_interval(effects[decided], seed)
    if count <= 0.2 * n:
        return Verdict(NOT_REPLICATED, count, n, interval)
    replicated = count >= 0.8 * n and interval.excludes(claim.none)
    return Verdict(REPLICATED if replicated else MIXED, count, n, interval)


def scorecard(
    replications: pd.DataFrame,
    post: pd.DataFrame,
    controls: pd.DataFrame,
    experiments: pd.DataFrame | None = None,
    robustness: pd.DataFrame | None = None,
) -> pd.DataFrame:
    """Return one row a rule, in order: each claim's own, and after it those that stand beside it.

    `replications` has columns `model`, `claim`, `effect`, `passed` of `claims.decide_claims`, for models by the post's
    recipe, which decide; `robustness` the same for models by the book's; `post` for the post's own weights; `controls`
    for untrained models and models trained on shuffled actions; `experiments` for the runs that decide C25 to C28
    (`model` says which run).

    Columns: `claim`; `of` and `kind`, for a rule that stands beside a claim; `group`, `statement`, `post` (its number),
    `where`, `effect_is`, `rule`, `none`; the effect on the post's weights, `posts_weights`, and whether it passes,
    `posts_passed`; `passed` of `n` replications, their mean `effect`, its interval `low`, `high`, and the `verdict`;
    the same by the book's recipe, `book_passed` … `book_verdict`; `controls_passed` of `controls_n`, and `controls`,
    the two in words; `section`, the page that shows it.
    """
    decided = pd.concat([replications, experiments]) if experiments is not None else replications
    book = replications.iloc[:0] if robustness is None else robustness
    return pd.DataFrame([_row(id, decided, book, post, controls) for id in CLAIMS])


def _row(
    id: str, decided: pd.DataFrame, book: pd.DataFrame, post: pd.DataFrame, controls: pd.DataFrame
) -> Mapping[str, object]:
    claim = CLAIMS[id]
    theirs, control = (table[table["claim"] == id] for table in (post, controls))
    tried = control["passed"].dropna()
    passed, n = int(tried.sum()), len(tried)
    return {
        "claim": id,
        "of": claim.of,
        "kind": claim.kind,
        "group": claim.group,
        "statement": claim.statement,
        "post": claim.post,
        "where": claim.where,
        "effect_is": claim.effect,
        "rule": claim.rule,
        "none": claim.none,
        "posts_weights": float(theirs["effect"].iloc[0]) if len(theirs) else np.nan,
        "posts_passed": float(theirs["passed"].iloc[0]) if len(theirs) else np.nan,
        **_decided(id, decided, uninformative=n > 0 and 2 * passed >= n),
        **{f"book_{name}": value for name, value in _decided(id, book, n > 0 and 2 * passed >= n).items()},
        "controls_passed": passed,
        "controls_n": n,
        "controls": f"{passed} of {n}" if n else "",
        "section": f"notebooks/{claim.section}.ipynb",
    }


def _decided(id: str, findings: pd.DataFrame, uninformative: bool) -> dict[str, object]:
    ours = findings[findings["claim"] == id]
    effects, passed = (ours[name].to_numpy(dtype=np.float64) for name in ("effect", "passed"))
    verdict, count, n, interval = decide(id, effects, passed)
    word = UNINFORMATIVE if uninformative and verdict != UNDECIDED else verdict
    bounds = {"effect": interval.value, "low": interval.low, "high": interval.high}
    return {"passed": count, "n": n, **bounds, "verdict": word}
