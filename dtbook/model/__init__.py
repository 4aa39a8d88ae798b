"""The Decision Transformer: its configuration, the model, its fast path and its files."""

from dtbook.artifacts.post_weights import NoPostWeights, fetch_post_checkpoint
from dtbook.model.config import DTConfig
from dtbook.model.subject import Subject, gather
from dtbook.model.transformer import DecisionTransformer

__all__ = [
    "DTConfig",
    "DecisionTransformer",
    "NoPostWeights",
    "Subject",
    "fetch_post_checkpoint",
    "gather",
]
