"""What an architecture does to its logits after its head: a scale, a soft cap, or something that is refused.

The model runs once on one token with a head that returns known values, and what comes out tells. No list of
architectures and no names of config fields are needed to *find* it; switching a cap off needs the one name that
transformers has for it.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from nextquill.errors import UnsupportedModelError

_SOFTCAP = "final_logit_softcapping"
# Tiny ones, where any cap is the identity, give the scale; huge ones the cap; those between say whether it is a tanh.
_POINTS = (-1e6, -37.0, -1.0, -1e-6, 0.0, 1e-6, 0.5, 3.0, 37.0, 1e6)


def probe_logits(model: nn.Module, head: nn.Module) -> tuple[float, float | None]:
    """Return (logit_scale, softcap) of what follows the head: cap · tanh(scale · x / cap), or scale · x and None.

    Raises:
        UnsupportedModelError: what follows is something else.
    """
    device = next(model.parameters()).device
    # In float64 the constants come out as a config holds them, wherever the model does not round.
    points = torch.tensor(_POINTS, dtype=torch.float32 if device.type == "mps" else torch.float64, device=device)
    known = replaced_forward(head, lambda *_, **__: points.view(1, 1, -1))
    with torch.no_grad(), in_eval_mode(model), whole_parameters(model), known:
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
            f"{type(model).__name__}: what it does to its logits is neither a scale nor a soft cap: "
            f"{points.tolist()} became {values.tolist()}"
        )
    digits = 14 if logits.dtype == torch.float64 else 7
    return _rounded(scale, digits), None if softcap is None else _rounded(softcap, digits)


def softcapped_configs(model: nn.Module) -> list[Any]:
    """Every config in the model that holds a soft cap; composite models have several."""
    configs = {id(config): config for module in model.modules() if (config := getattr(module, "config", None))}
    return [config for config in configs.values() if getattr(config, _SOFTCAP, None) is not None]


@contextmanager
def without_softcap(configs: Sequence[Any]) -> Iterator[None]:
    """Set the soft cap of these configs to None for the length of the block."""
    values = [getattr(config, _SOFTCAP) for config in configs]
    try:
        for config in configs:
            # Past the check of types that a config makes: gemma3n's says that there always is a cap.
            object.__setattr__(config, _SOFTCAP, None)
        yield
    finally:
        for config, value in zip(configs, values, strict=True):
            object.__setattr__(config, _SOFTCAP, value)


@contextmanager
def replaced_forward(module: nn.Module, forward: Callable[..., Tensor]) -> Iterator[None]:
    """Put `forward` in the place of the module's own for the length of the block; hooks around it still run."""
    previous = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        if previous is not None:  # an instance attribute of someone else's, such as an accelerate hook
            module.forward = previous


@contextmanager
def whole_parameters(model: nn.Module) -> Iterator[None]:
    """Give each module its parameters whole while it runs, where DeepSpeed's ZeRO-3 has loaded the model in shards."""
    handles = []
    for module in model.modules():
        own = [parameter for parameter in module.parameters(recurse=False) if hasattr(parameter, "ds_id")]
        if own:
            gathered = importlib.import_module("deepspeed").zero.GatheredParameters(own)

            def enter(*_: Any, gathered: Any = gathered) -> None:
                gathered.__enter__()

            def leave(*_: Any, gathered: Any = gathered) -> None:
                gathered.__exit__(None, None, None)

            handles.append(module.register_forward_pre_hook(enter))
            handles.append(module.register_forward_hook(leave, always_call=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def returned_logits(outputs: Any) -> Any:
    """The logits of a model's output, which is a `ModelOutput` or a tuple."""
    return outputs["logits"] if isinstance(outputs, dict) else outputs[0]


@contextmanager
def in_eval_mode(model: nn.Module) -> Iterator[None]:
    """Put a model and its modules in eval mode for the length of the block."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def _rounded(value: float, digits: int) -> float:
    """The number a config would hold: the probe's rounding removed."""
    return float(f"{value:.{digits}g}")
