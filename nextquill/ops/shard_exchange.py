"""The exchange between processes that divide a head's vocabulary: each holds consecutive rows of W, one part of V.

Every process computes the statistics of its own columns. The processes gather these few numbers per row and combine
them, and the gradient kernels then need nothing else: they read local logits and statistics of the whole vocabulary.
With max_r, sum_r of process r, and o the owner of the label, whose nll_o is over its own columns:

    max = max_r max_r      s_r = sum_r exp(max_r - max)      sum = Σ s_r      w_r = s_r / sum
    nll = nll_o + log(1 + Σ_{r≠o} s_r / s_o)
    KL(p1 ‖ p0) = Σ w1_r (KL_r + log(w1_r / w0_r))      H(p1) = Σ w1_r (H_r - log(w1_r))

The Jensen-Shannon divergence needs the normalisers of p1 and p0 before the mixture: two exchanges, see
`nextquill.ops.jsd.jsd_statistics`.

No large numbers are subtracted, so a nll near 0 keeps its digits. dW and db belong to the part and stay where they are;
dh is a sum over processes.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor

from nextquill.errors import ArgumentError

# Rows of the hidden states that take part in the comparison between processes, and how far their checksums may differ,
# in proportion to their size: half precision on different machines stays below, another dropout mask does not.
_COMPARED_ROWS = 64
_CHECKSUM_TOLERANCE = 1e-2


@dataclass(frozen=True)
class OpenShard:
    """A part of the vocabulary, known to fit those of the other processes.

    Attributes:
        group: the processes.
        starts: the first token of each process's part, ascending.
        start: the first token of this process's part.
        size: the number of its tokens.
        largest: the largest number of tokens of a part.
        vocabulary: the number of tokens of all parts.
    """

    group: dist.ProcessGroup
    starts: tuple[int, ...]
    start: int
    size: int
    largest: int
    vocabulary: int

    def own_labels(self, labels: Tensor) -> Tensor:
        """Return labels [n], int64, as columns of this part; `size` where another process has the label."""
        own = labels - self.start
        return torch.where((own >= 0) & (own < self.size), own, self.size)

    def combine_(self, stats: Tensor, labels: Tensor) -> None:
        """Replace statistics of this part by those of the whole vocabulary, in one exchange.

        Where processes disagree about a label, the row's NLLs are NaN. A row's result does not depend on the others.

        Args:
            stats: [3, n], [6, n], [9, n] or [11, n], float32 or float64, as `chunk_torch` defines them; overwritten.
            labels: [n], int64, in [0, V).
        """
        rows, n = stats.shape
        if n == 0:
            return
        sent = torch.cat((stats, labels.to(stats.dtype)[None]))
        received = sent.new_empty(len(self.starts), rows + 1, n)
        dist.all_gather(list(received), sent, group=self.group)
        # On a CPU torch's float32 logarithm of an element depends on its place: the last ones are not in vectors.
        received = received.double()
        streams = rows // 3
        maxima, sums, nlls = received[:, : 3 * streams].unflatten(1, (streams, 3)).unbind(2)  # [processes, streams, n]
        largest = maxima.amax(0)
        shares = torch.where(maxima == -math.inf, 0.0, sums * torch.exp(maxima - largest))
        total = shares.sum(0)
        owner = torch.searchsorted(torch.tensor(self.starts, device=labels.device), labels, right=True) - 1
        owner = owner.expand(1, streams, n)
        nll, own_sum, own_max = (each.gather(0, owner)[0] for each in (nlls, sums, maxima))
        rest = shares.scatter(0, owner, 0.0).sum(0)
        log_ratio = rest.log() + (largest - own_max) - own_sum.log()
        nll = nll + torch.logaddexp(torch.zeros_like(log_ratio), log_ratio)
        nll = nll.masked_fill((received[:, rows] != received[0, rows]).any(0), math.nan)
        stats[: 3 * streams].unflatten(0, (streams, 3)).copy_(torch.stack((largest, total, nll), 1))
        if rows > 3 * streams:
            log_w = (maxima - largest) + (sums / total).log()  # [processes, streams, n]
            weight = shares[:, 0] / total[0]
            kl, entropy = received[:, -3], received[:, -2]
            stats[-2] = _mean(weight, kl + (log_w[:, 0] - log_w[:, 1]))
            stats[-1] = _mean(weight, entropy - log_w[:, 0])

    def add_shares_(self, tensor: Tensor) -> None:
        """Replace `tensor`, of any shape and floating dtype, by its sum over the processes, in their order."""
        received = tensor.new_empty(len(self.starts), *tensor.shape)
        dist.all_gather(list(received), tensor.contiguous(), group=self.group)
        tensor.copy_(received.sum(0))

    def sum_(self, tensor: Tensor) -> dist.Work:
        """Start to replace `tensor`, of any shape and floating dtype, by its sum over the processes."""
        return dist.all_reduce(tensor, group=self.group, async_op=True)  # type: ignore[no-any-return]


def join(text: str, weight: Tensor, streams: Sequence[Tensor], labels: Tensor) -> OpenShard:
    """Return the part that `VocabularyShard.describe` wrote.

    The first time that a group sees a part, its processes compare their parts, hidden states and labels. Later calls
    exchange nothing here.

    Args:
        text: the description.
        weight: [v, D], any floating dtype.
        streams: hidden states [N, D], any floating dtype.
        labels: [N], int64.

    Raises:
        ArgumentError: on every process, if what they gave does not fit together.
    """
    from torch.distributed import distributed_c10d  # some builds of torch have none

    first, total, name = text.split("/", 2)
    start, vocabulary = int(first), int(total)
    group: dist.ProcessGroup = distributed_c10d._resolve_process_group(name)  # type: ignore[attr-defined, arg-type]
    size = weight.shape[0]
    known = _joined.setdefault(group, {})
    key = (start, size, vocabulary)
    if key not in known:
        own = {
            "start": start,
            "size": size,
            "vocabulary": vocabulary,
            "streams": len(streams),
            "hidden": list(streams[0].shape),
            "labels": zlib.crc32(labels.cpu().numpy().tobytes()),
            "checksums": [_checksum(stream) for stream in streams],
        }
        everyone: list[Any] = [None] * group.size()
        dist.all_gather_object(everyone, own, group=group)
        _check_parts(everyone)
        _check_rows(everyone)
        known[key] = tuple(each["size"] for each in everyone)
    sizes = known[key]
    starts = (0, *accumulate(sizes[:-1]))
    return OpenShard(group, starts, start, size, max(sizes), vocabulary)


#: The sizes of parts that have been compared, by group and by start, size and V of this process's part.
_joined: WeakKeyDictionary[dist.ProcessGroup, dict[tuple[int, int, int], tuple[int, ...]]] = WeakKeyDictionary()


def _check_parts(everyone: Sequence[Mapping[str, Any]]) -> None:
    expected, vocabulary = 0, everyone[0]["vocabulary"]
    for rank, each in enumerate(everyone):
        of_rank = f"on rank {rank} of its group"
        if each["vocabulary"] != vocabulary:
            raise ArgumentError(
                f"lm_head_weight.vocabulary: expected the same number on all processes, got {vocabulary} and, {of_rank}"
                f", {each['vocabulary']}"
            )
        if each["size"] == 0:
            raise ArgumentError(f"lm_head_weight: expected at least one token on each process, got none {of_rank}")
        if each["start"] != expected:
            raise ArgumentError(
                f"lm_head_weight.start: expected {expected}, where the previous part ends, {of_rank}, got "
                f"{each['start']}"
            )
        expected += each["size"]
    if expected != vocabulary:
        raise ArgumentError(f"lm_head_weight.vocabulary: expected {expected}, as in all parts, got {vocabulary}")


def _check_rows(everyone: Sequence[Mapping[str, Any]]) -> None:
    first = everyone[0]
    for rank, each in enumerate(everyone):
        both = f"on the processes that share a head's vocabulary, and rank {rank} of the group has others than rank 0"
        if (each["streams"], each["hidden"]) != (first["streams"], first["hidden"]):
            raise ArgumentError(
                f"hidden_states: expected the same {_shapes(first)} {both}: {_shapes(each)}; such processes must get "
                "the same batch (a weight sharded by FSDP is gathered inside the model's forward only)"
            )
        if each["labels"] != first["labels"]:
            raise ArgumentError(f"labels: expected the same {both}; such processes must get the same batch")
        for (own, size), (other, _) in zip(each["checksums"], first["checksums"], strict=True):
            if abs(own - other) > _CHECKSUM_TOLERANCE * size:
                raise ArgumentError(f"hidden_states: expected the same {both}; is dropout the same on all of them?")


def _shapes(each: Mapping[str, Any]) -> str:
    return f"{each['streams']} x {each['hidden']}"


def _checksum(hidden: Tensor) -> tuple[float, float]:
    """Return a sum of the first rows with different factors, and the size of a usual such sum; 0 for what is NaN."""
    values = hidden[:_COMPARED_ROWS].detach().double().nan_to_num(0.0, 0.0, 0.0).flatten()
    factors = torch.arange(1.0, values.numel() + 1, dtype=torch.float64, device=values.device).cos()
    return float(values @ factors), float(values.norm())


def _mean(weight: Tensor, values: Tensor) -> Tensor:
    """Return Σ weight · values over processes; a part without weight may have values that are not finite."""
    return torch.where(weight > 0, weight * values, weight).sum(0)
