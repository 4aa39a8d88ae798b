"""Columns of episodes: what is recorded is what happened, and files are whole or refused."""

import os
import re

import numpy as np
import pytest

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


def test_file_round_trip_and_same_bytes(data, tmp_path):
    data.save(tmp_path / "a.npz")
    data.save(tmp_path / "b.npz")
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()
    assert same(Trajectories.load(tmp_path / "a.npz"), data)


@pytest.mark.parametrize("damage", ["truncate", "flip", "empty", "pickle"])
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
    else:
        np.savez(path, task=np.array([{"size": 5}], dtype=object))
    with pytest.raises(ValueError, match=r"damaged\.npz is not a whole trajectory file"):
        Trajectories.load(path)


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


def test_recording_keeps_what_the_environment_gave():
    """Against episodes gathered here, step by step, from what the vector environment returns."""
    env = RecordEpisodes(DynamicObstaclesVectorEnv(6, size=5, n_obstacles=2, max_steps=25))
    images, _ = env.reset(seed=5)
    rng, running, ended = np.random.default_rng(2), [[] for _ in range(6)], []
    for _ in range(200):
        actions = rng.integers(3, size=6)
        after, rewards, terminated, truncated, infos = env.step(actions)
        for i in range(6):
            running[i].append((images[i], actions[i], rewards[i]))
            if terminated[i] or truncated[i]:
                ended.append((running[i], infos["final_obs"][i], truncated[i] and not terminated[i]))
                running[i] = []
        images = after
    recorded = env.trajectories()
    assert len(recorded.lengths) == len(ended)
    for e, (steps, final, truncated) in enumerate(ended):
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
    assert recorded.checkpoint.max() <= 200 * 6


def test_minari_round_trip(data, tmp_path, monkeypatch):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    minari = pytest.importorskip("minari")
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
