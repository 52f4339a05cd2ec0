"""Running a loss inside a model's output head, during the model's own forward.

During one forward, a function replaces the model's head. It sees the final hidden states and the head's weight, and
returns a scalar. The model returns that scalar in place of its logits, so DDP, FSDP and ZeRO-3 hooks see an ordinary
forward and backward. Calling the backbone and using `lm_head.weight` outside would break FSDP and skip DDP's gradient
synchronisation without an error. No logits exist.

A scale or a soft cap *after* the head is found by probing (`probe.py`) and becomes a part of the loss; it does not
change the returned scalar. A head that is not exactly x Wᵀ + b, LoRA included, is refused.

Tensor parallelism (transformers' `tp_plan`) divides the head's vocabulary over processes, and wraps the head's forward
in one that gathers logits. The function that replaces it needs no logits: it gets the hidden states, which are whole on
each process, and this process's part of the weight.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from nextquill.errors import UnsupportedModelError
from nextquill.models.configs import base_model
from nextquill.models.probe import probe_logits, replaced_forward, returned_logits, softcaps, without_softcap
from nextquill.vocabulary_shard import VocabularyShard, own_part, part_of

_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class HeadState:
    """The input of a head function.

    Attributes:
        hidden_states: [B, T, D], the head's input, in the dtype of the model's forward.
        weight: [V, D], the effective weight, in that dtype or a wider one; or this process's part of it.
        bias: [V], in the weight's dtype, or None; divided like the weight.
    """

    hidden_states: Tensor
    weight: Tensor | VocabularyShard
    bias: Tensor | None

    def select(self, positions: Tensor) -> Tensor:
        """Rows [n, D] of the flattened hidden states at `positions` (int64 [n]), in the weight's dtype.

        Under autocast they keep their own dtype, and autocast casts them later.
        """
        # Indexing, unlike index_select, has a backward without atomics on a GPU; branches may share a row.
        rows = self.hidden_states.flatten(0, 1)[positions]
        return rows if torch.is_autocast_enabled(rows.device.type) else rows.to(self.weight.dtype)


HeadFunction = Callable[[HeadState], Tensor]


class LossInHead:
    """Runs functions of (hidden states, head weight) inside `model`'s own forward.

    Args:
        model: an unwrapped causal language model of transformers, or a PEFT model around one.

    Attributes:
        softcap, logit_scale: applied by the architecture after its head; the loss needs both.

    Raises:
        UnsupportedModelError: the head is not a linear layer, plain or with LoRA; the operation after it is neither a
            scale nor a soft cap; or the model inserts positions (prompt learning).
    """

    def __init__(self, model: nn.Module) -> None:
        if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
            raise UnsupportedModelError(f"{type(model).__name__}: expected a decoder-only model")
        _check_positions(model)
        self.model = model
        self.head = find_head(model)
        _check_adapters(self.head)
        if not any(isinstance(module, FSDPModule) for module in model.modules()):  # its weight is gathered in a forward
            _check_reproduced(self.head)
        self.logit_scale, self.softcap = probe_logits(model, self.head)
        self._caps = [] if self.softcap is None else softcaps(model)
        self._function: HeadFunction | None = None
        # Always the same function object: compiled graphs are guarded by its identity.
        self._forward_in_head = torch.compiler.disable(self._run_function)
        # Without the cap only a scale is left; the returned scalar is divided by it.
        self._residual_scale, residual_cap = self.logit_scale, self.softcap
        if self.softcap is not None:
            with without_softcap(self._caps):
                self._residual_scale, residual_cap = probe_logits(model, self.head)
        if residual_cap is not None:
            raise UnsupportedModelError(
                f"{type(model).__name__}: its soft cap of {self.softcap:g} on the logits could not be switched off "
                "through config.final_logit_softcapping or a module, so a loss cannot be returned through its forward"
            )

    def forward(self, function: HeadFunction, inputs: dict[str, Any], call: nn.Module | None = None) -> Tensor:
        """Run the model on `inputs` and return the scalar of `function` in its head, of any floating dtype.

        The inputs are keyword arguments without labels. `call` is the model in a DDP or FSDP wrapper, if there is one.
        """
        _check_adapters(self.head)  # an adapter may have been added or switched
        self._function = function
        try:
            with without_softcap(self._caps), replaced_forward(self.head, self._forward_in_head):
                outputs = (self.model if call is None else call)(**inputs, use_cache=False)
        finally:
            self._function = None
        result: Tensor = returned_logits(outputs)
        if result.numel() != 1:
            raise UnsupportedModelError(
                f"{type(self.model).__name__}: its forward did not return the head's result; were its adapters "
                "switched after the trainer was made?"
            )
        return result.reshape(())

    def _run_function(self, hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
        """Replaces the head's forward."""
        assert self._function is not None
        weight, bias = effective_weight(self.head)
        if not torch.is_autocast_enabled(hidden_states.device.type):
            weight = _like(weight, own_part(weight).to(torch.promote_types(weight.dtype, hidden_states.dtype)))
            bias = None if bias is None else bias.to(weight.dtype)
        result = self._function(HeadState(hidden_states, weight, bias)).div(self._residual_scale)
        return result.reshape(1, 1, 1).clone()  # FSDP2 warns if a module returns a view


