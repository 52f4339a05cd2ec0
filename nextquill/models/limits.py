"""How many tokens a model knows, and how long it reads."""

from __future__ import annotations

from typing import Any

from torch import nn

from nextquill.errors import ArgumentError
from nextquill.models.architectures import text_config


def check_vocabulary(model: Any, tokenizer: Any) -> None:
    """Raise ArgumentError where the tokenizer can produce ids the model has no embedding for."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    embedding = base.get_input_embeddings() if hasattr(base, "get_input_embeddings") else None
    size = getattr(getattr(embedding, "weight", None), "shape", [0])[0]
    largest = max(tokenizer.get_vocab().values(), default=-1)
    if size and largest >= size:
        raise ArgumentError(
            f"processing_class: its token ids go up to {largest}, the model has {size} embeddings; "
            "resize the model's embeddings or use its own tokenizer"
        )


def default_max_length(model: nn.Module) -> int:
    """2048 tokens, or the model's own limit if that is less."""
    limit = getattr(text_config(model), "max_position_embeddings", None)
    return min(2048, limit) if isinstance(limit, int) and limit > 0 else 2048
