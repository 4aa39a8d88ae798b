"""Situations against the poses and states that show them; batches and counterfactuals against plain indexing."""

import jaxtyping
import numpy as np
import pytest
import torch

from dtbook.gridworld import GridState, all_observations, observe
from dtbook.gridworld.situations import (
    SITUATIONS,
    batches,
    counterfactual_pairs,
    sample,
    select,
    showing,
    weights,
    without_front,
)
from dtbook.model import DecisionTransformer, DTConfig

STEP = {0: (1, 0), 1: (0, 1), 2: (-1, 0), 3: (0, -1)}  # minigrid's directions: x to the right, y down
FRONT = (3, 5)


@pytest.fixture(scope="module")
def observations():
    """All of the 8×8 task."""
    return all_observations()


@pytest.fixture(scope="module")
def small():
    return all_observations(size=5, n_obstacles=2)


def in_front(state, row, size):
    """What is in front of the agent, from the state alone."""
    x, y = int(state.agent[row]) % size, int(state.agent[row]) // size
    dx, dy = STEP[int(state.direction[row])]
    x, y = x + dx, y + dy
    if x + size * y in state.obstacles[row].tolist():
        return "obstacle"
    if x in (0, size - 1) or y in (0, size - 1):
        return "wall"
    return "goal" if x == y == size - 2 else "empty"


