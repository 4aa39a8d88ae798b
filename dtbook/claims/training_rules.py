"""C25 to C28, about inductive bias and training: the experiments of chapters 11 and 12 decide them, not a model."""

from functools import partial

from dtbook.claims.rules import claim
from dtbook.protocol import HIGH, Bar

WITHOUT, MENDED = Bar("<", 0.5), Bar(">=", 0.9)
"""What C25 asks of greedy success at 0.9 without over-sampling, and with it."""

_trained = partial(claim, group="Inductive bias and training")

_trained(
    "C25",
    "11_encodings",
    statement="Indices made early models avoid the goal; over-sampling the last step mended it.",
    where="State embeddings",
    effect=f"greedy success at {HIGH} with − without over-sampling",
    rule=f"without {WITHOUT}, with {MENDED}",
)
_trained(
    "C26",
    "11_encodings",
    statement="A one-hot model would not need over-sampling.",
    where="State embeddings",
    effect=f"greedy success at {HIGH}, one-hot without over-sampling",
    bar=MENDED,
)
_trained(
    "C27",
    "12_why_it_comes_back",
    statement="One layer, width 128, two heads and one timestep are robustly good.",
    where="Training",
    effect=f"best mean return at {HIGH} in the sweep − this shape's",
    bar=Bar("<=", 0.05),
)
_trained(
    "C28",
    "12_why_it_comes_back",
    statement="Performance comes long before interpretability.",
    where="Discussion",
    effect="step at which the smallest faithful circuit and the share that a program explains have settled ÷ step at "
    f"which the return at {HIGH} has",
    bar=Bar(">=", 2.0),
    none=1.0,
)
