"""A model's folder: what goes in comes out, what was altered is refused by name. The post's checkpoint."""

import dataclasses
import hashlib
import json
import re
import signal
import socketserver
import subprocess
import sys
import textwrap
import threading
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import pooch
import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file

from dtbook.artifacts import describe, post_weights
from dtbook.artifacts.post_weights import POST_MODEL_SHA256, NoPostWeights, fetch_post_checkpoint
from dtbook.model import DecisionTransformer, DTConfig
from dtbook.model.subject import Subject

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


@pytest.mark.slow
def test_a_save_that_was_killed_halfway_is_ended_by_whoever_reads(saved):
    _, folder = saved
    program = """
    import os, signal, sys
    from pathlib import Path
    from dtbook.model import DecisionTransformer, DTConfig
    replace = Path.replace
    def replace_and_end(*names):
        replace(*names)
        if names[1].name == "config.json":
            os.kill(os.getpid(), signal.SIGKILL)
    Path.replace = replace_and_end
    DecisionTransformer(DTConfig(d_model=4, d_head=2, d_mlp=2, max_steps=3)).save_pretrained(sys.argv[1])
    """
    ended = subprocess.run([sys.executable, "-c", textwrap.dedent(program), folder])
    assert ended.returncode == -signal.SIGKILL
    assert DecisionTransformer.from_pretrained(folder).cfg.d_model == 4
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", "config.json", "model.safetensors"]


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


@pytest.mark.parametrize("name", [".", "..", "link"])
def test_a_model_is_saved_where_one_works_and_through_a_link(saved, monkeypatch, name):
    model, folder = saved
    work = folder.parent / "project/work"
    (work / "elsewhere").mkdir(parents=True)
    (work / "link").symlink_to("elsewhere")
    monkeypatch.chdir(work)
    model.save_pretrained(name)
    assert DecisionTransformer.from_pretrained(name).metadata == METADATA
    assert (Path.cwd(), (work / "link").is_symlink(), (work / "elsewhere").is_dir()) == (work, True, True)
    weights = Path(name, "model.safetensors")
    assert weights.stat().st_mode == Path(name, "config.json").stat().st_mode


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
def test_damage_is_named_in_one_sentence(as_users_run_it, saved, damage, error, message):
    _, folder = saved
    damage(folder)
    with pytest.raises(error, match=message) as caught:
        DecisionTransformer.from_pretrained(folder)
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_neither_saved_nor_loaded(saved, number):
    model, folder = saved
    weights = load_file(folder / "model.safetensors")
    with torch.no_grad():
        model.blocks[1].mlp.b_in[3] = number
    words = r" has numbers in blocks\.1\.mlp\.b_in that are not finite; every weight must be finite\."
    before = sorted(path.read_bytes() for path in folder.iterdir())
    for target in (folder, folder.parent / "new"):
        with pytest.raises(ValueError, match=f"the model for {target}{words}"):
            model.save_pretrained(target)
    assert sorted(path.read_bytes() for path in folder.iterdir()) == before
    assert [path.name for path in folder.parent.iterdir()] == ["model"]
    swap_weights(folder, weights | {"blocks.1.mlp.b_in": model.blocks[1].mlp.b_in.detach()})
    with pytest.raises(ValueError, match=f"{folder}/model.safetensors{words}"):
        DecisionTransformer.from_pretrained(folder)


