"""A model's folder: what goes in comes out, what was altered is refused by name. The post's checkpoint."""

import hashlib
import json
import os
from pathlib import Path

import pooch
import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file

from dtbook.artifacts import describe
from dtbook.model import DecisionTransformer, DTConfig, files
from dtbook.model.files import POST_MODEL_SHA256, fetch_post_checkpoint

CFG = DTConfig(
    d_model=12, n_heads=3, d_head=4, d_mlp=8, n_layers=2, n_timesteps=3, max_steps=20, encoding="one-hot"
)
METADATA = {"head_order": {"0": [1, 0, 2]}, "step": 8000, "stage": {"lr": 3e-4, "seeds": [0, 1]}}


@pytest.fixture
def saved(tmp_path):
    """A model and the folder it was saved to."""
    model = DecisionTransformer(CFG, seed=1, metadata=METADATA)
    model.save_pretrained(tmp_path / "model")
    return model, tmp_path / "model"


def edit_config(folder, **changes):
    """Change entries of config.json; None removes one."""
    config = json.loads((folder / "config.json").read_text()) | changes
    kept = {name: value for name, value in config.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(kept))


def swap_weights(folder, weights):
    """Put other weights in the folder, with a config.json that vouches for them."""
    save_file(weights, folder / "model.safetensors")
    edit_config(folder, weights_sha256=describe(folder / "model.safetensors")["sha256"])


def test_a_saved_model_comes_back(saved):
    model, folder = saved
    loaded = DecisionTransformer.from_pretrained(folder)
    assert loaded.cfg == CFG
    assert loaded.metadata == METADATA
    assert not loaded.training
    for name, value in model.state_dict().items():
        assert torch.equal(value, loaded.state_dict()[name])
    loaded.save_pretrained(folder.parent / "again")
    for file in ("model.safetensors", "config.json", "README.md"):
        assert (folder / file).read_bytes() == (folder.parent / "again" / file).read_bytes()


def test_the_folder_is_safetensors_json_and_a_card_of_ours(saved):
    _, folder = saved
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    assert [path.name for path in folder.parent.iterdir()] == ["model"]
    card = ModelCard.load(folder / "README.md")
    assert card.data.library_name == "dtbook"
    assert "More Information Needed" not in card.text


def test_saving_again_replaces_the_model_and_keeps_other_files(saved):
    _, folder = saved
    (folder / "notes.txt").write_text("mine")
    other = DecisionTransformer(CFG, seed=2, metadata={"step": 9000})
    other.save_pretrained(folder)
    loaded = DecisionTransformer.from_pretrained(folder)
    assert torch.equal(loaded.W_U, other.W_U)
    assert loaded.metadata == {"step": 9000}
    assert (folder / "notes.txt").read_text() == "mine"
    assert [path.name for path in folder.parent.iterdir()] == ["model"]


