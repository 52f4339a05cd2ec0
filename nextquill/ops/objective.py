"""A pair loss as coefficients: loss = Σ_i g_f[i] nll_f[i] + g_c[i] nll_c[i] + g_e[i] nll_e[i], or Σ_i g_f[i] jsd[i].

Weights and denominators carry no gradient, so the coefficients are also the upstream gradients of the NLLs. Every
scheme and reduction is an elementwise computation on a few numbers per row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import repeat
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nextquill.errors import ArgumentError
from nextquill.ops.row_groups import RowGroup, RowPlan
from nextquill.outputs import PairNLL
from nextquill.weighting import (
    PUBLISHED_WEIGHTINGS,
    ClipWeighting,
    ExpClipWeighting,
    ThresholdWeighting,
    UniformWeighting,
    Weighting,
)

REDUCTIONS = ("sequence", "token", "micro_batch")


class RowCoefficients(NamedTuple):
    """Numbers per row from which every coefficient of the loss is made; float32 (float64), no unit.

    Attributes:
        weights: [n], the token weights w.
        weighted: [n], w / (Z · items): factor of terms that use the weights.
        uniform: [n], 1 / (n · items): factor of plain means.
    """

    weights: Tensor
    weighted: Tensor
    uniform: Tensor


class RowTerms(NamedTuple):
    """One number per row for each term of the loss, `None` if the loss lacks the term; float32 (float64).

    Attributes:
        factual, counterfactual, effect: [n], for the term with nll_f, nll_c and nll_e.
    """

    factual: Tensor
    counterfactual: Tensor | None
    effect: Tensor | None


@dataclass(frozen=True)
class PairObjective:
    """The weights and terms of a loss, and the denominator of each term.

    With n rows and Z = Σ w if `normalize_weights` else n, per sequence:

        Σ w nll_f / Z  +  alpha · mean(nll_e)  +  anchor · mean(nll_c)

    and alpha · Σ w nll_e / Z for the second term with `weighted_effect`. `reduction="sequence"` averages over
    sequences, "token" divides every sum by the number of supervised tokens instead, and "micro_batch" takes all rows
    as one sequence. With `jsd_beta` the loss is Σ w jsd / Z alone, the divergence of z1 from a constant z0.
    """

    weighting: Weighting
    normalize_weights: bool = False
    alpha: float = 0.0
    weighted_effect: bool = False
    detach_counterfactual: bool = False
    anchor: float = 0.0
    reduction: str = "sequence"
    jsd_beta: float | None = None

    def __post_init__(self) -> None:
        if self.jsd_beta is not None and not (self.detach_counterfactual and self.alpha == self.anchor == 0):
            raise ArgumentError(
                "jsd_beta: expected detach_counterfactual=True, alpha=0 and anchor=0 beside it, got "
                f"detach_counterfactual={self.detach_counterfactual}, alpha={self.alpha}, anchor={self.anchor}"
            )

    @property
    def elementwise(self) -> bool:
        """Whether the weight of a row depends on that row alone."""
        return bool(getattr(self.weighting, "elementwise", False))

    @property
    def needs_whole_sequences(self) -> bool:
        """Whether a row's coefficient depends on other rows of its sequence."""
        return not self.elementwise or (self.normalize_weights and self.reduction != "token")

    def computes_effect(self, *, paired: bool, asked: bool) -> bool:
        """Whether nll_e is computed: there are two streams, and the loss, its weighting or the caller reads it."""
        return paired and (asked or self.alpha > 0 or bool(getattr(self.weighting, "reads_effect", True)))

    @property
    def counterfactual_is_constant(self) -> bool:
        """Whether no gradient flows to the counterfactual."""
        return self.detach_counterfactual or (self.alpha == 0 and self.anchor == 0)

    @property
    def terms_need_counterfactual(self) -> bool:
        """Whether a term, rather than the weighting, reads the counterfactual."""
        return self.alpha > 0 or self.anchor > 0 or self.jsd_beta is not None

    def of_given_weights(self) -> PairObjective:
        """Return this objective for token weights given by the caller: its weighting reads no NLLs."""
        return replace(self, weighting=UniformWeighting())

    def default_items(self, plan: RowPlan) -> int:
        """Count the items of this call that the reduction averages over: sequences, tokens, or one micro-batch."""
        if self.reduction == "sequence":
            return plan.num_sequences
        return plan.num_rows if self.reduction == "token" else 1

    def coefficients(
        self,
        pair: PairNLL,
        group: RowGroup,
        num_items: float | Tensor,
        fused: Callable[..., None] | None = None,
        given: Tensor | None = None,
    ) -> RowCoefficients:
        """Compute the coefficients of a group's n rows; never waits for the device.

        Args:
            pair: NLLs of the rows, each [n], float32 (float64), in nats.
            group: the rows.
            num_items: number of items that the reduction averages over in the whole batch (sequences, tokens or
                micro-batches); a number, or a scalar tensor on the rows' device.
            fused: a kernel that computes the published weightings and their normalisation in one pass over whole
                sequences; without it, elementwise operations do.
            given: weights of the rows [n], floating, in place of the weighting's.
        """
        scheme = None if given is not None or group.sequences is None else _scheme(self.weighting)
        if fused is not None and scheme is not None:
            out = pair.factual.new_empty(3, pair.factual.numel())
            fused(
                pair.factual,
                pair.counterfactual,
                group.offsets,
                **scheme,
                normalize=self.normalize_weights,
                per_token=self.reduction == "token",
                num_items=num_items,
                out=out,
            )
            return RowCoefficients(*out)
        weights = self.weights(pair, () if self.elementwise else group.lengths) if given is None else given
        if self.reduction == "token":
            counts = totals = torch.ones_like(weights)
        else:
            counts = group.plan.row_lengths[group.rows].to(weights.dtype)
            totals = _sequence_sums(weights, group.offsets) if self.normalize_weights else counts
        return RowCoefficients(weights, weights / (totals * num_items), 1.0 / (counts * num_items))

    def gradients(self, coefficients: RowCoefficients) -> RowTerms:
        """Return the upstream gradient of each nll; `None` means zero."""
        return RowTerms(
            coefficients.weighted,
            coefficients.uniform * self.anchor if self.anchor > 0 else None,
            self._effect_factor(coefficients) * self.alpha if self.alpha > 0 else None,
        )

    def terms(self, coefficients: RowCoefficients, pair: PairNLL, jsd: Tensor) -> RowTerms:
        """Return each row's share of each term, before `alpha` and `anchor`; `None` if the term's nll is absent.

        The first is that of `jsd` [n], float32 (float64) in nats, if the loss has `jsd_beta`.
        """
        return RowTerms(
            coefficients.weighted * (pair.factual if self.jsd_beta is None else jsd),
            None if pair.counterfactual is None else coefficients.uniform * pair.counterfactual,
            None if pair.effect is None else self._effect_factor(coefficients) * pair.effect,
        )

    def token_loss(self, terms: RowTerms) -> Tensor:
        """Return each row's share of the loss [n], float32 (float64) in nats, from its shares of the terms."""
        total = terms.factual
        # A term with factor 0 is left out, not multiplied by 0: its nll may be infinite.
        if self.alpha > 0 and terms.effect is not None:
            total = total + self.alpha * terms.effect
        if self.anchor > 0 and terms.counterfactual is not None:
            total = total + self.anchor * terms.counterfactual
        return total

    def _effect_factor(self, coefficients: RowCoefficients) -> Tensor:
        return coefficients.weighted if self.weighted_effect else coefficients.uniform

    def weights(self, pair: PairNLL, lengths: Sequence[int]) -> Tensor:
        """Return the weight of each row, [n] in the dtype of `pair`; ArgumentError if there is no real weight for each.

        A weighting of whole sequences needs their `lengths`.
        """
        if type(self.weighting) not in PUBLISHED_WEIGHTINGS:
            # A caller's function may change its arguments in place, and these NLLs are the engine's memory: copy them.
            pair = PairNLL(*(None if t is None else t.clone() for t in pair))  # type: ignore[arg-type]
        if self.elementwise:
            return _checked_weights(self.weighting(pair), pair)
        streams = [repeat(None) if t is None else t.split(list(lengths)) for t in pair]
        pieces = [PairNLL(*piece) for piece in zip(*streams, strict=False)]
        return torch.cat([_checked_weights(self.weighting(piece), piece) for piece in pieces])