@pytest.mark.parametrize("metadata", [{"score": float("nan")}, {"seeds": {1, 2}}])
def test_metadata_that_json_does_not_hold_is_refused(tmp_path, metadata):
    with pytest.raises(ValueError, match=r"^metadata is \{.*\}; it must hold plain JSON values \("):
        DecisionTransformer(CFG, metadata=metadata).save_pretrained(tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


# Checkpoints of the original

ORIGINAL = DTConfig(
    d_model=12, n_heads=3, d_head=4, d_mlp=8, n_layers=2, max_steps=20, encoding="one-hot", n_actions=7
)
PLAIN = {"layer_norm": None, "gated_mlp": False, "activation_fn": "relu", "n_ctx": 2}
SEEN = {"max_steps": 20, "one_hot_obs": True, "fully_observed": False, "img_obs": False}
LATER = {"state_encoder.weight": "state_embedding.weight"}
LATER |= {f"predict_actions.{kind}": f"action_predictor.{kind}" for kind in ("weight", "bias")}
BLOCK = "transformer.blocks.0"


def original(model):
    """A model's state dict as the original's first layout has it."""
    w, width = model.state_dict(), model.cfg.d_model
    names = {name: f"transformer.{name}" for name in w if name.startswith("blocks.")}
    state = {theirs: w[ours] for ours, theirs in names.items()} | {
        "reward_embedding.0.weight": w["W_E_rtg"][:, None],
        "state_encoder.weight": w["W_E_state"].T,
        "action_embedding.0.weight": torch.cat([w["W_E_action"], torch.ones(1, width)]),
        "time_embedding.weight": w["W_E_time"],
        "transformer.pos_embed.W_pos": w["W_pos"],
        "predict_actions.weight": w["W_U"].T,
        "predict_actions.bias": w["b_U"],
    }
    state |= {f"{BLOCK}.attn.mask": torch.ones(3, 3), f"{BLOCK}.attn.IGNORE": torch.tensor(-1e5)}
    return state | {
        f"predict_{what}.{kind}": torch.ones(2)
        for what in ("rewards", "states")
        for kind in ("weight", "bias")
    }


def later(model, **others):
    """The same as the later layouts have it: other names, one position less."""
    state = {LATER.get(name, name): weight for name, weight in original(model).items()}
    state = {
        re.sub(r"predict_(reward|state)s", r"\1_predictor", name): weight for name, weight in state.items()
    }
    return state | {"transformer.pos_embed.W_pos": model.W_pos.detach()[:2]} | others


def wrapped(state, **said):
    return {"model_state_dict": state, "offline_config": "{}", "model_config": json.dumps(PLAIN | said)} | {
        "environment_config": json.dumps(SEEN)
    }


@pytest.mark.parametrize(
    "layout",
    [original, later, lambda model: wrapped(later(model)), lambda model: wrapped(original(model), n_ctx=3)],
    ids=["the post's", "renamed", "wrapped", "wrapped, of the post's names"],
)
@pytest.mark.parametrize("encoding", ["index", "one-hot"])
def test_a_checkpoint_of_the_original_is_that_model_in_every_layout(tmp_path, layout, encoding):
    model = DecisionTransformer(dataclasses.replace(ORIGINAL, encoding=encoding), seed=4).eval()
    torch.save(layout(model), tmp_path / "theirs.pt")
    loaded = DecisionTransformer.from_post_checkpoint(tmp_path / "theirs.pt")
    assert loaded.cfg == model.cfg
    assert loaded.metadata == {
        "source": "a checkpoint of the original, theirs.pt",
        "sha256": hashlib.sha256((tmp_path / "theirs.pt").read_bytes()).hexdigest(),
    }
    x = torch.zeros(5, 1, 7, 7, 3, dtype=torch.uint8), torch.arange(5.0)[:, None], torch.arange(5)[:, None]
    assert torch.equal(loaded(*x), model(*x))
    subject = Subject.find(str(tmp_path / "theirs.pt"))
    assert (subject.sha256, subject.model.cfg) == (loaded.metadata["sha256"], model.cfg)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda m: later(m, **{f"{BLOCK}.ln1.w": torch.ones(12)}),
            "has what this architecture has not: LayerNorm",
        ),
        (lambda m: later(m, **{"transformer.ln_final.b": torch.ones(12)}), "LayerNorm"),
        (lambda m: wrapped(later(m), layer_norm="LNPre"), "LayerNorm"),
        (lambda m: later(m, **{f"{BLOCK}.mlp.W_gate": torch.ones(12, 8)}), "not: a gated MLP"),
        (
            lambda m: wrapped(later(m), gated_mlp=True, activation_fn="gelu"),
            "a gated MLP, the activation gelu",
        ),
        (lambda m: {"model_state_dict": {"memory_rnn.weight_ih": torch.ones(3)}}, "not: an LSTM"),
        (lambda m: later(m, **{"state_embedding.conv1.weight": torch.ones(3)}), "a convolution of the view"),
        (
            lambda m: later(m, **{"state_embedding.embedding.weight": torch.ones(3)}),
            "a bag of words for the view",
        ),
        (lambda m: later(m, **{"time_embedding.bias": torch.ones(12)}), "a linear time embedding"),
        (lambda m: later(m, **{"time_embedding.weight": torch.ones(12, 1)}), "a linear time embedding"),
        (
            lambda m: later(m, **{"transformer.pos_embed.W_pos": torch.ones(26, 12)}),
            "a context of 26 tokens, padded where an episode begins",
        ),
        (
            lambda m: wrapped(later(m)) | {"environment_config": '{"img_obs": true}'},
            "a picture or the whole grid",
        ),
        (lambda m: later(m, strange=torch.ones(1)), "has weights that this architecture has not: strange"),
        (
            lambda m: {"W": torch.ones(2)},
            r"is no Decision Transformer of the original: it has no reward_embedding\.0",
        ),
        (lambda m: torch.ones(2), "is no checkpoint of the original: it holds no state dict"),
        (lambda m: wrapped(later(m)) | {"model_config": "{"}, "its model_config is not a JSON object"),
        (
            lambda m: later(m, **{"state_embedding.weight": torch.ones(12, 150)}),
            "reads 150 numbers of a view",
        ),
        (
            lambda m: later(m, **{f"{BLOCK}.attn.b_Q": torch.ones(3)}),
            "does not hold a Decision Transformer: .*b_Q",
        ),
        (
            lambda m: later(m, **{"action_predictor.bias": torch.full((7,), float("nan"))}),
            "has numbers in b_U that",
        ),
    ],
)
def test_what_differs_from_this_architecture_is_said(tmp_path, change, words):
    torch.save(change(DecisionTransformer(ORIGINAL)), tmp_path / "theirs.pt")
    with pytest.raises(ValueError, match=rf"^{tmp_path}/theirs\.pt .*{words}") as caught:
        DecisionTransformer.from_post_checkpoint(tmp_path / "theirs.pt")
    assert "\n" not in str(caught.value)


