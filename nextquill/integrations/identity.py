"""What measured figures depend on, as short digests: two runs with the same ones may share their results."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from typing import Any

from nextquill.data import Record
from nextquill.integrations.loading import PromptSettings

# Values of each weight that tell models apart: of a trained one nearly all differ from what they were.
_SAMPLED_VALUES = 64
_DIGITS = 16


def records_digest(records: Sequence[Record]) -> str:
    """A digest of records and their order."""
    digest = hashlib.sha256()
    for record in records:
        digest.update(repr(record).encode())
    return digest.hexdigest()[:_DIGITS]


def model_digest(model: Any) -> str:
    """A digest of a model's weights, from some values of each."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        values = tensor.detach().reshape(-1)
        sample = values[:: max(1, values.numel() // _SAMPLED_VALUES)][:_SAMPLED_VALUES]
        digest.update(f"{name} {list(tensor.shape)} {sample.cpu().double().tolist()}".encode())
    return digest.hexdigest()[:_DIGITS]


def model_identity(model: Any, tokenizer: Any, settings: PromptSettings) -> dict[str, Any]:
    """What tells a model, its precision, its tokenizer and its prompts from another's, by name; JSON."""
    from nextquill.data.prepared import tokenizer_digest

    prompt = dataclasses.asdict(settings)
    template = prompt.pop("template")
    return {
        "dtype": str(model.dtype),
        "device": next(model.parameters()).device.type,
        "model": model_digest(model),
        "tokenizer": tokenizer_digest(tokenizer),
        **prompt,
        **{f"template {name}": value for name, value in template.items()},
    }
