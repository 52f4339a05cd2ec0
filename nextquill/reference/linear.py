"""Plain PyTorch twins of the public operators: full logits, ordinary autograd, any floating dtype.

The tests compare the fast paths with them, and they state the maths most clearly. They hold [N, V] in memory several
times, so they are for small inputs.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from nextquill.outputs import PairNLL, PairStats


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype to compute in: float64 for float64, float32 for all others."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def linear_logits(
    hidden_states: Tensor,
    lm_head_weight: Tensor,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
) -> Tensor:
    """Return cap(scale * (h Wᵀ + b)), in float32 (float64) arithmetic throughout.

    Args:
        hidden_states: h [N, D], any floating dtype.
        lm_head_weight: W [V, D], any floating dtype.
        bias: b [V], any floating dtype, or None.
        softcap: c > 0 of cap(x) = c·tanh(x/c), or None.
        logit_scale: the scale.

    Returns:
        [N, V], float32 (float64 for float64 hidden states).
    """
    dtype = compute_dtype(hidden_states.dtype)
    logits = hidden_states.to(dtype) @ lm_head_weight.to(dtype).T
    if bias is not None:
        logits = logits + bias.to(dtype)
    logits = logits * logit_scale
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def token_nll(logits: Tensor, labels: Tensor) -> Tensor:
    """Return logsumexp(z) - z[y] for `logits` ([N, V], float32 or float64) and `labels` ([N], int64); [N], nats.

    It uses log_softmax, whose gradient is right for logits of any size. The gradient of logsumexp is
    exp(z - logsumexp), which inherits the rounding error of the logsumexp.
    """
    return -torch.log_softmax(logits, -1).gather(-1, labels[:, None]).squeeze(-1)


def scatter_rows(values: Tensor, keep: Tensor) -> Tensor:
    """Put `values` [n], any dtype, one per kept row, into a tensor of `keep`'s shape (bool) that is 0 elsewhere."""
    return torch.zeros(keep.shape, dtype=values.dtype, device=values.device).masked_scatter(keep, values)


def linear_token_nll(
    hidden_states: Tensor,
    lm_head_weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    softcap: float | None = None,
    logit_scale: float = 1.0,
) -> Tensor:
    """Reference of the public operator; shapes and dtypes as for `nextquill.linear_token_nll`."""
    keep = labels != ignore_index
    logits = linear_logits(hidden_states[keep], lm_head_weight, bias, softcap, logit_scale)
    return scatter_rows(token_nll(logits, labels[keep].long()), keep)


def linear_pair_nll(
    hidden_factual: Tensor, hidden_counterfactual: Tensor, lm_head_weight: Tensor, labels: Tensor, *,
    bias: Tensor | None = None, ignore_index: int = -100, softcap: float | None = None, logit_scale: float = 1.0,
) -> PairNLL:  # fmt: skip
    """Reference of the public operator; shapes and dtypes as for `nextquill.linear_pair_nll`."""
    keep = labels != ignore_index
    head = (lm_head_weight, bias, softcap, logit_scale)
    z1, z0 = (linear_logits(hidden[keep], *head) for hidden in (hidden_factual, hidden_counterfactual))
    return _pair_nll(z1, z0, labels, keep)


def linear_pair_stats(
    hidden_factual: Tensor, hidden_counterfactual: Tensor, lm_head_weight: Tensor, labels: Tensor, *,
    bias: Tensor | None = None, ignore_index: int = -100, softcap: float | None = None, logit_scale: float = 1.0,
) -> PairStats:  # fmt: skip
    """Reference of the public operator; shapes and dtypes as for `nextquill.linear_pair_stats`."""
    keep = labels != ignore_index
    head = (lm_head_weight, bias, softcap, logit_scale)
    z1, z0 = (linear_logits(hidden[keep], *head) for hidden in (hidden_factual, hidden_counterfactual))
    log_p1, log_p0 = torch.log_softmax(z1, -1), torch.log_softmax(z0, -1)
    p1 = torch.exp(log_p1)
    kl = torch.where(p1 > 0, p1 * (log_p1 - log_p0), p1).sum(-1)
    entropy = -torch.where(p1 > 0, p1 * log_p1, p1).sum(-1)
    return PairStats(_pair_nll(z1, z0, labels, keep), kl=scatter_rows(kl, keep), entropy=scatter_rows(entropy, keep))


def linear_pair_jsd(
    hidden_student: Tensor, hidden_teacher: Tensor, lm_head_weight: Tensor, mask: Tensor, *, beta: float = 0.5,
    bias: Tensor | None = None, ignore_index: int = -100, softcap: float | None = None, logit_scale: float = 1.0,
) -> Tensor:  # fmt: skip
    """Reference of the public operator; shapes and dtypes as for `nextquill.linear_pair_jsd`."""
    keep = mask if mask.dtype == torch.bool else mask != ignore_index
    head = (lm_head_weight, bias, softcap, logit_scale)
    z1, z0 = (linear_logits(hidden[keep], *head) for hidden in (hidden_student, hidden_teacher))
    # Finite for a masked column too, whose probability stays 0: 0 · inf would be NaN.
    log_p1, log_p0 = (torch.log_softmax(z, -1).clamp(min=torch.finfo(z.dtype).min) for z in (z1, z0.detach()))
    if beta == 0:
        jsd = _divergence(log_p0, log_p1)
    elif beta == 1:
        jsd = _divergence(log_p1, log_p0)
    else:
        log_m = torch.logaddexp(log_p0 + math.log(beta), log_p1 + math.log1p(-beta))
        jsd = beta * _divergence(log_p0, log_m) + (1 - beta) * _divergence(log_p1, log_m)
    return scatter_rows(jsd, keep)


def _divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Return KL(p ‖ q) of log-probabilities [n, V], finite, float32 or float64: [n], nats."""
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def _pair_nll(z1: Tensor, z0: Tensor, labels: Tensor, keep: Tensor) -> PairNLL:
    return PairNLL(*(scatter_rows(token_nll(z, labels[keep].long()), keep) for z in (z1, z0, z1 - z0)))
