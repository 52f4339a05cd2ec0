"""The losses written as their equations say, over full logits with ordinary autograd.

One function per published objective. They share no code with the chunked engine except the names of results.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nextquill.outputs import PairNLL
from nextquill.reference.linear import linear_logits, token_nll


def pair_loss(
    hidden_factual: Tensor,
    hidden_counterfactual: Tensor,
    lm_head_weight: Tensor,
    labels: Tensor,
    *,
    token_weights: Tensor,
    normalize_weights: bool,
    alpha: float = 0.0,
    weighted_effect: bool = False,
    detach_counterfactual: bool = False,
    anchor: float = 0.0,
    reduction: str = "sequence",
    sequence_ids: Tensor | None = None,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    softcap: float | None = None,
    logit_scale: float = 1.0,
) -> Tensor:
    """The general objective for given `token_weights`.

    Per group of rows s, with w the weights, n_s the number of rows and Z_s = Σ w if `normalize_weights` else n_s:

        L_s = Σ w nll_f / Z_s  +  alpha mean(nll_e)  +  anchor mean(nll_c)

    with `weighted_effect`, alpha Σ w nll_e / Z_s instead of the mean. "sequence": mean of L_s over sequences;
    "token": every denominator is the number of supervised tokens; "micro_batch": one group of all rows.

    Args:
        hidden_factual, hidden_counterfactual: [N, D] or [B, T, D], any floating dtype.
        lm_head_weight: [V, D], any floating dtype.
        labels: [N] or [B, T], integers.
        token_weights: labels' shape, floating; constants.
        normalize_weights, alpha, weighted_effect, detach_counterfactual, anchor, reduction: as in `PairLoss`.
        sequence_ids: labels' shape, integers; by default each row of [B, T] is a sequence, [N] a single one.
        bias: [V], any floating dtype, or None.
        ignore_index, softcap, logit_scale: as in `PairLoss`.

    Returns:
        A float32 (float64) scalar, in nats.
    """
    sequence_ids = _sequence_ids(labels, sequence_ids)
    keep = labels != ignore_index
    y, w, ids = labels[keep].long(), token_weights[keep], sequence_ids[keep]
    z1 = linear_logits(hidden_factual[keep], lm_head_weight, bias, softcap, logit_scale)
    z0 = linear_logits(hidden_counterfactual[keep], lm_head_weight, bias, softcap, logit_scale)
    if detach_counterfactual:
        z0 = z0.detach()
    nll_f, nll_c, nll_e = token_nll(z1, y), token_nll(z0, y), token_nll(z1 - z0, y)
    if y.numel() == 0:
        return (nll_f + nll_c + nll_e).sum()

    groups = [ids == i for i in ids.unique()] if reduction == "sequence" else [torch.ones_like(ids, dtype=torch.bool)]
    losses = []
    for group in groups:
        count = group.sum()
        total = w[group].sum() if normalize_weights and reduction != "token" else count
        effect = (w * nll_e)[group].sum() / total if weighted_effect else nll_e[group].sum() / count
        losses.append((w * nll_f)[group].sum() / total + alpha * effect + anchor * nll_c[group].sum() / count)
    return torch.stack(losses).mean()


def threshold_weights(pair: PairNLL, threshold: float, high: float, low: float) -> Tensor:
    """NextQuill's ω: high where exp(-nll_f) - exp(-nll_c) > threshold, else low; shape and dtype of the NLLs."""
    effect = torch.exp(-pair.factual) - torch.exp(-_counterfactual(pair))
    return torch.where(effect > threshold, torch.full_like(effect, high), torch.full_like(effect, low)).detach()


def clip_weights(pair: PairNLL, minimum: float, maximum: float) -> Tensor:
    """PerCE's w: clip(nll_c - nll_f, minimum, maximum), in nats; shape and dtype of the NLLs."""
    return torch.clip(_counterfactual(pair) - pair.factual, minimum, maximum).detach()


def exp_clip_weights(pair: PairNLL, maximum: float) -> Tensor:
    """LongCE's w: min(exp(nll_c - nll_f), maximum); shape and dtype of the NLLs."""
    return torch.exp(_counterfactual(pair) - pair.factual).clamp(max=maximum).detach()


def _counterfactual(pair: PairNLL) -> Tensor:
    assert pair.counterfactual is not None
    return pair.counterfactual


def _sequence_ids(labels: Tensor, sequence_ids: Tensor | None) -> Tensor:
    if sequence_ids is not None:
        return sequence_ids
    if labels.dim() == 1:
        return torch.zeros_like(labels)
    return torch.arange(labels.shape[0], device=labels.device)[:, None].expand_as(labels)
