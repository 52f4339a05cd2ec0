"""The operation of an architecture on its logits after the head: a scale or a soft cap; any other is refused.

The model runs once on one token with a head that returns known values. The operation follows from the returned logits,
without a list of architectures or names of config fields. Only switching a cap off needs transformers' name for it.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from nextquill.errors import UnsupportedModelError
from nextquill.models.border import reading
from nextquill.models.configs import base_model

_SOFTCAP = "final_logit_softcapping"
# Tiny values give the scale, since any cap is the identity there. Huge values give the cap. The others show a tanh.
_POINTS = (-1e6, -37.0, -1.0, -1e-6, 0.0, 1e-6, 0.5, 3.0, 37.0, 1e6)


def probe_logits(model: nn.Module, head: nn.Module) -> tuple[float, float | None]:
    """Return (logit_scale, softcap) of the step after the head: cap · tanh(scale · x / cap), or scale · x and None.

    Raises:
        UnsupportedModelError: the operation is neither.
    """
    device = next(model.parameters()).device
    # In float64 the constants equal the config's, unless the model rounds.
    points = torch.tensor(_POINTS, dtype=torch.float32 if device.type == "mps" else torch.float64, device=device)
    known = replaced_forward(head, lambda *_, **__: points.view(1, 1, -1))
    fails = reading(None, f"{type(model).__name__}: its forward fails")  # as some settings are only read there
    with torch.no_grad(), in_eval_mode(model), whole_parameters(model), known, fails:
        outputs = model(input_ids=torch.zeros(1, 1, dtype=torch.long, device=device), use_cache=False)
    logits = returned_logits(outputs)
    if not isinstance(logits, Tensor) or logits.numel() != points.numel():
        raise UnsupportedModelError(f"{type(model).__name__}: its forward does not return its output embedding's rows")
    values, points = logits.detach().reshape(-1).double().cpu(), points.double().cpu()
    scale, largest = float(values[5] / points[5]), float(values[-1])
    softcap = None if math.isclose(largest, scale * 1e6, rel_tol=1e-2) else abs(largest)
    predicted = scale * points if not softcap else softcap * torch.tanh(scale * points / softcap)
    # A half-precision model may round the probe's values; anything but a scale and a cap is far off.
    if not (math.isfinite(scale) and scale != 0 and torch.allclose(values, predicted, rtol=2e-2, atol=1e-9)):
        raise UnsupportedModelError(
            f"{type(model).__name__}: the operation on its logits is neither a scale nor a soft cap: "
            f"{points.tolist()} became {values.tolist()}"
        )
    digits = 14 if logits.dtype == torch.float64 else 7
    return _rounded(scale, digits), None if softcap is None else _rounded(softcap, digits)


def softcaps(model: nn.Module) -> list[Any]:
    """What caps a model's logits: each config that holds a soft cap, as composite models have several, and modules.

    Such a module has no parameters; one that has some does more than cap.
    """
    configs = {id(config): config for module in model.modules() if (config := getattr(module, "config", None))}
    capped = [config for config in configs.values() if getattr(config, _SOFTCAP, None) is not None]
    modules = (module for module in base_model(model).children() if hasattr(module, "softcap"))
    return [*capped, *(module for module in modules if next(module.parameters(), None) is None)]


@contextmanager
def without_softcap(caps: Sequence[Any]) -> Iterator[None]:
    """Switch off these configs' and modules' soft caps inside the block."""
    with ExitStack() as changes:
        for cap in caps:
            if isinstance(cap, nn.Module):
                changes.enter_context(replaced_forward(cap, _unchanged))
                continue
            # This avoids the config's check of types: gemma3n's does not accept None.
            changes.callback(object.__setattr__, cap, _SOFTCAP, getattr(cap, _SOFTCAP))
            object.__setattr__(cap, _SOFTCAP, None)
        yield


def _unchanged(logits: Tensor) -> Tensor:
    return logits


@contextmanager
def temporarily(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Give an attribute that an object has another value inside the block."""
    previous = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, previous)


@contextmanager
def replaced_forward(module: nn.Module, forward: Callable[..., Tensor]) -> Iterator[None]:
    """Replace the module's forward by `forward` inside the block; hooks around it still run."""
    previous = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        if previous is not None:  # an instance attribute of another library, such as an accelerate hook
            module.forward = previous


@contextmanager
def whole_parameters(model: nn.Module) -> Iterator[None]:
    """Gather each module's parameters while it runs, if DeepSpeed's ZeRO-3 has loaded the model in shards."""
    with ExitStack() as hooks:
        for module in model.modules():
            own = [parameter for parameter in module.parameters(recurse=False) if hasattr(parameter, "ds_id")]
            if own:
                gathered = importlib.import_module("deepspeed").zero.GatheredParameters(own)

                def enter(*_: Any, gathered: Any = gathered) -> None:
                    gathered.__enter__()

                def leave(*_: Any, gathered: Any = gathered) -> None:
                    gathered.__exit__(None, None, None)

                hooks.enter_context(module.register_forward_pre_hook(enter))
                hooks.enter_context(module.register_forward_hook(leave, always_call=True))
        yield


def returned_logits(outputs: Any) -> Any:
    """The logits of a model's output, which is a `ModelOutput` or a tuple."""
    return outputs["logits"] if isinstance(outputs, dict) else outputs[0]


@contextmanager
def in_eval_mode(model: nn.Module) -> Iterator[None]:
    """Put a model and its modules in eval mode inside the block."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def _rounded(value: float, digits: int) -> float:
    """The value without the probe's rounding, as a config would hold it."""
    return float(f"{value:.{digits}g}")
