"""`torch.ops.nextquill.token_nll` and `.pair_nll`: per-token likelihoods, differentiable, with any upstream gradient.

Each saves its inputs, and its backward is another operator. `.pair_stats` computes the same forward and divergences,
without a gradient.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nextquill.ops.gradients import HeadGradients, Needs, first_order_only
from nextquill.ops.nll import head_nll, pair_gradients, token_gradients
from nextquill.ops.precision import autocast_off
from nextquill.ops.registration import define, nothing, open_head, results_dtype


def _token_nll(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, ignore_index: int, *options: Any
) -> Tensor:
    """Compute the nll [N]."""
    head = open_head(hidden, weight, bias, *options)
    with autocast_off(hidden.device):
        return head_nll((hidden,), head, labels, ignore_index)[0]


def _token_nll_fake(hidden: Tensor, _weight: Tensor, _bias: Any, labels: Tensor, _: int, *options: Any) -> Any:
    return hidden.new_empty(labels.shape[0], dtype=results_dtype(hidden, options))


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
    head = open_head(hidden, weight, bias, *options)
    wanted = Needs(needs[0], False, *needs[1:])
    with autocast_off(hidden.device):
        grads = token_gradients(grad_nll, hidden, head, labels, ignore_index, wanted)
    dh, _, dw, db = _deliver(grads, hidden, hidden, weight, bias)
    return dh, dw, db


def _token_nll_backward_fake(*arguments: Any) -> Any:
    _, hidden, weight, bias, _, needs, *_ = arguments
    return _fake_gradients((hidden, weight, bias), needs)


def _pair_nll(
    factual: Tensor,
    counterfactual: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    ignore_index: int,
    *options: Any,
) -> tuple[Tensor, ...]:
    """Compute the NLLs of z1, z0 and z1 - z0, each [N]."""
    head = open_head(factual, weight, bias, *options)
    with autocast_off(factual.device):
        nll = head_nll((factual, counterfactual), head, labels, ignore_index)
    return tuple(row.clone() for row in nll)  # an operator's results share no memory


def _pair_nll_fake(*arguments: Any) -> Any:
    factual, _, _, _, labels, _, *options = arguments
    rows = factual.new_empty(labels.shape[0], dtype=results_dtype(factual, options))
    return rows, torch.empty_like(rows), torch.empty_like(rows)


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
    head = open_head(factual, weight, bias, *options)
    upstream, streams = (grad_factual, grad_counterfactual, grad_effect), (factual, counterfactual)
    with autocast_off(factual.device):
        grads = pair_gradients(upstream, streams, head, labels, ignore_index, Needs(*needs))
    return _deliver(grads, factual, counterfactual, weight, bias)


def _pair_nll_backward_fake(*arguments: Any) -> Any:
    *inputs, _, needs = arguments[3:9]
    return _fake_gradients(tuple(inputs), needs)


def _pair_stats(
    factual: Tensor,
    counterfactual: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    ignore_index: int,
    *options: Any,
) -> Tensor:
    head = open_head(factual, weight, bias, *options)
    with autocast_off(factual.device):
        return head_nll((factual, counterfactual), head, labels, ignore_index, divergence=True)


def _pair_stats_fake(*arguments: Any) -> Any:
    factual, _, _, _, labels, _, *options = arguments
    dtype = results_dtype(factual, options)
    return factual.new_empty(5, labels.shape[0], dtype=dtype)


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


def _fake_gradients(inputs: tuple[Tensor | None, ...], needs: list[bool]) -> tuple[Tensor, ...]:
    first = inputs[0]
    assert first is not None
    return tuple(
        tensor.new_empty(tensor.shape) if tensor is not None and need else nothing(first)
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

token_nll.register_fake(_token_nll_fake)
token_nll_backward.register_fake(_token_nll_backward_fake)
pair_nll.register_fake(_pair_nll_fake)
pair_nll_backward.register_fake(_pair_nll_backward_fake)
pair_stats.register_fake(_pair_stats_fake)


def _token_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    del output
    hidden, weight, bias, labels, *ctx.arguments = inputs
    ctx.save_for_backward(hidden, weight, bias, labels)


@first_order_only
def _token_autograd(ctx: Any, grad_nll: Tensor) -> tuple[Any, ...]:
    needs = list(ctx.needs_input_grad[:3])
    grads = token_nll_backward(grad_nll, *ctx.saved_tensors, needs, *ctx.arguments)
    return *_wanted(grads, needs), None, *(None for _ in ctx.arguments)


def _pair_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    del output
    factual, counterfactual, weight, bias, labels, *ctx.arguments = inputs
    ctx.save_for_backward(factual, counterfactual, weight, bias, labels)
    ctx.set_materialize_grads(False)


@first_order_only
def _pair_autograd(ctx: Any, *grad_outputs: Tensor | None) -> tuple[Any, ...]:
    needs = list(ctx.needs_input_grad[:4])
    grads = pair_nll_backward(*grad_outputs, *ctx.saved_tensors, needs, *ctx.arguments)
    return *_wanted(grads, needs), None, *(None for _ in ctx.arguments)


def _wanted(grads: tuple[Tensor, ...], needs: list[bool]) -> tuple[Tensor | None, ...]:
    return tuple(grad if need else None for grad, need in zip(grads, needs, strict=True))


token_nll.register_autograd(_token_autograd, setup_context=_token_setup)
pair_nll.register_autograd(_pair_autograd, setup_context=_pair_setup)