def test_what_might_run_code_is_refused_without_a_hint_to_let_it(tmp_path):
    path = tmp_path / "theirs.pt"
    for content in (
        lambda: torch.save({"model": DecisionTransformer(ORIGINAL)}, path),
        lambda: path.write_bytes(b"PK"),
    ):
        content()
        with pytest.raises(
            ValueError, match=r"theirs\.pt is not read: it is no file of torch\.save, or"
        ) as caught:
            DecisionTransformer.from_post_checkpoint(path)
        assert not re.search(r"weights_only|allow_pickle|add_safe_globals|\n", str(caught.value))


def test_each_reader_names_the_other(saved, tmp_path):
    _, folder = saved
    with pytest.raises(ValueError, match="is a folder, and no checkpoint; `from_pretrained` reads"):
        DecisionTransformer.from_post_checkpoint(folder)
    with pytest.raises(
        ValueError, match="is a file, and no saved model's folder; `from_post_checkpoint` reads"
    ):
        DecisionTransformer.from_pretrained(folder / "config.json")


# The post's checkpoint


@pytest.mark.post_weights
def test_the_variable_names_the_posts_checkpoint():
    assert describe(fetch_post_checkpoint())["sha256"] == POST_MODEL_SHA256
    model = DecisionTransformer.from_post_checkpoint()
    assert model.cfg == DTConfig()
    assert model.metadata["sha256"] == POST_MODEL_SHA256
    actions = torch.load(fetch_post_checkpoint(), weights_only=True)["action_embedding.0.weight"]
    assert torch.equal(model.W_E_action, actions[:3])  # the fourth row is the original's padding
    named = DecisionTransformer.from_post_checkpoint(fetch_post_checkpoint())
    assert named.metadata == model.metadata
    assert "demo_model_overnight_training.pt" in named.metadata["source"]


def test_another_file_is_not_the_posts_checkpoint(tmp_path, monkeypatch):
    path = tmp_path / "model.pt"
    torch.save(original(DecisionTransformer(ORIGINAL)), path)
    monkeypatch.setenv("DTBOOK_POST_MODEL", str(path))
    with pytest.raises(
        ValueError, match=f"{path} has sha256 [0-9a-f]{{64}}; expected was {POST_MODEL_SHA256}"
    ):
        DecisionTransformer.from_post_checkpoint()


def test_a_missing_checkpoint_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.pt does not exist"):
        DecisionTransformer.from_post_checkpoint(tmp_path / "none.pt")


@pytest.fixture
def nowhere(tmp_path, monkeypatch):
    """No copy is named, none was fetched, no attempt was made."""
    monkeypatch.delenv(post_weights.COPY, raising=False)
    monkeypatch.setenv(post_weights.REFUSED, "")
    monkeypatch.delenv(post_weights.REFUSED)
    monkeypatch.setattr(pooch, "os_cache", lambda _: tmp_path / "cache")


