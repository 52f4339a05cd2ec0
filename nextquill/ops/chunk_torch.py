"""The chunk kernels in plain PyTorch: statistics of a chunk of logits, and its gradient.

Every `impl` offers these six functions on [n, V] logits in the compute dtype, with labels [n] in [0, V]. A label of V
is not among the columns, as if another rank held it: its nll is NaN, and onehot is 0. These functions read logits after
bias, scale and cap; see `ChunkKernels.finish_logits`. They walk the rows in small blocks, so that the temporaries of a
block stay in cache and no second buffer of the logits' size exists.

The statistics of a row are the largest logit, the sum of exp(z - max), and the nll, for each of z1, z0 and z1 - z0.
The gradients compute the softmax from these three:

    p = exp(z - max) / sum        p[y] - 1 = expm1(-nll)

exp(z - logsumexp) would inherit the rounding error of the logsumexp: 2^-25 of it, which at |z| = 1e4 changes every
probability by 5e-4 of itself. And expm1 keeps the digits of p - 1 where p is near 1.

The Jensen-Shannon divergence compares p1 and p0, the softmaxes of z1 and z0, with m = beta p0 + (1 - beta) p1. Its
logarithms come from the difference d of log-probabilities, so that they are exact where a probability underflows:

    d = log(p0 / p1) = (z0 - max0) - (z1 - max1) - log(sum0 / sum1)
    r = log(m / max(p0, p1)) = log(beta exp(min(d, 0)) + (1 - beta) exp(min(-d, 0)))
    log(m / p1) = r + max(d, 0)        log(m / p0) = r + max(-d, 0)

A divergence KL(p ‖ m) sums p log(p / m) + m - p, which is never negative. All m - p of a row add up to 0, up to the
rounding of the softmaxes: without them that rounding would be an error of the divergence.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

# A block of logits and its scratch tensors: about the L2 cache of one core.
_BLOCK_BYTES_PER_THREAD = 2**21
_BLOCK_BYTES_ACCELERATOR = 2**27  # few launches; still small beside the chunk


def token_stats(logits: Tensor, labels: Tensor, out: Tensor) -> None:
    """Write three statistics per row: max(z), the sum of exp(z - max), and nll = logsumexp(z) - z[y].

    Args:
        logits: z [n, V], float32 or float64.
        labels: y [n], int64.
        out: [3, n], dtype of `logits`; receives max, sum and nll (nats).
    """
    for rows, (scratch,) in _row_blocks(logits, buffers=1):
        _row_stats(logits[rows], labels[rows], scratch, out[:, rows])


def pair_stats(logits: tuple[Tensor, Tensor], labels: Tensor, out: Tensor) -> None:
    """Write the statistics of z1, of z0 and of z1 - z0, as `token_stats` does for one stream.

    Args:
        logits: z1 (factual) and z0 (counterfactual), each [n, V], float32 or float64.
        labels: y [n], int64.
        out: [9, n], dtype of the logits; receives max, sum and nll (nats) of z1, then of z0, then of z1 - z0. With
            [11, n] also KL(p1 ‖ p0) and the entropy of p1, in nats.
    """
    for rows, (difference, scratch) in _row_blocks(logits[0], buffers=2):
        z1, z0, y, stats = logits[0][rows], logits[1][rows], labels[rows], out[:, rows]
        torch.sub(z1, z0, out=difference)
        for index, z in enumerate((z1, z0, difference)):
            _row_stats(z, y, scratch, stats[3 * index : 3 * index + 3])
        if out.shape[0] == 11:
            _divergences(z1, difference, scratch, stats)


def token_grad(
    logits: Tensor,
    labels: Tensor,
    stats: Tensor,
    grad_nll: Tensor,
    out: Tensor,
    softcap: float | None = None,
    logit_scale: float = 1.0,
) -> None:
    """Compute the gradient of g·nll before cap and scale, scale·cap'(z)·g·(softmax(z) - onehot(y)).

    Args:
        logits: z [n, V], float32 or float64. Overwritten.
        labels: y [n], int64.
        stats: [3, n], dtype of `logits`; written by `token_stats` for the same logits.
        grad_nll: g [n], dtype of `logits`, per nat.
        out: [n, V], any floating dtype: receives the gradient. The logits themselves, or other memory.
        softcap: the cap c, with cap'(z) = 1 - (z / c)²; None for no cap.
        logit_scale: the scale.
    """
    for rows, (scratch,) in _row_blocks(logits, buffers=1):
        _weighted_softmax_grad(logits[rows], labels[rows], stats[:, rows], grad_nll[rows], scratch)
        _through_cap(logits[rows], scratch, out[rows], softcap, logit_scale)


def pair_grad(
    logits: tuple[Tensor, Tensor],
    labels: Tensor,
    stats: Tensor,
    grad_nlls: tuple[Tensor, Tensor | None, Tensor],
    outs: tuple[Tensor, Tensor | None],
    softcap: float | None = None,
    logit_scale: float = 1.0,
) -> None:
    """Compute the gradients of g_f nll_f + g_c nll_c + g_e nll_e before cap and scale.

        dz1 = g_f (p1 - onehot) + g_e (pe - onehot)        dz0 = g_c (p0 - onehot) - g_e (pe - onehot)

    each times scale·cap'.

    Args:
        logits: z1 (factual) and z0 (counterfactual), each [n, V], float32 or float64. Overwritten, but for a z0 without
            gradient.
        labels: y [n], int64.
        stats: [9, n], dtype of the logits; written by `pair_stats` for the same logits.
        grad_nlls: g_f, g_c and g_e, each [n], dtype of the logits, per nat; a g_c of None is zero and saves a softmax.
        outs: two as in `token_grad`, for dz1 and for dz0; None for a constant z0.
        softcap, logit_scale: as in `token_grad`.
    """
    g_f, g_c, g_e = grad_nlls
    out1, out0 = outs
    for rows, (effect, own) in _row_blocks(logits[0], buffers=2):
        z1, z0, y = logits[0][rows], logits[1][rows], labels[rows]
        stats1, stats0, stats_e = stats[:, rows].split(3)
        torch.sub(z1, z0, out=own)
        _weighted_softmax_grad(own, y, stats_e, g_e[rows], effect)
        _weighted_softmax_grad(z1, y, stats1, g_f[rows], own)
        _through_cap(z1, own.add_(effect), out1[rows], softcap, logit_scale)
        if out0 is None:
            continue
        effect.neg_()
        if g_c is not None:
            _weighted_softmax_grad(z0, y, stats0, g_c[rows], own)
            effect.add_(own)
        _through_cap(z0, effect, out0[rows], softcap, logit_scale)


def jsd_stats(logits: tuple[Tensor, Tensor], out: Tensor, beta: float, normalised: bool = False) -> None:
    """Write max(z1), the sum of exp(z1 - max), the same of z0, KL(p1 ‖ m) and jsd, per row.

        jsd = beta KL(p0 ‖ m) + (1 - beta) KL(p1 ‖ m)        KL(p0 ‖ p1) for beta = 0, KL(p1 ‖ p0) for beta = 1

    Args:
        logits: z1 (student) and z0 (teacher), each [n, V], float32 or float64.
        out: [6, n], dtype of the logits; receives the statistics, divergences in nats.
        beta: weight of p0 in m: 0, 1, or a number between that the dtype of the logits tells from both.
        normalised: the first four statistics are given in `out`. They may be those of more columns than the logits
            have; the divergences are then these columns' shares.
    """
    for rows, buffers in _row_blocks(logits[0], buffers=5):
        stats = out[:, rows]
        streams = () if normalised else zip((each[rows] for each in logits), stats[:4].split(2), buffers, strict=False)
        for z, (largest, total), p in streams:
            torch.amax(z, -1, out=largest)
            torch.sum(torch.sub(z, largest[:, None], out=p).exp_(), -1, out=total)
        p1, p0, d, r = _mixture((logits[0][rows], logits[1][rows]), stats, beta, buffers)
        log0 = torch.neg(d, out=buffers[4]).clamp_(min=0).add_(r)
        log1 = r.add_(d.clamp_(min=0))
        surplus = torch.sub(p0, p1, out=d)
        divergence0 = log0.mul_(p0).add_(surplus, alpha=1 - beta).sum(-1).neg_()
        divergence1 = log1.mul_(p1).sub_(surplus, alpha=beta).sum(-1).neg_()
        stats[4] = divergence1
        weight0, weight1 = (beta, 1 - beta) if 0 < beta < 1 else (1 - beta, beta)
        # Less than 0 by rounding only. `clamp` keeps NaN.
        stats[5] = divergence0.mul_(weight0).add_(divergence1, alpha=weight1).clamp_(min=0)


def jsd_grad(
    logits: tuple[Tensor, Tensor],
    stats: Tensor,
    grad_jsd: Tensor,
    out: Tensor,
    beta: float,
    softcap: float | None = None,
    logit_scale: float = 1.0,
) -> None:
    """Compute the gradient of g·jsd by z1 before cap and scale; z0 is a constant.

        dz1 = g (1 - beta) p1 (log(p1 / m) - KL(p1 ‖ m))
            = g (p1 - p0) for beta = 0,  g p1 (log(p1 / p0) - KL(p1 ‖ p0)) for beta = 1

    times scale·cap'.

    Args:
        logits: z1 (student) and z0 (teacher), each [n, V], float32 or float64. The first is overwritten.
        stats: [6, n], dtype of the logits; written by `jsd_stats` for the same logits and `beta`.
        grad_jsd: g [n], dtype of the logits, per nat.
        out: [n, V], any floating dtype: receives the gradient. The logits z1 themselves, or other memory.
        beta: as in `jsd_stats`.
        softcap, logit_scale: as in `token_grad`.
    """
    for rows, buffers in _row_blocks(logits[0], buffers=5):
        z1, own = logits[0][rows], stats[:, rows]
        p1, p0, d, r = _mixture((z1, logits[1][rows]), own, beta, buffers)
        if beta == 0:
            gradient, weight = p1.sub_(p0), grad_jsd[rows]
        else:
            gradient = p1.mul_(d.clamp_(min=0).add_(r).add_(own[4][:, None])).neg_()
            weight = grad_jsd[rows] * (1 - beta if beta < 1 else 1)
        _through_cap(z1, gradient.mul_(weight[:, None]), out[rows], softcap, logit_scale)


def _mixture(
    logits: tuple[Tensor, Tensor], stats: Tensor, beta: float, buffers: list[Tensor]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return p1, p0, d and r of the module's text, in the first four of five buffers."""
    p1, p0, d, r, scratch = buffers
    max1, total1, max0, total0 = stats[:4]
    # Finite also in a masked column, where d would be inf - inf; its probabilities stay 0.
    lowest = torch.finfo(p1.dtype).min
    torch.sub(logits[0], max1[:, None], out=p1).clamp_(min=lowest)
    torch.sub(logits[1], max0[:, None], out=p0).clamp_(min=lowest)
    torch.sub(p0, p1, out=d).sub_((total0 / total1).log_()[:, None])
    p1.exp_().div_(total1[:, None])
    p0.exp_().div_(total0[:, None])
    if beta == 0:
        torch.clamp(d, min=0, out=r).neg_()
    elif beta == 1:
        torch.clamp(d, max=0, out=r)
    else:
        torch.clamp(d, max=0, out=r).exp_().mul_(beta)
        r.add_(torch.neg(d, out=scratch).clamp_(max=0).exp_(), alpha=1 - beta).log_()
    return p1, p0, d, r