def test_a_save_that_fails_leaves_the_old_model(saved, monkeypatch):
    model, folder = saved
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    monkeypatch.setattr(json, "dumps", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        DecisionTransformer(CFG, seed=2).save_pretrained(folder)
    with pytest.raises(ZeroDivisionError):
        model.save_pretrained(folder.parent / "new")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert [path.name for path in folder.parent.iterdir()] == ["model"]


def truncate_weights(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


def alter_a_weight(folder):
    content = bytearray((folder / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (folder / "model.safetensors").write_bytes(content)


def drop_a_weight(folder):
    weights = load_file(folder / "model.safetensors")
    swap_weights(folder, {name: value for name, value in weights.items() if name != "W_pos"})


def reshape_a_weight(folder):
    swap_weights(folder, load_file(folder / "model.safetensors") | {"b_U": torch.zeros(4)})


def no_safetensors(folder):
    (folder / "model.safetensors").write_bytes(b"PK")
    edit_config(folder, weights_sha256=describe(folder / "model.safetensors")["sha256"])


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (
            truncate_weights,
            ValueError,
            r"model\.safetensors has sha256 [0-9a-f]{64}; expected was [0-9a-f]{64}\.$",
        ),
        (alter_a_weight, ValueError, r"model\.safetensors has sha256"),
        (no_safetensors, ValueError, r"model\.safetensors is not a safetensors file"),
        (drop_a_weight, ValueError, r'model does not hold a Decision Transformer: .*Missing key.*"W_pos"'),
        (reshape_a_weight, ValueError, "model does not hold a Decision Transformer: .*b_U"),
        (
            lambda folder: (folder / "config.json").write_text('{"cfg'),
            ValueError,
            r"config\.json is not a saved",
        ),
        (
            lambda folder: edit_config(folder, weights_sha256=None),
            ValueError,
            r"config\.json is not.*weights_sha256",
        ),
        (lambda folder: edit_config(folder, metadata=None), ValueError, "not hold.*metadata"),
        (lambda folder: edit_config(folder, cfg={"depth": 1}), ValueError, "not hold.*depth"),
        (lambda folder: edit_config(folder, cfg={"encoding": "x"}), ValueError, "DTConfig.encoding is 'x'"),
        (lambda folder: (folder / "config.json").unlink(), FileNotFoundError, r"config\.json does not exist"),
        (
            lambda folder: (folder / "model.safetensors").unlink(),
            FileNotFoundError,
            r"safetensors does not exist",
        ),
    ],
)
def test_damage_is_named_in_one_sentence(saved, damage, error, message):
    _, folder = saved
    damage(folder)
    with pytest.raises(error, match=message) as caught:
        DecisionTransformer.from_pretrained(folder)
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)


# The post's checkpoint


@pytest.mark.skipif(
    not os.environ.get("DTBOOK_POST_MODEL"),
    reason="set DTBOOK_POST_MODEL to the path of the post's checkpoint to run this",
)
def test_the_variable_names_the_posts_checkpoint():
    assert describe(fetch_post_checkpoint())["sha256"] == POST_MODEL_SHA256
    model = DecisionTransformer.from_post_checkpoint()
    assert model.cfg == DTConfig()
    assert model.metadata["sha256"] == POST_MODEL_SHA256
    actions = torch.load(fetch_post_checkpoint(), weights_only=True)["action_embedding.0.weight"]
    assert torch.equal(model.W_E_action, actions[:3])  # the fourth row is the original's padding


def test_another_file_is_not_the_posts_checkpoint(tmp_path, monkeypatch):
    path = tmp_path / "model.pt"
    torch.save({"W": torch.zeros(2)}, path)
    monkeypatch.setenv("DTBOOK_POST_MODEL", str(path))
    for argument in (None, path):
        with pytest.raises(
            ValueError, match=f"{path} has sha256 [0-9a-f]{{64}}; expected was {POST_MODEL_SHA256}"
        ):
            DecisionTransformer.from_post_checkpoint(argument)


def test_a_missing_checkpoint_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.pt does not exist"):
        DecisionTransformer.from_post_checkpoint(tmp_path / "none.pt")


def test_without_variable_and_network_one_sentence_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.delenv("DTBOOK_POST_MODEL", raising=False)
    monkeypatch.setattr(pooch, "os_cache", lambda _: tmp_path)
    monkeypatch.setattr(files, "POST_MODEL_URL", "http://127.0.0.1:9/model.pt")
    with pytest.raises(
        OSError, match=r"could not be fetched from http://127.0.0.1:9/model\.pt .*DTBOOK_POST_MODEL"
    ):
        fetch_post_checkpoint()
    assert list(tmp_path.iterdir()) == []


def test_a_download_with_another_hash_is_refused(tmp_path, monkeypatch):
    def download(_, url, file, pooch):
        Path(file).write_bytes(b"something else")

    monkeypatch.delenv("DTBOOK_POST_MODEL", raising=False)
    monkeypatch.setattr(pooch, "os_cache", lambda _: tmp_path)
    monkeypatch.setattr(pooch.HTTPDownloader, "__call__", download)
    found = hashlib.sha256(b"something else").hexdigest()
    with pytest.raises(ValueError, match=f"overnight_training.pt.*{POST_MODEL_SHA256}.*{found}") as caught:
        fetch_post_checkpoint()
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []
