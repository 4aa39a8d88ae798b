"""Parameters: NumPy's numbers are Python's, 1e3 is 1000, True is no number, and a refusal is one sentence."""

import ast
import json
from dataclasses import FrozenInstanceError, asdict, fields, replace
from fractions import Fraction
from pathlib import Path
from typing import get_type_hints

import numpy as np
import pytest
import torch

import dtbook
from dtbook.analysis.interventions import Site
from dtbook.artifacts.parameters import Count, Share, Whole, cast, check, checked
from dtbook.gridworld import DynamicObstaclesVectorEnv, Task
from dtbook.model import DecisionTransformer, DTConfig
from dtbook.pages.notebooks import Parameter
from dtbook.pipeline import Recipe
from dtbook.rollout import calibration_curve, rollout, rollout_in
from dtbook.training import TrainConfig, evaluate, train
from dtbook.trajectories import play, ppo
from dtbook.trajectories.anytask import record
from dtbook.trajectories.collection import QuotaConfig, collect_by_quota
from dtbook.trajectories.ppo import PPOConfig

CONFIGS = (DTConfig, TrainConfig, PPOConfig, QuotaConfig, Task, Recipe)
SEVENS = (
    7,
    7.0,
    np.uint8(7),
    np.int16(7),
    np.int64(7),
    np.float32(7),
    np.array(7),
    torch.tensor(7),
    Fraction(7),
)
NO_INTEGERS = (True, np.True_, 7.5, "7", None, [7], float("nan"), float("inf"), np.float32("nan"), 7j)
pytestmark = pytest.mark.usefixtures("as_users_run_it")


def of_type(kind):
    """Each field of a configuration that is a number of this type, with its configuration."""
    return [
        (config, field.name)
        for config in CONFIGS
        for field in fields(config)
        if get_type_hints(config)[field.name] is kind
    ]


def refused(sentence, call, *args, **kwargs):
    """Assert that a call raises ValueError with one sentence that begins so."""
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        call(*args, **kwargs)
    said = str(caught.value)
    assert said.startswith(sentence), said
    assert said.endswith(".")
    assert "\n" not in said
    assert len(said) < 250
    assert caught.value.__suppress_context__ or caught.value.__context__ is None


@pytest.mark.parametrize("value", SEVENS, ids=repr)
def test_every_integer_field_takes_every_seven(value):
    assert len(of_type(int)) == 28
    for config, name in of_type(int):
        made = config(**{name: value} | ({"size": 16} if config is Task and name == "n_obstacles" else {}))
        assert type(getattr(made, name)) is int
        assert getattr(made, name) == 7


@pytest.mark.parametrize("value", NO_INTEGERS, ids=repr)
def test_no_integer_field_takes_what_is_none(value):
    for config, name in of_type(int):
        refused(f"{config.__name__}.{name} is ", config, **{name: value})


@pytest.mark.parametrize("value", [np.float32(0.5), np.float64(0.5), np.array(0.5), Fraction(1, 2)], ids=repr)
def test_every_number_field_takes_numpys(value):
    assert len(of_type(float)) == 11
    for config, name in of_type(float):
        assert repr(getattr(config(**{name: value}), name)) == "0.5"


@pytest.mark.parametrize(
    "value", [True, "0.5", float("nan"), float("inf"), -np.inf, None, 10**400, -1], ids=str
)
def test_no_number_field_takes_what_is_none(value):
    for config, name in of_type(float):
        refused(f"{config.__name__}.{name} is ", config, **{name: value})


def test_truth_values_and_lists():
    assert Task(random_start=np.True_).random_start is True
    refused("Task.random_start is 1; it must be True or False.", Task, random_start=1)
    refused("TrainConfig.balance_classes is 'no'; it must be", TrainConfig, balance_classes="no")
    assert QuotaConfig(temperatures=np.array([1, 2])).temperatures == (1.0, 2.0)
    sentence = (
        "QuotaConfig.temperatures is (); it must be a list that is not empty, each item a finite number > 0."
    )
    refused(sentence, QuotaConfig, temperatures=())
    refused("QuotaConfig.epsilon is 1.0; it must be a finite number ≥ 0 and < 1.", QuotaConfig, epsilon=1.0)
    assert Recipe(snapshots=np.arange(2)).snapshots == (0, 1)
    refused("Recipe.task is 8; it must be a Task.", Recipe, task=8)
    refused(
        "Recipe.calibration['episodes'] is 0; it must be an integer ≥ 1.", Recipe, calibration={"episodes": 0}
    )
    assert Recipe(calibration={"rtgs": np.zeros(1), "episodes": 5e2}).calibration == {
        "rtgs": [0.0],
        "episodes": 500,
    }