def _row_stats(logits: Tensor, labels: Tensor, scratch: Tensor, out: Tensor) -> None:
    """Write max, sum and nll of each row into `out` [3, n]."""
    largest, total, nll = out
    torch.amax(logits, -1, out=largest)
    torch.sum(torch.sub(logits, largest[:, None], out=scratch).exp_(), -1, out=total)
    # The large terms cancel first, so that a nll near 0 keeps its digits.
    columns, known = _label_columns(logits, labels)
    own = logits.gather(1, columns).squeeze(1).masked_fill_(~known, torch.nan)
    torch.add(largest - own, total.log(), out=nll)


def _divergences(z1: Tensor, difference: Tensor, scratch: Tensor, stats: Tensor) -> None:
    """Compute rows 9 and 10 of the statistics from rows 0 to 8; overwrites the difference z1 - z0.

    KL = E[z1 - z0] - lse1 + lse0 and H = lse1 - E[z1], where E is the mean under p1. Each mean is taken of differences
    from a maximum: a mean of large logits would lose the small digits in which they differ.
    """
    max1, total1, _, max0, total0, _, max_e = stats[:7]
    p1 = torch.sub(z1, max1[:, None], out=scratch).exp_().div_(total1[:, None])
    mean = _expectation(p1, difference.sub_(max_e[:, None]))
    torch.add(mean + (max_e - (max1 - max0)), total0.log() - total1.log(), out=stats[9])
    torch.sub(total1.log(), _expectation(p1, torch.sub(z1, max1[:, None], out=difference)), out=stats[10])