def _scheme(weighting: Weighting) -> dict[str, Any] | None:
    """Return a published weighting as arguments of the fused kernel, or None for a caller's own weighting."""
    # Exact types: a subclass may compute something else.
    if type(weighting) is UniformWeighting:
        return {"scheme": "uniform", "low": 1.0, "high": 1.0, "threshold": 0.0}
    if type(weighting) is ThresholdWeighting:
        return {"scheme": "threshold", **asdict(weighting)}
    if type(weighting) is ClipWeighting:
        return {"scheme": "clip", "low": weighting.minimum, "high": weighting.maximum, "threshold": 0.0}
    if type(weighting) is ExpClipWeighting:
        return {"scheme": "exp_clip", "low": 0.0, "high": weighting.maximum, "threshold": 0.0}
    return None


def _checked_weights(weights: object, pair: PairNLL) -> Tensor:
    """Check that a user's weighting returned one number per row, and not a tensor that broadcasts to the rows."""
    if not isinstance(weights, Tensor) or weights.shape != pair.factual.shape:
        got = list(weights.shape) if isinstance(weights, Tensor) else type(weights).__name__
        raise ArgumentError(f"weighting: expected a tensor of shape {list(pair.factual.shape)}, got {got}")
    if weights.is_complex() or weights.device != pair.factual.device:
        raise ArgumentError(
            f"weighting: expected real weights on {pair.factual.device}, got {weights.dtype} on {weights.device}"
        )
    return weights.detach().to(pair.factual)


def _sequence_sums(weights: Tensor, offsets: Tensor) -> Tensor:
    """Return Σ w over each row's sequence [n]; 1 where it is exactly 0, so that all-zero weights give 0, not 0/0."""
    sizes = offsets.diff()
    # segment_reduce adds each segment in order: no atomics, unlike index_add on CUDA. In float32 a sum of 2,048 weights
    # would be off by 2e-5 of itself, and one of 32,768 by 3e-4.
    sums = torch.segment_reduce(weights.double(), "sum", lengths=sizes, unsafe=True).to(weights.dtype)
    return sums.masked_fill_(sums == 0, 1.0).repeat_interleave(sizes, output_size=weights.numel())
