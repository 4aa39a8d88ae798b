"""C14 to C24: what the embeddings say, and the circuit of head 1."""

from functools import partial

import numpy as np

from dtbook.analysis.behaviour import clockwise_bias
from dtbook.analysis.weights import CELLS
from dtbook.claims.evidence import Evidence
from dtbook.claims.rules import FIRST_EDITION, Effect, Finding, beside, claim, decide_claim
from dtbook.protocol import HIGH, LAST_TRAINED, Bar

# Embeddings

_embeds = partial(claim, section="07_embeddings", group="Embeddings")
_REPELS, _DRAWS = 1.0, 0.5
_STANDS_OUT = Bar(">=", 3.0)
_BOTH, _ALONE, _BIASED = Bar(">=", 0.8), Bar("<=", 0.5), Bar(">=", 0.1)

_embeds(
    "C14",
    statement="The RTG embedding points along forward − right.",
    post="1.13",
    where="RTG",
    effect="RTG embedding · (F−R) (logits per unit of return)",
    bar=Bar(">=", 0.5),
    needs_learnt=True,
)(lambda e: e.preference_of_rtg("F-R"))
beside("C14", FIRST_EDITION, bar=Bar(">=", 0.5))(lambda e: e.preference_of_rtg("F-R"))
_embeds(
    "C15",
    statement="The RTG embedding hardly tells right from left.",
    post="−0.16",
    where="RTG",
    effect="|RTG embedding · (R−L)| − 0.3 × max(|RTG embedding · (F−R)|, 0.1) (logits per unit of return)",
    bar=Bar("<=", 0.0),
    needs_learnt=True,
)(lambda e: abs(e.preference_of_rtg("R-L")) - 0.3 * max(abs(e.preference_of_rtg("F-R")), 0.1))
beside(
    "C15",
    FIRST_EDITION,
    effect="|RTG embedding · (R−L)| ÷ |RTG embedding · (F−R)|",
    bar=Bar("<", 0.3),
)(lambda e: abs(e.preference_of_rtg("R-L")) / abs(e.preference_of_rtg("F-R")))


def _time_pushes_forward(last: int) -> Effect:
    def rule(e: Evidence) -> Finding:
        line = e.time_slope(last)
        return Finding(last * line.slope, line.low > 0)

    return rule


_SLOPE = "95 % interval of the slope above 0"
_embeds(
    "C16",
    statement="The time embedding's F−R rises slightly with the timestep.",
    post="slight",
    where="Fig. 11",
    effect=f"least-squares rise over t = 0 … {LAST_TRAINED}, all that is trained on (logits)",
    rule=_SLOPE,
)(_time_pushes_forward(LAST_TRAINED))
beside("C16", FIRST_EDITION, effect="least-squares rise over t = 0 … 50 (logits)", rule=_SLOPE)(
    _time_pushes_forward(50)
)


@_embeds(
    "C17",
    statement="The front cell's embedding repels from walls, draws to the goal and is indifferent to obstacles.",
    post="empty 0.27, wall −3.17, obstacle 0.136, goal 1.42",
    where="Table 3",
    effect="weakest of −wall, (goal − empty) ÷ 0.5 and 2 − |obstacle − empty| ÷ 0.5",
    bar=Bar(">=", 1.0),
    rule=f"wall ≤ −{_REPELS:g}, goal ≥ empty + {_DRAWS}, obstacle within {_DRAWS} of empty (logits)",
)
def _front_cell_is_table_3(e: Evidence) -> float:
    f = e.front_cell
    apart = abs(f["obstacle"] - f["empty"])
    return min(-f["wall"] / _REPELS, (f["goal"] - f["empty"]) / _DRAWS, 2 - apart / _DRAWS)


@_embeds(
    "C18",
    statement="The front cell stands out among the weights on F−R: colour against, object for.",
    post="colour −0.742, object 0.27",
    where="Figs. 14, 15",
    effect="−z of its colour weight among the 49 cells",
    rule=f"colour weight negative with |z| {_STANDS_OUT}, object weight positive",
)
def _front_cell_stands_out(e: Evidence) -> Finding:
    colour, z = e.front_weight("colour")
    passed = colour < 0 and _STANDS_OUT.meets(abs(z)) and e.front_weight("object")[0] > 0
    return Finding(-z, passed)


@_embeds(
    "C19",
    statement="The weights of the state channel, which is always 0, vanish.",
    post="≈ 1e−38",
    where="Fig. 14",
    effect="largest absolute weight",
    bar=Bar("<", 1e-6),
)
def _state_channel_vanishes(e: Evidence) -> float:
    cells = e.model.cfg.view_size**2
    return float(e.model.W_E_state.detach()[2 * cells :].abs().max())


# The head-1 circuit

_circuit = partial(claim, section="08_the_obstacle_circuit", group="The head-1 circuit", needs_head=True)
_A = {"obstacle": "an obstacle", "wall": "a wall", "goal": "the goal"}

