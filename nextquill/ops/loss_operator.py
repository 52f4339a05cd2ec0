"""`torch.ops.nextquill.pair_loss`: a whole loss as one operator that returns the loss and its finished gradients.

Its backward scales them by the loss's upstream gradient. The objective is passed as text. Only `needs` decides which
results are returned: compiled graphs are cached by their arguments, across processes too, and must not depend on
anything else.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nextquill.ops.fused_loss import NUM_ROWS, PairLossEngine
from nextquill.ops.gradients import Needs, first_order_only, rows_dtype
from nextquill.ops.objective_spec import decode
from nextquill.ops.precision import autocast_off
from nextquill.ops.registration import define, nothing, open_head, results_dtype
from nextquill.ops.row_groups import plan_rows
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
    *options: Any,
) -> tuple[Tensor, ...]:
    """Compute the loss, and the gradients that `needs` asks for.

    Args:
        factual, counterfactual: hidden states [N, D], floating.
        weight, bias: [V, D] and [V], floating.
        labels, sequence_ids: [N], int64.
        num_items: float64 scalar, number of items that the reduction averages over; by default those of this call.
        token_weights: [N], floating, in place of the objective's weighting.
        objective: a `PairObjective` as text, see `objective_spec`.
        effect: compute nll_e even if the loss does not read it.
        needs: which of dh1, dh0, dW and db are wanted.
        options: options of the head, see `open_head`.

    Returns:
        loss (scalar); rows [7, N] for `unpack_rows`, 0 where ignored; the numbers of supervised tokens and sequences,
        int64 [2] on the host; dh1, dh0 [N, D], dW [V, D], db [V], each an empty vector if it is not wanted.
    """
    found = decode(objective)
    if token_weights is not None:
        found, token_weights = found.of_given_weights(), token_weights.to(results_dtype(factual, options))
    streams = (factual,) if counterfactual is None else (factual, counterfactual)
    head = open_head(streams, weight, bias, labels, *options)
    plan = plan_rows(labels, sequence_ids, ignore_index, head.num_labels, token_weights)
    with autocast_off(factual.device):
        # No variable holds the engine, so that its logits are freed after this statement.
        loss, compact, grads = PairLossEngine(
            factual,
            counterfactual,
            head,
            found,
            plan,
            num_items=_items(num_items, found.default_items(plan)),
            needs=Needs(*needs),
            effect=found.computes_effect(paired=counterfactual is not None, asked=effect),
            token_weights=None if token_weights is None else token_weights[plan.rows],
        ).run()
    rows = compact.new_zeros(NUM_ROWS, labels.numel()).index_copy_(1, plan.rows, compact)
    counts = torch.tensor([plan.num_rows, plan.num_sequences])
    if needs[1] and counterfactual is not None and grads.counterfactual is None:
        # The counterfactual is a constant of this objective. Return zeros, as `_pair_loss_fake` promises.
        grads.counterfactual = torch.zeros(counterfactual.shape, dtype=rows_dtype(counterfactual), device=loss.device)
    kept = (grads.factual, grads.counterfactual, grads.weight, grads.bias)
    return loss, rows, counts, *(nothing(loss) if gradient is None else gradient for gradient in kept)


def _pair_loss_fake(*arguments: Any) -> tuple[Tensor, ...]:
    factual, counterfactual, weight, bias, labels, _, _, _, _, _, needs, _, *options = arguments
    wide = results_dtype(factual, options)
    loss = factual.new_empty((), dtype=wide)
    kept = (
        nothing(loss)
        if like is None or not need
        else like.new_empty(like.shape, dtype=rows_dtype(like) if stream else wide)
        for like, need, stream in zip((factual, counterfactual, weight, bias), needs, (1, 1, 0, 0), strict=True)
    )
    counts = torch.zeros(2, dtype=torch.long, device="cpu")
    return loss, loss.new_empty(NUM_ROWS, labels.shape[0]), counts, *kept


def _items(given: Tensor | None, default: int) -> float | Tensor:
    """Return the number that the reduction divides by; a tensor on an accelerator stays there, unread."""
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
            # A gradient that is not wanted is an empty vector.
            if ctx.needs_input_grad[index] and gradient.dim() + gradient.numel() > 1:
                grads[index] = scale_gradient(gradient, grad_loss, dtype)
    return tuple(grads)


def _scale_gradient(gradient: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Return gradient · scale in `dtype`, in one pass; not in place, so that backward can run twice on a graph."""
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
