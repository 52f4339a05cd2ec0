"""What a run is, in a few values: a checkpoint is resumed only by a run that agrees in all of them."""

from __future__ import annotations

import re
from typing import Any

import torch

from nextquill.storage.fingerprints import fingerprint

_CONFIG_FIELDS = ("model_type", "hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
_SAMPLE = 16
#: What an adapter's weights mean depends on these.
_SCALING = ("lora_alpha", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern")


def run_identity(model: Any, loss: Any) -> dict[str, Any]:
    """What must agree between a run and a checkpoint it resumes from, as JSON holds it.

    The model's shape, its adapters, a fingerprint of its frozen weights (which no checkpoint of an adapter holds) and
    the loss.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    config: Any = getattr(base, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    return {
        "model": {name: getattr(config, name, None) for name in _CONFIG_FIELDS},
        "adapters": {name: _describe(adapter) for name, adapter in sorted(getattr(model, "peft_config", {}).items())},
        "frozen_weights": _fingerprint(model),
        # A function's address is another one in every process.
        "loss": re.sub(r" at 0x[0-9a-f]+", "", repr(loss)),
    }


def _describe(adapter: Any) -> str:
    targets = getattr(adapter, "target_modules", None)
    targets = sorted(targets) if isinstance(targets, (set, list, tuple)) else targets
    scaling = {name: value for name in _SCALING if (value := getattr(adapter, name, None))}
    kind = getattr(adapter.peft_type, "value", adapter.peft_type)
    return f"{kind}, r={getattr(adapter, 'r', None)}, {scaling}, {targets}"


def _fingerprint(model: torch.nn.Module) -> str | None:
    """A hash over the first values of every frozen parameter; None where nothing is frozen."""
    frozen = [(name, p) for name, p in model.named_parameters() if not p.requires_grad and not p.is_meta]
    if not frozen:
        return None
    parts = list[bytes]()
    for name, parameter in frozen:
        sample = parameter.detach().reshape(-1)[:_SAMPLE]
        sample = sample.float() if sample.is_floating_point() else sample
        parts.append(name.encode() + sample.cpu().numpy().tobytes())
    return fingerprint(parts)
