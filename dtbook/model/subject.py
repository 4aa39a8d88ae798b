"""What is looked at: a model under a name, whoever trained it, and what was measured of it where that is at hand."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import pandas as pd

from dtbook.artifacts.parameters import refuse
from dtbook.artifacts.post_weights import POST_MODEL_SHA256
from dtbook.artifacts.store import ArtifactStore, describe
from dtbook.model.transformer import DecisionTransformer

POST = "post"
"""The name of the post's own weights."""


@dataclass(frozen=True)
class Subject:
    """A model to be looked at: a replication, the post's weights, a control, or a model of the reader's own.

    To find one is quick: its weights are read when `model` is first asked for, and the post's are fetched only then.
    """

    name: str
    """Its name in a store, or the absolute path that it was found at."""
    sha256: str
    """That of the model's folder, or of the checkpoint."""
    load: Callable[[], DecisionTransformer]
    store: ArtifactStore | None = None
    """What holds, in `folder`, what it was trained on and what was measured of it; None for a model by itself."""
    folder: str = ""

    @classmethod
    def find(cls, name: str, store: ArtifactStore | None = None) -> "Subject":
        """Return the subject of that name: "post", a folder of a store, like "seed_13", or a path.

        A path is that of a model's folder, of a checkpoint of the original, or of a folder of another store, like the
        `own` that `dtbook measure` leaves. The store is `data/` if none is given. Raises ValueError for a name that is
        none of these.
        """
        store, path = store or ArtifactStore(), Path(name).expanduser().absolute()
        if name == POST:
            return cls(POST, POST_MODEL_SHA256, DecisionTransformer.from_post_checkpoint, store, POST)
        if found := cls._kept(name, store, name):
            return found
        there = ArtifactStore(path.parent)
        if (path / "model").is_dir() and (found := cls._kept(str(path), there, path.name)):
            return found
        if not name or not path.exists():
            models = [
                key for key, entry in store.entries().items() if "config.json" in entry.get("files", {})
            ]
            known = ", ".join([POST, *(key.removesuffix("/model") for key in models)])
            raise ValueError(f"there is no subject {name!r}: give {known}, or a model's folder")
        kind = DecisionTransformer
        read = kind.from_pretrained if path.is_dir() else kind.from_post_checkpoint
        return cls(str(path), describe(path)["sha256"], partial(read, path))

    @classmethod
    def _kept(cls, name: str, store: ArtifactStore, folder: str) -> "Subject | None":
        """Return the subject whose model a store has in a folder, or as it; None if it has none there."""
        entries = store.entries()
        artifact = next((each for each in (f"{folder}/model", folder) if each in entries), "")
        if not artifact:
            return None

        def load() -> DecisionTransformer:
            return DecisionTransformer.from_pretrained(store.path(artifact))

        return cls(name, entries[artifact]["sha256"], load, store, folder)

    @cached_property
    def model(self) -> DecisionTransformer:
        """Return the model. Raises ValueError where it is damaged, or of another architecture."""
        return self.load()

    def has(self, file: str) -> bool:
        """Return whether something of the subject is at hand, such as "causal.parquet"."""
        return self.store is not None and f"{self.folder}/{file}" in self.store.entries()

    def path(self, file: str) -> Path:
        """Return the path of something of the subject, such as "causal.parquet".

        Raises ValueError where it is not at hand, naming the subjects of `data/` that have it.
        """
        if self.store is not None and self.has(file):
            return self.store.path(f"{self.folder}/{file}")
        having = [name.rpartition("/")[0] for name in ArtifactStore().entries() if name.endswith(f"/{file}")]
        others = "a folder that holds it, as `dtbook measure` and `dtbook reproduce` leave them"
        refuse("subject", self.name, f"one with {file}: {', '.join(having)}, or {others}")


def gather(subjects: Iterable[Subject], file: str) -> pd.DataFrame:
    """Return one table of what was measured of several subjects, such as "causal.parquet"; `model` says of which.

    Raises ValueError naming the first of which there is no such table.
    """
    tables = {each.name: pd.read_parquet(each.path(file)) for each in subjects}
    return pd.concat(tables, names=["model"]).reset_index("model").reset_index(drop=True)