def test_configurations_are_dataclasses_as_before():
    config = DTConfig(n_heads=np.int64(4))
    assert config == DTConfig(n_heads=4)
    assert hash(config) == hash(DTConfig(n_heads=4))
    assert replace(config, n_heads=3e0).n_heads == 3
    assert json.loads(json.dumps(asdict(config)))["n_heads"] == 4
    assert (DTConfig.act_fn, "act_fn" in asdict(config)) == ("relu", False)
    refused("DTConfig.n_heads is 0; it must be an integer ≥ 1.", DTConfig, n_heads=0)
    refused("DTConfig.n_heads is 0; it must be an integer ≥ 1.", replace, config, n_heads=0)
    with pytest.raises(FrozenInstanceError):
        config.n_heads = 2
    with pytest.raises(TypeError, match="n_head"):
        DTConfig(n_head=2)


@pytest.fixture(scope="module")
def model():
    return DecisionTransformer(DTConfig(d_model=8, d_head=4, d_mlp=8, max_steps=10))


TASK = Task(size=5, n_obstacles=1, max_steps=10)


def calls(model):
    """What takes an integer, by the parameter's name: name → calls of it with a value."""
    envs, forward = DynamicObstaclesVectorEnv(1, 5, 1, 10), lambda images, *_: np.full(len(images), 2)
    tiny = TrainConfig(steps=1, batch_size=4, evaluation_episodes=0, balance_classes=False)
    data, rng = play(TASK, forward, 3, np.random.default_rng(0)), np.random.default_rng
    agent = ppo.ActorCritic()
    tables = {3: agent.state_dict()}, Task(5, 1, 10), QuotaConfig(1, 1, 8, 1)
    return {
        "episodes": [
            lambda value: play(TASK, forward, value, rng(0)),
            lambda value: record(envs, forward, value, 0),
            lambda value: calibration_curve(model, [0.0], value, task=TASK),
            lambda value: evaluate(model, value, 0, data),
            lambda value: ppo.evaluate_agent(agent, envs, value, False, 0),
        ],
        "seed": [
            lambda value: record(envs, forward, 1, value),
            lambda value: rollout(model, [0.0], seed=value, task=TASK),
            lambda value: rollout_in(envs, model, [0.0], seed=value),
            lambda value: calibration_curve(model, [0.0], 1, seed=value, task=TASK),
            lambda value: train(data, model.cfg, tiny, value, progress=False),
            lambda value: evaluate(model, 1, value, data),
            lambda value: ppo.train_ppo(envs, PPOConfig(8, 8, minibatches=1), value, progress=False),
            lambda value: ppo.evaluate_agent(agent, envs, 1, False, value),
            lambda value: collect_by_quota(*tables, value, progress=False),
            lambda value: DecisionTransformer(model.cfg, value),
        ],
        "max_steps": [lambda value: rollout(model, [0.0], max_steps=value)],
        "num_envs": [DynamicObstaclesVectorEnv],
        "hidden": [lambda value: ppo.ActorCritic(hidden=value)],
    }


def test_functions_take_integers_as_configurations_do(model):
    for name, functions in calls(model).items():
        for call in functions:
            for value in (7, 7.0, np.int16(7), np.float64(7)):
                call(value)
            for value in (True, 7.5, "7", float("nan"), -1):  # before anything is done
                refused(f"{name} is ", call, value)


def test_what_is_kept_of_a_run_is_plain(model, tmp_path):
    """A seed and snapshots of NumPy's would fail when the first checkpoint is written."""
    data = play(TASK, lambda images, *_: np.full(len(images), 2), 3, np.random.default_rng(0))
    config = TrainConfig(steps=2, batch_size=4, evaluation_episodes=0, balance_classes=False)
    result = train(data, model.cfg, config, np.int64(3), tmp_path, False, snapshots=np.array([0, 2]))
    assert list(result.snapshots) == [0, 2]
    settings = json.loads((tmp_path / "step_000002/training.json").read_text())["settings"]
    assert (settings["seed"], settings["snapshots"]) == (3, [0, 2])
    refused("snapshots is [1.5]; it must be", train, data, model.cfg, config, 3, None, False, [1.5])


