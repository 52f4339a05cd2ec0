"""The chunk kernels in plain PyTorch: statistics of a chunk of logits, and its gradient in place.

Every `impl` offers these four functions on [n, V] logits in the compute dtype, after scale and cap, with labels [n] in
[0, V). They walk the rows in small blocks, so that the temporaries of a block stay in cache and no second buffer of the
logits' size exists; `softmax` and `log_softmax` with `out=` are each one fused pass over a row.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

_BLOCK_BYTES_PER_THREAD = 2**20  # about the L2 cache of one core
_BLOCK_BYTES_ACCELERATOR = 2**26  # few launches; still small beside the chunk


def token_stats(logits: Tensor, labels: Tensor, out: Tensor) -> None:
    """Write the rows (logsumexp, nll) into `out` [2, n]: nll = logsumexp(z) - z[y]."""
    for rows, (scratch,) in _row_blocks(logits, buffers=1):
        _row_stats(logits[rows], labels[rows], scratch, out[:, rows])


def pair_stats(logits_factual: Tensor, logits_counterfactual: Tensor, labels: Tensor, out: Tensor) -> None:
    """Write the rows logsumexp of z1, z0, z1 - z0, then nll of the same three, into `out` [6, n].

    With `out` [8, n] two rows more: KL(p1 ‖ p0) and the entropy of p1, in nats.
    """
    for rows, (difference, scratch) in _row_blocks(logits_factual, buffers=2):
        z1, z0, y, stats = logits_factual[rows], logits_counterfactual[rows], labels[rows], out[:, rows]
        torch.sub(z1, z0, out=difference)
        for stream, logits in enumerate((z1, z0, difference)):
            _row_stats(logits, y, scratch, stats[stream : stream + 4 : 3])
        if out.shape[0] == 8:
            torch.softmax(z1, -1, out=scratch)
            # Σ p1 (z1 - z0) and Σ p1 z1; a masked entry has probability 0 and must not bring 0 · inf.
            expected_difference = _expectation(scratch, difference)
            torch.sub(expected_difference, stats[0] - stats[1], out=stats[6])
            torch.sub(stats[0], _expectation(scratch, z1), out=stats[7])


def token_grad_(
    logits: Tensor,
    labels: Tensor,
    logsumexp: Tensor,
    grad_nll: Tensor,
    softcap: float | None,
    logit_scale: float,
    dtype: torch.dtype,
) -> Tensor:
    """Overwrite z with the gradient of g·nll before cap and scale, scale·cap'(z)·g·(softmax(z) - onehot(y)).

    `dtype` is the one the caller multiplies in. An implementation may write the result in it, in the first half of each
    row's memory; this one leaves the compute dtype. The result says which.
    """
    del logsumexp, dtype  # one fused softmax is faster here than exp(z - logsumexp)
    for rows, (scratch,) in _row_blocks(logits, buffers=1):
        _weighted_softmax_grad(logits[rows], labels[rows], grad_nll[rows], scratch)
        _through_cap_(logits[rows], scratch, softcap, logit_scale)
    return logits


def pair_grad_(
    logits_factual: Tensor,
    logits_counterfactual: Tensor,
    labels: Tensor,
    logsumexps: Tensor,
    grad_factual: Tensor,
    grad_counterfactual: Tensor | None,
    grad_effect: Tensor,
    softcap: float | None,
    logit_scale: float,
    dtype: torch.dtype,
    detach_counterfactual: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Overwrite z1, z0 with the gradients of g_f nll_f + g_c nll_c + g_e nll_e before cap and scale.

        dz1 = g_f (p1 - onehot) + g_e (pe - onehot)        dz0 = g_c (p0 - onehot) - g_e (pe - onehot)

    each times scale·cap'. `grad_counterfactual=None` means zero and saves a softmax. `logsumexps` [3, n] are those of
    z1, z0 and z1 - z0. With `detach_counterfactual` z0 is only read and the second result is None. `dtype`: see
    `token_grad_`.
    """
    del logsumexps, dtype
    for rows, (effect, own) in _row_blocks(logits_factual, buffers=2):
        z1, z0, y = logits_factual[rows], logits_counterfactual[rows], labels[rows]
        torch.sub(z1, z0, out=own)
        _weighted_softmax_grad(own, y, grad_effect[rows], effect)
        _weighted_softmax_grad(z1, y, grad_factual[rows], own)
        _through_cap_(z1, own.add_(effect), softcap, logit_scale)
        if detach_counterfactual:
            continue
        effect.neg_()
        if grad_counterfactual is not None:
            _weighted_softmax_grad(z0, y, grad_counterfactual[rows], own)
            effect.add_(own)
        _through_cap_(z0, effect, softcap, logit_scale)
    return logits_factual, None if detach_counterfactual else logits_counterfactual


def _row_stats(logits: Tensor, labels: Tensor, scratch: Tensor, out: Tensor) -> None:
    """out [2, n] <- (logsumexp, nll)."""
    torch.log_softmax(logits, -1, out=scratch)
    torch.neg(scratch.gather(1, labels[:, None]).squeeze(1), out=out[1])
    torch.add(out[1], logits.gather(1, labels[:, None]).squeeze(1), out=out[0])
    # The sum is inf - inf where the label itself is masked. Reading that off an accelerator would wait for it.
    if logits.device.type != "cpu" or bool(out[0].isnan().any()):
        torch.logsumexp(logits, -1, out=out[0])


def _expectation(probabilities: Tensor, values: Tensor) -> Tensor:
    return torch.where(probabilities > 0, probabilities * values, probabilities).sum(-1)


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
