"""A model of several timesteps: windows, attention by lag, exchanges, against plain loops and a model built to look."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from planted import scattered

from dtbook.analysis import long_context
from dtbook.artifacts import ArtifactStore
from dtbook.gridworld import DynamicObstaclesVectorEnv
from dtbook.model import DecisionTransformer, DTConfig
from dtbook.pipeline.engine import Job
from dtbook.pipeline.replication import LONG_CONTEXT, REPLICATION_ROWS, LongContext
from dtbook.training import TrainConfig
from dtbook.trajectories import RecordEpisodes

N_TIMESTEPS = 4
CFG = DTConfig(d_model=12, d_head=5, d_mlp=16, n_timesteps=N_TIMESTEPS, max_steps=40)
CONFIG = TrainConfig(steps=4, batch_size=8, evaluation_episodes=0, checkpoint_every=2)


@pytest.fixture(scope="module")
def data():
    """Random play in a small room, with episodes of all three kinds of return."""
    recorder = RecordEpisodes(DynamicObstaclesVectorEnv(32, 5, 1, 12, True))
    recorder.reset(seed=0)
    rng = np.random.default_rng(0)
    for _ in range(200):
        recorder.step(rng.choice(3, 32, p=[0.4, 0.4, 0.2]))
    return recorder.trajectories()


@pytest.fixture(scope="module")
def batch(data):
    return long_context.windows(data, N_TIMESTEPS, 40, seed=2)


@pytest.fixture(scope="module")
def model():
    model = scattered(CFG)
    with torch.no_grad():
        model.W_E_state.mul_(0.1)  # cells are numbers up to 8, and there are 147 of them
    return model


def test_windows_are_whole_pieces_of_episodes(data, batch):
    assert len(batch.states) == 40
    assert batch.real.all()
    assert (batch.timesteps.diff(dim=1) == 1).all()
    assert set(np.sign(batch.rtgs[:, 0].tolist())) == {-1, 0, 1}
    ends = {}  # each window is found again, step by step, in an episode of its return
    for start, length, episode_return in zip(data.episode_starts, data.lengths, data.returns, strict=True):
        images = data.observations(np.arange(start, start + length))
        for t in range(N_TIMESTEPS - 1, length):
            first = t - N_TIMESTEPS + 1
            key = images[first : t + 1].tobytes(), first, np.float32(episode_return)
            ends.setdefault(key, []).append(data.actions[start + first : start + t + 1].tolist())
    for k in range(40):
        key = batch.states[k].numpy().tobytes(), int(batch.timesteps[k, 0]), np.float32(batch.rtgs[k, 0])
        assert batch.actions[k].tolist() in ends[key]


def test_windows_longer_than_any_episode_are_refused(data):
    with pytest.raises(ValueError, match=r"n_timesteps is 13; it must be at most .* 12"):
        long_context.windows(data, 13, 5)


def test_attention_by_lag_is_the_last_state_tokens(model, batch, monkeypatch):
    monkeypatch.setattr(long_context, "CHUNK", 7)
    table = long_context.looks_back(long_context.attention(model, batch))
    assert len(table) == 2 * 11
    np.testing.assert_allclose(table.groupby("head")["mean"].sum(), 1)
    by_token = table.set_index(["head", "token", "lag"])
    _, cache = model.run_with_cache(*batch[:3], batch.actions[:, :-1])
    for kind, pos, lag in (("RTG", 0, 3), ("state", 1, 3), ("action", 2, 3), ("RTG", 9, 0), ("state", 10, 0)):
        found = by_token.loc["L0H1", kind, lag]
        values = cache["pattern", 0][:, 1, -1, pos].numpy()
        expected = [values.mean(), *np.quantile(values, [0.05, 0.95])]
        assert found[["mean", "low", "high"]].tolist() == pytest.approx(expected, abs=1e-12)
    assert not any(hook.has_hooks() for hook in model.hook_dict.values())


def test_names_count_from_the_last_timestep():
    assert long_context.token_names(8) == ["R-2", "s-2", "a-2", "R-1", "s-1", "a-1", "R0", "s0"]


@pytest.mark.parametrize("part", long_context.EXCHANGES)
def test_an_exchange_takes_its_part_and_leaves_the_rest(batch, part):
    before = [value.clone() for value in batch]
    found = long_context.exchange(batch, part)
    for k in range(len(batch.states)):  # window 0 gets what the last has
        expected = {name: value[k].clone() for name, value in batch._asdict().items()}
        if part == "RTG":
            expected["rtgs"] = batch.rtgs[k - 1]
        elif part == "last state":
            expected["states"][-1] = batch.states[k - 1, -1]
        elif part == "earlier states":
            expected["states"][:-1] = batch.states[k - 1, :-1]
        else:
            expected["actions"][:-1] = batch.actions[k - 1, :-1]
        for name, value in expected.items():
            assert (getattr(found, name)[k] == value).all(), (name, k)
    assert all((old == new).all() for old, new in zip(before, batch, strict=True))


def test_an_unknown_exchange_is_named(batch):
    with pytest.raises(ValueError, match="part is 'actions'; it must be one of 'RTG', 'earlier states'"):
        long_context.exchange(batch, "actions")


@torch.no_grad()
def test_what_cannot_be_read_does_not_move_the_action(model, batch):
    distances = long_context.moved(model, batch)
    own = model(*batch[:3], batch.actions[:, :-1])[:, -1].softmax(-1)
    other = model(batch.states, batch.rtgs.roll(1, 0), batch.timesteps, batch.actions[:, :-1])[:, -1]
    assert distances["RTG"] == pytest.approx(float((other.softmax(-1) - own).abs().sum(1).mean() / 2))
    assert (distances > 1e-4).all()
    deaf = DecisionTransformer(CFG).double()
    deaf.load_state_dict(model.state_dict())
    deaf.blocks[0].attn.W_O.zero_()  # without heads the last state token is alone
    alone = long_context.moved(deaf, batch)
    assert alone[["RTG", "earlier states", "earlier actions"]].tolist() == [0, 0, 0]
    assert alone["last state"] > 1e-3


def test_the_model_is_made_once_of_the_references_trajectories(tmp_path, data):
    store = ArtifactStore(tmp_path)
    with store.write(
        "seed_10/trajectories.npz", stage="collection", code=["dtbook.trajectories.collection"]
    ) as path:
        data.save(path)

    def job(config):
        return Job(
            REPLICATION_ROWS["long context"], store, recipe=LongContext(replace(CFG, max_steps=12), config)
        )

    job(CONFIG).ensure()
    entry, made = store.entries()[LONG_CONTEXT], store.path(LONG_CONTEXT)
    trajectories = "seed_10/trajectories.npz"
    assert entry["parameters"]["from"] == {trajectories: store.entries()[trajectories]["sha256"]}
    assert entry["parameters"]["model"]["n_timesteps"] == N_TIMESTEPS
    assert json.loads((made / "config.json").read_text())["cfg"]["n_timesteps"] == N_TIMESTEPS
    assert list((tmp_path / ".running").iterdir()) == [], "nothing of the training is left"
    weights = made / "model.safetensors"
    stamp = weights.stat().st_mtime_ns
    assert job(CONFIG).ensure() is None
    assert weights.stat().st_mtime_ns == stamp
    assert job(replace(CONFIG, steps=2)).ensure() > 0
    assert DecisionTransformer.from_pretrained(store.path(LONG_CONTEXT)).cfg.n_timesteps == N_TIMESTEPS
    assert weights.stat().st_mtime_ns != stamp
