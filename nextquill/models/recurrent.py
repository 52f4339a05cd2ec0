"""Layers that carry a state from token to token, over rows of trees: gated delta nets, Mamba-2, short convolutions.

In transformers such a layer continues a sequence from a cache: it reads the state of its convolution and of its
recurrence there, and writes the new ones. So a row of trees is computed in runs (`nextquill.tree.runs`), by the layer's
own forward, with a cache that gives each run the states after the run before it. Unlike transformers' cache, this one
writes nothing in place, so gradients flow through the states. All that is known of an architecture is the name of
Mamba-2's chunk size.

The forward of each layer is replaced by one that passes every call without a tree to the layer's own. It stays: without
it, a layer that gradient checkpointing runs again in the backward would read across branches without an error.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from transformers import Cache

from nextquill.models.cache_names import cache_argument
from nextquill.models.probe import temporarily
from nextquill.tree import TreeLayout
from nextquill.tree.runs import StateRun, state_runs

#: Tokens in the smallest chunk that the kernels of Mamba-2 take.
_SMALLEST_CHUNK = 16
#: States of a layer by kind and index, [B, ...] each.
States = dict[tuple[str, int], Tensor]


def layers_with_state(base: nn.Module) -> list[nn.Module]:
    """The layers that keep a state in transformers' cache and can continue from it, with gradient."""
    return [module for module in base.modules() if _state_cache_argument(type(module).forward) is not None]


def run_over_trees(base: nn.Module) -> bool:
    """Let the layers with a state take `nextquill_tree_runs`; whether there are any."""
    layers = layers_with_state(base)
    for layer in layers:
        if not isinstance(layer.forward, _ForwardOverRuns):
            layer.forward = _ForwardOverRuns(layer)
    return bool(layers)


@functools.cache
def _state_cache_argument(forward: Callable[..., Any]) -> str | None:
    """The name of the cache in a layer's `forward`; None if the layer keeps no state, or cannot continue from it.

    Mamba-1 in transformers continues by single tokens alone: it has no initial state to give to its scan. Before
    transformers 5.21 layers reach into the cache, and no other object can take its place.
    """
    if not hasattr(Cache, "get_conv_state"):
        return None
    code: Any = getattr(inspect.unwrap(forward), "__code__", None)
    if code is None or "update_conv_state" not in code.co_names:
        return None
    keywords = [name for names in code.co_consts if isinstance(names, tuple) for name in names if isinstance(name, str)]
    if "get_recurrent_state" in code.co_names and not {"initial_state", "initial_states"} & {*keywords}:
        return None
    return cache_argument(forward)


class _ForwardOverRuns:
    """A layer's forward: run by run over a row of trees, and the layer's own otherwise."""

    def __init__(self, layer: nn.Module) -> None:
        self._layer = layer
        self._previous: Callable[..., Any] | None = vars(layer).get("forward")  # such as a hook of accelerate
        self._cache = _state_cache_argument(type(layer).forward)

    def __call__(self, *args: Any, nextquill_tree_runs: tuple[TreeLayout, int] | None = None, **kwargs: Any) -> Any:
        if nextquill_tree_runs is None:
            return self._own(*args, **kwargs)
        return self._over_runs(args[0] if args else kwargs["hidden_states"], *nextquill_tree_runs)

    def _own(self, *args: Any, **kwargs: Any) -> Any:
        if self._previous is not None:
            return self._previous(*args, **kwargs)
        return type(self._layer).forward(self._layer, *args, **kwargs)

    # Compiled, it would be compiled again for every tree.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _over_runs(self, hidden_states: Tensor, layout: TreeLayout, shared: int) -> Tensor:
        """The layer's output [1, T, D] for `hidden_states` [1, T, D]."""
        runs = state_runs(layout, shared, hidden_states.device)
        outputs, after = list[Tensor](), list[States]()
        for run in runs.steps:
            cache = _RunCache(_states_before(run, after))
            with _chunks_that_fit(self._layer, run.rows.shape[1]):
                out = self._own(_take(hidden_states[0], run.rows), **{str(self._cache): cache})
            outputs.append(out.flatten(0, 1))
            if run.is_origin:
                after.append(cache.after)
        return _take(torch.cat(outputs), runs.places)[None]


@contextmanager
def _chunks_that_fit(layer: Any, length: int) -> Iterator[None]:
    """Halve the chunks of a Mamba-2 layer, often 256 tokens, while `length` tokens fit; it pads a run to a chunk.

    With a shared history of 400 tokens and 16 branches of 70, a step of a small Bamba takes .58 of the time.
    """
    size = getattr(layer, "chunk_size", None)
    if not isinstance(size, int):
        yield
        return
    fitting = size
    while fitting % 2 == 0 and fitting // 2 >= max(length, _SMALLEST_CHUNK):
        fitting //= 2
    with temporarily(layer, "chunk_size", fitting):
        yield


def _take(rows: Tensor, places: Tensor) -> Tensor:
    """Rows [N, D] at places; the gradients of copies are summed without atomics."""
    return F.embedding(places, rows)


def _states_before(run: StateRun, after: list[States]) -> States:
    """The states where each sequence of a run starts; a branch without a shared beginning starts from zeros."""
    if not run.origins:
        return {}
    given = [after[origin] if origin >= 0 else None for origin in run.origins]
    some = next(states for states in given if states is not None)
    return {
        name: torch.cat([torch.zeros_like(like) if states is None else states[name] for states in given])
        for name, like in some.items()
    }


class _RunCache:
    """The methods of transformers' `Cache` that a layer with a state calls, for one run of one layer."""

    def __init__(self, before: States) -> None:
        self._before = before
        self.after: States = {}

    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> Tensor | None:
        return self._before.get(("conv", state_idx))

    def get_recurrent_state(self, layer_idx: int, state_idx: int = 0) -> Tensor | None:
        return self._before.get(("recurrent", state_idx))

    def update_conv_state(
        self, conv_states: Tensor, layer_idx: int, state_idx: int = 0, *, conv_kernel_size: int, **_: Any
    ) -> Tensor:
        """The inputs [B, C, L] behind those of before; keeps the last `conv_kernel_size`."""
        before = self.get_conv_state(layer_idx, state_idx)
        inputs = conv_states if before is None else torch.cat([before, conv_states], -1)
        self.after["conv", state_idx] = F.pad(inputs, (max(0, conv_kernel_size - inputs.shape[-1]), 0))[
            ..., -conv_kernel_size:
        ]
        return inputs

    def update_recurrent_state(self, recurrent_states: Tensor, layer_idx: int, state_idx: int = 0, **_: Any) -> Tensor:
        self.after["recurrent", state_idx] = recurrent_states
        return recurrent_states
