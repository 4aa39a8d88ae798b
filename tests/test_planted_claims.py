"""The rules of the claims on models whose circuit was planted: they find what is there, and reject what is not."""

import pytest
from planted import (
    GOAL,
    OBSTACLE,
    SEEN,
    TOLD,
    blank,
    eager,
    plant_conjunction,
    plant_gate,
    plant_head,
    plant_look,
    plant_mlp,
    plant_reader,
    see_apart,
    turning,
)

from dtbook.analysis.heads import obstacle_head_scores, order_heads
from dtbook.claims import CLAIMS, RULES
from dtbook.claims.evidence import Evidence
from dtbook.gridworld import all_observations

MODELS = {
    "head 1 avoids what is in front": lambda: plant_head(empty(), 1, 2.0),
    "so does head 0, to be head 1 by the rule": lambda: plant_head(empty(), 0, 2.0),
    "a neuron does": lambda: plant_mlp(empty(), SEEN, 2.0),
    "head 1 tells a neuron": lambda: plant_mlp(plant_head(empty(), 1, 1.0, to=TOLD), TOLD, 2.0),
    "head 1 looks away": lambda: plant_look(empty(), 1, 12.0),
    "head 1 for obstacles, head 0 for the goal": lambda: plant_reader(
        plant_reader(see_apart(empty()), 1, OBSTACLE, 12.0), 0, GOAL, 12.0
    ),
    "nothing": lambda: empty(),
    "head 1 is a brake": lambda: plant_gate(empty(), 1, -6.0, when_blocked=True),
    "head 1 is a throttle": lambda: plant_gate(empty(), 1, 6.0, when_blocked=False),
    "head 1 is a gate that does not shut": lambda: plant_gate(empty(), 1, -6.0, when_blocked=False),
    "head 1 and the MLP's own view": lambda: plant_conjunction(empty(), 1, 0.8, 7.0),
    "turns right": lambda: turning(empty(), 0.5),
    "turns left": lambda: turning(empty(), -0.5),
    "head 1, the MLP's own view and head 0": lambda: plant_head(
        plant_conjunction(empty(), 1, 0.8, 7.0), 0, 0.7
    ),
}
# claim: whether it holds for each of the models above, in their order; None: not planted, either way
EXPECTED = {
    "C08": (False, False, False, False, False, True, False),  # without head 0 into the goal from the top
    "C09": (True, True, False, True, True, True, False),  # without head 1 into obstacles
    "C10": (False, False, True, True, False, False, False),  # without the MLP into the goal from the left
    "C11": (True, True, True, True, True, False, True),  # head 0 does not guard the goal from the left
    "C12": (False, False, False, True, False, False, False),  # the MLP amplifies head 1
    "C13": (False, False, None, False, False, True, None),  # the roles of the heads are separate
    "C22": (True, True, False, False, False, None, False),  # the front cell through head 1's OV
    "C24": (True, True, False, True, False, True, False),  # its values carry more than its pattern
    # the log odds, which go through 0 where the probability rises far, and those of "nothing" favour forward already
    "C08 log odds": (False, False, False, False, False, True, False),
    "C09 log odds": (True, True, False, True, True, True, False),
    "C10 log odds": (False, False, True, True, False, False, False),
    "M1": (False,) * 7 + (True, True, False, False, False, False, False),  # one gate
    "M2": (False,) * 10
    + (True, False, False, False),  # a conjunction; of the last the two carry three quarters
    "M3": (False,) * 11 + (True, True, False),  # turns one way
}


def empty():
    return eager(blank(max_steps=60))


@pytest.fixture(scope="module")
def evidence():
    observations = all_observations(size=5, n_obstacles=2)
    found = {}
    for name, build in MODELS.items():
        model = build()
        ordered = order_heads(model, obstacle_head_scores(model, observations))
        found[name] = Evidence(ordered, observations, timesteps=(0, 10))
    return found


@pytest.mark.parametrize(
    ("claim", "k"), [(c, k) for c, row in EXPECTED.items() for k in range(len(row)) if row[k] is not None]
)
def test_a_rule_finds_what_was_planted_and_nothing_else(evidence, claim, k):
    name = list(MODELS)[k]
    expected = EXPECTED[claim][k]
    finding = RULES[claim](evidence[name])
    passed = bool(finding.passed) and not (CLAIMS[claim].needs_head and not evidence[name].has_obstacle_head)
    assert passed == expected, (CLAIMS[claim].statement, name, finding)


def test_the_planted_head_is_the_obstacle_head(evidence):
    for name, one in evidence.items():
        assert one.has_obstacle_head == ("head" in name), name
