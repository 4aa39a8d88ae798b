"""Training: what is drawn, one optimiser step by hand, and a kill that leaves no trace in the result."""

import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from forked import Fork

from dtbook import training
from dtbook.gridworld import Task
from dtbook.model import DecisionTransformer, DTConfig
from dtbook.training import Sampler, TrainConfig, train
from dtbook.trajectories import Trajectories, play

TASK = Task(size=5, n_obstacles=2, max_steps=40)
SMALL = {"d_model": 32, "d_head": 16, "d_mlp": 32, "max_steps": 40}


@pytest.fixture(scope="module")
def data():
    """Episodes of a wanderer and of one who only turns: all three classes of return."""
    rng = np.random.default_rng(3)
    wanderer = play(TASK, lambda images, e, t: rng.integers(3, size=len(images)), 600, rng)
    turner = play(TASK, lambda images, e, t: np.zeros(len(images)), 20, rng)
    return Trajectories.concatenate([wanderer, turner])


def rows_drawn(data, config, context=1, batches=40):
    sampler = Sampler(data, context, config)
    return np.concatenate([sampler.rows(np.random.default_rng([0, i])) for i in range(batches)])


def test_classes_are_drawn_equally_and_steps_uniformly_within(data):
    rows = rows_drawn(data, TrainConfig(last_step_share=0.0))
    episode = np.searchsorted(data.episode_starts, rows, side="right") - 1
    counts = np.bincount(data.classes[episode], minlength=3)
    expected = len(rows) / 3
    assert (np.abs(counts - expected) < 4 * np.sqrt(expected * 2 / 3)).all()
    steps_of = np.repeat(data.classes, data.lengths)
    for c in range(3):  # by decile of the class's steps
        members = np.flatnonzero(steps_of == c)
        decile = np.searchsorted(members, rows[steps_of[rows] == c]) * 10 // len(members)
        share = np.bincount(decile, minlength=10) / counts[c]
        assert (np.abs(share - 0.1) < 4 * np.sqrt(0.09 / counts[c]) + 10 / len(members)).all()


def test_unbalanced_drawing_follows_the_data(data):
    rows = rows_drawn(data, TrainConfig(last_step_share=0.0, balance_classes=False))
    drawn = np.bincount(np.repeat(data.classes, data.lengths)[rows], minlength=3) / len(rows)
    there = np.bincount(data.classes, data.lengths, minlength=3) / len(data.actions)
    assert (np.abs(drawn - there) < 4 * np.sqrt(there * (1 - there) / len(rows))).all()


@pytest.mark.parametrize("share", [0.0, 0.1, 1.0])
def test_share_of_last_steps(data, share):
    rows = rows_drawn(data, TrainConfig(last_step_share=share, balance_classes=False))
    last = np.isin(rows, data.episode_starts + data.lengths - 1).mean()
    natural = len(data.lengths) / len(data.actions)
    expected = share + (1 - share) * natural
    assert abs(last - expected) < 4 * np.sqrt(expected * (1 - expected) / len(rows)) + 1e-9


@pytest.mark.parametrize("context", [1, 3])
def test_batches_of_steps_are_those_drawn_one_by_one(data, context, monkeypatch):
    monkeypatch.setattr(training, "LOOKED_UP_AT_ONCE", 3)
    sampler = Sampler(data, context, TrainConfig(batch_size=8))
    together = list(sampler.batches(4, 2, 9))
    assert len(together) == 7
    for step, batch in enumerate(together, 2):
        alone = sampler.batch(np.random.default_rng([4, step]))
        assert all(torch.equal(a, b) for a, b in zip(batch, alone, strict=True))


@pytest.mark.parametrize("context", [1, 3])
def test_windows_hold_consecutive_steps_of_one_episode(data, context):
    sampler = Sampler(data, context, TrainConfig(batch_size=256))
    batch = sampler.batch(np.random.default_rng(5))
    ends = sampler.rows(np.random.default_rng(5))
    for i, end in enumerate(ends):
        episode = np.searchsorted(data.episode_starts, end, side="right") - 1
        first = max(end - context + 1, data.episode_starts[episode])
        n = end - first + 1
        rows = np.arange(first, end + 1)
        assert batch.real[i].tolist() == [True] * n + [False] * (context - n)
        assert np.array_equal(batch.states[i, :n], data.observations(rows))
        assert np.array_equal(batch.actions[i, :n], data.actions[rows])
        assert np.array_equal(batch.timesteps[i, :n], rows - data.episode_starts[episode])
        assert (batch.rtgs[i].numpy() == data.returns[episode]).all()


