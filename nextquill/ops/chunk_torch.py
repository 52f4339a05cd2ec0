"""The chunk kernels in plain PyTorch: label statistics of a chunk of logits, and its gradient in place.

Every `impl` offers these four functions on [n, V] logits in the compute dtype. They walk the rows in small blocks, so
that the temporaries of a block stay in cache and no second buffer of the logits' size exists; `softmax` and
`log_softmax` with `out=` are each one fused pass over a row.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

_BLOCK_BYTES_PER_THREAD = 2**20  # about the L2 cache of one core
_BLOCK_BYTES_ACCELERATOR = 2**26  # few launches; still small beside the chunk


def token_stats(logits: Tensor, labels: Tensor) -> Tensor:
    """nll = logsumexp(z) - z[y]; [n]."""
    nll = torch.empty_like(logits[:, 0])
    for rows, (scratch,) in _row_blocks(logits, buffers=1):
        torch.log_softmax(logits[rows], -1, out=scratch)
        torch.neg(scratch.gather(1, labels[rows, None]).squeeze(1), out=nll[rows])
    return nll


def effect_stats(logits_factual: Tensor, logits_counterfactual: Tensor, labels: Tensor) -> Tensor:
    """nll of the effect logits z1 - z0; [n]."""
    nll = torch.empty_like(logits_factual[:, 0])
    for rows, (difference, scratch) in _row_blocks(logits_factual, buffers=2):
        torch.sub(logits_factual[rows], logits_counterfactual[rows], out=difference)
        torch.log_softmax(difference, -1, out=scratch)
        torch.neg(scratch.gather(1, labels[rows, None]).squeeze(1), out=nll[rows])
    return nll


def token_grad_(logits: Tensor, labels: Tensor, grad_nll: Tensor, softcap: float | None, logit_scale: float) -> Tensor:
    """Overwrite z with the gradient of g·nll before cap and scale, scale·cap'(z)·g·(softmax(z) - onehot(y))."""
    for rows, (scratch,) in _row_blocks(logits, buffers=1):
        _weighted_softmax_grad(logits[rows], labels[rows], grad_nll[rows], scratch)
        _through_cap_(logits[rows], scratch, softcap, logit_scale)
    return logits


def pair_grad_(
    logits_factual: Tensor,
    logits_counterfactual: Tensor,
    labels: Tensor,
    grad_factual: Tensor,
    grad_counterfactual: Tensor | None,
    grad_effect: Tensor,
    softcap: float | None,
    logit_scale: float,
) -> tuple[Tensor, Tensor]:
    """Overwrite z1, z0 with the gradients of g_f nll_f + g_c nll_c + g_e nll_e before cap and scale.

        dz1 = g_f (p1 - onehot) + g_e (pe - onehot)        dz0 = g_c (p0 - onehot) - g_e (pe - onehot)

    each times scale·cap'. `grad_counterfactual=None` means zero and saves a softmax.
    """
    for rows, (effect, own) in _row_blocks(logits_factual, buffers=2):
        z1, z0, y = logits_factual[rows], logits_counterfactual[rows], labels[rows]
        torch.sub(z1, z0, out=own)
        _weighted_softmax_grad(own, y, grad_effect[rows], effect)
        _weighted_softmax_grad(z1, y, grad_factual[rows], own)
        _through_cap_(z1, own.add_(effect), softcap, logit_scale)
        effect.neg_()
        if grad_counterfactual is not None:
            _weighted_softmax_grad(z0, y, grad_counterfactual[rows], own)
            effect.add_(own)
        _through_cap_(z0, effect, softcap, logit_scale)
    return logits_factual, logits_counterfactual


def _weighted_softmax_grad(logits: Tensor, labels: Tensor, grad_nll: Tensor, out: Tensor) -> None:
    """out = g (softmax(z) - onehot(y))."""
    torch.softmax(logits, -1, out=out)
    out.mul_(grad_nll[:, None])
    # gather and scatter rather than scatter_add, whose CUDA kernel uses atomics.
    out.scatter_(1, labels[:, None], out.gather(1, labels[:, None]) - grad_nll[:, None])


def _through_cap_(logits: Tensor, gradient: Tensor, softcap: float | None, logit_scale: float) -> None:
    """logits <- gradient · cap'(z) · scale, where cap'(x) = 1 - (z / c)² in terms of the capped z."""
    if softcap is None:
        torch.mul(gradient, logit_scale, out=logits)
    else:
        logits.div_(softcap).square_().neg_().add_(1.0).mul_(gradient).mul_(logit_scale)


def _row_blocks(logits: Tensor, buffers: int) -> Iterator[tuple[slice, list[Tensor]]]:
    """Yield row slices of [n, V] with `buffers` scratch tensors of each slice's shape."""
    rows, vocabulary = logits.shape
    on_cpu = logits.device.type == "cpu"
    budget = _BLOCK_BYTES_PER_THREAD * torch.get_num_threads() if on_cpu else _BLOCK_BYTES_ACCELERATOR
    size = max(1, min(rows, budget // (vocabulary * logits.element_size())))
    scratch = [logits.new_empty(size, vocabulary) for _ in range(buffers)]
    for start in range(0, rows, size):
        stop = min(start + size, rows)
        yield slice(start, stop), [buffer[: stop - start] for buffer in scratch]
