"""The model inside an adapter, its text config, and its limits in tokens. Imports no torch."""

from __future__ import annotations

from typing import Any

from nextquill.errors import ArgumentError


def is_adapter(model: Any) -> bool:
    """Whether `model` is a PEFT model."""
    return hasattr(model, "peft_config")


def base_model(model: Any) -> Any:
    """The model of transformers inside a PEFT model, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def text_config(model: Any) -> Any:
    """The config of a model's language part; None for a model without a config."""
    config: Any = getattr(base_model(model), "config", None)
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def context_length(model: Any) -> int | None:
    """The largest number of positions that the config allows; None where it gives no number."""
    limit = getattr(text_config(model), "max_position_embeddings", None)
    return limit if isinstance(limit, int) and limit > 0 else None


def default_max_length(model: Any) -> int:
    """2048 tokens, or the model's own limit if that is less."""
    return min(2048, context_length(model) or 2048)


def check_vocabulary(model: Any, tokenizer: Any) -> None:
    """Raise ArgumentError if the tokenizer can produce ids without an embedding in the model."""
    base = base_model(model)
    embedding = base.get_input_embeddings() if hasattr(base, "get_input_embeddings") else None
    size = getattr(getattr(embedding, "weight", None), "shape", [0])[0]
    largest = max(tokenizer.get_vocab().values(), default=-1)
    if size and largest >= size:
        raise ArgumentError(
            f"processing_class: its token ids go up to {largest}, the model has {size} embeddings; "
            "resize the model's embeddings or use its own tokenizer"
        )
