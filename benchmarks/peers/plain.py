"""Plain PyTorch: the usual code, over full [N, V] logits with ordinary autograd.

The product runs in the inputs' dtype, as in the published code, and its result becomes float32. float64 inputs stay
float64, so these functions are also the gate's truth. The published code takes p from a second soft-max over the
vocabulary. exp(-nll) is the same number without that pass, so the baseline here is faster than the published code.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from benchmarks.cases import Inputs
from benchmarks.provider import BASELINE, Provider


def logits(hidden: Tensor, weight: Tensor, softcap: float | None = None) -> Tensor:
    """Full logits in float32 (float64 for float64 inputs)."""
    z = hidden @ weight.T
    z = z if z.dtype == torch.float64 else z.float()
    return z if softcap is None else softcap * torch.tanh(z / softcap)


def nextquill_plain(
    h1: Tensor,
    h0: Tensor,
    weight: Tensor,
    labels: Tensor,
    ids: Tensor,
    detach: bool = False,
    softcap: float | None = None,
) -> Tensor:
    """NextQuill's objective per sequence, averaged; threshold .05, weights .9 / .1, alpha .1."""
    z1, z0 = logits(h1, weight, softcap), logits(h0, weight, softcap)
    if detach:
        z0 = z0.detach()
    nll_f = cross_entropy(z1, labels, reduction="none")
    nll_c = cross_entropy(z0.detach(), labels, reduction="none")
    return nextquill_objective(nll_f, nll_c, mean_over(cross_entropy(z1 - z0, labels, reduction="none"), ids), ids)


def nextquill_objective(nll_f: Tensor, nll_c: Tensor, effect: Tensor, ids: Tensor) -> Tensor:
    """The objective from the NLLs per token [N] and the mean effect NLL, per sequence or over equal lengths."""
    omega = torch.where((-nll_f.detach()).exp() - (-nll_c.detach()).exp() > 0.05, 0.9, 0.1).to(nll_f.dtype)
    return (mean_over(omega * nll_f, ids) / mean_over(omega, ids)).mean() + 0.1 * effect.mean()


def perce_plain(
    h1: Tensor, h0: Tensor, weight: Tensor, labels: Tensor, ids: Tensor, softcap: float | None = None
) -> Tensor:
    """PerCE, mean(clip(nll_c - nll_f, .8, 5) nll_f) per sequence, averaged; no gradient through h0."""
    with torch.no_grad():
        nll_c = cross_entropy(logits(h0, weight, softcap), labels, reduction="none")
    return perce_objective(cross_entropy(logits(h1, weight, softcap), labels, reduction="none"), nll_c, ids)


def perce_objective(nll_f: Tensor, nll_c: Tensor, ids: Tensor) -> Tensor:
    """The objective from the NLLs per token [N]."""
    return mean_over((nll_c.detach() - nll_f.detach()).clamp(0.8, 5.0) * nll_f, ids).mean()


def sft_plain(h1: Tensor, weight: Tensor, labels: Tensor, ids: Tensor, softcap: float | None = None) -> Tensor:
    """Cross-entropy, mean per sequence, averaged."""
    return mean_over(cross_entropy(logits(h1, weight, softcap), labels, reduction="none"), ids).mean()


def pair_nll_plain(
    h1: Tensor, h0: Tensor, weight: Tensor, labels: Tensor, softcap: float | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """The label's NLLs with history, without history, and under the difference of the logits."""
    z1, z0 = logits(h1, weight, softcap), logits(h0, weight, softcap)
    first, second, third = (cross_entropy(z, labels, reduction="none") for z in (z1, z0, z1 - z0))
    return first, second, third


def mean_over(values: Tensor, ids: Tensor) -> Tensor:
    """The mean of each sequence; ids are 0 … S-1."""
    count = int(ids.max()) + 1
    ones = torch.ones_like(values)
    return values.new_zeros(count).index_add(0, ids, values) / values.new_zeros(count).index_add(0, ids, ones)


def _nextquill(x: Inputs, detach: bool = False) -> Tensor:
    return nextquill_plain(x.h1, x.h0, x.weight, x.labels, x.ids, detach, x.softcap)


PROVIDER = Provider(
    BASELINE,
    losses={
        "NextQuill": _nextquill,
        "NextQuill detached": lambda x: _nextquill(x, detach=True),
        "PerCE": lambda x: perce_plain(x.h1, x.h0, x.weight, x.labels, x.ids, x.softcap),
        "SFT": lambda x: sft_plain(x.h1, x.weight, x.labels, x.ids, x.softcap),
        "pair nll": lambda x: pair_nll_plain(x.h1, x.h0, x.weight, x.labels, x.softcap),
        "token nll": lambda x: (cross_entropy(logits(x.h1, x.weight, x.softcap), x.labels, reduction="none"),),
    },
)
