"""Which models can share prefixes exactly: what is refused before anything runs, and why."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from nextquill.errors import UnsupportedModelError

#: Layers whose tokens see their own path only.
_LAYER_TYPES = frozenset({"full_attention", "sliding_attention"})
#: Rotary embeddings whose frequencies follow the longest position of a row.
_ROW_DEPENDENT_ROPE = ("dynamic", "longrope")
#: Parts of the names under which modules keep rates: dropout, attention_dropout, layerdrop, router_jitter_noise …
_RANDOM = ("drop", "jitter")


def check_architecture(base: Any) -> None:
    """Raise UnsupportedModelError for layers in which a token depends on more than the tokens on its path."""
    name = type(base).__name__
    advice = "use attention='padded', which runs every branch in a row of its own"
    others = layer_types(base) - _LAYER_TYPES
    if others:
        raise UnsupportedModelError(
            f"{name}: its layers of type {', '.join(sorted(others))} pass what they have seen from row to row, so the "
            f"branches of a tree would see each other; {advice}"
        )
    if getattr(base, "_is_stateful", False):
        raise UnsupportedModelError(
            f"{name}: a model with recurrent state cannot share a prefix among branches; {advice}"
        )


def random_rates(model: nn.Module) -> list[tuple[str, nn.Module, str]]:
    """Where a model keeps the rates of what is random in training: name, module and attribute."""
    found: list[tuple[str, nn.Module, str]] = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Dropout):
            found.append((name, module, "p"))
        named = (attribute for attribute in vars(module) if any(part in attribute for part in _RANDOM))
        found += [(name, module, attribute) for attribute in named if _rate(module, attribute) is not None]
    return found


def check_dropout(rates: Sequence[tuple[str, nn.Module, str]], *, in_training_only: bool = False) -> None:
    """Raise UnsupportedModelError where training would draw once for all branches that share a token.

    Args:
        rates: of `random_rates`; the values are read now.
        in_training_only: look at modules in training mode only.
    """
    for name, module, attribute in rates:
        rate = _rate(module, attribute)
        if rate and (module.training or not in_training_only):
            raise UnsupportedModelError(
                f"dropout: {name}.{attribute}={rate:g} would drop the same units in all branches that share a prefix, "
                "which training them apart does not; set it to 0 (for LoRA: lora_dropout=0) or use attention='padded'"
            )


def _rate(module: nn.Module, attribute: str) -> float | None:
    """A rate, or the largest of a dict of them, which PEFT keeps by adapter."""
    value = getattr(module, attribute, None)
    values = [each for each in (value.values() if isinstance(value, dict) else [value]) if isinstance(each, float)]
    return max(values, default=None)


def rope_limit(base: Any) -> int | None:
    """The longest branch for which a row of trees has the rotary frequencies each branch has alone; None for any."""
    config = text_config(base)
    parameters = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    scopes = [scope for scope in parameters.values() if isinstance(scope, dict)] or [parameters]
    limits = []
    for scope in scopes:
        kind = str(scope.get("rope_type", scope.get("type", "default")))
        if any(known in kind for known in _ROW_DEPENDENT_ROPE):
            original = scope.get("original_max_position_embeddings") or getattr(
                config, "original_max_position_embeddings", None
            )
            limits.append(int(original or config.max_position_embeddings))
    return min(limits, default=None)


def layer_windows(base: Any) -> dict[int, int]:
    """The sliding window of each layer that has one, by the config."""
    config = text_config(base)
    window, types = getattr(config, "sliding_window", None), getattr(config, "layer_types", None)
    if window is None:
        return {}
    layers = range(config.num_hidden_layers)
    return {i: window for i in layers if types is None or types[i] == "sliding_attention"}


def base_model(model: Any) -> Any:
    """The model of transformers inside a PEFT model, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def layer_types(base: Any) -> set[str]:
    """The types of a model's layers; empty where its config does not name them."""
    return set(getattr(text_config(base), "layer_types", None) or ())


def text_config(base: Any) -> Any:
    """The config of a model's language part."""
    config: Any = getattr(base, "config", None)
    return config.get_text_config() if hasattr(config, "get_text_config") else config
