"""PEFT adapters of the two roles: makes fresh ones, copies their initial state, and switches between them.

PEFT changes the parameters' `requires_grad` when it switches adapters, although here the optimizer decides what is
trained. So every switch restores these flags.
"""

from __future__ import annotations

import copy
from collections.abc import Container, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from nextquill.errors import ArgumentError

#: Ends the name of the frozen copy of an adapter's initial state.
_INITIAL = "_initial"
# Initialisations that leave the outputs as they are; others change them, or the base weights that both roles share.
_BEGINNINGS = (True, "gaussian")


@contextmanager
def switched(model: Any, adapter: str | None) -> Iterator[None]:
    """Switch a PEFT model to this adapter, or to none, within the block; the trained parameters stay the same."""
    previous = model.active_adapter
    if adapter == previous:
        yield
        return
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}

    def restore() -> None:
        for name, parameter in model.named_parameters():  # FSDP2 replaces them in a forward
            parameter.requires_grad_(flags[name])

    with ExitStack() as stack:
        stack.callback(restore)
        if adapter is None:
            stack.callback(model.base_model.enable_adapter_layers)
            model.base_model.disable_adapter_layers()
        else:
            stack.callback(model.set_adapter, previous)
            model.set_adapter(adapter)
        restore()
        yield


def with_adapters(model: Any, peft_config: Any, names: Sequence[str], frozen: Container[str] = ()) -> Any:
    """Return the model with a fresh LoRA adapter of each name, by default of rank 16 on all linear layers but the head.

    Checkpoints do not restore the `frozen` adapters, so their random part is always the same. ArgumentError if the
    config does not fit two roles of one model.
    """
    from peft import LoraConfig, get_peft_model

    if peft_config is None:
        peft_config = LoraConfig(task_type="CAUSAL_LM", r=16, lora_alpha=32, target_modules="all-linear")
    if not is_lora(peft_config):
        raise ArgumentError(f"peft_config: expected a LoraConfig, got {type(peft_config).__name__}")
    check_trainable(peft_config)
    if peft_config.init_lora_weights not in _BEGINNINGS:
        raise ArgumentError(
            f"peft_config: expected init_lora_weights True or 'gaussian', got {peft_config.init_lora_weights!r}: each "
            "role starts as the base model, whose weights both share"
        )
    adapted: Any = None
    for name in names:
        with torch.random.fork_rng(devices=[], enabled=name in frozen):
            if name in frozen:
                torch.manual_seed(0)
            if adapted is None:
                adapted = get_peft_model(model, copy.deepcopy(peft_config), adapter_name=name)
            else:
                adapted.add_adapter(name, copy.deepcopy(peft_config))
    return adapted


def check_trainable(config: Any) -> None:
    """Raise ArgumentError for a config with dropout, or one that trains more than the adapter's own weights."""
    if getattr(config, "lora_dropout", 0.0):
        raise ArgumentError(
            f"peft_config: expected lora_dropout=0, got {config.lora_dropout}: losses and rewards are measured without "
            "dropout, so the gradient must be too"
        )
    if getattr(config, "modules_to_save", None):
        raise ArgumentError("peft_config: expected no modules_to_save; both roles share everything but their adapters")
    if getattr(config, "bias", "none") != "none":
        raise ArgumentError(f"peft_config: expected bias='none', got {config.bias!r}; biases are the base model's")
    if getattr(config, "trainable_token_indices", None):
        raise ArgumentError("peft_config: expected no trainable_token_indices; embeddings are the base model's")


def is_lora(config: Any) -> bool:
    """Whether a config is a LoRA config."""
    return getattr(config, "peft_type", None) == "LORA"


def initial_adapter(model: Any, name: str) -> str | None:
    """Keep the present state of a LoRA adapter: return the name of a frozen copy, or None if it has no effect yet."""
    own = {key: p for key, p in model.named_parameters() if f".{name}." in key and "lora_" in key}
    later = [p for key, p in own.items() if "lora_B" in key]
    plain = all(".lora_A." in key or ".lora_B." in key for key in own)
    if plain and later and not any(bool(p.any()) for p in later):
        return None
    flags = {parameter: parameter.requires_grad for parameter in model.parameters()}
    copied, config = name + _INITIAL, copy.deepcopy(model.peft_config[name])
    config.init_lora_weights = True  # another initialisation could change the base weights a second time
    model.add_adapter(copied, config)
    weights = dict(model.named_parameters())
    with torch.no_grad():
        for key, parameter in weights.items():
            parameter.requires_grad_(flags.get(parameter, False))
            if f".{copied}." in key:
                parameter.copy_(weights[key.replace(f".{copied}.", f".{name}.")])
    return copied