def test_the_posts_settings_are_the_originals():
    """As read from its script and its `train.py`; the rate neither rises nor falls."""
    config = TrainConfig.post()
    assert {config.learning_rate(step) for step in (0, 1, 35_000, 69_999)} == {1e-4}
    assert (config.steps, config.batch_size, config.optimizer) == (70_000, 128, "adam")
    assert (config.weight_decay, config.last_step_share, config.balance_classes) == (1e-3, 0.1, False)


@pytest.mark.parametrize("optimizer", ["adam", "adamw"])
def test_two_steps_against_the_update_written_out(data, optimizer):
    """Adam with coupled L2, and AdamW, from their papers' formulas in float64 (Kingma & Ba; Loshchilov & Hutter)."""
    config = TrainConfig(
        steps=2, batch_size=64, optimizer=optimizer, weight_decay=0.1, evaluation_episodes=0, lr=1e-2
    )
    result = train(data, DTConfig(**SMALL), config, seed=7, progress=False)
    model = DecisionTransformer(DTConfig(**SMALL), seed=7).double()
    sampler, moments = Sampler(data, 1, config), {n: (0.0, 0.0) for n, _ in model.named_parameters()}
    for step, batch in enumerate(sampler.batches(7, 0, 2)):
        log_probs = model(batch.states, batch.rtgs.double(), batch.timesteps)[:, 0].log_softmax(-1)
        loss = -log_probs[torch.arange(64), batch.actions[:, 0]].mean()
        model.zero_grad()
        loss.backward()
        lr = 1e-2 * (step + 1) / 100 * 0.5 * (1 + np.cos(np.pi * step / 2))
        assert result.curve.loc[step, "loss"] == pytest.approx(loss.item(), rel=1e-5)
        for name, p in model.named_parameters():
            grad = torch.zeros_like(p) if p.grad is None else p.grad
            if p.grad is None:
                continue
            if optimizer == "adam":
                grad = grad + 0.1 * p.data
            else:
                p.data -= lr * 0.1 * p.data
            m, v = (
                b * old + (1 - b) * g
                for b, old, g in zip((0.9, 0.999), moments[name], (grad, grad**2), strict=True)
            )
            moments[name] = (m, v)
            k = step + 1
            p.data -= lr * (m / (1 - 0.9**k)) / ((v / (1 - 0.999**k)).sqrt() + 1e-8)
    for name, p in model.named_parameters():
        ours = result.model.get_parameter(name).double()
        assert (ours - p).abs().max() < 1e-5, name


OTHER_SHAPES = {"n_timesteps": 3}, {"encoding": "one-hot"}


@pytest.mark.parametrize(
    "shape", [{}, *(pytest.param(other, marks=pytest.mark.slow) for other in OTHER_SHAPES)]
)
def test_learns_what_the_return_says(data, shape):
    """A planted rule: return 0 belongs to an agent that only turns left, so asked for 0 the model must do so too."""
    turner = data.episodes(np.arange(len(data.lengths) - 20, len(data.lengths)))
    planted = Trajectories.concatenate([data.episodes(data.classes != 1), turner])
    config = TrainConfig(steps=500, batch_size=128, lr=3e-3, evaluation_episodes=0)
    model = train(planted, DTConfig(**SMALL, **shape), config, seed=0, progress=False).model
    rows = np.arange(len(turner.actions))
    states, t = (
        torch.from_numpy(turner.observations(rows))[:, None],
        torch.from_numpy(turner.timesteps(rows))[:, None],
    )
    asked = [torch.full((len(rows), 1), rtg) for rtg in (0.0, -1.0)]
    left = [model(states, rtgs, t).softmax(-1)[..., 0].mean().item() for rtgs in asked]
    assert left[0] > 0.85
    assert left[1] < left[0] - 0.1


