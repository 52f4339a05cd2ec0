"""`torch.ops.nextquill.token_nll`, `.pair_nll` and `.pair_jsd`: per token, differentiable, with any upstream gradient.

Each saves its inputs, and its backward is another operator. `.pair_stats` computes the forward of `.pair_nll` and
divergences, without a gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from nextquill.ops.gradients import HeadGradients, Needs, first_order_only
from nextquill.ops.jsd import head_jsd, head_jsd_gradients
from nextquill.ops.nll import head_gradients, head_nll
from nextquill.ops.precision import autocast_off
from nextquill.ops.registration import define, nothing, open_head, results_dtype

# Every operator ends with labels (and in a backward `needs`), ignore_index and the head's six options. `pair_jsd` has
# `counts` and `beta` in the place of labels and ignore_index.
_AFTER_LABELS = 7


def _token_nll(hidden: Tensor, *arguments: Any) -> Tensor:
    """Compute the nll [N]."""
    return _nlls((hidden,), *arguments)[0]


def _pair_nll(factual: Tensor, counterfactual: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    """Compute the NLLs of z1, z0 and z1 - z0, each [N]."""
    nlls = _nlls((factual, counterfactual), *arguments)
    return tuple(row.clone() for row in nlls)  # an operator's results share no memory


def _pair_stats(factual: Tensor, counterfactual: Tensor, *arguments: Any) -> Tensor:
    """Compute the three NLLs, the divergence and the entropy: [5, N]."""
    return _nlls((factual, counterfactual), *arguments, divergence=True)


def _nlls(
    streams: tuple[Tensor, ...],
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    ignore_index: int,
    *options: Any,
    divergence: bool = False,
) -> Tensor:
    head = open_head(streams, weight, bias, labels, *options)
    with autocast_off(labels.device):
        return head_nll(streams, head, labels, ignore_index, divergence=divergence)


def _pair_jsd(
    student: Tensor,
    teacher: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    counts: Tensor,
    beta: float,
    *options: Any,
) -> Tensor:
    """Compute the divergence [N]."""
    head = open_head((student, teacher), weight, bias, counts, *options)
    with autocast_off(student.device):
        return head_jsd((student, teacher), head, counts, beta)


def _fake_row(*arguments: Any) -> Tensor:
    """Return the fake result [N] of a forward operator."""
    hidden: Tensor = arguments[0]
    labels: Tensor = arguments[-1 - _AFTER_LABELS]
    return hidden.new_empty(labels.shape[0], dtype=results_dtype(hidden, arguments))


def _token_nll_backward(
    grad_nll: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    needs: list[bool],
    ignore_index: int,
    *options: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    head = open_head((hidden,), weight, bias, labels, *options)
    wanted = Needs(needs[0], False, *needs[1:])
    with autocast_off(hidden.device):
        grads = head_gradients((grad_nll,), (hidden,), head, labels, ignore_index, wanted)
    dh, _, dw, db = _deliver(grads, hidden, hidden, weight, bias)
    return dh, dw, db


def _pair_nll_backward(
    grad_factual: Tensor | None,
    grad_counterfactual: Tensor | None,
    grad_effect: Tensor | None,
    factual: Tensor,
    counterfactual: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    needs: list[bool],
    ignore_index: int,
    *options: Any,
) -> tuple[Tensor, ...]:
    upstream, streams = (grad_factual, grad_counterfactual, grad_effect), (factual, counterfactual)
    head = open_head(streams, weight, bias, labels, *options)
    with autocast_off(factual.device):
        grads = head_gradients(upstream, streams, head, labels, ignore_index, Needs(*needs))
    return _deliver(grads, factual, counterfactual, weight, bias)


def _pair_jsd_backward(
    grad_jsd: Tensor,
    student: Tensor,
    teacher: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    counts: Tensor,
    needs: list[bool],
    beta: float,
    *options: Any,
) -> tuple[Tensor, ...]:
    head = open_head((student, teacher), weight, bias, counts, *options)
    with autocast_off(student.device):
        grads = head_jsd_gradients(grad_jsd, (student, teacher), head, counts, beta, Needs(*needs))
    return _deliver(grads, student, teacher, weight, bias)


def _deliver(
    grads: HeadGradients, factual: Tensor, counterfactual: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, ...]:
    """Return dh1, dh0, dW, db in the dtypes of the inputs."""
    found = (grads.factual, grads.counterfactual, grads.weight, grads.bias)
    likes = (factual, counterfactual, weight, weight if bias is None else bias)
    return tuple(
        nothing(factual) if gradient is None else gradient.to(like.dtype)
        for gradient, like in zip(found, likes, strict=True)
    )


def _fake_gradients(*arguments: Any) -> tuple[Tensor, ...]:
    """Return the fake results of a backward operator."""
    *tensors, _labels, needs = arguments[:-_AFTER_LABELS]
    inputs = tensors[-len(needs) :]
    return tuple(
        tensor.new_empty(tensor.shape) if tensor is not None and need else nothing(inputs[0])
        for tensor, need in zip(inputs, needs, strict=True)
    )


token_nll = define(
    "token_nll",
    _token_nll,
    "Tensor hidden, Tensor weight, Tensor? bias, Tensor labels, int ignore_index",
    "Tensor",
    product=(0, 1),
)
token_nll_backward = define(
    "token_nll_backward",
    _token_nll_backward,
    "Tensor grad_nll, Tensor hidden, Tensor weight, Tensor? bias, Tensor labels, bool[] needs, int ignore_index",
    "(Tensor, Tensor, Tensor)",
)
_PAIR = "Tensor factual, Tensor counterfactual, Tensor weight, Tensor? bias, Tensor labels"
pair_nll = define("pair_nll", _pair_nll, f"{_PAIR}, int ignore_index", "(Tensor, Tensor, Tensor)", product=(0, 1, 2))
pair_nll_backward = define(
    "pair_nll_backward",
    _pair_nll_backward,
    f"Tensor? grad_factual, Tensor? grad_counterfactual, Tensor? grad_effect, {_PAIR}, bool[] needs, int ignore_index",
    "(Tensor, Tensor, Tensor, Tensor)",
)
pair_stats = define("pair_stats", _pair_stats, f"{_PAIR}, int ignore_index", "Tensor", product=(0, 1, 2))
_MIRROR = "Tensor student, Tensor teacher, Tensor weight, Tensor? bias, Tensor counts"
pair_jsd = define("pair_jsd", _pair_jsd, f"{_MIRROR}, float beta", "Tensor", product=(0, 1, 2))
pair_jsd_backward = define(
    "pair_jsd_backward",
    _pair_jsd_backward,
    f"Tensor grad_jsd, {_MIRROR}, bool[] needs, float beta",
    "(Tensor, Tensor, Tensor, Tensor)",
)

token_nll.register_fake(_fake_row)
token_nll_backward.register_fake(_fake_gradients)
pair_nll.register_fake(lambda *arguments: tuple(_fake_row(*arguments) for _ in range(3)))
pair_nll_backward.register_fake(_fake_gradients)
pair_stats.register_fake(lambda *arguments: torch.stack([_fake_row(*arguments)] * 5))
pair_jsd.register_fake(_fake_row)
pair_jsd_backward.register_fake(_fake_gradients)


def _token_setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    del output
    ctx.save_for_backward(*inputs[:-_AFTER_LABELS])
    ctx.arguments = inputs[-_AFTER_LABELS:]


def _pair_setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    _token_setup(ctx, inputs, output)
    ctx.set_materialize_grads(False)


def _autograd(backward: Callable[..., tuple[Tensor, ...]]) -> Callable[..., tuple[Any, ...]]:
    """Return the gradient formula of an operator whose gradients `backward` computes."""

    @first_order_only
    def formula(ctx: Any, *grad_outputs: Tensor | None) -> tuple[Any, ...]:
        *inputs, labels = ctx.saved_tensors
        needs = list(ctx.needs_input_grad[: len(inputs)])
        grads = backward(*grad_outputs, *inputs, labels, needs, *ctx.arguments)
        wanted = (grad if need else None for grad, need in zip(grads, needs, strict=True))
        return *wanted, None, *(None for _ in ctx.arguments)

    return formula


token_nll.register_autograd(_autograd(token_nll_backward), setup_context=_token_setup)
pair_nll.register_autograd(_autograd(pair_nll_backward), setup_context=_pair_setup)
pair_jsd.register_autograd(_autograd(pair_jsd_backward), setup_context=_token_setup)
