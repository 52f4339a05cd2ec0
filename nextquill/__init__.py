"""nextquill: causal personalisation training of language models at the cost of plain fine-tuning.

    import nextquill as nq

    loss_fn = nq.PerCELoss()
    loss = loss_fn(hidden_with_history, hidden_without, lm_head.weight, labels)

Its names are imported on first use: the losses and operators with torch alone; `NextQuillTrainer`, `PairPasses`,
`Writer`, `HistoryGuidance` and `prompt_for` with Hugging Face packages. `torch.ops.nextquill` is filled by then, or by
`import nextquill.functional`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from nextquill.errors import (
    ArgumentError,
    ArgumentTypeError,
    BackendUnavailableError,
    BudgetError,
    CheckpointError,
    GradientError,
    NextQuillError,
    NonFiniteError,
    OutputExistsError,
    RecordError,
    UnsupportedModelError,
)
from nextquill.lazy import on_first_use

if TYPE_CHECKING:
    from nextquill import tree
    from nextquill.functional import linear_pair_jsd, linear_pair_nll, linear_pair_stats, linear_token_nll
    from nextquill.generation.guidance import HistoryGuidance
    from nextquill.generation.writer import UserPrompt, Writer, prompt_for
    from nextquill.losses import LongCELoss, NextQuillLoss, PairLoss, PerCELoss, SFTLoss
    from nextquill.mirror.loss import MirrorLoss
    from nextquill.mirror.trainer import MirrorTrainer
    from nextquill.models.branch_passes import PairPasses
    from nextquill.outputs import PairNLL, PairStats, PreferenceLossOutput
    from nextquill.training.trainer import NextQuillTrainer
    from nextquill.vocabulary_shard import VocabularyShard
else:
    __getattr__, __dir__ = on_first_use(
        __name__,
        (
            "outputs",
            "weighting",
            "functional",
            "losses",
            "mirror.loss",
            "tree",
            "models.branch_passes",
            "training.trainer",
            "mirror.trainer",
            "generation.guidance",
            "generation.writer",
        ),
        needs=dict.fromkeys(
            (
                "PairPasses",
                "NextQuillTrainer",
                "MirrorTrainer",
                "HistoryGuidance",
                "UserPrompt",
                "VocabularyShard",
                "Writer",
                "prompt_for",
            ),
            "transformers",
        ),
    )

__version__ = "0.1.0"

__all__ = [
    "ArgumentError",
    "ArgumentTypeError",
    "BackendUnavailableError",
    "BudgetError",
    "CheckpointError",
    "GradientError",
    "HistoryGuidance",
    "LongCELoss",
    "MirrorLoss",
    "MirrorTrainer",
    "NextQuillError",
    "NextQuillLoss",
    "NextQuillTrainer",
    "NonFiniteError",
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
    "UserPrompt",
    "VocabularyShard",
    "Writer",
    "linear_pair_jsd",
    "linear_pair_nll",
    "linear_pair_stats",
    "linear_token_nll",
    "prompt_for",
    "tree",
]
