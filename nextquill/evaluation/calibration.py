"""Measures how sure a model is of each response token, and how likely the response is at other temperatures.

    confidence = max_v p(v)        top1: p(y) = max_v p(v)        nll_T = -log softmax(z / T)[y]

Computed in plain torch from the hidden states that scoring has anyway, some rows at a time.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from nextquill.errors import UnsupportedModelError
from nextquill.evaluation.token_measures import TEMPERATURES
from nextquill.losses import PairLoss
from nextquill.models.head import HeadState
from nextquill.vocabulary_shard import VocabularyShard, own_part

# Two float32 buffers of logits are held at a time, together at most about this large.
_LOGIT_BYTES = 128 * 2**20
# Rows of the weight that are widened to float32 at a time; a 16-bit head would otherwise be held twice more.
_WEIGHT_ROWS = 4096


class Calibration(NamedTuple):
    """Predictions of n tokens.

    Attributes:
        top1: bool [n], whether no token is more likely than the label.
        confidence: float32 (float64 for a model in float64) [n], the probability of the most likely token.
        nll_by_temperature: float32 (float64) [n, temperatures], nats, in the order of `TEMPERATURES`.
    """

    top1: Tensor
    confidence: Tensor
    nll_by_temperature: Tensor


def calibration(rows: Tensor, state: HeadState, labels: Tensor, loss: PairLoss) -> Calibration:
    """The calibration of the tokens that `rows` predict.

    Args:
        rows: [n, D], final hidden states.
        state: the head.
        labels: int64 [n].
        loss: has the model's softcap and logit_scale.
    """
    if isinstance(state.weight, VocabularyShard):
        raise UnsupportedModelError(
            "calibration: expected the whole vocabulary on each process, got one part of it; evaluate without tensor "
            "parallelism"
        )
    step = max(1, _LOGIT_BYTES // (2 * 4 * len(state.weight)))
    with torch.autocast(rows.device.type, enabled=False):
        parts = [_of_chunk(*pair, state, loss) for pair in zip(rows.split(step), labels.split(step), strict=True)]
    return Calibration(*map(torch.cat, zip(*parts, strict=True)))


def _of_chunk(rows: Tensor, labels: Tensor, state: HeadState, loss: PairLoss) -> Calibration:
    own = own_part(state.weight)
    logits = rows.new_empty(len(rows), len(own), dtype=torch.promote_types(rows.dtype, torch.float32))
    wide = rows.to(logits.dtype)
    for out, weight in zip(logits.split(_WEIGHT_ROWS, 1), own.split(_WEIGHT_ROWS), strict=True):
        torch.mm(wide, weight.to(logits.dtype).T, out=out)
    if state.bias is not None:
        logits += state.bias.to(logits.dtype)
    logits *= loss.logit_scale
    if loss.softcap is not None:
        logits.div_(loss.softcap).tanh_().mul_(loss.softcap)
    logits -= logits.amax(1, keepdim=True)
    label, buffer = logits.gather(1, labels[:, None])[:, 0], torch.empty_like(logits)
    nlls = [torch.div(logits, t, out=buffer).exp_().sum(1).log_().sub_(label / t) for t in TEMPERATURES]
    confidence = torch.exp(logits, out=buffer).sum(1).reciprocal_()
    return Calibration(label >= 0, confidence, torch.stack(nlls, 1))