def test_training_is_deterministic_and_evaluates(data):
    config = TrainConfig(steps=20, batch_size=32, checkpoint_every=10, evaluation_episodes=5)
    a, b = (train(data, DTConfig(**SMALL), config, seed=1, progress=False) for _ in range(2))
    for x, y in zip(a.model.state_dict().values(), b.model.state_dict().values(), strict=True):
        assert torch.equal(x, y)
    assert a.evaluations["step"].tolist() == [10, 20]
    assert {"greedy -1", "sampled 0.9"} <= set(a.evaluations)
    assert a.curve["step"].tolist() == list(range(1, 21))


TRAIN_IN_FOLDER = """
import sys
from dtbook.model import DTConfig
from dtbook.training import TrainConfig, train
from dtbook.trajectories import Trajectories
data, folder = Trajectories.load(sys.argv[1]), sys.argv[2]
shape = DTConfig(d_model=32, d_head=16, d_mlp=32, max_steps=40)
config = TrainConfig(steps=60, batch_size=64, checkpoint_every=5, evaluation_episodes=0)
train(data, shape, config, 2, folder, progress=False).model.save_pretrained(folder + "/final")
"""


@pytest.mark.slow
@pytest.mark.usefixtures("forks")
def test_killed_runs_resume_to_the_same_bytes(data, tmp_path):
    data.save(tmp_path / "data.npz")
    command = [sys.executable, "-c", TRAIN_IN_FOLDER, tmp_path / "data.npz", tmp_path / "whole"]
    subprocess.run(command, check=True)  # under another seed of hashes than the forks
    again = TRAIN_IN_FOLDER, tmp_path / "data.npz", tmp_path / "killed"
    kills = 0
    for wanted in (2, 6):  # killed as soon as so many checkpoints are there, twice
        process = Fork(*again)
        while process.poll() is None and len(list((tmp_path / "killed").glob("step_*"))) < wanted:
            time.sleep(0.005)
        kills += process.poll() is None
        process.kill()
        for checkpoint in (tmp_path / "killed").glob("step_*"):
            DecisionTransformer.from_pretrained(checkpoint)
    assert kills == 2, "the runs must have been killed on their way"
    assert Fork(*again).wait() == 0
    for name in ("step_000060", "final"):
        whole, killed = tmp_path / "whole" / name, tmp_path / "killed" / name
        assert {p.name for p in whole.iterdir()} == {p.name for p in killed.iterdir()}
        for file in whole.iterdir():
            assert file.read_bytes() == (killed / file.name).read_bytes(), file


def test_a_folder_of_another_run_is_refused(data, tmp_path):
    config = TrainConfig(steps=2, batch_size=8, evaluation_episodes=0)
    train(data, DTConfig(**SMALL), config, 0, tmp_path, progress=False)
    with pytest.raises(ValueError, match="belongs to a run of other settings"):
        train(data, DTConfig(**SMALL), config, 1, tmp_path, progress=False)
    (tmp_path / "step_000002" / "optimizer.safetensors").write_bytes(b"short")
    with pytest.raises(ValueError, match=r"optimizer\.safetensors is not whole"):
        train(data, DTConfig(**SMALL), config, 0, tmp_path, progress=False)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("steps", 0),
        ("batch_size", -1),
        ("lr", float("nan")),
        ("optimizer", "sgd"),
        ("last_step_share", 1.5),
        ("weight_decay", -1e-4),
        ("evaluation_episodes", -1),
    ],
)
def test_wrong_settings_are_named(as_users_run_it, field, value):
    with pytest.raises(ValueError, match=rf"TrainConfig\.{field} is {value!r}; it must be "):
        TrainConfig(**{field: value})


def test_data_that_do_not_fit_are_refused(data):
    with pytest.raises(ValueError, match="1 to 20 steps"):
        train(data, DTConfig(max_steps=20), TrainConfig(steps=1), 0, progress=False)
    only_deaths = data.episodes(data.classes == 0)
    with pytest.raises(ValueError, match="none have return 0"):
        train(only_deaths, DTConfig(**SMALL), TrainConfig(steps=1), 0, progress=False)


