"""Per-token operators over the output head: validate, flatten, call the operator."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nextquill.ops.dispatch import check_impl
from nextquill.ops.nll_operators import pair_jsd, pair_nll, pair_stats, token_nll
from nextquill.ops.validation import (
    HeadInputs,
    check_beta,
    check_chunk_bytes,
    check_floating,
    check_head_inputs,
    check_head_options,
    check_ignore_index,
)
from nextquill.outputs import PairNLL, PairStats
from nextquill.vocabulary_shard import VocabularyShard


def linear_token_nll(
    hidden_states: Tensor,
    lm_head_weight: Tensor | VocabularyShard,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    impl: str = "auto",
    chunk_bytes: int | None = None,
) -> Tensor:
    """Negative log-likelihood of each label under a linear head, without materialising [N, V].

        z = cap(logit_scale · (h Wᵀ + b)),  cap(x) = softcap · tanh(x / softcap) or x
        nll = logsumexp(z) - z[y]

    Equals `F.cross_entropy(z, labels, reduction="none", ignore_index=ignore_index)` with z in float32.

    Args:
        hidden_states: [N, D] or [B, T, D], floating, at the *predicting* positions: labels are not shifted.
        lm_head_weight: [V, D], the hidden states' dtype (under autocast it may differ). If processes divide the
            vocabulary, a DTensor sharded on dimension 0, or a `VocabularyShard`.
        labels: [N] or [B, T], any integer dtype, in [0, V) or `ignore_index`.
        bias: [V], the hidden states' dtype (under autocast it may differ), or None. Divided like the weight.
        ignore_index: rows with this label give exactly 0 and get exactly 0 gradient, whatever they hold.
        softcap: cap on the logits' magnitude (Gemma), or None.
        logit_scale: factor on the logits before the cap.
        impl: "auto", "triton", "native" or "torch".
        chunk_bytes: bound on the memory for logits and their gradient, as in `PairLoss`. A forward without it stores no
            logits where the kernels can compute so (Triton); with it, it stores a chunk at a time.

    Returns:
        float32 (float64 for float64 inputs), labels' shape, in nats. Differentiable in hidden_states, lm_head_weight
        and bias.

    Raises:
        ArgumentError, ArgumentTypeError: an argument does not fit; the message names it.
        BackendUnavailableError: `impl` cannot run here.
    """
    options = _operator_options(ignore_index, softcap, logit_scale, impl, chunk_bytes)
    inputs = check_head_inputs(hidden_states, None, lm_head_weight, labels, bias, hidden_name="hidden_states")
    options["vocabulary_shard"] = inputs.vocabulary_shard
    nll: Tensor = token_nll(inputs.factual, inputs.weight, inputs.bias, inputs.labels, **options)
    return nll.view(inputs.shape)


def linear_pair_nll(
    hidden_factual: Tensor,
    hidden_counterfactual: Tensor,
    lm_head_weight: Tensor | VocabularyShard,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    impl: str = "auto",
    chunk_bytes: int | None = None,
) -> PairNLL:
    """The three NLLs of a factual / counterfactual pair, without materialising [N, V].

        nll_f = lse(z1) - z1[y]      nll_c = lse(z0) - z0[y]      nll_e = lse(z1 - z0) - (z1 - z0)[y]

    where z1 and z0 are the (scaled, capped) logits of both streams, in float32 or float64 arithmetic throughout.
    NextQuill's effect logits are the difference z1 - z0 (arXiv 2506.02368).

    Args:
        hidden_factual, hidden_counterfactual: [N, D] or [B, T, D], final hidden states of the *same* label in both
            branches, at the predicting positions.
        lm_head_weight, labels, bias, ignore_index, softcap, logit_scale, impl, chunk_bytes: as in `linear_token_nll`.

    Returns:
        PairNLL(factual, counterfactual, effect), each float32 (float64 for float64 inputs) in the labels' shape, in
        nats, and differentiable in both hidden states, the weight and the bias. To mask tokens of the vocabulary, give
        them a large negative finite bias: with -inf the difference of the logits is NaN.

    Raises:
        ArgumentError, ArgumentTypeError: an argument does not fit; the message names it.
        BackendUnavailableError: `impl` cannot run here.
    """
    options = _operator_options(ignore_index, softcap, logit_scale, impl, chunk_bytes)
    inputs = _check_pair(hidden_factual, hidden_counterfactual, lm_head_weight, labels, bias)
    options["vocabulary_shard"] = inputs.vocabulary_shard
    return PairNLL(*(nll.view(inputs.shape) for nll in pair_nll(*inputs.tensors, **options)))


def linear_pair_stats(
    hidden_factual: Tensor,
    hidden_counterfactual: Tensor,
    lm_head_weight: Tensor | VocabularyShard,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    impl: str = "auto",
    chunk_bytes: int | None = None,
) -> PairStats:
    """The result of `linear_pair_nll`, and how far the history moves the whole distribution; without gradient.

        kl = KL(p1 ‖ p0) = Σ p1 (log p1 - log p0)        entropy = - Σ p1 log p1        (nats)

    Args:
        hidden_factual, hidden_counterfactual, lm_head_weight, labels, bias: as in `linear_pair_nll`.
        ignore_index, softcap, logit_scale, impl, chunk_bytes: as there, but logits are always stored a chunk at a time.

    Returns:
        PairStats(pair_nll, kl, entropy), float32 (float64 for float64 inputs) in the labels' shape, in nats, and 0 in
        ignored rows.

    Raises:
        ArgumentError, ArgumentTypeError: an argument does not fit; the message names it.
        BackendUnavailableError: `impl` cannot run here.
    """
    options = _operator_options(ignore_index, softcap, logit_scale, impl, chunk_bytes)
    inputs = _check_pair(hidden_factual, hidden_counterfactual, lm_head_weight, labels, bias)
    options["vocabulary_shard"] = inputs.vocabulary_shard
    with torch.no_grad():
        stats = pair_stats(*inputs.tensors, **options)
    *nlls, kl, entropy = (row.view(inputs.shape) for row in stats)
    return PairStats(PairNLL(*nlls), kl=kl, entropy=entropy)


def linear_pair_jsd(
    hidden_student: Tensor,
    hidden_teacher: Tensor,
    lm_head_weight: Tensor | VocabularyShard,
    mask: Tensor,
    *,
    beta: float = 0.5,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    impl: str = "auto",
    chunk_bytes: int | None = None,
) -> Tensor:
    """Generalised Jensen-Shannon divergence of a student from a constant teacher, without materialising [N, V].

        jsd = beta · KL(p0 ‖ m) + (1 - beta) · KL(p1 ‖ m),  m = beta · p0 + (1 - beta) · p1

    where p1 and p0 are the softmaxes of the student's and the teacher's (scaled, capped) logits. The limits are

        beta = 0:  KL(p0 ‖ p1) = lim jsd / beta        beta = 1:  KL(p1 ‖ p0) = lim jsd / (1 - beta)

    At 0.5 the divergence is symmetric and at most log 2. It is the objective of generalised knowledge distillation
    (arXiv 2306.13649) and, at 0.5, of MIRROR (arXiv 2610.09795).

    Args:
        hidden_student, hidden_teacher: [N, D] or [B, T, D], floating, final hidden states that predict the *same*
            token in both branches.
        lm_head_weight: as in `linear_token_nll`.
        mask: [N] or [B, T]: bool, True where a row counts; or labels of any integer dtype, where every row counts but
            those with `ignore_index`. Rows that do not count give exactly 0 and get exactly 0 gradient, whatever they
            hold.
        beta: weight of the teacher in the mixture, in [0, 1].
        bias: [V], the hidden states' dtype (under autocast it may differ), or None. A bias of -inf masks a
            token, if there is no softcap.
        ignore_index: see `mask`.
        softcap, logit_scale, impl, chunk_bytes: as in `linear_token_nll`, but logits are always stored a chunk at a
            time.

    Returns:
        float32 (float64 for float64 inputs), mask's shape, in nats. Differentiable in hidden_student, lm_head_weight
        and bias, through the student's logits only: the teacher is a constant.

    Raises:
        ArgumentError, ArgumentTypeError: an argument does not fit; the message names it.
        BackendUnavailableError: `impl` cannot run here.
    """
    options = _operator_options(ignore_index, softcap, logit_scale, impl, chunk_bytes)
    del options["ignore_index"]  # the operator takes a mask
    beta = check_beta(beta)
    check_floating("hidden_teacher", hidden_teacher)
    inputs = check_head_inputs(
        hidden_student,
        hidden_teacher.detach(),
        lm_head_weight,
        mask,
        bias,
        hidden_name="hidden_student",
        other_name="hidden_teacher",
        labels_name="mask",
    )
    options["vocabulary_shard"] = inputs.vocabulary_shard
    counts = inputs.labels.bool() if mask.dtype == torch.bool else inputs.labels != ignore_index
    tensors = (inputs.factual, inputs.counterfactual, inputs.weight, inputs.bias, counts)
    jsd: Tensor = pair_jsd(*tensors, beta=beta, **options)
    return jsd.view(inputs.shape)


def _operator_options(
    ignore_index: int, softcap: float | None, logit_scale: float, impl: str, chunk_bytes: int | None
) -> dict[str, Any]:
    """Return the last arguments of every operator, checked."""
    check_head_options(softcap, logit_scale)
    check_chunk_bytes(chunk_bytes)
    return {
        "ignore_index": check_ignore_index(ignore_index),
        "softcap": softcap,
        "logit_scale": logit_scale,
        "impl": check_impl(impl),
        "chunk_bytes": chunk_bytes,
        "vocabulary_shard": None,  # filled in for a weight whose vocabulary is divided
        "product_dtype": None,  # filled in under autocast
    }


def _check_pair(
    factual: Tensor, counterfactual: Tensor, weight: Tensor | VocabularyShard, labels: Tensor, bias: Tensor | None
) -> HeadInputs:
    check_floating("hidden_counterfactual", counterfactual)
    return check_head_inputs(factual, counterfactual, weight, labels, bias)
