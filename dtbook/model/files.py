"""Files of a model: saving and loading a folder (safetensors + JSON), and reading the post's checkpoint.

Nothing here knows the architecture; `model.DecisionTransformer` does. No pickle is loaded: a checkpoint is read by
`torch.load(weights_only=True)`, which accepts tensors and texts alone.
"""

import json
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

import safetensors
import safetensors.torch
import torch
from huggingface_hub import PyTorchModelHubMixin
from torch import Tensor

from dtbook.artifacts.parameters import check_finite
from dtbook.artifacts.post_weights import (
    NONE,
    POST_MODEL_SHA256,
    NoPostWeights,
    fetch_post_checkpoint,
    note,
)
from dtbook.artifacts.store import atomic_write, describe, recover

WEIGHTS_FILE, CONFIG_FILE = "model.safetensors", "config.json"
MODEL_CARD = """---
{{ card_data }}
---

A Decision Transformer on MiniGrid's Dynamic Obstacles, from the Decision Transformer book.
Load it with `dtbook.model.DecisionTransformer.from_pretrained(folder)`; `config.json` says what it is.
"""


class FolderMixin(
    PyTorchModelHubMixin,
    library_name="dtbook",
    license="mit",
    tags=["decision-transformer", "minigrid", "interpretability"],
    model_card_template=MODEL_CARD,
):
    """Saving, whole or not at all, by huggingface_hub's mixin (which adds the card and `push_to_hub`)."""

    def description(self) -> dict[str, Any]:
        """Return what config.json is to hold besides the weights' sha256."""
        raise NotImplementedError

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> str | None:
        """Write weights (safetensors), config.json (shape, metadata, the weights' sha256) and a model card.

        The folder appears, or changes, as by `atomic_write`; other files in it stay. Further arguments are
        huggingface_hub's (`push_to_hub`, …). Raises ValueError for weights that are not finite and
        metadata that JSON does not hold.
        """
        check_finite(f"the model for {save_directory}", cast(torch.nn.Module, self).state_dict())
        with atomic_write(save_directory, keep=True) as draft:
            return super().save_pretrained(draft, **kwargs)

    def _save_pretrained(self, save_directory: Path) -> None:
        super()._save_pretrained(save_directory)
        config = self.description() | {"weights_sha256": describe(save_directory / WEIGHTS_FILE)["sha256"]}
        try:
            text = json.dumps(config, indent=2, sort_keys=True, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"metadata is {config['metadata']}; it must hold plain JSON values ({error})."
            ) from error
        (save_directory / CONFIG_FILE).write_text(text + "\n")


def read_folder(folder: str | Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return what config.json says and the weights, of a folder that `save_pretrained` wrote.

    Raises FileNotFoundError for a missing file, ValueError naming one that is truncated, altered, of another kind, or
    holds numbers that are not finite.
    """
    if Path(folder).is_file():
        raise ValueError(
            f"{folder} is a file, and no saved model's folder; `from_post_checkpoint` reads the original's checkpoints."
        )
    with suppress(OSError):  # where a killed save cannot be ended, what is there is read
        recover(Path(folder))
    config_path, weights_path = Path(folder) / CONFIG_FILE, Path(folder) / WEIGHTS_FILE
    for path in (config_path, weights_path):
        if not path.is_file():
            raise FileNotFoundError(f"{path} does not exist; the folder of a saved model holds it.")
    try:
        config = json.loads(config_path.read_text())
        check_sha256(weights_path, config["weights_sha256"])
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{config_path} is not a saved model's description: {error!r}.") from error
    try:
        weights = safetensors.torch.load_file(weights_path)
    except safetensors.SafetensorError as error:
        raise ValueError(f"{weights_path} is not a safetensors file: {error}.") from error
    check_finite(str(weights_path), weights)
    return config, weights


def read_post_checkpoint(path: str | Path | None = None) -> tuple[Any, str]:
    """Return what a checkpoint of the original holds, and its sha256; without `path` that of the post.

    The runner of a notebook is left a note of the post's, which is `fetch_post_checkpoint()`. Raises NoPostWeights
    where it cannot be had, FileNotFoundError for a file that is missing, ValueError naming one that is not the post's,
    where none was named, or no checkpoint.
    """
    try:
        file = Path(path) if path is not None else fetch_post_checkpoint()
    except NoPostWeights as error:
        note(NONE, str(error))
        raise
    if file.is_dir():
        raise ValueError(
            f"{file} is a folder, and no checkpoint; `from_pretrained` reads a saved model's folder."
        )
    if not file.is_file():
        raise FileNotFoundError(
            f"{file} does not exist; a checkpoint of the original was to be read from it."
        )
    if path is None:
        check_sha256(file, POST_MODEL_SHA256)
    if (sha256 := str(describe(file)["sha256"])) == POST_MODEL_SHA256:
        note(sha256)
    try:
        return torch.load(file, weights_only=True, map_location="cpu"), sha256
    except Exception as error:  # whose words are many lines, and say how to let the file run code
        raise ValueError(
            f"{file} is not read: it is no file of torch.save, or holds other things than tensors and texts; save the "
            "state dict alone."
        ) from error


def check_sha256(path: Path, expected: str) -> None:
    """Raise ValueError naming the file and both hashes if it is not the one expected."""
    if (found := describe(path)["sha256"]) != expected:
        raise ValueError(f"{path} has sha256 {found}; expected was {expected}.")
