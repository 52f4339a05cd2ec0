"""The published objectives, written from the papers' equations, without code from nextquill or its reference.

Softmax probabilities are computed explicitly, and sequences in a loop. Inputs are float64.
"""

from __future__ import annotations

import torch
from torch import Tensor


def logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, scale: float = 1.0, softcap: float | None = None):
    z = torch.einsum("nd,vd->nv", hidden, weight)
    z = z if bias is None else z + bias
    z = scale * z
    return z if softcap is None else softcap * (1 - 2 / (1 + torch.exp(2 * z / softcap)))


def cross_entropy(z: Tensor, y: Tensor) -> Tensor:
    """-log softmax(z)[y], from probabilities."""
    exponentials = torch.exp(z - z.amax(1, keepdim=True).detach())
    probabilities = exponentials / exponentials.sum(1, keepdim=True)
    return -torch.log(probabilities[torch.arange(len(y)), y])


def sequences(y: Tensor, ids: Tensor) -> list[Tensor]:
    """Row numbers of each sequence that has a supervised token."""
    groups = [torch.nonzero((ids == i) & (y != -100)).flatten() for i in sorted(set(ids.tolist()))]
    return [g for g in groups if len(g)]


def nextquill_sequence(
    z1: Tensor, z0: Tensor, y: Tensor, *, threshold=0.05, high=0.9, low=0.1, alpha=0.1, paper=False, detached=False,
    anchor=0.0,
) -> Tensor:  # fmt: skip
    """arXiv 2506.02368 for one sequence: weights from p(y|history) - p(y), cross-entropy on z1 - z0."""
    rows = torch.arange(len(y))
    p1, p0 = torch.softmax(z1, 1)[rows, y], torch.softmax(z0, 1)[rows, y]
    omega = torch.tensor([high if a - b > threshold else low for a, b in zip(p1, p0, strict=True)], dtype=z1.dtype)
    effect = cross_entropy(z1 - (z0.detach() if detached else z0), y)
    second = (omega * effect).sum() / omega.sum() if paper else effect.mean()
    return (omega * cross_entropy(z1, y)).sum() / omega.sum() + alpha * second + anchor * cross_entropy(z0, y).mean()


def perce_sequence(z1: Tensor, z0: Tensor, y: Tensor, *, low=0.8, high=5.0) -> Tensor:
    """arXiv 2603.06595: mean of clip(log p(y|history) - log p(y), low, high) times the cross-entropy."""
    rows = torch.arange(len(y))
    pir = torch.log(torch.softmax(z1, 1)[rows, y] / torch.softmax(z0, 1)[rows, y]).tolist()
    weights = torch.tensor([min(max(value, low), high) for value in pir], dtype=z1.dtype)
    return (weights * cross_entropy(z1, y)).mean()


def longce_sequence(z1: Tensor, z0: Tensor, y: Tensor, *, high=5.0) -> Tensor:
    """arXiv 2410.23771: mean of min(p(y|history) / p(y), high) times the cross-entropy."""
    rows = torch.arange(len(y))
    ratio = (torch.softmax(z1, 1)[rows, y] / torch.softmax(z0, 1)[rows, y]).tolist()
    weights = torch.tensor([min(value, high) for value in ratio], dtype=z1.dtype)
    return (weights * cross_entropy(z1, y)).mean()


def sft_sequence(z1: Tensor, z0: Tensor, y: Tensor) -> Tensor:
    return cross_entropy(z1, y).mean()


def batch_loss(sequence_loss, h1, h0, weight, y, ids, *, bias=None, scale=1.0, softcap=None, **options) -> Tensor:
    """Mean of `sequence_loss` over the sequences with a supervised token."""
    z1, z0 = (logits(h, weight, bias, scale, softcap) for h in (h1, h0))
    losses = [sequence_loss(z1[g], z0[g], y[g], **options) for g in sequences(y, ids)]
    return torch.stack(losses).mean()