def test_seeds_of_any_integer_are_the_same_seed(model):
    weights = [DecisionTransformer(model.cfg, seed).W_U for seed in (5, 5.0, np.uint8(5))]
    assert all(torch.equal(weights[0], weight) for weight in weights)


def test_heads_are_put_in_order_by_numbers_alone(model):
    """A list of truth values would pick heads as a mask does."""
    expected = model.permute_heads(0, [1, 0]).blocks[0].attn.W_Q
    assert torch.equal(model.permute_heads(np.int64(0), np.array([1, 0])).blocks[0].attn.W_Q, expected)
    assert torch.equal(model.permute_heads(0, [1.0, 0]).blocks[0].attn.W_Q, expected)
    refused(
        "order is [True, False]; it must be a list, each item an integer.",
        model.permute_heads,
        0,
        [True, False],
    )
    refused("layer is False; it must be an integer.", model.permute_heads, False, [1, 0])


def test_a_site_takes_numpys_integers_and_no_truth_value():
    for kind in (np.int64, np.uint8, float, int):
        for number in (0, 1):
            site = Site("blocks.0.attn.hook_z", kind(number), kind(number))
            assert site.index == (slice(None), slice(number, number + 1), slice(number, number + 1))
    assert Site("blocks.0.mlp.hook_post", neuron=np.int64(0)).index[2] == slice(0, 1)
    refused("Site.head is True; it must be an integer.", Site, "blocks.0.attn.hook_z", True)
    refused("Site.positions is 0.5; it must be an integer.", Site, "blocks.0.attn.hook_z", 0, 0.5)


def test_notebook_parameters_are_alike():
    for value in ("1e3", 1e3, 1000, "1000", np.int32(1000), "1_000"):
        taken = Parameter("steps", 5, "steps, at least 1").accept(value)
        assert (taken, type(taken)) == (1000, int)
    for value in ("True", True, 2.5, "2.5", "1e999", None):
        with pytest.raises(ValueError, match=r"^steps must be of type int, like 5, not "):
            Parameter("steps", 5, "steps, at least 1").accept(value)
    assert Parameter("rtgs", [0.5], "returns").accept([1, np.float32(0.5)]) == [1.0, 0.5]


def test_a_function_checks_the_parameters_that_say_so():
    @checked
    def area(width: Count, height: Whole = 2, *, share: Share = 1.0, name: str = ""):
        return width * height * share, name

    assert area(3.0, share=np.float32(0.5), name=1) == (3.0, 1)
    refused("width is 0; it must be an integer ≥ 1.", area, 0)
    refused("share is 2; it must be a finite number from 0 to 1.", area, 1, share=2)


def test_arrays_are_cast_where_nothing_is_lost():
    for values in ([0, 1], np.array([0, 1], np.int16), np.array([False, True]), [0.0, 1.0]):
        taken = cast("x", values, np.uint8)
        assert (taken.tolist(), taken.dtype) == ([0, 1], np.uint8)
    same = np.zeros(3, np.float32)
    assert cast("x", same, np.float32) is same
    assert cast("x", [0.1], np.float32) == np.float32(0.1)
    for values, shown in (([0, -1], -1), ([256], 256), ([0.5], 0.5), ([np.nan], "nan"), (["a"], "['a']")):
        refused(f"x is {shown}; it must be", cast, "x", values, np.uint8)
    for values in ([np.inf], [1e300], [np.nan]):
        refused("x is ", cast, "x", values, np.float32)


def test_what_is_shown_of_a_long_value_is_short():
    refused("x is [0, 1, 2, 3, 4", check, "x", list(range(1000)), Count)


ROOMS = ("model", "trajectories", "gridworld", "analysis")


def test_no_public_function_takes_an_integer_unchecked():
    """What a reader calls with a seed, a number of episodes … says of what kind it must be, and is `@checked`."""
    names = {"seed", "episodes", "max_steps", "timestep", "batch_size", "resamples", "workers", "n_timesteps"}
    root, missing = Path(dtbook.__file__).parent, []
    for path in (*root.glob("[rt]*.py"), *(p for room in ROOMS for p in sorted((root / room).glob("*.py")))):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
                plain = {a.arg for a in node.args.args if a.annotation and ast.unparse(a.annotation) == "int"}
                missing += [f"{path.stem}.{node.name}({name})" for name in sorted(plain & names)]
    assert missing == []