def test_evaluation_that_the_model_cannot_play_is_refused_before_the_first_step(data, monkeypatch):
    monkeypatch.setattr(training.Updater, "__call__", None)
    short = data.episodes(data.lengths <= 20)
    config = TrainConfig(steps=1, balance_classes=False)
    for shape, sentence in (
        ({"max_steps": 30}, "the task's max_steps is 40; it must be at most the model's, 30"),
        ({"n_actions": 4}, "the model's n_actions is 4; it must be at most the task's, 3."),
    ):
        with pytest.raises(ValueError, match=sentence):
            train(short, DTConfig(**(SMALL | shape)), config, 0, progress=False)
    for shape, sentence in (
        ({"n_actions": 2}, r"data's largest action is 2; it must be at most n_actions − 1 = 1\."),
        ({"view_size": 9}, r"DTConfig\.view_size is 9; it must be that of data, 7\."),
    ):
        with pytest.raises(ValueError, match=sentence):
            train(short, DTConfig(**(SMALL | shape)), config, 0, progress=False)


# Training that diverges


def explode(monkeypatch, at, how):
    """Let a weight become nan or infinite by the update of one step, after its loss was taken."""
    plain, step = training.Updater.__call__, iter(range(1, 1000))

    def update(self, *rest):
        done = plain(self, *rest)
        if next(step) == at:
            self.model.W_E_rtg.data[2] = how
        return done

    monkeypatch.setattr(training.Updater, "__call__", update)


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_training_that_diverges_stops_at_once_and_says_where(data, monkeypatch, tmp_path, number):
    explode(monkeypatch, 6, number)
    config = TrainConfig(steps=20, batch_size=16, checkpoint_every=4, evaluation_episodes=0)
    with pytest.raises(
        ValueError, match=r"^training has diverged at step 7 of 20: the loss .*; lr is 0\.0008, and"
    ) as caught:
        train(data, DTConfig(**SMALL), config, 0, tmp_path, False, snapshots=[5, 12])
    assert "\n" not in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_000004", "weights_000005.safetensors"]


@pytest.mark.parametrize(("snapshots", "every"), [([6], 100), ([], 6)], ids=["snapshot", "checkpoint"])
def test_weights_that_are_not_finite_are_not_kept(data, monkeypatch, tmp_path, snapshots, every):
    explode(monkeypatch, 6, float("nan"))
    config = TrainConfig(steps=20, batch_size=16, checkpoint_every=every, evaluation_episodes=5)
    with pytest.raises(ValueError, match="diverged at step 6 of 20: W_E_rtg is no longer finite"):
        train(data, DTConfig(**SMALL), config, 0, tmp_path, False, snapshots=snapshots)
    assert not list(tmp_path.iterdir())


def test_a_rate_that_is_too_high_is_found_out(data):
    config = TrainConfig(steps=200, batch_size=16, lr=1e30, warmup_steps=0, evaluation_episodes=0)
    with pytest.raises(
        ValueError, match="training has diverged at step 2 of 200: the loss is no longer finite"
    ):
        train(data, DTConfig(**SMALL), config, 0, progress=False)


def test_an_update_obeys_what_is_attached_to_a_model(data):
    """Without its MLP's output and with frozen attention, the loss is that model's and frozen weights stay."""
    model, config = DecisionTransformer(DTConfig(**SMALL)), TrainConfig(batch_size=32)
    model.blocks[0].mlp.register_forward_hook(lambda _, __, out: out * 0)
    model.blocks[0].attn.requires_grad_(False)
    batch = Sampler(data, 1, config).batch(np.random.default_rng(0))
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    logits = model(batch.states, batch.rtgs, batch.timesteps)[:, 0]
    expected = torch.nn.functional.cross_entropy(logits, batch.actions[:, 0]).item()
    loss, _ = training.Updater(model, config)(batch, 1e-2)
    assert loss == expected
    moved = {name for name, weight in model.state_dict().items() if not torch.equal(weight, before[name])}
    assert {"W_U", "W_E_state"} <= moved
    assert not any(name.startswith("blocks.0.attn") for name in moved)
