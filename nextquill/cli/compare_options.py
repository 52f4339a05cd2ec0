"""The flags of `nextquill compare`: what is compared, on what, and how it is evaluated."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from nextquill.cli.flags import check_positive, option
from nextquill.cli.options import BatchOptions
from nextquill.comparison.arms import ARMS, DEFAULT_TIME_REFERENCE
from nextquill.errors import ArgumentError, NextQuillError
from nextquill.evaluation.options import EvaluationOptions
from nextquill.losses import SFTLoss

#: The placebo, and what else an evaluation draws, are the same for every arm and seed.
EVALUATION_SEED = 42


@dataclass
class CompareFiles:
    """What goes in; --output_dir is TrainingArguments' own."""

    train_file: str = option("Training records, JSONL: user_id, query, history, response.", metavar="FILE")
    eval_file: str = option("Records that every arm is evaluated on, of the same form.", metavar="FILE")
    overwrite_output_dir: bool = option("Delete the earlier comparison that the output folder holds.", False)


@dataclass
class CompareOptions:
    """What is compared."""

    arms: list[str] = field(
        default_factory=lambda: list(ARMS),
        metadata={"help": f"What to train. Of: {', '.join(ARMS)}.", "metavar": "ARM"},
    )
    seeds: list[int] = field(
        default_factory=lambda: [0, 1, 2],
        metadata={"help": "Each arm is trained once from each; a seed decides the order, and a new model's weights."},
    )
    baseline: str = option("The arm that the others are compared with.", "sft", metavar="ARM")
    time_reference: str = option("The arm whose training time sft_time gets.", DEFAULT_TIME_REFERENCE, metavar="ARM")
    save_models: bool = option("Keep every trained model.", False)
    reduction: str | None = option(
        "What every loss averages: examples, tokens, or the published code's micro-batch.", None,
        choices=["sequence", "token", "micro_batch"],
    )  # fmt: skip
    chunk_bytes: int | None = option("Bytes of logits held at once.", None)
    impl: str | None = option("Kernels of the losses.", None, choices=["auto", "triton", "native", "torch"])

    def loss_options(self) -> dict[str, Any]:
        """What every loss is made with.

        Raises:
            ArgumentError: a value that losses refuse.
        """
        given = {"reduction": self.reduction, "chunk_bytes": self.chunk_bytes, "impl": self.impl}
        options = {name: value for name, value in given.items() if value is not None}
        try:
            SFTLoss(**options)
        except NextQuillError as error:  # its message begins with the argument's name
            raise ArgumentError(f"--{error}") from error
        return options


@dataclass
class CompareEvaluation:
    """How every arm is evaluated."""

    task: str = option("A task of nextquill evaluate, which says what generated texts are scored in.", "text")
    metrics: list[str] | None = field(
        default=None, metadata={"help": "Measures of generated texts, instead of the task's.", "metavar": "NAME"}
    )
    generate: bool = option("Generate responses and score them; false: nll's and effects only.", True)
    max_new_tokens: int = option("Bound on a generated response.", 128)
    generate_limit: int | None = option("Generate for only the first so many records.", None)
    eval_limit: int | None = option("Evaluate on only the first so many records.", None)
    item_effects: int = option("Measure what each history item does, for so many records.", 0)
    report_examples: int = option("Responses shown on the page, coloured by effect, for the first seed.", 6)
    level: float = option("Confidence level of the intervals.", 0.95)
    resamples: int = option("Draws of each interval and test.", 2000)

    def options(self, batches: BatchOptions, batch_size: int) -> EvaluationOptions:
        """The same for `evaluate_model`.

        Raises:
            ArgumentError: a value that does not fit.
        """
        check_positive(self, ("eval_limit",))
        if self.report_examples < 0:
            raise ArgumentError(f"--report_examples: expected at least 0, got {self.report_examples}")
        try:
            return EvaluationOptions(
                task=self.task,
                metrics=None if self.metrics is None else tuple(self.metrics),
                generate_branches=("factual",) if self.generate else (),
                max_new_tokens=self.max_new_tokens,
                batch_size=batch_size if batches.attention == "padded" else None,
                generate_limit=self.generate_limit,
                item_effects=self.item_effects,
                seed=EVALUATION_SEED,
                resamples=self.resamples,
                level=self.level,
                attention=batches.attention,
            )
        except NextQuillError as error:
            raise ArgumentError(f"--{error}") from error
