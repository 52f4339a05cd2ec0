"""The peers: what one writes today, over full [N, V] logits with ordinary autograd."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy


def nextquill_plain(
    h1: Tensor, h0: Tensor, weight: Tensor, labels: Tensor, ids: Tensor, detach: bool = False
) -> Tensor:
    """NextQuill's objective per sequence, averaged; threshold .05, weights .9 / .1, alpha .1."""
    z1, z0 = h1.float() @ weight.float().T, h0.float() @ weight.float().T
    if detach:
        z0 = z0.detach()
    nll_f = cross_entropy(z1, labels, reduction="none")
    nll_e = cross_entropy(z1 - z0, labels, reduction="none")
    p1 = z1.detach().softmax(-1).gather(1, labels[:, None]).squeeze(1)
    p0 = z0.detach().softmax(-1).gather(1, labels[:, None]).squeeze(1)
    omega = torch.where(p1 - p0 > 0.05, 0.9, 0.1)
    return (mean_over(omega * nll_f, ids) / mean_over(omega, ids) + 0.1 * mean_over(nll_e, ids)).mean()


def perce_plain(h1: Tensor, h0: Tensor, weight: Tensor, labels: Tensor, ids: Tensor) -> Tensor:
    """PerCE, mean(clip(nll_c - nll_f, .8, 5) nll_f) per sequence, averaged; no gradient through h0."""
    nll_f = cross_entropy(h1.float() @ weight.float().T, labels, reduction="none")
    with torch.no_grad():
        nll_c = cross_entropy(h0.float() @ weight.float().T, labels, reduction="none")
        weights = (nll_c - nll_f).clamp(0.8, 5.0)
    return mean_over(weights * nll_f, ids).mean()


def sft_plain(h1: Tensor, weight: Tensor, labels: Tensor, ids: Tensor) -> Tensor:
    """Cross-entropy, mean per sequence, averaged."""
    return mean_over(cross_entropy(h1.float() @ weight.float().T, labels, reduction="none"), ids).mean()


def mean_over(values: Tensor, ids: Tensor) -> Tensor:
    """Mean of each sequence; ids are 0 … S-1."""
    count = int(ids.max()) + 1
    ones = torch.ones_like(values)
    return values.new_zeros(count).index_add(0, ids, values) / values.new_zeros(count).index_add(0, ids, ones)
