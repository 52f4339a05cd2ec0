"""Token weights from per-token likelihoods: the published schemes, and the contract for your own.

A weighting is any callable that takes a `PairNLL` of tensors [n] and returns weights [n], floating. It runs
without gradient. Unless it declares `elementwise = True` it is called with the supervised rows of exactly one sequence
(of the whole micro-batch under `reduction="micro_batch"`), so a result never depends on how a batch was split. With
`reads_effect = False` it promises not to read `pair.effect`, which is then None if the loss has no effect term.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from nextquill.errors import ArgumentError, ArgumentTypeError
from nextquill.outputs import PairNLL

Weighting = Callable[[PairNLL], Tensor]


def check_number(name: str, value: object, *, low: float | None = None, above: float | None = None) -> float:
    """Return `value` as a finite float of at least `low` (or above `above`), or raise naming the argument."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ArgumentTypeError(f"{name}: expected a number, got {type(value).__name__} {value!r}")
    # A comparison rather than math.isfinite, which torch.compile cannot trace.
    if not abs(value) < math.inf:
        raise ArgumentError(f"{name}: expected a finite number, got {value!r}")
    if low is not None and value < low:
        raise ArgumentError(f"{name}: expected at least {low:g}, got {value!r}")
    if above is not None and value <= above:
        raise ArgumentError(f"{name}: expected a number above {above:g}, got {value!r}")
    return float(value)


@dataclass(frozen=True)
class UniformWeighting:
    """Weight 1 on every token: plain supervised fine-tuning.

    Called with a pair of NLLs [n], it returns weights [n] in their dtype.
    """

    elementwise: ClassVar[bool] = True
    reads_effect: ClassVar[bool] = False

    def __call__(self, pair: PairNLL) -> Tensor:
        return torch.ones_like(pair.factual)


@dataclass(frozen=True)
class ThresholdWeighting:
    """`high` where effect_prob > threshold, else `low` (NextQuill, arXiv 2506.02368).

    Called with a pair of NLLs [n], it returns weights [n] in their dtype.
    """

    threshold: float = 0.05
    high: float = 0.9
    low: float = 0.1
    elementwise: ClassVar[bool] = True
    reads_effect: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_number("threshold", self.threshold)
        check_number("high_weight", self.high, low=0.0)
        check_number("low_weight", self.low, low=0.0)
        if self.low > self.high:
            raise ArgumentError(f"low_weight: expected at most high_weight={self.high!r}, got {self.low!r}")
        if self.high == 0:
            raise ArgumentError("high_weight: expected a positive weight, got 0: every token would weigh nothing")

    def __call__(self, pair: PairNLL) -> Tensor:
        effect = pair.effect_prob
        # masked_fill rather than torch.where of two Python floats, which would round the weights to float32.
        weights = torch.full_like(effect, self.low).masked_fill_(effect > self.threshold, self.high)
        # NaN compares as "not above": without this line a broken counterfactual would leave the loss finite.
        return weights.masked_fill_(effect.isnan(), torch.nan)


@dataclass(frozen=True)
class ClipWeighting:
    """clip(effect_logprob, minimum, maximum) (PerCE, arXiv 2603.06595).

    Called with a pair of NLLs [n] in nats, it returns weights [n] in their dtype.
    """

    minimum: float = 0.8
    maximum: float = 5.0
    elementwise: ClassVar[bool] = True
    reads_effect: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_number("min_weight", self.minimum, low=0.0)
        check_number("max_weight", self.maximum, above=0.0)
        if self.minimum > self.maximum:
            raise ArgumentError(f"min_weight: expected at most max_weight={self.maximum!r}, got {self.minimum!r}")

    def __call__(self, pair: PairNLL) -> Tensor:
        return pair.effect_logprob.clamp(self.minimum, self.maximum)


@dataclass(frozen=True)
class ExpClipWeighting:
    """min(exp(effect_logprob), maximum) (LongCE, arXiv 2410.23771).

    Called with a pair of NLLs [n] in nats, it returns weights [n] in their dtype.
    """

    maximum: float = 5.0
    elementwise: ClassVar[bool] = True
    reads_effect: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_number("max_weight", self.maximum, above=0.0)

    def __call__(self, pair: PairNLL) -> Tensor:
        return pair.effect_logprob.exp().clamp(max=self.maximum)


#: The schemes of the papers: the fused kernels compute them, and `objective_spec` writes them as text.
PUBLISHED_WEIGHTINGS = (UniformWeighting, ThresholdWeighting, ClipWeighting, ExpClipWeighting)
