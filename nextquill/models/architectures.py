"""Models that cannot share prefixes exactly are refused before anything runs, with the reason."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from nextquill.errors import UnsupportedModelError
from nextquill.models.configs import text_config
from nextquill.models.recurrent import layers_with_state

#: Layers in which a token sees only its own path.
_ATTENTION_TYPES = frozenset({"full_attention", "sliding_attention"})
_FEED_FORWARD_TYPES = frozenset({"mlp", "moe"})
#: Layers that carry a state along a token's path, which `recurrent` runs; "hybrid" ones have attention beside it.
_STATE_TYPES = frozenset({"linear_attention", "conv", "hybrid"})
#: Rotary embeddings whose frequencies follow the longest position of a row.
_ROW_DEPENDENT_ROPE = ("dynamic", "longrope")
#: Parts of the names of attributes that hold rates: dropout, attention_dropout, layerdrop, router_jitter_noise …
_RANDOM = ("drop", "jitter")


def check_architecture(base: Any) -> None:
    """Raise UnsupportedModelError for layers in which a token depends on tokens outside its path."""
    name = type(base).__name__
    advice = "use attention='padded', which runs every branch in a separate row"
    types = layer_types(base)
    has_state = bool(types & (_ATTENTION_TYPES | {"hybrid"})) and bool(layers_with_state(base))
    others = types - _ATTENTION_TYPES - _FEED_FORWARD_TYPES - (_STATE_TYPES if has_state else frozenset())
    if others:
        raise UnsupportedModelError(
            f"{name}: its layers of type {', '.join(sorted(others))} let a token depend on rows outside its path, so "
            f"the branches of a tree would see each other; {advice}"
        )
    if getattr(base, "_is_stateful", False) and not has_state:
        raise UnsupportedModelError(
            f"{name}: a model with recurrent state cannot share a prefix among branches; {advice}"
        )


def random_rates(model: nn.Module) -> list[tuple[str, nn.Module, str]]:
    """The rates of a model's random operations in training, as name, module and attribute."""
    found: list[tuple[str, nn.Module, str]] = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Dropout):
            found.append((name, module, "p"))
        named = (attribute for attribute in vars(module) if any(part in attribute for part in _RANDOM))
        found += [(name, module, attribute) for attribute in named if random_rate(module, attribute) is not None]
    return found


def check_dropout(rates: Sequence[tuple[str, nn.Module, str]], *, in_training_only: bool = False) -> None:
    """Raise UnsupportedModelError if training would draw once for all branches that share a token.

    The rates, found by `random_rates`, are read now; with `in_training_only`, only those of modules in training mode.
    """
    for name, module, attribute in rates:
        rate = random_rate(module, attribute)
        if rate and (module.training or not in_training_only):
            raise UnsupportedModelError(
                f"dropout: {name}.{attribute}={rate:g} would drop the same units in all branches that share a prefix, "
                "unlike training in separate rows; set it to 0 (for LoRA: lora_dropout=0) or use attention='padded'"
            )


def random_rate(module: nn.Module, attribute: str) -> float | None:
    """A rate, or the largest one of a dict that PEFT keeps by adapter."""
    value = getattr(module, attribute, None)
    values = [each for each in (value.values() if isinstance(value, dict) else [value]) if isinstance(each, float)]
    return max(values, default=None)


def rope_limit(base: Any) -> int | None:
    """The longest branch that has the same rotary frequencies in a row of trees as alone; None without a limit."""
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
    """The sliding window of each layer that has one, from the config."""
    config = text_config(base)
    window, types = getattr(config, "sliding_window", None), getattr(config, "layer_types", None)
    if window is None:
        return {}
    layers = range(config.num_hidden_layers)
    return {i: window for i in layers if types is None or types[i] == "sliding_attention"}


def layer_types(base: Any) -> set[str]:
    """The types of a model's layers; empty if its config does not name them."""
    return set(getattr(text_config(base), "layer_types", None) or ())
