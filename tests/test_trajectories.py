"""Columns of episodes: what is recorded is what happened, and files are whole or refused."""

import json
import os
import re

import gymnasium
import numpy as np
import pytest
from gymnasium.vector import AutoresetMode
from gymnasium.wrappers.vector import RecordEpisodeStatistics

from dtbook import gridworld
from dtbook.gridworld import DynamicObstaclesVectorEnv, Task
from dtbook.trajectories import EPISODE_COLUMNS, STEP_COLUMNS, RecordEpisodes, Trajectories, play

TASK = Task(size=5, n_obstacles=2, max_steps=40)


def wander(rng):
    return lambda images, episodes, timesteps: rng.integers(3, size=len(images))


@pytest.fixture(scope="module")
def data():
    """A wanderer, and one who only turns on the spot and so survives."""
    rng = np.random.default_rng(3)
    wandered = play(TASK, wander(rng), 780, rng, checkpoint=7, temperature=0.5)
    turned = play(TASK, lambda images, episodes, timesteps: np.ones(len(images)), 20, rng, checkpoint=8)
    return Trajectories.concatenate([wandered, turned])


def same(a, b):
    names = (*STEP_COLUMNS, *EPISODE_COLUMNS, "episode_starts")
    return a.task == b.task and all(np.array_equal(getattr(a, n), getattr(b, n)) for n in names)


def test_each_row_follows_minigrids_rules(data):
    """Rewards and endings recomputed from what minigrid itself would show, row by row."""
    rows = np.arange(len(data.actions))
    front = data.observations(rows)[:, 3, 5, 0]
    crash = (data.actions == 2) & ((front == 2) | (front == 6))
    last = np.zeros(len(rows), dtype=bool)
    last[data.episode_starts + data.lengths - 1] = True
    assert np.array_equal(data.rewards == -1, crash)
    assert last[crash].all()
    success = data.rewards > 0
    assert (front[success] == 8).all()
    expected = 1 - 0.9 * (data.timesteps(rows)[success] + 1) / TASK.max_steps
    np.testing.assert_allclose(data.rewards[success], expected, rtol=1e-6)
    assert np.array_equal(data.truncated, (data.lengths == TASK.max_steps) & (data.returns == 0))
    assert {-1, 0, 1} == set(np.sign(data.returns)), "the sample should hold all three classes"


def test_observations_are_minigrids(data):
    rows = np.random.default_rng(0).integers(len(data.actions), size=50)
    images = data.observations(rows)
    for image, row in zip(images, rows, strict=True):
        env = gridworld.to_minigrid(TASK, data.states(np.array([row])))
        assert np.array_equal(env.unwrapped.gen_obs()["image"], image)


def test_rows_of_an_episode_follow_each_other(data):
    inside = np.setdiff1d(np.arange(1, len(data.actions)), data.episode_starts)
    turned = (data.direction[inside].astype(int) - data.direction[inside - 1]) % 4
    by_action = np.array([3, 1, 0])[data.actions[inside - 1]]
    assert np.array_equal(turned, by_action)
    final_turn = (
        data.final_direction.astype(int) - data.direction[data.episode_starts + data.lengths - 1]
    ) % 4
    last_action = data.actions[data.episode_starts + data.lengths - 1]
    assert np.array_equal(final_turn, np.array([3, 1, 0])[last_action])


def test_selecting_and_joining_episodes(data):
    even, odd = data.episodes(np.arange(0, 800, 2)), data.episodes(np.arange(800) % 2 == 1)
    joined = Trajectories.concatenate([even, odd])
    back = joined.episodes(np.argsort(np.r_[np.arange(0, 800, 2), np.arange(1, 800, 2)]))
    assert same(back, data)
    with pytest.raises(ValueError, match="one task"):
        Trajectories.concatenate(
            [even, play(Task(), wander(np.random.default_rng(0)), 2, np.random.default_rng(0))]
        )


