"""Files and what made them: the store with its manifest, provenance, comparison. Nothing here knows a model."""

from dtbook.artifacts.store import CHECKOUT, DATA_URL, ArtifactError, ArtifactStore, atomic_write, describe

__all__ = [
    "CHECKOUT",
    "DATA_URL",
    "ArtifactError",
    "ArtifactStore",
    "atomic_write",
    "describe",
]
