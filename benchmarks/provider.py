"""A provider: who can compute which loss, whether it can run here, and a callable that runs it.

A provider is one file in `benchmarks/peers` that imports nothing optional until it is called; `benchmarks.registry`
lists them. It names its losses; a loss takes `Inputs` (and a variant's options) and returns a scalar, or for the
scoring operators a tuple of NLLs [N] in nats.
"""

from __future__ import annotations

import importlib.util
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.cases import TRAINING, Inputs, Task

Loss = Callable[..., "Tensor | tuple[Tensor, ...]"]
Call = Callable[[], tuple[Tensor, ...]]
BASELINE = "plain"
OUT_OF_MEMORY = "out of memory"


class ProviderError(RuntimeError):
    """A provider could not finish; the message is one line."""


@dataclass(frozen=True)
class Provider:
    """One implementation.

    Args:
        name: as it stands in the CSV.
        losses: by the names of `benchmarks.cases.PRODUCTS`.
        missing: why it cannot run on a device, or None; it imports nothing heavy if the provider is missing.
        unsupported: why it cannot do a task on these inputs, or None.
        variants: options to choose the fastest from; the choice is written beside the figures.
        ours: held to plain PyTorch's accuracy, and a failure of it fails the run.
        forward_gradients: bytes of the finished gradients, by name, that a task's forward keeps for its backward; they
            are not counted as transient memory, unlike whatever else it keeps.
    """

    name: str
    losses: Mapping[str, Loss]
    missing: Callable[[torch.device], str | None] = lambda device: None
    unsupported: Callable[[Task, Inputs], str | None] = lambda task, inputs: None
    variants: Callable[[], tuple[dict[str, Any], ...]] = lambda: ({},)
    ours: bool = False
    forward_gradients: Callable[[Task, Inputs], dict[str, int]] = lambda task, inputs: {}

    def reason_against(self, task: Task, inputs: Inputs) -> str | None:
        """Why this provider does not take part in a task, or None."""
        if task.loss not in self.losses:
            return f"does not offer {task.loss}"
        return self.missing(inputs.h1.device) or self.unsupported(task, inputs)

    def bind(self, task: Task, inputs: Inputs, options: Mapping[str, Any] | None = None) -> Call:
        """A callable without arguments: the outputs, or the loss and its gradients.

        Raises (when called):
            ProviderError: whatever went wrong.
        """
        forward, wanted = self._forward(task, inputs, options), tuple(inputs.wanted.values())

        def compute() -> tuple[Tensor, ...]:
            outputs = forward()
            if task.mode != TRAINING:
                return outputs
            return outputs[0].detach(), *torch.autograd.grad(outputs[0], wanted)

        return self._guarded(compute)

    def bind_forward(self, task: Task, inputs: Inputs, options: Mapping[str, Any] | None = None) -> Call:
        """As `bind`, for the outputs alone; they hold what the forward keeps for a training task's backward."""
        return self._guarded(self._forward(task, inputs, options))

    def _forward(self, task: Task, inputs: Inputs, options: Mapping[str, Any] | None) -> Call:
        loss, chosen = self.losses[task.loss], dict(options or {})

        def compute() -> tuple[Tensor, ...]:
            with torch.set_grad_enabled(task.mode == TRAINING):
                outputs = loss(inputs, **chosen)
            return outputs if isinstance(outputs, tuple) else (outputs,)

        return compute

    def _guarded(self, compute: Call) -> Call:
        def guarded() -> tuple[Tensor, ...]:
            try:
                return compute()
            except torch.OutOfMemoryError as error:
                raise ProviderError(OUT_OF_MEMORY) from error
            except Exception as error:
                if self.ours:
                    traceback.print_exc()
                raise ProviderError(f"{type(error).__name__}: {' '.join(str(error).split())[:160]}") from error

        return guarded


def not_installed(package: str, distribution: str) -> str | None:
    """The reason for a package that is not there."""
    return None if importlib.util.find_spec(package) else f"{distribution} is not installed"
