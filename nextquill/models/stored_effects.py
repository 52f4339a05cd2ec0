"""Token weights from effects that this model or another measured before training: a frozen estimator."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from nextquill.data import EncodedExample
from nextquill.errors import ArgumentError
from nextquill.losses import PairLoss
from nextquill.outputs import PairNLL
from nextquill.storage.fingerprints import fingerprint
from nextquill.weighting import UniformWeighting


def effects_digest(examples: Sequence[EncodedExample]) -> str:
    """A hash of the examples' stored effects, which identifies their file."""
    return fingerprint(each.effects.numpy().tobytes() for each in examples if each.effects is not None)


def check_stored_weighting(loss: PairLoss) -> None:
    """Raise ArgumentError if a loss's weighting reads more than the two stored NLLs, or neither."""
    weighting = loss.objective.weighting
    if type(weighting) is UniformWeighting:
        raise ArgumentError(f"loss: {type(loss).__name__} gives all tokens one weight and cannot use stored effects")
    # By the contract of `nextquill.weighting`, a weighting without the attribute may read `pair.effect`.
    if getattr(weighting, "reads_effect", True):
        raise ArgumentError(
            "loss: expected a weighting with `reads_effect = False` for stored effects, which hold nll_factual and "
            "nll_counterfactual only"
        )


def stored_weights(loss: PairLoss, effects: Tensor, sequence_ids: Tensor) -> Tensor:
    """The weights w = weighting(NLLs) of stored NLLs, with the loss's own weighting.

    Args:
        effects: float32 [2, n], nll_factual and nll_counterfactual in nats.
        sequence_ids: int64 [n]; the rows of a sequence are adjacent.

    Returns:
        float32 [n], without gradient.

    Raises:
        ArgumentError: the weighting did not return one weight for each token.
    """
    whole = loss.objective.elementwise or loss.reduction == "micro_batch" or not effects.shape[1]
    sizes = [effects.shape[1]] if whole else sequence_ids.unique_consecutive(return_counts=True)[1].tolist()
    with torch.no_grad():
        return loss.objective.weights(PairNLL(effects[0], effects[1], None), sizes)