@contextmanager
def serving(monkeypatch, answer):
    """A server that the weights are fetched from, which does this with each connection; yields how many there were."""

    class Handler(socketserver.BaseRequestHandler):
        def handle(self):
            connections.append(self.client_address)
            self.request.recv(4096)
            answer(self.request)

    connections = []
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads, server.block_on_close = True, False
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv(post_weights.MIRROR, f"http://127.0.0.1:{server.server_address[1]}/model.pt")
        yield connections
        server.shutdown()


def reply(body, length=None):
    length = len(body) if length is None else length
    return f"HTTP/1.1 200 OK\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n".encode() + body


def drip(request):
    """A byte now and then, for ten seconds: no single read takes long."""
    request.sendall(reply(b"", 100))
    with suppress(OSError):
        for _ in range(100):
            request.sendall(b"x")
            time.sleep(0.1)


@pytest.mark.parametrize("answer", [lambda _: time.sleep(60), drip], ids=["silent", "dripping"])
def test_a_download_that_takes_too_long_is_given_up_and_not_tried_again(
    answer, nowhere, monkeypatch, tmp_path
):
    monkeypatch.setattr(post_weights, "SECONDS", 0.5)
    with serving(monkeypatch, answer) as connections:
        for _ in range(2):
            with pytest.raises(
                NoPostWeights, match=r"from http://127.*/model\.pt \(\w*Timeout\w*\); DTBOOK_POST_MODEL"
            ):
                fetch_post_checkpoint()
        ask = "from dtbook.artifacts.post_weights import weights_at_hand; print(weights_at_hand())"
        started = subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True, check=True)
        assert started.stdout == "none\n"
    assert len(connections) == 1, "neither this process nor one that it starts asks again"
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_refused_connection_is_one_sentence_that_says_what_to_do(nowhere, monkeypatch):
    monkeypatch.setenv(post_weights.MIRROR, "http://127.0.0.1:9/model.pt")
    with pytest.raises(NoPostWeights) as caught:
        DecisionTransformer.from_post_checkpoint()
    assert str(caught.value) == (
        "The post's checkpoint could not be fetched from http://127.0.0.1:9/model.pt (ConnectionError); "
        "DTBOOK_POST_MODEL may name a copy of it."
    )


def test_what_comes_with_another_hash_is_not_the_posts(nowhere, monkeypatch, tmp_path):
    """As the page that a network answers with until one has signed in."""
    found = hashlib.sha256(b"something else").hexdigest()
    with (
        serving(monkeypatch, lambda request: request.sendall(reply(b"something else"))),
        pytest.raises(NoPostWeights, match=f"model.pt.*{POST_MODEL_SHA256}.*{found}") as caught,
    ):
        fetch_post_checkpoint()
    assert "\n" not in str(caught.value)
    assert list((tmp_path / "cache").iterdir()) == []


def test_what_was_fetched_is_kept(nowhere, monkeypatch):
    monkeypatch.setattr(post_weights, "POST_MODEL_SHA256", hashlib.sha256(b"weights").hexdigest())
    with serving(monkeypatch, lambda request: request.sendall(reply(b"weights"))) as connections:
        assert [fetch_post_checkpoint().read_bytes() for _ in range(2)] == [b"weights"] * 2
    assert len(connections) == 1
    fetch_post_checkpoint().write_bytes(b"damaged")
    assert post_weights.find_post_checkpoint() is None


def test_a_variable_that_names_no_file_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(post_weights.COPY, "gone.pt")
    for read in (
        fetch_post_checkpoint,
        DecisionTransformer.from_post_checkpoint,
        post_weights.weights_at_hand,
    ):
        with pytest.raises(
            FileNotFoundError, match=r"DTBOOK_POST_MODEL is 'gone.pt', but there is no file /.*gone"
        ):
            read()


@pytest.mark.parametrize("named", ["../post.pt", "~/post.pt"])
def test_a_copy_is_found_from_the_callers_folder_and_from_home(named, tmp_path, monkeypatch):
    (tmp_path / "below").mkdir()
    (tmp_path / "post.pt").write_bytes(b"weights")
    monkeypatch.chdir(tmp_path / "below")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv(post_weights.COPY, named)
    found = fetch_post_checkpoint()
    assert found.is_absolute()
    assert found.samefile(tmp_path / "post.pt")
