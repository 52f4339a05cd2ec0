"""Providers: the losses that each can compute, whether it can run here, and a callable that runs it.

A provider is one file in `benchmarks/peers` that imports no optional package until it is called. It lists its losses. A
loss takes `Inputs` and a variant's options, and returns a scalar, or, for the scoring operators, a tuple of NLLs [N].
"""

from __future__ import annotations

import importlib
import importlib.metadata
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
        name: its name in the CSV.
        losses: by the names of `benchmarks.cases.PRODUCTS`.
        missing: returns why it cannot run on a device, or None; imports a large package only if it can run.
        unsupported: returns why it cannot do a task on these inputs, or None.
        variants: options of which the fastest are chosen; the choice is stored with the figures.
        ours: must be as accurate as plain PyTorch, and its failure fails the run.
        forward_gradients: bytes of the finished gradients, by name, that a task's forward keeps for its backward. They
            do not count as transient memory; everything else that it keeps does.
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
        """A callable without arguments that returns the outputs, or the loss and its gradients.

        Raises (when called):
            ProviderError: the provider failed in any way.
        """
        forward, wanted = self._forward(task, inputs, options), tuple(inputs.wanted.values())

        def compute() -> tuple[Tensor, ...]:
            outputs = forward()
            if task.mode != TRAINING:
                return outputs
            return outputs[0].detach(), *torch.autograd.grad(outputs[0], wanted)

        return self._guarded(compute)

    def bind_forward(self, task: Task, inputs: Inputs, options: Mapping[str, Any] | None = None) -> Call:
        """A callable that runs only the forward. Its outputs hold what the forward keeps for a training's backward."""
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


def providers() -> tuple[Provider, ...]:
    """Every provider, the baseline first."""
    from benchmarks.peers import cce, liger, ours, plain, torch_lce

    return (plain.PROVIDER, *ours.PROVIDERS, torch_lce.PROVIDER, liger.PROVIDER, cce.PROVIDER)


def not_installed(package: str, distribution: str) -> str | None:
    """The reason why a package is missing, or None if it is installed."""
    return None if importlib.util.find_spec(package) else f"{distribution} is not installed"


def version(distribution: str) -> str:
    """The installed version, or an empty string."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return ""