def _expectation(probabilities: Tensor, values: Tensor) -> Tensor:
    # A masked entry has probability 0 and an infinite value; their product would be NaN.
    return torch.where(probabilities > 0, probabilities * values, probabilities).sum(-1)


def _weighted_softmax_grad(logits: Tensor, labels: Tensor, stats: Tensor, grad_nll: Tensor, out: Tensor) -> None:
    """Write g (softmax(z) - onehot(y)) into `out`."""
    largest, total, nll = stats
    torch.sub(logits, largest[:, None], out=out).exp_().mul_((grad_nll / total)[:, None])
    columns, known = _label_columns(logits, labels)
    at_label = torch.where(known, grad_nll * torch.expm1(-nll), out.gather(1, columns).squeeze(1))
    # scatter, because the CUDA kernel of scatter_add uses atomics.
    out.scatter_(1, columns, at_label[:, None])


def _label_columns(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return a column for each label [n, 1], int64, and whether the label is there [n], bool."""
    last = logits.shape[1] - 1
    return labels.clamp(max=last)[:, None], labels <= last


def _through_cap(logits: Tensor, gradient: Tensor, out: Tensor, softcap: float | None, logit_scale: float) -> None:
    """Write gradient · cap'(z) · scale, where cap' = 1 - (z / c)² for a capped logit z; overwrites the logits."""
    if softcap is not None:
        gradient = logits.div_(softcap).square_().neg_().add_(1.0).mul_(gradient)
    torch.mul(gradient, logit_scale, out=out)


def _row_blocks(logits: Tensor, buffers: int) -> Iterator[tuple[slice, list[Tensor]]]:
    """Yield row slices of [n, V] with `buffers` scratch tensors of each slice's shape."""
    rows, vocabulary = logits.shape
    on_cpu = logits.device.type == "cpu"
    budget = _BLOCK_BYTES_PER_THREAD * torch.get_num_threads() if on_cpu else _BLOCK_BYTES_ACCELERATOR
    size = max(1, min(rows, budget // ((buffers + 1) * vocabulary * logits.element_size())))
    scratch = [logits.new_empty(size, vocabulary) for _ in range(buffers)]
    for start in range(0, rows, size):
        stop = min(start + size, rows)
        yield slice(start, stop), [buffer[: stop - start] for buffer in scratch]