def find_head(model: Any) -> Any:
    """Return the module whose forward computes the logits; UnsupportedModelError if none is a linear layer."""
    base = base_model(model)
    head: Any = base.get_output_embeddings() if hasattr(base, "get_output_embeddings") else None
    if not isinstance(head, nn.Module):
        raise UnsupportedModelError(f"{type(base).__name__}: expected a model with an output embedding, got none")
    if isinstance(getattr(head, "modules_to_save", None), nn.ModuleDict):  # PEFT's copies of a fully trained module
        copies: Any = head.modules_to_save
        adapters: Any = head.active_adapters
        head = copies[adapters[0]]
    layer = _base_layer(head)
    if not isinstance(layer, nn.Linear) or layer.weight.dtype not in _DTYPES:
        dtype = getattr(getattr(layer, "weight", None), "dtype", None)
        raise UnsupportedModelError(
            f"{type(base).__name__}: expected its output embedding to be a linear layer with a floating-point weight, "
            f"got {type(layer).__name__} of {dtype}"
        )
    return head


def effective_weight(head: Any) -> tuple[Tensor | VocabularyShard, Tensor | None]:
    """The effective weight and bias of a head, LoRA adapters included, differentiable in all of them.

    The weight is W + Σ scaling · B A over the active adapters, [V, D]. It has the widest dtype among them, so that a
    half-precision base does not round a small adapter away. The bias [V] has the same dtype, or is None. If W is a
    DTensor whose vocabulary processes divide, both are this process's part.
    """
    base = _base_layer(head)
    given = part_of("lm_head.weight", base.weight)
    weight, bias = own_part(given), None if base.bias is None else own_part(part_of("lm_head.bias", base.bias))
    for name in _active_lora(head):
        down, up = head.lora_A[name].weight, head.lora_B[name].weight
        if isinstance(given, VocabularyShard):
            down, up = given.summed_gradient(down), _own_rows(given, up)
        wide = torch.promote_types(weight.dtype, up.dtype)
        with torch.autocast(weight.device.type, enabled=False):
            weight = weight.to(wide) + head.scaling[name] * (up.to(wide) @ down.to(wide))
    return _like(given, weight), None if bias is None else bias.to(weight.dtype)


def _own_rows(part: VocabularyShard, up: Tensor) -> Tensor:
    """The rows [v, r] of a LoRA factor B [V, r] that belong to this process's part of the vocabulary."""
    factor = part_of("lora_B", up)
    if isinstance(factor, VocabularyShard):
        return factor.weight
    if len(factor) != part.vocabulary:  # its own forward would fail, too
        raise UnsupportedModelError(
            f"output embedding: expected LoRA for {part.vocabulary} tokens, got {len(factor)}: PEFT does not adapt a "
            "head that gathers its logits; load the model with tp_plan={'lm_head': 'colwise'}, or leave lm_head out of "
            "target_modules"
        )
    return part.summed_gradient(factor)[part.start : part.start + len(part.weight)]


def _like(given: Tensor | VocabularyShard, weight: Tensor) -> Tensor | VocabularyShard:
    return given.with_weight(weight) if isinstance(given, VocabularyShard) else weight


def _base_layer(head: Any) -> Any:
    return head.base_layer if hasattr(head, "base_layer") else head


def _active_lora(head: Any) -> list[str]:
    if not hasattr(head, "lora_A") or head.disable_adapters or head.merged:
        return []
    return [name for name in head.active_adapters if name in head.lora_A]


def _check_positions(model: nn.Module) -> None:
    """Refuse adapters that put virtual tokens before the input: labels would no longer match the rows."""
    for name, config in getattr(model, "peft_config", {}).items():
        if getattr(config, "is_prompt_learning", False):
            raise UnsupportedModelError(
                f"adapter {name!r}: prompt learning ({config.peft_type}) is not supported; use LoRA"
            )


def _check_adapters(head: Any) -> None:
    """Refuse an adapted head that `effective_weight` does not reproduce."""
    adapted = hasattr(head, "base_layer")
    if not adapted and not type(head).__module__.startswith("peft."):
        return
    if not adapted or not hasattr(head, "lora_A"):
        raise UnsupportedModelError(
            f"output embedding: adapters of type {type(head).__name__} are not supported, only LoRA"
        )
    for name in head.lora_A:
        if getattr(head.lora_dropout[name], "p", 0.0) > 0:
            raise UnsupportedModelError(
                "output embedding: LoRA with dropout on the output embedding is not supported; set lora_dropout=0 or "
                "leave lm_head out of target_modules"
            )
        if head.lora_variant.get(name) is not None or head.lora_bias.get(name):
            raise UnsupportedModelError("output embedding: only plain LoRA (no DoRA, no lora_bias) is supported on it")


@torch.no_grad()
def _check_reproduced(head: nn.Module) -> None:
    """Refuse a head that does not return x Wᵀ + b on two rows, such as a subclass of Linear with a scale inside."""
    given, bias = effective_weight(head)
    weight = own_part(given)
    if weight.is_meta or weight.numel() == 0:  # not loaded yet, or partitioned by ZeRO-3
        return
    rows = torch.arange(2 * weight.shape[1], device=weight.device).view(1, 2, -1).cos()
    expected = nn.functional.linear(rows.to(weight.dtype), weight, bias)
    result = head(rows.to(_base_layer(head).weight.dtype))
    if isinstance(given, VocabularyShard) and result.shape[-1] == given.vocabulary:
        result = result.narrow(-1, given.start, len(weight))
    if (result - expected).abs().max() > 2e-2 * expected.abs().max():
        raise UnsupportedModelError(
            f"output embedding: the result of {type(head).__name__} is not hidden_states · weightᵀ + bias, "
            "so a loss inside it would be wrong"
        )
