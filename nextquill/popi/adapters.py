"""PEFT adapters of the two roles: fresh ones, copies of what they were, and switching between them.

Switching PEFT's adapters changes which parameters want a gradient, and which of them that is belongs to the optimizer
here. So every switch puts those flags back.
"""

from __future__ import annotations

import copy
from collections.abc import Container, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch

from nextquill.errors import ArgumentError

#: Adapters of these names are frozen copies of what the others were at the start.
_INITIAL = "_initial"
# Those that leave the model what it is; others begin elsewhere, or change the base weights under both roles.
_BEGINNINGS = (True, "gaussian")


@contextmanager
def switched(model: Any, adapter: str | None) -> Iterator[None]:
    """A PEFT model with this adapter on, or none, for the length of the block; what is trained stays what it is."""
    previous = model.active_adapter
    if adapter == previous:
        yield
        return
    flags = {parameter: parameter.requires_grad for parameter in model.parameters()}

    def restore() -> None:
        for parameter, flag in flags.items():
            parameter.requires_grad_(flag)

    try:
        if adapter is None:
            model.base_model.disable_adapter_layers()
        else:
            model.set_adapter(adapter)
        restore()
        yield
    finally:
        if adapter is None:
            model.base_model.enable_adapter_layers()
        else:
            model.set_adapter(previous)
        restore()


def with_adapters(model: Any, peft_config: Any, names: Sequence[str], frozen: Container[str] = ()) -> Any:
    """The model with fresh LoRA adapters of these names.

    Args:
        model: one without adapters.
        peft_config: of each; None for rank 16 on all linear layers but the head.
        names: at least one.
        frozen: those that are not trained. No checkpoint is loaded into them, so their random part is always the same.

    Raises:
        ArgumentError: the config cannot be trained by two roles.
    """
    from peft import LoraConfig, get_peft_model

    if peft_config is None:
        peft_config = LoraConfig(task_type="CAUSAL_LM", r=16, lora_alpha=32, target_modules="all-linear")
    check_fresh(peft_config)
    adapted: Any = None
    for name in names:
        with _same_every_time() if name in frozen else nullcontext():
            if adapted is None:
                adapted = get_peft_model(model, copy.deepcopy(peft_config), adapter_name=name)
            else:
                adapted.add_adapter(name, copy.deepcopy(peft_config))
    return adapted


def check_fresh(config: Any) -> None:
    """Raise ArgumentError for a config of adapters that two roles of one model cannot have."""
    if not is_lora(config):
        raise ArgumentError(f"peft_config: expected a LoraConfig, got {type(config).__name__}")
    check_trainable(config)
    if config.init_lora_weights not in _BEGINNINGS:
        raise ArgumentError(
            f"peft_config: expected init_lora_weights True or 'gaussian', got {config.init_lora_weights!r}: each role "
            "begins as the base model, and the other one shares its weights"
        )


def check_trainable(config: Any) -> None:
    """Raise ArgumentError for dropout, and for what would be trained beside an adapter's own weights."""
    if getattr(config, "lora_dropout", 0.0):
        raise ArgumentError(
            f"peft_config: expected lora_dropout=0, got {config.lora_dropout}: losses and rewards are measured without "
            "dropout, and the gradient has to be theirs"
        )
    if getattr(config, "modules_to_save", None):
        raise ArgumentError("peft_config: expected no modules_to_save; both roles share everything but their adapters")
    if getattr(config, "bias", "none") != "none":
        raise ArgumentError(f"peft_config: expected bias='none', got {config.bias!r}; biases are the base model's")
    if getattr(config, "trainable_token_indices", None):
        raise ArgumentError("peft_config: expected no trainable_token_indices; embeddings are the base model's")


def is_lora(config: Any) -> bool:
    """Whether a config is of LoRA."""
    kind = getattr(config, "peft_type", None)
    return str(getattr(kind, "value", kind)) == "LORA"


def initial_adapter(model: Any, name: str) -> str | None:
    """The adapter that keeps what this one is now: None, for no adapter, where it does nothing yet, or a frozen copy.

    Args:
        model: a PEFT model with a LoRA adapter of this name.
        name: the adapter's.
    """
    own = {key: p for key, p in model.named_parameters() if f".{name}." in key and "lora_" in key}
    later = [p for key, p in own.items() if "lora_B" in key]
    plain = all(".lora_A." in key or ".lora_B." in key for key in own)
    if plain and later and not any(bool(p.any()) for p in later):
        return None
    flags = {parameter: parameter.requires_grad for parameter in model.parameters()}
    copied, config = name + _INITIAL, copy.deepcopy(model.peft_config[name])
    config.init_lora_weights = True  # any other could change the base weights a second time
    model.add_adapter(copied, config)
    weights = dict(model.named_parameters())
    with torch.no_grad():
        for key, parameter in weights.items():
            parameter.requires_grad_(flags.get(parameter, False))
            if f".{copied}." in key:
                parameter.copy_(weights[key.replace(f".{copied}.", f".{name}.")])
    return copied


@contextmanager
def _same_every_time() -> Iterator[None]:
    """Random numbers on the CPU from a fixed seed, and afterwards as if none had been drawn."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield
