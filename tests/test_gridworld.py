"""The task against minigrid itself: what it shows, how it goes and starts; its Gymnasium face, its limits."""

import copy
import dataclasses
import hashlib
import itertools
import math
import re
import warnings

import gymnasium
import numba
import numpy as np
import pytest
from gymnasium.envs.registration import EnvSpec
from gymnasium.utils.env_checker import check_env, data_equivalence
from gymnasium.utils.performance import benchmark_vector_step
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv
from gymnasium.wrappers.vector import DictInfoToList, RecordEpisodeStatistics
from minigrid.envs import DynamicObstaclesEnv
from minigrid.wrappers import ImgObsWrapper
from scipy import stats

from dtbook import gridworld
from dtbook.gridworld import DynamicObstaclesVectorEnv, GridState, Task, kernels

ENV_IDS = [f"MiniGrid-Dynamic-Obstacles-{name}-v0" for name in ("5x5", "Random-5x5", "6x6", "8x8", "16x16")]
ALPHA = 1e-4  # a chi-squared test fails below this p; all seeds are fixed


def random_states(task, batch, seed):
    """Uniform over every state, the agent on the goal included; drawn with NumPy alone."""
    rng = np.random.default_rng(seed)
    cells = np.array([x + task.size * y for y in range(1, task.size - 1) for x in range(1, task.size - 1)])
    keys = rng.random((batch, len(cells)))
    keys[:, -1] += 1  # the goal is the last cell: no obstacle stands there
    order = cells[np.argsort(keys, axis=1)].astype(np.uint8)
    agent = np.where(rng.random(batch) < 0.02, cells[-1], order[:, 0]).astype(np.uint8)
    direction = rng.integers(0, 4, batch, dtype=np.uint8)
    step_count = rng.integers(0, task.max_steps, batch, dtype=np.int32)
    return GridState(agent, direction, order[:, 1 : task.n_obstacles + 1].copy(), step_count)


def repeated(state, times):
    return GridState(*(np.repeat(value, times, axis=0) for value in state))


# What the agent sees