_circuit(
    "C20",
    statement="Through head 1's QK circuit, object and colour in front inhibit attention to RTG.",
    post="object −0.244, colour −0.217",
    where="Fig. 16",
    effect="larger of the two weights (without 1/√d_head)",
    bar=Bar("<", 0.0),
    rule="both {bar}",
    needs_learnt=True,
)(lambda e: max(e.qk_front.values()))
beside("C20", FIRST_EDITION, bar=Bar("<", 0.0), rule="both {bar}")(lambda e: max(e.qk_front.values()))


def _attends_less(situation: str) -> Effect:
    return lambda e: e.attention("empty") - e.attention(situation)


for _letter, _thing in zip("abc", _A, strict=True):
    _circuit(
        f"C21{_letter}",
        statement=f"So head 1 attends less to RTG with {_A[_thing]} in front than with an empty cell.",
        where="Fig. 16, text",
        effect=f"attention to RTG, empty − {_thing} (RTG {HIGH})",
        bar=Bar(">=", 0.1),
    )(_attends_less(_thing))


@_circuit(
    "C22",
    statement="Through head 1's OV circuit, obstacle and goal in front lower the forward logit.",
    post="object −0.864, colour 0.168",
    where="Fig. 17",
    effect="empty − obstacle or empty − goal, whichever is smaller (logits at full attention)",
    bar=Bar(">=", 1.0),
    rule="both {bar}",
)
def _ov_lowers_forward(e: Evidence) -> float:
    weights = np.array([*e.ov_front.values()])
    empty, *others = (np.array(CELLS[name][:2]) @ weights for name in ("empty", "obstacle", "goal"))
    return float(min(empty - other for other in others))


_circuit(
    "C23",
    statement="Not attending to RTG lowers forward, as RTG through head 1 writes along F−R.",
    where="Circuit, text",
    effect=f"RTG token (embedding at {HIGH}, time, position) through head 1's OV on F−R (logits at full attention)",
    bar=Bar(">", 0.0),
    needs_learnt=True,
)(lambda e: sum(e.rtg_through_head.values()))
beside(
    "C23",
    FIRST_EDITION,
    effect=f"{HIGH} · RTG embedding through head 1's OV on F−R (logits at full attention)",
    bar=Bar(">", 0.0),
)(lambda e: e.rtg_through_head["embedding"])


@_circuit(
    "C24",
    statement="Obstacle avoidance is carried by what head 1 reads from the state (OV), not by where it looks (QK).",
    where="Circuit, text",
    effect="(OV part − QK part) ÷ head 1's whole effect on the log odds of forward",
    rule="OV part ≥ QK part",
)
def _ov_carries_it(e: Evidence) -> Finding:
    effect = (e.circuit.ov - e.circuit.qk) / e.circuit.head if e.circuit.head else np.nan
    return Finding(effect, e.circuit.ov >= e.circuit.qk)


# Added in the second edition: found on the models of the first, so decided only on others

WHOLE_CIRCUIT = ("C09", "C12", "C20", "C21a", "C22", "C24")
"""The claims that make up the post's obstacle circuit (M4)."""
_added = partial(claim, section="12_why_it_comes_back", group="Found here", where="")

_added(
    "M1",
    statement="The obstacle head is one gate: it attends to what lowers forward when an obstacle is in front.",
    effect="fall of its attention to RTG before an obstacle (C21a) × what the RTG embedding writes through it (logits)",
    bar=Bar(">", 0.0),
    rule="the two have the same sign",
    needs_head=True,
)(lambda e: (e.attention("empty") - e.attention("obstacle")) * e.rtg_through_head["embedding"])


@_added(
    "M2",
    statement="Avoidance is a conjunction: head 1's change or the MLP's own view of the cell alone does not do it.",
    effect="larger share of the obstacle's effect that one of the two carries alone",
    rule=f"both together {_BOTH}, either alone {_ALONE}",
    none=1.0,
    needs_head=True,
)
def _is_a_conjunction(e: Evidence) -> Finding:
    head, view, both = (
        part / e.circuit.total for part in (e.circuit.head, e.circuit.view, e.circuit.head_and_view)
    )
    return Finding(max(head, view), _BOTH.meets(both) and _ALONE.meets(max(head, view)))


@_added(
    "M3",
    statement="With nothing to avoid, right and left are not equally likely: there is a clockwise bias, or the other.",
    post="“clockwise”",
    effect=f"(P(right) − P(left)) ÷ (P(right) + P(left)), empty cell in front, RTG {HIGH}",
    rule=f"its size {_BIASED}; the same sign counts",
    same_sign=True,
)
def _turns_one_way(e: Evidence) -> Finding:
    bias = float(clockwise_bias(*e.turns_when_free))
    return Finding(bias, _BIASED.meets(abs(bias)))


@_added(
    "M4",
    statement="The post's whole obstacle circuit comes back in one model.",
    effect=f"how many of {', '.join(WHOLE_CIRCUIT)} hold in it",
    bar=Bar(">=", float(len(WHOLE_CIRCUIT))),
    needs_head=True,
)
def _whole_circuit(e: Evidence) -> float:
    return float(sum(decide_claim(id, e)[1] == 1 for id in WHOLE_CIRCUIT))
