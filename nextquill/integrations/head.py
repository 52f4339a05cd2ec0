"""Running a loss inside a model's output head, during the model's own forward.

The model's head is replaced for the length of one forward by a function that sees the final hidden states and the
head's weight and returns a scalar. That scalar travels through the model's own return value, so DDP, FSDP and ZeRO-3
hooks see an ordinary forward and backward; calling the backbone and using `lm_head.weight` outside breaks FSDP and
silently skips DDP's gradient synchronisation. No logits exist.

What an architecture does *after* its head (a scale, a soft cap) is found by probing: the model runs once on one token
with a head that returns known values, and what comes out tells. It then belongs to the loss, and the scalar is guarded
against it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nextquill.errors import UnsupportedModelError


@dataclass(frozen=True)
class HeadState:
    """What a head function sees: hidden states [B, T, D] and the effective weight [V, D] and bias [V] or None."""

    hidden_states: Tensor
    weight: Tensor
    bias: Tensor | None


HeadFunction = Callable[[HeadState], Tensor]


class LossInHead:
    """Runs functions of (hidden states, head weight) inside `model`'s own forward.

    Args:
        model: an unwrapped causal language model of transformers, or a PEFT model around one.

    Attributes:
        softcap, logit_scale: what the architecture applies after its head; to be given to the loss.

    Raises:
        UnsupportedModelError: no output embedding, or something after it that is neither a scale nor a soft cap.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.head = find_head(model)
        _check_adapters(self.head)
        self.logit_scale, self.softcap = _probe(model, self.head)
        # What is left after the cap is switched off is a scale, which the returned scalar is divided by.
        with _without_softcap(model, self.softcap):
            self._residual_scale, residual_cap = _probe(model, self.head)
        if residual_cap is not None:
            raise UnsupportedModelError(
                f"{type(model).__name__}: its soft cap of {self.softcap:g} on the logits could not be switched off "
                "through config.final_logit_softcapping, so a loss cannot be returned through its forward"
            )

    def forward(self, function: HeadFunction, inputs: dict[str, Any], call: nn.Module | None = None) -> Tensor:
        """Run the model on `inputs` and return the scalar that `function` computed in its head.

        Args:
            function: maps `HeadState` to a scalar.
            inputs: keyword arguments of the model's forward, without labels.
            call: what to call in place of the model: the same model inside a DDP or FSDP wrapper.
        """
        with self._patched(function):
            outputs = (self.model if call is None else call)(**inputs, use_cache=False)
        logits: Tensor = outputs["logits"] if isinstance(outputs, dict) else outputs[0]
        if logits.numel() != 1:
            raise UnsupportedModelError(f"{type(self.model).__name__}: its forward did not return the head's result")
        return logits.reshape(())

    @contextmanager
    def _patched(self, function: HeadFunction) -> Iterator[None]:
        def head_forward(hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
            weight, bias = effective_weight(self.head)
            if weight.dtype != hidden_states.dtype and not torch.is_autocast_enabled(hidden_states.device.type):
                wide = torch.promote_types(weight.dtype, hidden_states.dtype)
                hidden_states, weight = hidden_states.to(wide), weight.to(wide)
                bias = None if bias is None else bias.to(wide)
            return function(HeadState(hidden_states, weight, bias)).div(self._residual_scale).reshape(1, 1, 1)

        with _without_softcap(self.model, self.softcap), _replaced_forward(self.head, head_forward):
            yield


def find_head(model: nn.Module) -> nn.Module:
    """Return the module whose forward computes the logits.

    Raises:
        UnsupportedModelError: the model has none, or one that is not a linear layer.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    head = base.get_output_embeddings() if hasattr(base, "get_output_embeddings") else None
    if not isinstance(head, nn.Module):
        raise UnsupportedModelError(f"{type(base).__name__}: a model without an output embedding cannot be trained here")
    if hasattr(head, "modules_to_save"):  # PEFT's copy of a fully trained module; FSDP may wrap it on its own
        head = head.modules_to_save[head.active_adapters[0]]  # type: ignore[index]
    weight = getattr(_base_layer(head), "weight", None)
    if not isinstance(weight, Tensor) or weight.dim() != 2 or not weight.is_floating_point():
        raise UnsupportedModelError(
            f"{type(base).__name__}: expected an output embedding with a floating-point weight [V, D], "
            f"got {type(head).__name__}"
        )
    return head


def effective_weight(head: nn.Module) -> tuple[Tensor, Tensor | None]:
    """The weight and bias a head computes with, LoRA adapters included, differentiable in all of them.

    W + Σ scaling · B A over the active adapters, in the widest dtype among them, so that a small adapter is not rounded
    away by a half-precision base.
    """
    base = _base_layer(head)
    weight, bias = base.weight, base.bias
    for name in _active_lora(head):
        down, up = head.lora_A[name].weight, head.lora_B[name].weight  # type: ignore[index,union-attr]
        wide = torch.promote_types(weight.dtype, up.dtype)
        weight = weight.to(wide) + head.scaling[name] * (up.to(wide) @ down.to(wide))  # type: ignore[index]
    return weight, None if bias is None else bias.to(weight.dtype)


def _base_layer(head: nn.Module) -> Any:
    return head.base_layer if hasattr(head, "base_layer") else head


def _active_lora(head: nn.Module) -> list[str]:
    if not hasattr(head, "lora_A") or head.disable_adapters or head.merged:  # type: ignore[union-attr]
        return []
    return [name for name in head.active_adapters if name in head.lora_A]  # type: ignore[operator,union-attr]


def _check_adapters(head: nn.Module) -> None:
    """Refuse an adapted head that `effective_weight` would not reproduce."""
    if not hasattr(head, "base_layer"):
        return
    if not hasattr(head, "lora_A"):
        raise UnsupportedModelError(f"output embedding: adapters of type {type(head).__name__} are not supported, only LoRA")
    if isinstance(_base_layer(head), nn.Embedding) or len(getattr(head, "lora_embedding_A", ())):
        raise UnsupportedModelError("output embedding: LoRA on an embedding used as the head is not supported")
    for name in head.lora_A:  # type: ignore[union-attr]
        if getattr(head.lora_dropout[name], "p", 0.0) > 0:  # type: ignore[index]
            raise UnsupportedModelError(
                "output embedding: LoRA with dropout on the output embedding is not supported; set lora_dropout=0 or "
                "leave lm_head out of target_modules"
            )
        if head.lora_variant.get(name) is not None or head.lora_bias.get(name):  # type: ignore[union-attr,operator]
            raise UnsupportedModelError("output embedding: only plain LoRA (no DoRA, no lora_bias) is supported on it")


@contextmanager
def _replaced_forward(module: nn.Module, forward: Callable[..., Tensor]) -> Iterator[None]:
    previous = module.__dict__.get("forward")
    module.forward = forward  # type: ignore[method-assign]
    try:
        yield
    finally:
        del module.forward
        if previous is not None:  # an instance attribute of someone else's, such as an accelerate hook
            module.forward = previous  # type: ignore[method-assign]


@contextmanager
def _without_softcap(model: nn.Module, softcap: float | None) -> Iterator[None]:
    """Set `final_logit_softcapping` of every config in the model to None for a while."""
    configs = []
    if softcap is not None:
        found = {id(module.config): module.config for module in model.modules() if hasattr(module, "config")}
        configs = [c for c in found.values() if getattr(c, "final_logit_softcapping", None) is not None]
    values = [config.final_logit_softcapping for config in configs]
    for config in configs:
        config.final_logit_softcapping = None
    try:
        yield
    finally:
        for config, value in zip(configs, values, strict=True):
            config.final_logit_softcapping = value


def _probe(model: nn.Module, head: nn.Module) -> tuple[float, float | None]:
    """Return (logit_scale, softcap) of what follows the head, from one forward of one token.

    The head is made to return x from tiny to huge. f(x) / x for tiny x is the scale; if f(huge) is not scale · huge, its
    magnitude is the cap, and every point must then lie on cap · tanh(scale · x / cap).
    """
    points = torch.tensor([-1e6, -37.0, -1.0, -1e-3, 0.0, 1e-3, 0.5, 3.0, 37.0, 1e6], dtype=torch.float64)
    device = next(model.parameters()).device
    training = model.training
    model.eval()
    try:
        with torch.no_grad(), _replaced_forward(head, lambda *_, **__: points.float().to(device).view(1, 1, -1)):
            outputs = model(input_ids=torch.zeros(1, 1, dtype=torch.long, device=device), use_cache=False)
    finally:
        model.train(training)
    logits = outputs["logits"] if isinstance(outputs, dict) else outputs[0]
    if not isinstance(logits, Tensor) or logits.numel() != points.numel():
        raise UnsupportedModelError(f"{type(model).__name__}: its forward does not return its output embedding's result")
    values = logits.detach().reshape(-1).double().cpu()
    scale = float(values[5] / points[5])
    softcap = None if math.isclose(float(values[-1]), scale * 1e6, rel_tol=1e-2) else float(values[-1].abs())
    predicted = scale * points
    if softcap is not None and softcap > 0:
        predicted = softcap * torch.tanh(predicted / softcap)
    # A half-precision model may round the probe's values; anything but a scale and a cap is far off.
    if not (math.isfinite(scale) and scale != 0 and torch.allclose(values, predicted, rtol=2e-2, atol=1e-6)):
        raise UnsupportedModelError(
            f"{type(model).__name__}: what it does to its logits is neither a scale nor a soft cap: "
            f"{points.tolist()} became {values.tolist()}"
        )
    return _rounded(scale), None if softcap is None else _rounded(softcap)


def _rounded(value: float) -> float:
    """The number a config would hold: float32 noise of the probe removed."""
    return float(f"{value:.6g}")
