"""The flags of `nextquill compare`."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import TrainingArguments

from nextquill.cli.evaluate import Measures, evaluation_options
from nextquill.cli.flags import UsageError, check_positive, option
from nextquill.cli.options import BatchOptions, LossComputation
from nextquill.cli.training_checks import check_arguments
from nextquill.comparison.arms import ARMS, DEFAULT_TIME_REFERENCE
from nextquill.errors import ArgumentError
from nextquill.evaluation.options import EvaluationOptions
from nextquill.losses import SFTLoss

# Flags that a comparison decides itself: the value where it was not given, and the reason.
_NOT_FOR_COMPARISONS: dict[str, tuple[Any, str]] = {
    "seed": (None, "each run has one of --seeds"),
    "data_seed": (None, "each run's seed decides the order"),
    "run_name": (None, "runs are named by arm and seed"),
    "resume_from_checkpoint": (None, "the same command resumes"),
    "load_best_model_at_end": (False, "it would choose each model on the records that it is compared on"),
    "push_to_hub": (False, "the runs would overwrite each other"),
}
#: One seed for every evaluation, so that all arms and seeds have the same placebo and the same draws.
EVALUATION_SEED = 42


@dataclass
class CompareFiles:
    """Data: the records, and the folder of the comparison."""

    OUTPUT_DIR = "Where the comparison is written; must be new, empty, or hold the same comparison."
    train_file: str = option("Training records, JSONL: user_id, query, history, response.", metavar="FILE")
    eval_file: str = option("Records for the evaluation of every arm, in the same form.", metavar="FILE")
    overwrite: bool = option(
        "Delete the earlier comparison that the output folder holds.", False, ["overwrite_output_dir"]
    )


@dataclass
class CompareOptions(LossComputation):
    """Comparison: the losses and how often each is trained."""

    arms: list[str] = option(f"Arms to train: {', '.join(ARMS)}.", list(ARMS), metavar="ARM")
    seeds: list[int] = option(
        "Each arm is trained once per seed, which decides the order and a new model's weights.", [0, 1, 2]
    )
    baseline: str = option("The arm to compare the others with.", "sft", metavar="ARM")
    time_reference: str = option("The arm whose training time sft_time gets.", DEFAULT_TIME_REFERENCE, metavar="ARM")
    save_models: bool = option("Keep every trained model.", False)

    def loss_options(self) -> dict[str, Any]:
        """Arguments of every loss."""
        names = [field.name for field in dataclasses.fields(LossComputation)]
        options = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        SFTLoss(**options)  # refuses bad values before any work
        return options


@dataclass
class CompareEvaluation(Measures):
    """Evaluation: the same for every arm."""

    max_new_tokens: int = option("Most tokens of a generated response.", 128)
    eval_limit: int | None = option("Evaluate only on the first INT records.", None)
    report_examples: int = option("Responses on the page, coloured by effect, from the first seed.", 6)

    def options(self, batches: BatchOptions, batch_size: int) -> EvaluationOptions:
        """These flags as the options of `evaluate_model`."""
        check_positive(self, ("eval_limit",))
        if self.report_examples < 0:
            raise ArgumentError(f"report_examples: expected at least 0, got {self.report_examples}")
        return evaluation_options(
            **vars(self),
            batch_size=batch_size if batches.attention == "padded" else None,
            seed=EVALUATION_SEED,
            attention=batches.attention,
        )


def check_seeds(seeds: Sequence[int]) -> None:
    """Raise ArgumentError unless the seeds are different whole numbers that can seed every library."""
    for seed in seeds:
        if not 0 <= seed < 2**32:
            raise ArgumentError(f"seeds: expected whole numbers from 0 to 4294967295, got {seed}")
        if list(seeds).count(seed) > 1:
            raise ArgumentError(f"seeds: {seed} is given twice")


def check_training(args: TrainingArguments) -> None:
    """Raise UsageError or ArgumentError for training flags that do not fit, or that a comparison decides itself."""
    for name, (unset, reason) in _NOT_FOR_COMPARISONS.items():
        if getattr(args, name) != unset:
            raise UsageError(f"{name}: not for comparisons: {reason}")
    if args.save_strategy == "best":
        raise UsageError("save_strategy: not for comparisons: best would choose by the records of the comparison")
    check_arguments(args, has_eval_file=True)