@pytest.mark.parametrize("states", [2_000, pytest.param(20_000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("size", [5, 6, 8, 16])
def test_observations_are_minigrids_bit_for_bit(size, states):
    task = Task(size, n_obstacles=size // 2)
    states = random_states(task, states, seed=size)
    env = gridworld.to_minigrid(task, states)
    for index, image in enumerate(gridworld.observe(states, size)):
        gridworld.inject(env, states, index)
        np.testing.assert_array_equal(image, env.gen_obs()["image"])


def test_front_cell_is_what_the_agent_faces():
    state = GridState(
        *(np.array([value], np.uint8) for value in (9, 0)), np.array([[10]], np.uint8), np.zeros(1, np.int32)
    )
    image = gridworld.observe(state)[0]
    assert image[gridworld.FRONT][0] == gridworld.OBSTACLE
    assert (image[3, 6] == (gridworld.EMPTY, 0, 0)).all()  # the agent's own cell


# How a step goes. Drawings show the room without its walls: the agent as an arrow, the goal as G, and the
# obstacles as a, b, … in the order in which they move.

LEFT, RIGHT, FORWARD = range(3)
CASES = {
    "clear, forward": (FORWARD, ">...", "...a", "....", "..bG"),
    "clear, left": (LEFT, "....", ".>..", "...a", "b..G"),
    "clear, right": (RIGHT, "....", ".^..", "...a", "b..G"),
    "wall ahead, forward": (FORWARD, "..^.", "....", ".a..", "b..G"),
    "wall ahead, left": (LEFT, "...>", "....", ".a..", "b..G"),
    "obstacle ahead that can leave, forward": (FORWARD, "....", ".>a.", "....", "b..G"),
    "obstacle ahead that can leave, right": (RIGHT, "....", ".>a.", "....", "b..G"),
    "obstacle ahead, its cell filled by the next, forward": (FORWARD, "...b", ".>a.", "....", "...G"),
    "obstacle ahead, the other moves first, forward": (FORWARD, "...a", ".>b.", "....", "...G"),
    "obstacle ahead boxed in, forward": (FORWARD, "a<..", "bc..", "....", "...G"),
    "obstacle ahead boxed in until the others move, forward": (FORWARD, "c<..", "ab..", "....", "...G"),
    "obstacle ahead with one free cell, forward": (FORWARD, "a<..", "b...", "c...", "...G"),
    "obstacle beside the front cell, forward": (FORWARD, "....", ">...", ".a..", "...G"),
    "two obstacles beside the front cell, forward": (FORWARD, "..a.", ".>..", "..b.", "...G"),
    "obstacle beside the agent, forward into a corner": (FORWARD, ".<..", "a...", "....", "...G"),
    "goal ahead, forward": (FORWARD, "....", "....", "...a", "b.>G"),
    "goal ahead, obstacles around it, forward": (FORWARD, "....", "....", "..av", "..bG"),
    "goal ahead, left": (LEFT, "....", "....", "..av", "..bG"),
    "nothing to avoid, forward": (FORWARD, ">...", "....", "....", "...G"),
    "agent on the goal, forward": (FORWARD, "....", "....", "..a.", "..b<"),
    "four obstacles in a corner, left": (LEFT, "....", "....", "cd..", "ab^G"),
}


def drawn(rows, step_count):
    """(task, one state) of a drawing."""
    size = len(rows) + 2
    at = {
        char: x + size * y
        for y, row in enumerate(rows, 1)
        for x, char in enumerate(row, 1)
        if char not in ".G"
    }
    arrow = next(char for char in at if char in ">v<^")
    obstacles = [at[char] for char in sorted(at) if char.islower() and char != "v"]
    task = Task(size, len(obstacles), max_steps=50)
    agent, direction = np.array([at[arrow]], np.uint8), np.array([">v<^".index(arrow)], np.uint8)
    return task, GridState(
        agent, direction, np.array([obstacles], np.uint8), np.array([step_count], np.int32)
    )


def minigrid_outcomes(task, state, action, times):
    """What minigrid's own step makes of a state, each time: cells, direction, reward, flags and step."""
    env = gridworld.to_minigrid(task, state)
    env.gen_obs = lambda: None  # observations are compared elsewhere; this is four times as fast
    outcomes = []
    for _ in range(times):
        gridworld.inject(env, state)
        _, reward, terminated, truncated, _ = env.step(action)
        cells = [x + task.size * y for x, y in (env.agent_pos, *(ball.cur_pos for ball in env.obstacles))]
        outcomes.append(
            (*map(int, cells), env.agent_dir, np.float32(reward), terminated, truncated, env.step_count)
        )
    return outcomes


def our_outcomes(task, state, action, times):
    new, *rest = gridworld.step(
        task, repeated(state, times), np.full(times, action), np.random.default_rng(1)
    )
    columns = [new.agent, *new.obstacles.T, new.direction, *rest, new.step_count]
    return list(zip(*(column.tolist() for column in columns), strict=True))


def same_distribution(ours, theirs):
    """p of the chi-squared test that two samples come from one distribution, rare outcomes pooled."""
    outcomes = sorted({*ours, *theirs})
    index = {outcome: i for i, outcome in enumerate(outcomes)}
    table = np.stack(
        [np.bincount([index[o] for o in sample], minlength=len(outcomes)) for sample in (ours, theirs)]
    )
    rare = table.sum(axis=0) * min(len(ours), len(theirs)) < 5 * (len(ours) + len(theirs))
    table = np.column_stack([table[:, ~rare], table[:, rare].sum(axis=1)])
    table = table[:, table.sum(axis=0) > 0]
    return stats.chi2_contingency(table).pvalue if table.shape[1] > 1 else 1.0


@pytest.mark.parametrize("step_count", [7, 49], ids=["", "last step"])
@pytest.mark.parametrize("case", CASES)
def test_steps_have_minigrids_distribution(case, step_count):
    action, *rows = CASES[case]
    task, state = drawn(rows, step_count)
    theirs = minigrid_outcomes(task, state, action, times=400 if step_count == 49 else 2_000)
    ours = our_outcomes(task, state, action, times=20_000)
    assert set(theirs) <= set(ours)
    assert same_distribution(ours, theirs) > ALPHA


@pytest.mark.parametrize(
    ("case", "rewards", "ends", "agents"),
    [
        ("obstacle ahead that can leave, forward", {-1}, {True}, {(3, 2)}),
        ("obstacle ahead, its cell filled by the next, forward", {-1}, {True}, {(2, 2), (3, 2)}),
        ("obstacle ahead boxed in, forward", {-1}, {True}, {(2, 1)}),
        ("obstacle beside the front cell, forward", {0}, {False}, {(1, 2), (2, 2)}),
        ("goal ahead, forward", {np.float32(1 - 0.9 * 8 / 50)}, {True}, {(4, 4)}),
        ("wall ahead, forward", {-1}, {True}, {(3, 1)}),
    ],
)
def test_what_is_in_front_is_judged_before_the_obstacles_move(case, rewards, ends, agents):
    action, *rows = CASES[case]
    task, state = drawn(rows, 7)
    new, reward, terminated, _ = gridworld.step(
        task, repeated(state, 2_000), np.full(2_000, action), np.random.default_rng(0)
    )
    assert (set(reward.tolist()), set(terminated.tolist())) == (rewards, ends)
    assert {divmod(cell, task.size)[::-1] for cell in new.agent.tolist()} == agents


class Stuck:
    """A random number generator that never finds a free cell."""

    def __init__(self, cell):
        self.cell, self.calls = cell, 0

    def integers(self, low, high):
        self.calls += 1
        return self.cell[(self.calls - 1) % 2]


def test_an_obstacle_gives_up_as_often_as_in_minigrid():
    task, state = drawn(["a<..", "b...", "c...", "...G"], 7)
    env = gridworld.to_minigrid(dataclasses.replace(task, n_obstacles=3), state)
    env.np_random = Stuck((1, 1))
    env.step(LEFT)
    tries = env.np_random.calls // 2 // task.n_obstacles
    assert [ball.cur_pos for ball in env.obstacles] == [(1, 1), (1, 2), (1, 3)]
    chance = (8 / 9) ** tries  # of finding the one free cell of the nine in none of the tries
    np.testing.assert_allclose(kernels.GIVE_UP[1], chance, rtol=1e-12)
    for word, cell in ((0.99 * chance, (1, 1)), (1.01 * chance, (2, 2))):
        obstacles = state.obstacles.copy()
        words = np.array([[word], [0.5], [0.5]])
        kernels.move_obstacles(state.agent, obstacles, words, *kernels.move_tables(task.size))
        assert divmod(obstacles[0, 0], task.size)[::-1] == cell


@pytest.mark.parametrize("env_id", ENV_IDS)
def test_a_walk_stays_among_states_and_shows_what_minigrid_shows(env_id):
    task = Task.from_env_id(env_id, max_steps=40)
    rng = np.random.default_rng(3)
    state = gridworld.reset(task, 50, rng)
    for _ in range(40):
        state, _, _, truncated = gridworld.step(task, state, rng.integers(0, 3, 50), rng)
        gridworld.check_state(task, state)
    assert truncated.all()
    for index in range(50):
        env = gridworld.to_minigrid(task, state, index)
        np.testing.assert_array_equal(gridworld.observe(state, task.size)[index], env.gen_obs()["image"])


def test_a_step_leaves_its_inputs_as_they_are():
    task, rng = Task(), np.random.default_rng(0)
    state = gridworld.reset(task, 100, rng)
    before, actions = repeated(state, 1), rng.integers(0, 3, 100)
    gridworld.step(task, state, actions, rng)
    assert all((a == b).all() for a, b in zip(before, state, strict=True))


def test_memory_layout_and_width_of_actions_do_not_matter():
    task = Task()
    state = gridworld.reset(task, 64, np.random.default_rng(0))
    strided = GridState(*(np.asfortranarray(np.repeat(value, 2, axis=0))[::2] for value in state))
    for dtype in (np.int8, np.uint8, np.int32, np.int64, np.bool_):
        actions = np.arange(64) % (2 if dtype is np.bool_ else 3)
        ours = gridworld.step(task, strided, actions.astype(dtype), np.random.default_rng(1))
        reference = gridworld.step(task, state, actions, np.random.default_rng(1))
        assert data_equivalence(tuple(reference.state), tuple(ours.state), exact=True)
    np.testing.assert_array_equal(gridworld.observe(strided), gridworld.observe(state))


def test_no_environments_is_a_batch_too():
    task, rng = Task(), np.random.default_rng(0)
    state = gridworld.reset(task, 0, rng)
    assert gridworld.step(task, state, np.empty(0, np.int64), rng).reward.shape == (0,)
    assert gridworld.observe(state).shape == (0, 7, 7, 3)


# How episodes start


@pytest.mark.parametrize("random_start", [False, True])
def test_first_states_are_uniform(random_start):
    task = Task(size=5, n_obstacles=2, random_start=random_start)
    state = gridworld.reset(task, 400_000, np.random.default_rng(0))
    gridworld.check_state(task, state)
    columns = np.column_stack([state.agent, state.direction, state.obstacles]).astype(np.int64)
    _, counts = np.unique(columns @ 256 ** np.arange(4), return_counts=True)
    assert (
        len(counts) == (8 * 4 if random_start else 1) * 7 * 6
    )  # free cells, directions, ordered pairs of the rest
    assert stats.chisquare(counts).pvalue > ALPHA


@pytest.mark.parametrize("random_start", [False, True])
def test_first_states_have_minigrids_distribution(random_start):
    task = Task(size=5, n_obstacles=1, random_start=random_start)
    env = gridworld.to_minigrid(task, gridworld.reset(task, 1, np.random.default_rng(0)))
    env.gen_obs = lambda: None
    theirs = []
    for _ in range(6_000):
        env.reset()
        cells = [int(x + 5 * y) for x, y in (env.agent_pos, env.obstacles[0].cur_pos)]
        theirs.append((*cells, int(env.agent_dir)))
    state = gridworld.reset(task, 60_000, np.random.default_rng(0))
    ours = list(
        zip(state.agent.tolist(), state.obstacles[:, 0].tolist(), state.direction.tolist(), strict=True)
    )
    assert set(theirs) == set(ours)
    assert same_distribution(ours, theirs) > ALPHA


@pytest.mark.parametrize("env_id", ENV_IDS)
def test_tasks_from_minigrids_registry(env_id):
    task, env = Task.from_env_id(env_id), gymnasium.make(env_id).unwrapped
    assert (task.size, task.n_obstacles) == (env.width, env.n_obstacles)
    assert task.random_start == (env.agent_start_pos is None)
    assert task.max_steps == 300


# Every observation


def every_state(size, n_obstacles):
    """All states in which an agent acts, obstacles as sets."""
    goal = size - 2 + size * (size - 2)
    cells = [x + size * y for y in range(1, size - 1) for x in range(1, size - 1) if x + size * y != goal]
    rows = [
        (agent, direction, *obstacles)
        for agent in cells
        for direction in range(4)
        for obstacles in itertools.combinations([cell for cell in cells if cell != agent], n_obstacles)
    ]
    table = np.array(rows, dtype=np.uint8)
    return GridState(*table[:, :2].T, table[:, 2:], np.zeros(len(table), np.int32))


@pytest.mark.parametrize(("size", "n_obstacles"), [(5, 0), (5, 2), (5, 3), (6, 3), (7, 2), (8, 1)])
def test_all_observations_are_those_of_every_state(size, n_obstacles):
    states = every_state(size, n_obstacles)
    flat = gridworld.observe(states, size).reshape(len(states.agent), -1)
    expected, counts = np.unique(flat, axis=0, return_counts=True)
    found = gridworld.all_observations(size, n_obstacles)
    order = np.lexsort(found.images.reshape(len(found.images), -1).T[::-1])
    np.testing.assert_array_equal(found.images.reshape(-1, flat.shape[1])[order], expected)
    np.testing.assert_array_equal(found.multiplicity[order], counts)


@pytest.mark.slow
def test_the_posts_task_has_892298_observations():
    found = gridworld.all_observations()
    keys = np.random.default_rng(0).integers(0, 2**63, 49)  # sums of these tell different observations apart
    objects = found.images[..., 0].reshape(-1, 49)
    assert len(np.unique(objects @ keys)) == len(found.images) == 892_298
    assert found.multiplicity.sum() == 6_492_640 == 4 * 35 * math.comb(34, 4)
    kinds, counts = np.unique(found.images[:, 3, 5, 0], return_counts=True)
    assert dict(zip(kinds.tolist(), counts.tolist(), strict=True)) == {
        gridworld.EMPTY: 767_032,
        gridworld.OBSTACLE: 124_962,
        gridworld.WALL: 190,
        gridworld.GOAL: 114,
    }
    for index in np.random.default_rng(0).integers(0, len(found.images), 200):
        env = gridworld.to_minigrid(Task(), found.witness, int(index))
        np.testing.assert_array_equal(found.images[index], env.gen_obs()["image"])


def test_all_observations_come_in_the_same_order():
    first, second = gridworld.all_observations(6, 3), gridworld.all_observations(6, 3)
    assert first.images.tobytes() == second.images.tobytes()


class EveryChoice(np.random.Generator):
    """Makes, row by row, every combination of choices that obstacles with up to eight free cells have."""

    def random(self, shape):
        n_obstacles, batch = shape
        choices = np.array(list(itertools.product((np.arange(8) + 0.5) / 8, repeat=n_obstacles)))
        return np.ascontiguousarray(np.tile(choices, (batch // len(choices), 1)).T)


def state_numbers(size, state):
    """A whole number for each state, obstacles as sets."""
    numbers = 4 * state.agent.astype(np.int64) + state.direction
    for obstacle in np.sort(state.obstacles, axis=1).T:
        numbers = numbers * size**2 + obstacle
    return numbers


def next_numbers(task, state, order):
    """Of the states that one step can make of these, those that do not end the episode."""
    many = repeated(state._replace(obstacles=state.obstacles[:, order]), 8**task.n_obstacles)
    for action in range(3):
        actions, every_choice = np.full(len(many.agent), action), EveryChoice(np.random.PCG64(0))
        new, _, terminated, _ = gridworld.step(task, many, actions, every_choice)
        yield state_numbers(task.size, new)[~terminated]


@pytest.mark.parametrize(
    ("size", "n_obstacles"), [(5, 2), (5, 3), pytest.param(6, 3, marks=pytest.mark.slow)]
)
def test_every_state_is_reached_from_the_fixed_start(size, n_obstacles):
    """Obstacles start in every order, so what is reached with them in one order is reached in all."""
    task, states = Task(size, n_obstacles), every_state(size, n_obstacles)
    numbers = state_numbers(size, states)
    reached = np.zeros(numbers.max() + 1, dtype=bool)
    reached[numbers[(states.agent == size + 1) & (states.direction == 0)]] = True
    for order in itertools.permutations(range(n_obstacles)):
        frontier = np.flatnonzero(reached[numbers])
        while len(frontier) and not reached[numbers].all():
            before = reached.copy()
            for rows in np.array_split(frontier, 1 + len(frontier) // 1_000):
                for found in next_numbers(task, GridState(*(value[rows] for value in states)), order):
                    reached[found] = True
            frontier = np.flatnonzero((reached & ~before)[numbers])
    assert reached[numbers].all()
    assert reached.sum() == len(numbers)


# The face to Gymnasium


class OneEnv(gymnasium.Env):
    """A vector environment of one, as a single environment, for Gymnasium's own checker."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 10}  # noqa: RUF012

    def __init__(self, render_mode=None):
        mode = AutoresetMode.DISABLED
        self.envs = DynamicObstaclesVectorEnv(1, autoreset_mode=mode, render_mode=render_mode)
        self.observation_space = self.envs.single_observation_space
        self.action_space = self.envs.single_action_space
        self.render_mode = render_mode

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        images, infos = self.envs.reset(seed=seed, options=options)
        self._np_random = self.envs.np_random
        return images[0], infos

    def step(self, action):
        images, rewards, terminated, truncated, infos = self.envs.step(np.array([action]))
        return images[0], float(rewards[0]), bool(terminated[0]), bool(truncated[0]), infos

    def render(self):
        return self.envs.render()[0]


def test_gymnasiums_checkers_pass():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        env = gymnasium.make(EnvSpec("OneEnv-v0", entry_point=OneEnv), render_mode="rgb_array")
        check_env(env.unwrapped)
        env.reset(seed=0)  # and through the passive checker that `make` puts around it
        env.step(FORWARD)
        env.render()


def test_spaces_and_metadata():
    envs = DynamicObstaclesVectorEnv(4)
    assert envs.single_observation_space == gymnasium.spaces.Box(0, 255, (7, 7, 3), np.uint8)
    assert envs.single_action_space == gymnasium.spaces.Discrete(3)
    assert envs.observation_space.shape == (4, 7, 7, 3)
    assert envs.metadata["autoreset_mode"] is AutoresetMode.SAME_STEP
    assert (
        DynamicObstaclesVectorEnv(autoreset_mode="NextStep").metadata["autoreset_mode"]
        is AutoresetMode.NEXT_STEP
    )
    images, _ = envs.reset(seed=0)
    assert images in envs.observation_space
    images, rewards, terminated, truncated, _ = envs.step(envs.action_space.sample())
    assert images in envs.observation_space
    assert (rewards.shape, terminated.dtype, truncated.dtype) == ((4,), bool, bool)


def play(envs, actions, mode):
    """Everything a vector environment returns."""
    yield envs.reset(seed=0)
    over = np.zeros(envs.num_envs, dtype=bool)
    for action in actions:
        if mode is AutoresetMode.DISABLED and over.any():
            yield envs.reset(options={"reset_mask": over.copy()})
        result = envs.step(action)
        over = result[2] | result[3]
        yield result


@pytest.mark.parametrize("vectorizer", [SyncVectorEnv, AsyncVectorEnv])
@pytest.mark.parametrize("mode", AutoresetMode)
def test_it_returns_what_gymnasiums_vector_envs_return_of_minigrid(vectorizer, mode):
    """Without obstacles minigrid is deterministic, so everything must agree, infos included."""
    make = lambda: ImgObsWrapper(DynamicObstaclesEnv(size=5, n_obstacles=0, max_steps=9))  # noqa: E731
    theirs = vectorizer([make] * 3, autoreset_mode=mode)
    ours = DynamicObstaclesVectorEnv(3, size=5, n_obstacles=0, max_steps=9, autoreset_mode=mode)
    ends, goals = np.zeros(2), 0
    actions = np.random.default_rng(0).choice(3, (250, 3), p=[0.15, 0.15, 0.7])
    for mine, reference in zip(play(ours, actions, mode), play(theirs, actions, mode), strict=True):
        np.testing.assert_array_equal(mine[0], reference[0])
        if "final_info" in mine[-1]:
            mine[-1]["final_info"] = {}  # where ours has the last states
        assert data_equivalence(mine[-1], reference[-1])
        for a, b in zip(mine[1:-1], reference[1:-1], strict=True):
            np.testing.assert_array_equal(a, b.astype(a.dtype))
        if len(mine) == 5:
            ends += [mine[2].sum(), mine[3].sum()]
            goals += (mine[1] > 0).sum()
    theirs.close()
    assert (ends > 2).all()
    assert goals > 2


def test_same_step_keeps_the_last_observation_and_state_and_starts_anew():
    envs = DynamicObstaclesVectorEnv(200)
    envs.reset(seed=0)
    for action in np.random.default_rng(0).integers(0, 3, (50, 200)):
        state, rng = envs.state, copy.deepcopy(envs.np_random)
        images, _, terminated, truncated, infos = envs.step(action)
        over = terminated | truncated
        last = gridworld.step(envs.task, state, action, rng).state
        np.testing.assert_array_equal(infos["_final_obs"], over)
        np.testing.assert_array_equal(np.stack(infos["final_obs"][over]), gridworld.observe(last)[over])
        np.testing.assert_array_equal(infos["_final_info"], over)
        for name, value in last._asdict().items():
            np.testing.assert_array_equal(infos["final_info"][name][over], value[over])
            np.testing.assert_array_equal(infos["final_info"][f"_{name}"], over)
        np.testing.assert_array_equal(images, gridworld.observe(envs.state))
        assert (envs.state.step_count[over] == 0).all()


def test_it_works_through_make_vec():
    spec = EnvSpec("DynamicObstacles-v0", vector_entry_point="dtbook.gridworld:DynamicObstaclesVectorEnv")
    envs = gymnasium.make_vec(spec, num_envs=3, size=6, n_obstacles=3)
    assert envs.reset(seed=0)[0].shape == (3, 7, 7, 3)
    assert envs.unwrapped.task == Task(6, 3)


@pytest.mark.parametrize("mode", [AutoresetMode.SAME_STEP, AutoresetMode.NEXT_STEP])
def test_gymnasiums_wrappers_work_on_it(mode):
    envs = RecordEpisodeStatistics(
        DynamicObstaclesVectorEnv(8, max_steps=20, autoreset_mode=mode), buffer_length=10_000
    )
    envs.reset(seed=0)
    returns, started = [], np.zeros(8)
    for action in np.random.default_rng(0).integers(0, 3, (300, 8)):
        _, rewards, terminated, truncated, infos = envs.step(action)
        started += rewards
        over = terminated | truncated
        returns += started[over].tolist()
        started[over] = 0
        np.testing.assert_array_equal(infos.get("_episode", np.zeros(8, bool)), over)
    np.testing.assert_allclose(list(envs.return_queue), returns, atol=1e-6)
    assert max(envs.length_queue) == 20
    listed = DictInfoToList(DynamicObstaclesVectorEnv(2, max_steps=1))
    listed.reset(seed=0)
    assert [info["final_info"]["step_count"] for info in listed.step(np.zeros(2, int))[-1]] == [1, 1]


def test_gymnasiums_own_benchmark_runs_on_it():
    assert benchmark_vector_step(DynamicObstaclesVectorEnv(8), target_duration=0.05, seed=0) > 0


def test_rendering_is_minigrids():
    envs = DynamicObstaclesVectorEnv(2, render_mode="rgb_array")
    envs.reset(seed=0)
    env = gridworld.to_minigrid(envs.task, envs.state, 1, render_mode="rgb_array")
    np.testing.assert_array_equal(envs.render()[1], env.render())
    assert DynamicObstaclesVectorEnv(2).render() is None


def test_any_state_can_be_set():
    envs = DynamicObstaclesVectorEnv(30, size=6, n_obstacles=3)
    state = random_states(envs.task, 30, seed=0)
    envs.state = state
    assert data_equivalence(tuple(envs.state), tuple(state), exact=True)
    envs.state.agent[:] = 0  # a copy: the environments keep theirs
    assert data_equivalence(tuple(envs.state), tuple(state), exact=True)


def digest(seed, envs):
    digest = hashlib.sha256()
    images, _ = envs.reset(seed=seed)
    for action in np.random.default_rng(5).integers(0, 3, (100, envs.num_envs)):
        images, rewards, terminated, truncated, _ = envs.step(action)
        for array in (images, rewards, terminated, truncated):
            digest.update(array.tobytes())
    return digest.hexdigest()


def test_the_same_seed_gives_the_same_bytes():
    envs = DynamicObstaclesVectorEnv(16, random_start=True)
    first = digest(1, envs)
    assert digest(1, envs) == first == digest(1, DynamicObstaclesVectorEnv(16, random_start=True))
    assert digest(2, envs) != first


def test_kernels_compile_where_nothing_can_be_written(monkeypatch):
    monkeypatch.setattr(numba.config, "CACHE_LOCATOR_CLASSES", "ZipCacheLocator")  # which needs a zip archive
    with pytest.raises(RuntimeError, match="cannot cache"):
        numba.njit(cache=True)(abs_difference)
    assert kernels.compiled(abs_difference)(3, 5) == 2


def abs_difference(a, b):
    return abs(a - b)


# What is refused


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"size": 4}, "Task.size is 4; it must be an integer from 5 to 16."),
        ({"size": 17}, "Task.size is 17; it must be an integer from 5 to 16."),
        ({"n_obstacles": -1}, "Task.n_obstacles is -1; it must be an integer ≥ 0."),
        ({"n_obstacles": 6}, "Task.n_obstacles is 6; it must be an integer from 0 to 5."),
        ({"size": 5, "n_obstacles": 4}, "Task.n_obstacles is 4; it must be an integer from 0 to 3."),
        ({"max_steps": 0}, "Task.max_steps is 0; it must be an integer from 1 to 2147483647."),
        ({"max_steps": True}, "Task.max_steps is True; it must be an integer from 1 to 2147483647."),
    ],
)
def test_wrong_tasks(wrong, sentence):
    with pytest.raises(ValueError, match=re.escape(sentence)):
        Task(**wrong)
    with pytest.raises(ValueError, match=re.escape(sentence)):
        DynamicObstaclesVectorEnv(2, **wrong)


@pytest.mark.parametrize(("size", "most"), [(5, 3), (6, 4), (7, 4), (8, 5), (16, 9)])
def test_more_obstacles_are_refused_exactly_where_minigrid_changes_their_number(size, most):
    assert (
        Task(size, most).n_obstacles == DynamicObstaclesEnv(size=size, n_obstacles=most).n_obstacles == most
    )
    assert DynamicObstaclesEnv(size=size, n_obstacles=most + 1).n_obstacles != most + 1
    with pytest.raises(ValueError, match="n_obstacles"):
        Task(size, most + 1)


def test_unknown_env_ids_are_refused():
    for env_id in ("MiniGrid-Dynamic-Obstacles-9x9-v0", "MiniGrid-Empty-8x8-v0"):
        with pytest.raises(
            ValueError, match=r"env_id must be one of MiniGrid-Dynamic-Obstacles-16x16-v0, .*, not"
        ):
            Task.from_env_id(env_id)


@pytest.mark.parametrize(
    ("field", "value", "sentence"),
    [
        ("direction", [4], "direction must be 0 to 3"),
        ("step_count", [-1], "step_count must not be negative"),
        ("agent", [8], "agent must be a cell inside the walls"),
        ("agent", [255], "agent must be a cell inside the walls"),
        ("obstacles", [[10, 64, 12, 13]], "obstacles must be cells inside the walls and off the goal"),
        ("obstacles", [[10, 54, 12, 13]], "obstacles must be cells inside the walls and off the goal"),
        ("obstacles", [[10, 9, 12, 13]], "obstacles must be off the agent's cell"),
        ("obstacles", [[10, 11, 12, 10]], "obstacles must be on cells that differ"),
        ("obstacles", [[10, 11, 12]], "obstacles must have shape (batch, n_obstacles) = (1, 4), not (1, 3)."),
        ("direction", [0, 1], "direction must have shape (batch,) = (1,), not (2,)."),
    ],
)
def test_wrong_states(field, value, sentence):
    envs = DynamicObstaclesVectorEnv(1)
    good = GridState(
        np.array([9], np.uint8),
        np.array([0], np.uint8),
        np.array([[10, 11, 12, 13]], np.uint8),
        np.zeros(1, np.int32),
    )
    envs.state = good
    bad = good._replace(**{field: np.array(value, dtype=getattr(good, field).dtype)})
    with pytest.raises(ValueError, match=re.escape(sentence)):
        envs.state = bad
    with pytest.raises(ValueError, match=re.escape(sentence)):
        gridworld.step(Task(), bad, np.array([0]), np.random.default_rng(0))
    assert data_equivalence(tuple(envs.state), tuple(good), exact=True)


def test_wrong_kinds_of_state():
    envs = DynamicObstaclesVectorEnv(2)
    envs.reset(seed=0)
    with pytest.raises(TypeError, match=r"agent must be an array of uint8, not int64."):
        envs.state = envs.state._replace(agent=envs.state.agent.astype(np.int64))
    with pytest.raises(TypeError, match=r"step_count must be an array of int32, not list."):
        envs.state = envs.state._replace(step_count=[0, 0])
    with pytest.raises(ValueError, match=r"state must hold num_envs = 2 states, not 1."):
        envs.state = gridworld.reset(envs.task, 1, np.random.default_rng(0))


@pytest.mark.parametrize(
    ("actions", "error", "sentence"),
    [
        ([0, 3], ValueError, "actions must be 0 (left), 1 (right) or 2 (forward), not 3."),
        ([-1, 0], ValueError, "actions must be 0 (left), 1 (right) or 2 (forward), not -1."),
        ([0, 1, 2], ValueError, "actions must have shape (batch,) = (2,), not (3,)."),
        ([0.0, 1.0], TypeError, "actions must be whole numbers, not float64."),
        (["0", "1"], TypeError, "actions must be whole numbers, not <U1."),
    ],
)
def test_wrong_actions_change_nothing(actions, error, sentence):
    envs = DynamicObstaclesVectorEnv(2)
    envs.reset(seed=0)
    before = envs.state
    with pytest.raises(error, match=re.escape(sentence)):
        envs.step(actions)
    assert data_equivalence(tuple(envs.state), tuple(before), exact=True)


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"num_envs": 0}, "num_envs is 0; it must be an integer ≥ 1."),
        (
            {"autoreset_mode": "Never"},
            "autoreset_mode must be one of 'NextStep', 'SameStep', 'Disabled', not 'Never'.",
        ),
        ({"render_mode": "human"}, "render_mode must be None or 'rgb_array', not 'human'."),
    ],
)
def test_wrong_environments(wrong, sentence):
    with pytest.raises(ValueError, match=re.escape(sentence)):
        DynamicObstaclesVectorEnv(**wrong)


def test_use_out_of_order():
    envs = DynamicObstaclesVectorEnv(2, max_steps=1, autoreset_mode=AutoresetMode.DISABLED)
    with pytest.raises(gymnasium.error.ResetNeeded, match=r"Call reset\(\) once"):
        envs.step([0, 0])
    with pytest.raises(gymnasium.error.ResetNeeded, match=r"Call reset\(\) once"):
        envs.reset(options={"reset_mask": np.array([True, False])})
    envs.reset(seed=0)
    envs.step([0, 0])
    with pytest.raises(gymnasium.error.ResetNeeded, match=r"Environments \[0, 1\] are over"):
        envs.step([0, 0])
    with pytest.raises(ValueError, match=r"options may hold 'reset_mask', not 'state'."):
        envs.reset(options={"state": 0})
    for mask in ([True, False], np.array([1, 0]), np.array([True]), np.array([False, False])):
        with pytest.raises(
            ValueError, match=r"reset_mask must be a boolean array of shape \(2,\), not all False"
        ):
            envs.reset(options={"reset_mask": mask})


def test_too_many_observations_are_counted_not_listed():
    cells = {(x, y) for x in range(1, 15) for y in range(1, 15)} - {(14, 14)}
    views = {}  # what each pose sees of the empty 16×16 room, and how many of the cells seen are free
    for (x, y), (dx, dy) in itertools.product(sorted(cells), [(1, 0), (0, 1), (-1, 0), (0, -1)]):
        view = tuple(
            (x + f * dx - s * dy, y + f * dy + s * dx)
            for f in range(7)
            for s in range(-3, 4)
            if (f, s) != (0, 0)
        )
        look = tuple("free" if c in cells else "goal" if c == (14, 14) else "wall" for c in view)
        views[look] = look.count("free")
    total = sum(math.comb(seen, k) for seen in views.values() for k in range(max(0, 9 - 194 + seen), 9))
    with pytest.raises(ValueError, match=f"makes {total:,} distinct observations, more than the 10,000,000"):
        gridworld.all_observations(16, 8)
