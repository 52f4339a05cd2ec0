"""A head's weight whose vocabulary is divided over processes, as a caller gives it: a part of it, or a DTensor.

`nextquill.ops.shard_exchange` says what the processes exchange.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from nextquill.errors import ArgumentError, ArgumentTypeError


@dataclass(frozen=True, eq=False)
class VocabularyShard:
    """One process's part of an output head whose vocabulary is divided over a group of processes.

    Losses and operators take it in the place of `lm_head_weight`; `bias` is then the same part of the bias. All
    processes of the group call them together, with the same hidden states and labels. Each gets the same values and the
    whole gradient of the hidden states, and of weight and bias the gradient of its own part.

    A DTensor that is sharded on dimension 0 needs no such object.

    Attributes:
        weight: rows [start, start + v) of the weight: [v, D], floating, v at least 1.
        start: the first token of this part.
        vocabulary: V, the number of tokens of all parts.
        group: the processes, whose ranks hold successive parts; all processes by default.
    """

    weight: Tensor
    start: int
    vocabulary: int
    group: dist.ProcessGroup | None = None

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weight."""
        return self.weight.dtype

    def with_weight(self, weight: Tensor) -> VocabularyShard:
        """Return this part with another weight [v, D], of any floating dtype."""
        return VocabularyShard(weight, self.start, self.vocabulary, self.group)

    def summed_gradient(self, tensor: Tensor) -> Tensor:
        """Return `tensor`, whole on each process and of any shape, with its gradient added up over the processes.

        Its gradient through this part of the vocabulary is a share of the whole.
        """
        return _SummedGradient.apply(tensor, self._group)  # type: ignore[no-untyped-call, no-any-return]

    @property
    def _group(self) -> dist.ProcessGroup:
        return dist.group.WORLD if self.group is None else self.group  # type: ignore[return-value]

    def describe(self) -> str:
        """Return the part as text, for an operator's argument; `nextquill.ops.shard_exchange.join` reads it.

        Raises:
            ArgumentError, ArgumentTypeError: there is no group of several processes, or a field is impossible.
        """
        for name, value in (("start", self.start), ("vocabulary", self.vocabulary)):
            if isinstance(value, bool) or not isinstance(value, int):
                raise ArgumentTypeError(f"lm_head_weight.{name}: expected an int, got {type(value).__name__} {value!r}")
        if not (dist.is_available() and dist.is_initialized()):
            raise ArgumentError(
                "lm_head_weight.group: expected initialised processes, got none; call "
                "torch.distributed.init_process_group first"
            )
        group = self._group
        if not isinstance(group, dist.ProcessGroup):
            raise ArgumentTypeError(
                "lm_head_weight.group: expected a process group that this process belongs to, got "
                f"{type(group).__name__}"
            )
        if group.size() == 1:
            raise ArgumentError("lm_head_weight.group: expected at least 2 processes, got 1; pass the whole weight")
        return f"{self.start}/{self.vocabulary}/{group.group_name}"


def part_of(name: str, weight: Any) -> Tensor | VocabularyShard:
    """Return a DTensor [V, …] as the part that this process holds, or as the whole weight; other weights as they are.

    Args:
        name: the argument's name in messages.
        weight: a tensor or part, of any dtype.

    Raises:
        ArgumentError: the DTensor is divided in another way than over its rows, or over several dimensions of a mesh.
    """
    if not is_dtensor(weight):
        return weight  # type: ignore[no-any-return]
    mesh, placements = weight.device_mesh, weight.placements
    if all(placement.is_replicate() for placement in placements) or mesh.size() == 1:
        return weight.to_local()  # type: ignore[no-any-return]
    if mesh.ndim != 1 or type(placements[0]).__name__ != "Shard" or placements[0].dim != 0:
        raise ArgumentError(
            f"{name}: expected a DTensor that is replicated, or sharded on dimension 0 over a mesh of one "
            f"dimension, got {list(placements)} over a mesh of shape {list(mesh.shape)}"
        )
    vocabulary = weight.shape[0]
    start = min(vocabulary, mesh.get_local_rank() * -(-vocabulary // mesh.size()))
    return VocabularyShard(weight.to_local(), start, vocabulary, mesh.get_group())


def own_part(weight: Tensor | VocabularyShard) -> Tensor:
    """Return the weight [V, …], of any dtype, that this process holds: all of it, or its part."""
    return weight.weight if isinstance(weight, VocabularyShard) else weight


class _SummedGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        total = grad.contiguous().clone()
        dist.all_reduce(total, group=ctx.group)
        return total, None


def is_dtensor(tensor: object) -> bool:
    """Whether `tensor` is a DTensor; without importing what may not be installed."""
    return type(tensor).__name__ == "DTensor"