def random_states(size, rng):
    """Every pose, with as many obstacles as the task may have, at random, ten times."""
    free = [x + size * y for y in range(1, size - 1) for x in range(1, size - 1)][:-1]
    rows = [
        (cell, direction, rng.choice([c for c in free if c != cell], size // 2 + 1, replace=False))
        for cell in free
        for direction in range(4)
        for _ in range(10)
    ]
    agent, direction, obstacles = (np.array(column, np.uint8) for column in zip(*rows, strict=True))
    return GridState(agent, direction, obstacles, np.zeros(len(rows), np.int32))


ROWS = {"slice": slice(3, 40, 7), "integers": np.arange(5) * 11, "twice": [2, 2, 5], "one": 9, "the last": -1}


@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
def test_a_set_is_indexed_by_rows(small, rows):
    every = np.arange(len(small.images))
    which, some = np.atleast_1d(every[rows]), small[rows]
    assert len(some) == len(which)
    assert np.array_equal(some.images, small.images[which])
    assert some.multiplicity.tolist() == small.multiplicity[which].tolist()
    assert np.array_equal(observe(some.witness, 5), some.images), "each witness shows its observation"
    mask = np.isin(every, which)
    assert np.array_equal(small[mask].images, small.images[mask])


def test_the_whole_task_has_the_counts_the_design_gives(observations):
    counts = {name: int(showing(observations.images, name).sum()) for name in SITUATIONS}
    assert counts["empty"] == 767_032
    assert counts["obstacle"] == 124_962
    assert counts["wall"] == 190
    assert counts["goal"] == counts["goal from the top"] + counts["goal from the left"] == 114


@pytest.mark.parametrize("size", [5, 6, 8, 16])
def test_situations_are_what_the_states_are_in(size):
    state = random_states(size, np.random.default_rng(size))
    images = observe(state, size)
    expected = np.array([in_front(state, row, size) for row in range(len(images))])
    for name in ("empty", "wall", "obstacle", "goal"):
        assert (showing(images, name) == (expected == name)).all()
        assert (expected == name).any()
    above, left = (size - 2) + size * (size - 3), (size - 3) + size * (size - 2)
    from_the_top = (state.agent == above) & (state.direction == 1)
    from_the_left = (state.agent == left) & (state.direction == 0)
    assert (showing(images, "goal from the top") == from_the_top).all()
    assert (showing(images, "goal from the left") == from_the_left).all()


def test_witnesses_agree_with_the_situation(observations):
    for name, (agent, direction) in {
        "goal from the top": (6 + 8 * 5, 1),
        "goal from the left": (5 + 8 * 6, 0),
    }.items():
        chosen = select(observations, name)
        assert len(chosen.images) == 57
        assert (chosen.witness.agent == agent).all()
        assert (chosen.witness.direction == direction).all()
        assert (observe(chosen.witness) == chosen.images).all()


def test_a_selection_keeps_order_and_multiplicity(small):
    chosen = select(small, "obstacle")
    rows = [row for row, image in enumerate(small.images) if image[FRONT][0] == 6]
    assert (chosen.images == small.images[rows]).all()
    assert (chosen.multiplicity == small.multiplicity[rows]).all()
    assert (chosen.witness.obstacles == small.witness.obstacles[rows]).all()


def test_weights_count_states(small):
    chosen = select(small, "wall")
    assert weights(chosen).sum() == pytest.approx(1, abs=1e-14)
    assert weights(chosen) == pytest.approx(chosen.multiplicity / sum(chosen.multiplicity.tolist()))
    assert len(set(weights(chosen))) > 1


@pytest.mark.parametrize("batch_size", [1, 7, 100_000])
def test_batches_are_all_observations_once_in_order_and_no_copies(small, batch_size):
    seen = list(batches(small, rtg=0.9, timestep=12, batch_size=batch_size))
    assert (np.concatenate([batch.states[:, 0].numpy() for batch in seen]) == small.images).all()
    assert all(np.shares_memory(batch.states.numpy(), small.images) for batch in seen)
    assert torch.cat([batch.weights for batch in seen]).numpy() == pytest.approx(weights(small))
    assert np.concatenate([np.arange(len(small.images))[batch.rows] for batch in seen]).tolist() == list(
        range(len(small.images))
    )
    assert all((batch.rtgs == torch.tensor(0.9)).all() and (batch.timesteps == 12).all() for batch in seen)
    model = DecisionTransformer(DTConfig(d_model=8, n_heads=1, d_head=2, d_mlp=2))
    assert model(*seen[-1].inputs).shape == (len(seen[-1].weights), 1, 3)


def test_the_counterfactual_is_what_the_agent_would_see_with_that_obstacle_out_of_view():
    """minigrid's own picture: the obstacle in front moved behind the agent, where it does not see it."""
    size, corner, behind = 8, 1 + 8 * 1, 2 + 8 * 1
    agent = np.full(3, 3 + size * 1, np.uint8)  # at (3, 1) looking east; (1, 1) and (2, 1) are behind it
    obstacles = np.array([[12, 20, 30, corner], [45, 12, 46, corner], [51, 28, 12, corner]], np.uint8)
    state = GridState(agent, np.zeros(3, np.uint8), obstacles, np.zeros(3, np.int32))
    moved = state._replace(obstacles=np.where(obstacles == 12, behind, obstacles).astype(np.uint8))
    images = torch.from_numpy(observe(state))
    before = images.clone()
    assert showing(images.numpy(), "obstacle").all()
    assert (without_front(images).numpy() == observe(moved)).all()
    assert (images == before).all()


@pytest.mark.parametrize("situation", ["obstacle", "wall", "goal"])
def test_pairs_differ_in_the_front_cell_alone(small, situation):
    chosen, rows = select(small, situation), 0
    for clean, other in counterfactual_pairs(small, -1.0, 3, situation, batch_size=50):
        assert (clean.states[:, 0].numpy() == chosen.images[clean.rows]).all()
        difference = (clean.states != other.states).any(-1)[:, 0]
        assert difference[:, 3, 5].all()
        assert int(difference.sum()) == len(difference)
        assert (other.states[:, 0, 3, 5] == torch.tensor([1, 0, 0])).all()
        assert other[1:] == clean[1:]
        rows += len(clean.weights)
    assert rows == len(chosen.images) > 0


def test_samples_come_as_often_as_states_show_them(small):
    n = 20_000
    drawn, rows = sample(small, n, np.random.default_rng(0))
    assert (drawn.images == small.images[rows]).all()
    assert weights(drawn) == pytest.approx(np.full(n, 1 / n))
    share, expected = np.bincount(rows, minlength=len(small.images)) / n, weights(small)
    assert np.abs(share - expected).max() < 5 * np.sqrt(expected.max() / n)  # five standard errors
    heavy = expected == expected.max()
    assert share[heavy].mean() > 1.5 * share[expected == expected.min()].mean()
    assert (
        sample(small, 50, np.random.default_rng(0))[1] == sample(small, 50, np.random.default_rng(0))[1]
    ).all()


@pytest.mark.parametrize(
    "call", [showing, lambda images, name: next(counterfactual_pairs(images, 0.0, 0, name))]
)
def test_an_unknown_situation_gets_one_sentence(small, call):
    argument = small.images if call is showing else small
    with pytest.raises(ValueError, match=r"situation must be one of 'empty', .*, not 'lava'\.") as caught:
        call(argument, "lava")
    assert "\n" not in str(caught.value)


def test_a_situation_nobody_is_in_gets_one_sentence():
    nothing = select(all_observations(size=5, n_obstacles=0), "obstacle")
    with pytest.raises(ValueError, match="observations is empty"):
        batches(nothing, 0.9, 10)


def test_a_batch_of_nothing_is_refused_before_the_first(small):
    with pytest.raises(ValueError, match="batch_size is 0; it must be an integer ≥ 1"):
        batches(small, 0.9, 10, batch_size=0)


def test_a_model_of_another_view_says_so(small):
    model = DecisionTransformer(DTConfig(d_model=8, n_heads=1, d_head=2, d_mlp=2, view_size=5))
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        with pytest.raises(ValueError, match=r"states has shape .*\(5, 5, 3\)"):
            model(*next(batches(small, 0.9, 10)).inputs)
    finally:
        jaxtyping.config.update("jaxtyping_disable", False)
