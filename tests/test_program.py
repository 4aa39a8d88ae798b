"""The model as a table: facts against the grid, fits against the definition, a model that is a table found exactly."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from planted import blank, plant_head

from dtbook.analysis.program import (
    FACTS,
    FITTED_RTGS,
    FITTED_TIMESTEPS,
    FRONTS,
    STEPS,
    TRIGRAM,
    Program,
    bands,
    facts,
    keys,
    program_table,
    split_keys,
    summarise_model,
)
from dtbook.gridworld import Task, all_observations
from dtbook.gridworld.situations import IN_FRONT, weights
from dtbook.model import DecisionTransformer, DTConfig

DIRECTIONS = np.array([[1, 0], [0, 1], [-1, 0], [0, -1]])  # east, south, west, north; y goes down


@pytest.fixture(scope="module")
def observations():
    return all_observations(size=5, n_obstacles=2)


@pytest.fixture(scope="module")
def model():
    cfg = DTConfig(d_model=12, d_head=5, d_mlp=16, max_steps=60)
    model, generator = DecisionTransformer(cfg).double(), torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model.eval()


@pytest.fixture(scope="module")
def summary(model, observations):
    return summarise_model(model, observations)


def test_facts_are_what_the_witness_state_says():
    """Read off the agent's cell and direction, not off the image."""
    size = 8
    room = all_observations(size=size, n_obstacles=1)
    known = facts(room.images)
    x, y = (room.witness.agent % size).astype(int), (room.witness.agent // size).astype(int)
    ahead = DIRECTIONS[room.witness.direction]
    right = np.stack([-ahead[:, 1], ahead[:, 0]], 1)

    def to_wall(way):
        along = (way * np.stack([x, y], 1)).sum(1)
        return np.where(way.sum(1) > 0, size - 1 - along, -along)

    assert (known["walls"] == (to_wall(-right) == 1) + 2 * (to_wall(right) == 1)).all()
    assert (known["quadrant"] == (to_wall(ahead) > 3) + 2 * (to_wall(right) < to_wall(-right))).all()
    nearest = np.minimum(to_wall(-right), to_wall(right))
    assert (known["place"] % 8 == to_wall(ahead)).all()
    assert (known["place"] // 8 % 5 == nearest).all()
    front = np.stack([x, y], 1) + ahead
    obstacle = room.witness.obstacles[:, 0]
    in_front = obstacle == front[:, 0] + size * front[:, 1]
    assert ((known["front"] == FRONTS.index("obstacle")) == in_front).all()
    goal = np.array([size - 2, size - 2]) - np.stack([x, y], 1)
    i, j = 3 + (goal * right).sum(1), 6 - (goal * ahead).sum(1)
    seen = (i >= 0) & (i < 7) & (j >= 0) & (j < 7)
    assert (known["goal"] == np.where(seen, 1 + 7 * i + j, 0)).all()
    assert all(value.min() >= 0 and value.max() < FACTS[name] for name, value in known.items())


def test_keys_come_apart_again(observations):
    names = ("front", "goal", "hands")
    apart = split_keys(keys(observations.images, names), names)
    known = facts(observations.images)
    assert all((apart[name] == known[name]).all() for name in names)


@torch.no_grad()
@pytest.mark.parametrize("step", [STEPS[0], TRIGRAM, STEPS[5], STEPS[-1]], ids=lambda step: step.name)
def test_a_fit_is_the_definition(model, observations, summary, step):
    program, share = Program(summary, step), weights(observations)
    states, n = torch.from_numpy(observations.images).unsqueeze(1), len(observations.images)
    kl = agreement = 0.0
    for rtg in FITTED_RTGS:
        for timestep in FITTED_TIMESTEPS:
            asked = torch.full((n, 1), rtg, dtype=torch.float64), torch.full((n, 1), timestep)
            p = model(states, *asked)[:, 0].softmax(-1).numpy()
            q = program(observations.images, np.full(n, rtg))
            kl += share @ (p * np.log(p / q)).sum(1) / (len(FITTED_RTGS) * len(FITTED_TIMESTEPS))
            agreement += share @ (p.argmax(1) == q.argmax(1)) / (len(FITTED_RTGS) * len(FITTED_TIMESTEPS))
    assert program.kl == pytest.approx(kl)
    assert program.agreement == pytest.approx(agreement)


def test_bigger_steps_are_nearer(summary):
    programs = [Program(summary, step) for step in STEPS]
    divergences = [program.kl for program in programs]
    # a fact that is the same all over this room makes no difference: then the two agree up to rounding
    assert all(later <= earlier + 1e-12 for earlier, later in pairwise(divergences)), divergences
    assert divergences[-1] > 0.001  # timesteps and the rest of the view are left out of every table
    assert [program.n_rows for program in programs] == sorted(program.n_rows for program in programs)


def test_no_other_table_is_nearer(summary):
    program, rng = Program(summary, TRIGRAM), np.random.default_rng(0)
    best = program.kl
    program.probabilities = program.probabilities * rng.uniform(0.9, 1.1, program.probabilities.shape)
    program.probabilities /= program.probabilities.sum(1, keepdims=True)
    assert program.kl > best


def test_a_model_that_looks_only_in_front_is_its_trigram(observations):
    """A head that avoids what is in front, whatever else there is to see: the trigram explains it all."""
    model = plant_head(blank(max_steps=60), 1, 1.0)
    model.b_U[0] = 0.1  # else left and right are equally likely, and neither the likeliest
    summary = summarise_model(model, observations)
    assert Program(summary, STEPS[1]).kl > 0.01
    program = Program(summary, TRIGRAM)
    assert program.kl == pytest.approx(0, abs=1e-9)
    assert program.agreement == pytest.approx(1)
    table = program.table().set_index(["rtg", "front"])
    for name, thing in IN_FRONT.items():
        odds = np.exp(-float(thing))
        found = table["forward"].xs(FRONTS.index(name), level="front")
        assert found.tolist() == pytest.approx([odds / (1 + np.exp(0.1) + odds)] * len(found))


def test_play_follows_the_table(observations):
    """Always forward dies on a wall or an obstacle at once; always left survives."""
    task = Task(size=5, n_obstacles=2, max_steps=30)
    summary = summarise_model(blank(max_steps=60), observations)
    program = Program(summary, STEPS[0])
    for action, outcome in ((2, -1.0), (0, 0.0)):
        program.probabilities = np.eye(3)[[action]]
        for greedy in (True, False):
            played = program.play(np.full(20, 0.9), greedy, task, seed=0)
            assert set(played.returns.tolist()) == {outcome}


def test_the_table_of_steps_is_the_same_twice(summary):
    task = Task(size=5, n_obstacles=2, max_steps=30)
    first, second = (program_table(summary, 5, task, seed=1) for _ in range(2))
    assert first.equals(second)
    assert first["explained"].tolist()[0] == 0
    assert {"sampled −1", "greedy 0.9"} <= set(first.columns)


def test_bands_part_the_three_classes():
    assert bands(np.array([-1.0, -0.3, 0.0, 0.2, 0.3, 0.9])).tolist() == [0, 0, 1, 1, 2, 2]
