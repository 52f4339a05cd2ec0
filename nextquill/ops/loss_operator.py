"""`torch.ops.nextquill.pair_loss`: a whole loss as one operator that returns its finished gradients beside it.

Its backward scales them by the loss's upstream gradient. The objective travels as text. Which results there are is said
by `needs` alone: compiled graphs are cached by their arguments, across processes too, and must not depend on more.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nextquill.ops.fused_loss import LossCall, pair_loss
from nextquill.ops.gradients import Needs, first_order_only, rows_dtype
from nextquill.ops.objective_spec import decode
from nextquill.ops.precision import autocast_off
from nextquill.ops.registration import HeadOptions, define, nothing
from nextquill.ops.row_groups import plan_rows
from nextquill.reference.linear import compute_dtype
from nextquill.weighting import check_number


def _pair_loss(
    factual: Tensor,
    counterfactual: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    sequence_ids: Tensor | None,
    num_items: Tensor | None,
    token_weights: Tensor | None,
    objective: str,
    effect: bool,
    needs: list[bool],
    ignore_index: int,
    *rest: Any,
) -> tuple[Tensor, ...]:
    """loss, rows [6, N] (fused_loss.RowResults), (tokens, sequences) on the host, dh1, dh0, dW, db."""
    options = HeadOptions(*rest)
    head_call, found = options.call(factual), decode(objective)
    if token_weights is not None:
        found, token_weights = found.of_given_weights(), token_weights.to(compute_dtype(options.dtype(factual)))
    plan = plan_rows(labels, sequence_ids, ignore_index, weight.shape[0], token_weights)
    items = _items(num_items, found.default_items(plan))
    effect = counterfactual is not None and (effect or found.needs_effect)
    with autocast_off(factual.device):
        head = head_call.head(weight, bias, options.dtype(factual))
        given = None if token_weights is None else token_weights[plan.rows]
        call = LossCall(head_call, found, plan, items, Needs(*needs), effect, given)
        loss, compact, grads = pair_loss(call, head, factual, counterfactual)
    rows = compact.new_zeros(6, labels.numel()).index_copy_(1, plan.rows, compact)
    counts = torch.tensor([plan.num_rows, plan.num_sequences])
    if needs[1] and counterfactual is not None and grads.counterfactual is None:
        # The objective makes it a constant. What is asked for is returned all the same, as the fake result says.
        grads.counterfactual = torch.zeros(counterfactual.shape, dtype=rows_dtype(counterfactual), device=loss.device)
    kept = (grads.factual, grads.counterfactual, grads.weight, grads.bias)
    return loss, rows, counts, *(nothing(loss) if gradient is None else gradient for gradient in kept)


def _pair_loss_fake(*arguments: Any) -> tuple[Tensor, ...]:
    factual, counterfactual, weight, bias, labels, _, _, _, _, _, needs, _, *rest = arguments
    wide = compute_dtype(HeadOptions(*rest).dtype(factual))
    loss = factual.new_empty((), dtype=wide)
    kept = (
        nothing(loss)
        if like is None or not need
        else like.new_empty(like.shape, dtype=rows_dtype(like) if stream else wide)
        for like, need, stream in zip((factual, counterfactual, weight, bias), needs, (1, 1, 0, 0), strict=True)
    )
    counts = torch.zeros(2, dtype=torch.long, device="cpu")
    return loss, loss.new_empty(6, labels.shape[0]), counts, *kept


def _items(given: Tensor | None, default: int) -> float | Tensor:
    """What the reduction divides by; a number on an accelerator is left there, unread."""
    if given is None:
        return float(max(1, default))
    if given.device.type != "cpu":
        return given
    return check_number("num_items_in_batch", given.item(), above=0.0)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.num_inputs = len(inputs)
    ctx.dtypes = [None if tensor is None else tensor.dtype for tensor in inputs[:4]]
    ctx.save_for_backward(*output[3:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


@first_order_only
def _autograd(ctx: Any, grad_loss: Tensor | None, *_: Any) -> tuple[Any, ...]:
    grads: list[Tensor | None] = [None] * ctx.num_inputs
    if grad_loss is not None:
        for index, (gradient, dtype) in enumerate(zip(ctx.saved_tensors, ctx.dtypes, strict=True)):
            # An unwanted gradient, and one that the objective makes constant, is an empty vector.
            if ctx.needs_input_grad[index] and gradient.dim() + gradient.numel() > 1:
                grads[index] = scale_gradient(gradient, grad_loss, dtype)
    return tuple(grads)


def _scale_gradient(gradient: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """gradient · scale in `dtype`, in one pass and never in place, so that a graph can be walked twice."""
    return torch.mul(gradient, scale, out=torch.empty_like(gradient, dtype=dtype))


pair_loss_operator = define(
    "pair_loss",
    _pair_loss,
    "Tensor factual, Tensor? counterfactual, Tensor weight, Tensor? bias, Tensor labels, Tensor? sequence_ids, "
    "Tensor? num_items, Tensor? token_weights, str objective, bool effect, bool[] needs, int ignore_index",
    "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    product=(0, 1, 2),
)
scale_gradient = torch.library.custom_op(
    "nextquill::scale_gradient",
    _scale_gradient,
    mutates_args=(),
    schema="(Tensor gradient, Tensor scale, ScalarType dtype) -> Tensor",
)
pair_loss_operator.register_fake(_pair_loss_fake)
pair_loss_operator.register_autograd(_autograd, setup_context=_setup)
scale_gradient.register_fake(lambda gradient, scale, dtype: torch.empty_like(gradient, dtype=dtype))
