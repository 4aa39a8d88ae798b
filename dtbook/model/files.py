"""Files of a model: saving and loading a folder (safetensors + JSON), and reading the post's checkpoint.

Nothing here knows the architecture; `model.DecisionTransformer` does. No pickle is loaded: the post's
checkpoint is read by `torch.load(weights_only=True)`, which accepts tensors alone, once its sha256 is
checked.
"""

import json
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from huggingface_hub import PyTorchModelHubMixin
from torch import Tensor

from dtbook.artifacts.post_weights import (
    NONE,
    POST_MODEL_SHA256,
    NoPostWeights,
    fetch_post_checkpoint,
    note,
)
from dtbook.artifacts.store import atomic_write, describe

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
        huggingface_hub's (`push_to_hub`, …).
        """
        with atomic_write(save_directory, keep=True) as draft:
            return super().save_pretrained(draft, **kwargs)

    def _save_pretrained(self, save_directory: Path) -> None:
        super()._save_pretrained(save_directory)
        config = self.description() | {"weights_sha256": describe(save_directory / WEIGHTS_FILE)["sha256"]}
        (save_directory / CONFIG_FILE).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def read_folder(folder: str | Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return what config.json says and the weights, of a folder that `save_pretrained` wrote.

    Raises FileNotFoundError for a missing file, ValueError naming one that is truncated, altered or of
    another kind.
    """
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
        return config, safetensors.torch.load_file(weights_path)
    except safetensors.SafetensorError as error:
        raise ValueError(f"{weights_path} is not a safetensors file: {error}.") from error


def read_post_checkpoint(path: str | Path | None = None) -> dict[str, Tensor]:
    """Return the state dict of the post's model, from `path` or else from `fetch_post_checkpoint()`.

    The runner of a notebook is left a note of it. Raises NoPostWeights where they cannot be had, FileNotFoundError
    for a file that is missing, ValueError naming a file that is not the post's.
    """
    try:
        file = Path(path) if path is not None else fetch_post_checkpoint()
    except NoPostWeights as error:
        note(NONE, str(error))
        raise
    if not file.is_file():
        raise FileNotFoundError(f"{file} does not exist; the post's checkpoint was to be read from it.")
    check_sha256(file, POST_MODEL_SHA256)
    note(POST_MODEL_SHA256)
    return torch.load(file, weights_only=True, map_location="cpu")


def check_sha256(path: Path, expected: str) -> None:
    """Raise ValueError naming the file and both hashes if it is not the one expected."""
    if (found := describe(path)["sha256"]) != expected:
        raise ValueError(f"{path} has sha256 {found}; expected was {expected}.")