def test_a_selection_that_is_none_of_these_episodes_is_refused(data):
    for selection, sentence in (
        (np.ones(799, bool), "indices or a mask of all 800 episodes, not bool of shape (799,)"),
        (np.array([3, 800]), "selection must name episodes below 800, not 800"),
        (np.array([-801]), "selection must name episodes below 800, not -801"),
    ):
        with pytest.raises(ValueError, match=re.escape(sentence)):
            data.episodes(selection)
    # the type checker that runs with the tests may be the first to notice
    with pytest.raises((ValueError, TypeError), match="selection"):
        data.episodes(np.ones(3))
    assert same(data.episodes(np.array([-1, 3])), data.episodes(np.array([799, 3])))
    assert not len(data.episodes(np.zeros(800, bool)).lengths)


def test_file_round_trip_and_same_bytes(data, tmp_path):
    data.save(tmp_path / "a.npz")
    data.save(tmp_path / "b.npz")
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()
    assert same(Trajectories.load(tmp_path / "a.npz"), data)


@pytest.mark.parametrize("damage", ["truncate", "flip", "empty", "pickle", "pickled file"])
def test_a_damaged_file_is_refused_by_name(data, tmp_path, damage):
    path = tmp_path / "damaged.npz"
    data.save(path)
    whole = path.read_bytes()
    if damage == "truncate":
        path.write_bytes(whole[: len(whole) // 2])
    elif damage == "flip":
        middle = len(whole) // 2
        path.write_bytes(whole[:middle] + bytes([whole[middle] ^ 0xFF]) + whole[middle + 1 :])
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "pickled file":
        path.write_bytes(b"\x80\x04K\x01.")
    else:
        np.savez(path, task=np.array([{"size": 5}], dtype=object))
    with pytest.raises(ValueError, match=r"damaged\.npz is not a whole trajectory file") as caught:
        Trajectories.load(path)
    assert "allow_pickle" not in str(caught.value)


def test_numbers_that_are_not_finite_are_neither_saved_nor_loaded(data, tmp_path):
    broken = data.episodes(np.arange(2))
    broken.save(tmp_path / "whole.npz")
    broken.rewards[1] = np.nan
    with pytest.raises(ValueError, match="rewards"):
        broken.save(tmp_path / "broken.npz")
    assert [path.name for path in tmp_path.iterdir()] == ["whole.npz"]
    columns = dict(np.load(tmp_path / "whole.npz")) | {"rewards": broken.rewards}
    np.savez(tmp_path / "broken.npz", **columns)
    with pytest.raises(ValueError, match=r"broken\.npz is not a whole trajectory file .*rewards"):
        Trajectories.load(tmp_path / "broken.npz")


def test_columns_that_do_not_fit_are_named(data):
    columns = {n: getattr(data, n) for n in (*STEP_COLUMNS, *EPISODE_COLUMNS, "episode_starts")}
    # the type checker that runs with the tests may be the first to notice
    with pytest.raises((ValueError, TypeError), match="rewards"):
        Trajectories(TASK, **(columns | {"rewards": data.rewards[:3]}))
    with pytest.raises(ValueError, match=r"episode_starts is .*, rising from 0 and below the"):
        Trajectories(TASK, **(columns | {"episode_starts": data.episode_starts + 1}))
    with pytest.raises(ValueError, match="actions is 5; it must be from 0 to 2"):
        Trajectories(TASK, **(columns | {"actions": data.actions + 3}))
    with pytest.raises(ValueError, match="episodes is -4; it must be an integer ≥ 1"):
        play(TASK, wander(np.random.default_rng(0)), -4, np.random.default_rng(0))


def columns_of(data):
    return {n: getattr(data, n) for n in (*STEP_COLUMNS, *EPISODE_COLUMNS, "episode_starts")}


@pytest.mark.parametrize("dtype", [np.int64, np.int16, np.float64, list])
def test_columns_of_other_types_are_cast(as_users_run_it, data, dtype):
    other = {name: c.tolist() if dtype is list else c.astype(dtype) for name, c in columns_of(data).items()}
    if dtype in (np.int64, np.int16):
        other |= {
            name: getattr(data, name) for name in ("rewards", "temperature", "checkpoint", "episode_starts")
        }
    again = Trajectories(TASK, **other)
    for name, column in columns_of(data).items():
        taken = getattr(again, name)
        assert taken.dtype == column.dtype, name
        np.testing.assert_array_equal(taken, column)


@pytest.mark.parametrize(
    ("column", "change", "sentence"),
    [
        ("actions", lambda a: a - 0.5, "actions is -0.5; it must be a number that uint8 holds"),
        ("actions", lambda a: a.astype(int) - 1, "actions is -1; it must be a number that uint8 holds"),
        (
            "obstacles",
            lambda a: a[:, :1],
            "obstacles has shape (5233, 1); it must be (steps = 5233, n_obstacles = 2).",
        ),
        ("rewards", lambda a: a * np.nan, "rewards is nan; it must be a number that float32 holds"),
        ("truncated", lambda a: a[:-1], "; it must be (episodes = "),
        ("episode_starts", lambda a: a[1:], "it must be the first row of each episode, rising from 0"),
    ],
)
def test_wrong_columns_are_one_sentence(as_users_run_it, data, column, change, sentence):
    columns = columns_of(data)
    columns[column] = change(columns[column])
    if column == "episode_starts":  # the others have a row for each episode
        columns |= {name: columns[name][1:] for name in EPISODE_COLUMNS}
    with pytest.raises(ValueError, match=re.escape(sentence)) as caught:
        Trajectories(TASK, **columns)
    assert "\n" not in str(caught.value)


def test_actions_of_a_policy_that_are_none_are_refused():
    for action, sentence in (
        (0.5, "actions is 0.5; it must be"),
        (-1, "actions is -1; it must be"),
        (3, "not 3"),
    ):
        with pytest.raises(ValueError, match=sentence):
            play(
                TASK,
                lambda images, *_, action=action: np.full(len(images), action),
                2,
                np.random.default_rng(0),
            )


def test_playing_is_deterministic(tmp_path):
    for name in "ab":
        rng = np.random.default_rng(11)
        play(TASK, wander(rng), 50, rng).save(tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


LANES = 6


def recorder(mode=AutoresetMode.SAME_STEP):
    return RecordEpisodes(DynamicObstaclesVectorEnv(LANES, 5, 2, max_steps=25, autoreset_mode=mode))


class Gatherer:
    """Gathers episodes step by step from what an environment returns; `reset` breaks off those that are running."""

    def __init__(self, env):
        self.env, self.rng, self.ended = env, np.random.default_rng(2), []

    def reset(self, rows=range(LANES), **how):
        self.images, _ = self.env.reset(**how)
        self.running = [
            [] if i in rows else steps for i, steps in enumerate(getattr(self, "running", [()] * LANES))
        ]

    def wander(self, steps):
        for _ in range(steps):
            over = np.array([steps is None for steps in self.running])
            if over.any() and self.env.metadata["autoreset_mode"] == AutoresetMode.DISABLED:
                self.reset(np.flatnonzero(over), options={"reset_mask": over})
            self.step(self.rng.integers(3, size=LANES))

    def step(self, actions):
        after, rewards, terminated, truncated, infos = self.env.step(actions)
        done = terminated | truncated
        for i in range(LANES):
            if self.running[i] is None:  # NEXT_STEP: this step has only reset
                self.running[i] = []
                continue
            self.running[i].append((self.images[i], actions[i], rewards[i]))
            if done[i]:
                same_step = self.env.metadata["autoreset_mode"] == AutoresetMode.SAME_STEP
                final = infos["final_obs"][i] if same_step else after[i]
                self.ended.append((self.running[i], final, truncated[i] and not terminated[i]))
                self.running[i] = [] if same_step else None
        self.images = after


def train_twice(gatherer):
    for seed in (5, 6):
        gatherer.reset(seed=seed)
        gatherer.wander(60)


def reset_some(gatherer):
    for _ in range(40):
        gatherer.wander(5)
        mask = gatherer.rng.integers(2, size=LANES) == 1
        if mask.any():
            gatherer.reset(np.flatnonzero(mask), options={"reset_mask": mask})


def reset_behind_its_back(gatherer):
    for _ in range(20):
        gatherer.wander(5)
        gatherer.env.env.reset()
        gatherer.reset()


WAYS = {
    "as it comes": lambda gatherer: gatherer.wander(200),
    "two trainings": train_twice,
    "resets of some": reset_some,
    "resets of what is wrapped": reset_behind_its_back,
}


@pytest.mark.parametrize("mode", AutoresetMode)
@pytest.mark.parametrize("way", WAYS)
def test_recording_keeps_what_the_environment_gave(way, mode):
    """Against episodes gathered here, step by step, from what the vector environment returns."""
    env = recorder(mode)
    gatherer = Gatherer(env)
    gatherer.reset(seed=5)
    WAYS[way](gatherer)
    recorded = env.trajectories()
    assert len(recorded.lengths) == len(gatherer.ended) > 20
    for e, (steps, final, truncated) in enumerate(gatherer.ended):
        rows = recorded.episode_starts[e] + np.arange(recorded.lengths[e])
        assert np.array_equal(recorded.observations(rows), np.stack([s[0] for s in steps]))
        assert np.array_equal(recorded.actions[rows], [s[1] for s in steps])
        np.testing.assert_array_equal(recorded.rewards[rows], np.float32([s[2] for s in steps]))
        assert recorded.truncated[e] == truncated
        last = gridworld.GridState(
            recorded.final_agent[[e]],
            recorded.final_direction[[e]],
            recorded.final_obstacles[[e]],
            np.zeros(1, np.int32),
        )
        assert np.array_equal(gridworld.observe(last, 5)[0], final)
    assert recorded.checkpoint.max() <= env.steps


def test_what_has_no_beginning_or_no_end_is_not_recorded():
    env = recorder()
    with pytest.raises(ValueError, match="no episode has ended yet: step the recorder"):
        env.trajectories()
    env.env.reset(seed=0)
    ahead = np.full(LANES, 2)
    env.env.step(np.ones(LANES, int))
    late = env.env.state  # every episode has gone on without the recorder
    while not np.any(env.step(ahead)[2]):
        pass
    with pytest.raises(ValueError, match="no episode has ended yet"):
        env.trajectories()
    for _ in range(60):
        env.step(ahead)
        env.env.state = late  # and is begun in its middle
    with pytest.raises(ValueError, match="no episode has ended yet"):
        env.trajectories()


def test_a_step_that_is_refused_leaves_no_row():
    env = recorder()
    env.reset(seed=5)
    for actions in (np.full(LANES, 3), np.ones(LANES + 1, int)):
        with pytest.raises(ValueError, match="actions"):
            env.step(actions)
    gatherer = Gatherer(env)
    gatherer.reset(seed=5)
    gatherer.wander(50)
    assert len(env.trajectories().lengths) == len(gatherer.ended)


def test_only_the_environment_itself_is_recorded():
    inside = DynamicObstaclesVectorEnv(2)
    for env in (RecordEpisodeStatistics(inside), RecordEpisodes(inside)):
        with pytest.raises(
            ValueError, match=f"env must be a Dynamic.* itself, not {type(env).__name__}: put other"
        ):
            RecordEpisodes(env)


@pytest.fixture
def minari(tmp_path, monkeypatch):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    return pytest.importorskip("minari")


def test_minari_round_trip(data, tmp_path, minari):
    some = data.episodes(np.arange(40))
    some.to_minari("dtbook/wander-v0", algorithm_name="uniform", author="dtbook")
    dataset = minari.load_dataset("dtbook/wander-v0")
    assert dataset.total_steps == len(some.actions)
    for e, episode in enumerate(dataset.iterate_episodes()):
        rows = some.episode_starts[e] + np.arange(some.lengths[e])
        assert np.array_equal(episode.observations[:-1], some.observations(rows))
        assert np.array_equal(episode.actions, some.actions[rows])
        assert episode.rewards.sum() == pytest.approx(some.returns[e])
        assert bool(episode.truncations[-1]) == some.truncated[e]
        assert bool(episode.terminations[-1]) != some.truncated[e]
    assert same(Trajectories.from_minari(dataset), some)
    assert os.listdir(tmp_path)


def test_parts_of_a_dataset_and_several_in_one_are_read_back(data, minari):
    a, b = data.episodes(np.arange(30)), data.episodes(np.arange(770, 800))
    a.to_minari("a-v0", description="Wanderers, as we like them.")
    b.to_minari("b-v0", author="dtbook")
    loaded = [minari.load_dataset(name) for name in ("a-v0", "b-v0")]
    assert loaded[0].storage.metadata["description"] == "Wanderers, as we like them."
    combined = minari.combine_datasets(loaded, "both-v0")
    assert same(Trajectories.from_minari(combined), Trajectories.concatenate([a, b]))
    first, last = (
        Trajectories.from_minari(part) for part in minari.split_dataset(combined, [20, 40], seed=1)
    )
    assert sorted([*first.lengths, *last.lengths]) == sorted([*a.lengths, *b.lengths])
    died = loaded[0].filter_episodes(lambda episode: bool((episode.rewards < 0).any()))
    assert same(Trajectories.from_minari(died), a.episodes(a.returns < 0))
    nothing = loaded[0].filter_episodes(lambda episode: False)
    with pytest.raises(ValueError, match="dataset must have episodes of one task, but 'a-v0' has those of 0"):
        Trajectories.from_minari(nothing)


def test_a_dataset_of_another_hand_or_of_two_tasks_is_one_sentence(data, minari):
    some, rng = data.episodes(np.arange(3)), np.random.default_rng(0)
    play(Task(size=6, n_obstacles=2, max_steps=40), wander(rng), 3, rng).to_minari("six-v0")
    some.to_minari("five-v0")
    both = minari.combine_datasets([minari.load_dataset(name) for name in ("five-v0", "six-v0")], "both-v0")
    with pytest.raises(
        ValueError, match="dataset must have episodes of one task, but 'both-v0' has those of 2"
    ):
        Trajectories.from_minari(both)
    for name, infos in (("bare-v0", None), ("other-v0", {"agent": np.zeros(3)})):
        foreign = minari.create_dataset_from_buffers(
            name,
            [minari.data_collector.EpisodeBuffer(
                observations=np.zeros((3, 2), np.float32), actions=[0, 1], rewards=[0.0, 1.0],
                terminations=[False, True], truncations=[False, False], infos=infos)],
            observation_space=gymnasium.spaces.Box(0, 1, (2,)),
            action_space=gymnasium.spaces.Discrete(2),
            description="CartPole",
        )  # fmt: skip
        with pytest.raises(
            ValueError, match=f"hold states and their task, as to_minari writes them, but '{name}' does not"
        ):
            Trajectories.from_minari(foreign)


def test_a_dataset_that_fails_on_its_way_is_taken_away_and_one_that_was_there_stays(data, minari, tmp_path):
    some = data.episodes(np.arange(3))
    for name, metadata in (
        ("a-v0", {"description": object()}),
        ("a-v0", {"auhtor": "dtbook"}),
        ("No Name", {}),
    ):
        with pytest.raises((TypeError, ValueError)):
            some.to_minari(name, **metadata)
        assert not os.listdir(tmp_path)
    some.to_minari("a-v0")
    with pytest.raises(ValueError, match="a-v0 already exists"):
        data.to_minari("a-v0")
    assert same(Trajectories.from_minari(minari.load_dataset("a-v0")), some)


def test_datasets_whose_description_alone_says_the_task_are_read_and_others_refused(
    data, minari, monkeypatch
):
    """As `to_minari` wrote them before, and as combining left them."""
    some, episode = data.episodes(np.arange(3)), Trajectories._minari_episode

    def without(self, e):
        written = episode(self, e)
        del written["infos"]["task"]
        return written

    monkeypatch.setattr(Trajectories, "_minari_episode", without)
    dataset = some.to_minari("former-v0")
    assert json.loads(dataset.storage.metadata["description"])["size"] == 5
    assert same(Trajectories.from_minari(dataset), some)
    combined = minari.combine_datasets([dataset, some.to_minari("words-v0")], "combined-v0")
    for untold in (
        combined,
        some.to_minari("told-v0", description="told"),
        some.to_minari("n-v0", description="7"),
    ):
        with pytest.raises(ValueError, match="dataset must hold states and their task"):
            Trajectories.from_minari(untold)
