"""nextquill: causal personalisation training of language models at the cost of plain fine-tuning.

    import nextquill as nq

    loss_fn = nq.NextQuillLoss(detach_counterfactual=True)
    loss = loss_fn(hidden_with_history, hidden_without, lm_head.weight, labels)

Importing this package needs torch only. What needs Hugging Face packages (`NextQuillTrainer`, `PairPasses`) is
imported on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from nextquill import tree
from nextquill.errors import (
    ArgumentError,
    ArgumentTypeError,
    BackendUnavailableError,
    BudgetError,
    CheckpointError,
    GradientError,
    NextQuillError,
    OutputExistsError,
    RecordError,
    UnsupportedModelError,
)
from nextquill.functional import linear_pair_nll, linear_pair_stats, linear_token_nll
from nextquill.losses import LongCELoss, NextQuillLoss, PairLoss, PerCELoss, SFTLoss
from nextquill.outputs import PairNLL, PairStats, PreferenceLossOutput

if TYPE_CHECKING:
    from nextquill.integrations.passes import PairPasses
    from nextquill.integrations.trainer import NextQuillTrainer

__version__ = "0.1.0"

__all__ = [
    "ArgumentError",
    "ArgumentTypeError",
    "BackendUnavailableError",
    "BudgetError",
    "CheckpointError",
    "GradientError",
    "LongCELoss",
    "NextQuillError",
    "NextQuillLoss",
    "NextQuillTrainer",
    "OutputExistsError",
    "PairLoss",
    "PairNLL",
    "PairPasses",
    "PairStats",
    "PerCELoss",
    "PreferenceLossOutput",
    "RecordError",
    "SFTLoss",
    "UnsupportedModelError",
    "linear_pair_nll",
    "linear_pair_stats",
    "linear_token_nll",
    "tree",
]

_LAZY = {
    "NextQuillTrainer": "nextquill.integrations.trainer",
    "PairPasses": "nextquill.integrations.passes",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
