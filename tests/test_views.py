"""Read-outs of the view against the model itself, NumPy over every observation, and the post's printed numbers."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from dtbook.analysis.attribution import decompose
from dtbook.analysis.weights import (
    REGIONS,
    THINGS,
    Embeddings,
    embeddings,
    front_cell,
    front_cell_table,
    moments,
    thing_effects,
    variance_shares,
)
from dtbook.gridworld import FRONT, all_observations
from dtbook.gridworld.situations import showing, weights
from dtbook.model import DecisionTransformer, DTConfig


@pytest.fixture(scope="module")
def small():
    """All observations of the room of 5×5 cells with two obstacles, an untrained model, its effects and its sums."""
    observations = all_observations(5, 2)
    model = DecisionTransformer(DTConfig(d_model=8, d_head=4, d_mlp=8, max_steps=20), seed=3)
    effects = thing_effects(embeddings(model).on("F-R")["state"])
    states = torch.from_numpy(observations.images).unsqueeze(1)
    n = len(states)
    parts = decompose(model, states, torch.zeros(n, 1), torch.zeros(n, 1, dtype=torch.int64))
    logits = sum(parts[f"state: {name}"] for name in ("object", "colour", "state"))[:, 0].double().numpy()
    return observations, model, effects, logits[:, 2] - logits[:, 1]


def by_hand(observations, effects, mask):
    """The sum of a group of cells' effects, cell by cell."""
    codes = {1: 0, 2: 1, 6: 2, 8: 3}
    things = np.vectorize(codes.get)(observations.images[..., 0])
    i, j = np.indices((7, 7))
    return (effects[i, j, things] * mask).sum((1, 2))


def test_effects_add_up_to_what_the_state_embedding_writes(small):
    observations, _, effects, direct = small
    assert by_hand(observations, effects, np.ones((7, 7))) == pytest.approx(direct, abs=1e-5)


@pytest.mark.parametrize("encoding", ["index", "one-hot"])
def test_effects_of_the_front_cell_are_table_3_in_both_encodings(encoding):
    model = DecisionTransformer(DTConfig(d_model=8, d_head=4, d_mlp=8, encoding=encoding), seed=1)
    effects = thing_effects(embeddings(model).on("F-L")["state"])
    assert effects[FRONT] == pytest.approx(
        front_cell_table(model, "F-L")["contribution"].to_numpy(), abs=1e-6
    )


def test_shares_are_those_of_the_sums_over_every_observation(small):
    observations, _, effects, _ = small
    share, table = weights(observations), variance_shares(effects, moments(observations))
    whole = by_hand(observations, effects, np.ones((7, 7)))
    for name, mask in REGIONS.items():
        part = by_hand(observations, effects, mask)
        covariance = np.cov(part, whole, aweights=share, ddof=0)
        assert table["share"][name] == pytest.approx(covariance[0, 1] / covariance[1, 1], abs=1e-6)
        assert table["alone"][name] == pytest.approx(covariance[0, 0] / covariance[1, 1], abs=1e-6)
    assert table["share"].sum() == pytest.approx(1)
    assert sum(REGIONS.values()).tolist() == np.ones((7, 7)).tolist(), "each cell is in one region"


def test_front_cell_explains_what_it_does_over_every_observation(small):
    observations, _, effects, _ = small
    share, found = weights(observations), front_cell(effects, moments(observations))
    whole = by_hand(observations, effects, np.ones((7, 7)))
    rest = whole - by_hand(observations, effects, REGIONS["front cell"])
    variance = np.cov(whole, aweights=share, ddof=0)
    assert found.of_itself == pytest.approx(1 - np.cov(rest, aweights=share, ddof=0) / variance, abs=1e-6)
    predicted = np.zeros(len(whole))
    for thing in THINGS:
        seen = showing(observations.images, thing)
        predicted[seen] = np.average(whole[seen], weights=share[seen])
        assert found.table["whole"][thing] == pytest.approx(predicted[seen][0])
        assert found.table["share"][thing] == pytest.approx(share[seen].sum())
    assert found.by_content == pytest.approx(np.cov(predicted, aweights=share, ddof=0) / variance)


def test_a_read_out_of_the_front_cell_alone_is_explained_by_it(small):
    effects = np.zeros((7, 7, 4))
    effects[FRONT] = (0, -3, 1, 2)
    found = front_cell(effects, moments(small[0]))
    assert (found.of_itself, found.by_content) == pytest.approx((1, 1))


def test_embeddings_come_back_from_their_file(small, tmp_path):
    made = embeddings(small[1])
    made.save(tmp_path / "e.safetensors")
    again = Embeddings.load(tmp_path / "e.safetensors")
    assert all(np.array_equal(a, b) for a, b in zip(made, again, strict=True))
    assert made.largest[0] == pytest.approx(float(small[1].W_E_state.detach()[:49].abs().max()))


@pytest.mark.post_weights
def test_the_posts_numbers():
    post = embeddings(DecisionTransformer.from_post_checkpoint())
    on = post.on("F-R")
    assert float(on["rtg"]) == pytest.approx(1.13, abs=0.005)
    assert float(post.on("R-L")["rtg"]) == pytest.approx(-0.16, abs=0.005)
    assert on["state"][1][FRONT] == pytest.approx(-0.742, abs=0.0005)
    assert post.largest[2] < 1e-30


def test_what_cannot_be_read_gets_one_sentence():
    with pytest.raises(ValueError, match="maps are of 4 channels"):
        thing_effects(np.zeros((4, 7, 7)))
    with pytest.raises(ValueError, match="sees 5×5 cells"):
        embeddings(DecisionTransformer(DTConfig(view_size=5)))
    with pytest.raises(ValueError, match="preference is 'F-X'"):
        embeddings(DecisionTransformer(DTConfig())).on("F-X")
    observations = all_observations(5, 2)
    strange = replace(observations, images=observations.images + np.uint8(1))
    with pytest.raises(ValueError, match="something else than empty, wall"):
        moments(strange)
