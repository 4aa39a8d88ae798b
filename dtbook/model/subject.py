"""What is looked at: a model under a name, whoever trained it, and its data where they are at hand."""

from dataclasses import dataclass
from pathlib import Path

from dtbook.artifacts.post_weights import POST_MODEL_SHA256
from dtbook.artifacts.store import ArtifactStore, describe
from dtbook.model.transformer import DecisionTransformer
from dtbook.trajectories.episodes import Trajectories

POST = "post"
"""The name of the post's own weights."""


@dataclass(frozen=True)
class Subject:
    """A model to be looked at: a replication, the post's weights, a control, or a model of the reader's own."""

    name: str
    model: DecisionTransformer
    sha256: str
    """That of the model's folder, or of the post's checkpoint."""
    data: Trajectories | None = None
    """What the model was trained on."""

    @classmethod
    def find(cls, name: str, store: ArtifactStore | None = None) -> "Subject":
        """Return the subject of that name: "post", a folder of a store, like "seed_3", or a path.

        A path is that of a model's folder, or of a checkpoint of the original.

        The store is `data/` if none is given. The post's weights are fetched, or found where DTBOOK_POST_MODEL says.
        Raises ValueError for a name that is none of these, and for what is damaged or of another architecture.
        """
        if name == POST:
            return cls(name, DecisionTransformer.from_post_checkpoint(), POST_MODEL_SHA256)
        store = store or ArtifactStore()
        entries = store.entries()
        for artifact in (f"{name}/model", name):
            if artifact in entries:
                model = DecisionTransformer.from_pretrained(store.path(artifact))
                episodes = f"{name}/trajectories.npz"
                data = Trajectories.load(store.path(episodes)) if episodes in entries else None
                return cls(name, model, entries[artifact]["sha256"], data)
        path = Path(name).expanduser()
        if not path.exists():
            known = [POST, *(entry.removesuffix("/model") for entry in entries if entry.endswith("/model"))]
            raise ValueError(f"there is no subject {name!r}: give {', '.join(known)}, or a model's folder")
        read = (
            DecisionTransformer.from_pretrained if path.is_dir() else DecisionTransformer.from_post_checkpoint
        )
        return cls(name, read(path), describe(path)["sha256"])
