"""The Decision Transformer: its configuration, the model, its fast path and its files."""

from dtbook.model.config import DTConfig
from dtbook.model.files import fetch_post_checkpoint
from dtbook.model.transformer import DecisionTransformer

__all__ = [
    "DTConfig",
    "DecisionTransformer",
    "fetch_post_checkpoint",
]
