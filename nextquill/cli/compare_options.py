"""The flags of `nextquill compare`: arms, data and evaluation."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from nextquill.cli.flags import check_positive, option
from nextquill.cli.options import BatchOptions
from nextquill.comparison.arms import ARMS, DEFAULT_TIME_REFERENCE
from nextquill.errors import ArgumentError
from nextquill.evaluation.options import EvaluationOptions
from nextquill.losses import SFTLoss

#: One seed for every evaluation, so that all arms and seeds have the same placebo and the same draws.
EVALUATION_SEED = 42


@dataclass
class CompareFiles:
    """Data: the records, and the folder of the comparison."""

    OUTPUT_DIR = "Where the comparison is written; must be new, empty, or hold the same comparison."
    train_file: str = option("Training records, JSONL: user_id, query, history, response.", metavar="FILE")
    eval_file: str = option("Records for the evaluation of every arm, in the same form.", metavar="FILE")
    overwrite_output_dir: bool = option("Delete the earlier comparison that the output folder holds.", False)


@dataclass
class CompareOptions:
    """Comparison: the losses and how often each is trained."""

    arms: list[str] = field(
        default_factory=lambda: list(ARMS),
        metadata={"help": f"Arms to train: {', '.join(ARMS)}.", "metavar": "ARM"},
    )
    seeds: list[int] = field(
        default_factory=lambda: [0, 1, 2],
        metadata={"help": "Each arm is trained once per seed, which decides the order and a new model's weights."},
    )
    baseline: str = option("The arm to compare the others with.", "sft", metavar="ARM")
    time_reference: str = option(
        "The arm whose training time sft_time is given.", DEFAULT_TIME_REFERENCE, metavar="ARM"
    )
    save_models: bool = option("Keep every trained model.", False)
    reduction: str | None = option(
        "Average over examples, over tokens, or as the published code over a micro-batch.", None,
        choices=["sequence", "token", "micro_batch"],
    )  # fmt: skip
    chunk_bytes: int | None = option("Bytes of logits held at once.", None)
    impl: str | None = option("Kernels that compute the losses.", None, choices=["auto", "triton", "native", "torch"])

    def loss_options(self) -> dict[str, Any]:
        """Arguments of every loss.

        Raises:
            ArgumentError: a value that losses refuse.
        """
        given = {"reduction": self.reduction, "chunk_bytes": self.chunk_bytes, "impl": self.impl}
        options = {name: value for name, value in given.items() if value is not None}
        SFTLoss(**options)  # refuses bad values before any work
        return options


@dataclass
class CompareEvaluation:
    """Evaluation: the same for every arm."""

    task: str = option("A task of nextquill evaluate, which decides the measures of generated texts.", "text")
    metrics: list[str] | None = field(
        default=None, metadata={"help": "Measures of generated texts, instead of the task's.", "metavar": "NAME"}
    )
    generate: bool = option("Generate responses and score them; false: only NLLs and effects.", True)
    max_new_tokens: int = option("Most tokens of a generated response.", 128)
    generate_limit: int | None = option("Generate only for this many records, the first ones.", None)
    eval_limit: int | None = option("Evaluate only on this many records, the first ones.", None)
    item_effects: int = option("Records for which the effect of each history item is measured.", 0)
    report_examples: int = option("Responses on the page, coloured by effect, from the first seed.", 6)
    level: float = option("Confidence level of the intervals.", 0.95)
    resamples: int = option("Resamples of each interval and test.", 2000)

    def options(self, batches: BatchOptions, batch_size: int) -> EvaluationOptions:
        """These flags as the options of `evaluate_model`.

        Raises:
            ArgumentError: a value that does not fit.
        """
        check_positive(self, ("eval_limit",))
        if self.report_examples < 0:
            raise ArgumentError(f"report_examples: expected at least 0, got {self.report_examples}")
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
