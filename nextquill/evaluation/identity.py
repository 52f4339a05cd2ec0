"""Digests of everything that an evaluation's results depend on; runs that agree in them may share results."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

from nextquill.data import Record
from nextquill.data.tokenizing import tokenizer_digest
from nextquill.models.loading import PromptSettings
from nextquill.storage.fingerprints import fingerprint

# Values of each weight in a digest. A few tell models apart, because training changes nearly all values.
_SAMPLED_VALUES = 64


def records_digest(records: Sequence[Record]) -> str:
    """A digest of records and their order."""
    return fingerprint(map(repr, records))


def model_digest(model: Any) -> str:
    """A digest of a model's weights, from some values of each weight."""

    def parts() -> Iterator[str]:
        for name, tensor in model.state_dict().items():
            values = tensor.detach().reshape(-1)
            sample = values[:: max(1, values.numel() // _SAMPLED_VALUES)][:_SAMPLED_VALUES]
            yield f"{name} {list(tensor.shape)} {sample.cpu().double().tolist()}"

    return fingerprint(parts())


def model_identity(model: Any, tokenizer: Any, settings: PromptSettings) -> dict[str, Any]:
    """The values that distinguish a model, its precision, its tokenizer and its prompts from others, by name; JSON."""
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
