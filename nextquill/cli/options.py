"""The flags of the command line as dataclasses: one class per subject, shared by the commands that need it."""

from __future__ import annotations

import dataclasses
import inspect
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nextquill.cli.flags import check_positive, option
from nextquill.data import PromptTemplate
from nextquill.errors import ArgumentError, NextQuillError
from nextquill.models import ATTENTIONS
from nextquill.models.loading import PromptSettings, is_adapter
from nextquill.models.tiny_models import SCRATCH_SIZES

if TYPE_CHECKING:
    from nextquill.losses import PairLoss

#: Their classes by the name of each, as importing them imports torch.
LOSSES = {"nextquill": "NextQuillLoss", "perce": "PerCELoss", "longce": "LongCELoss", "sft": "SFTLoss"}


@dataclass
class TrainModelOptions:
    """Which model is trained."""

    model_name_or_path: str = option(
        "A model folder, a name on the Hugging Face hub, or 'tiny' / 'small' to build a model and its tokenizer from "
        "the training text.",
        metavar="MODEL",
    )
    dtype: str = option(
        "Precision of the weights: 'auto' as stored. Training all weights in half precision rounds small updates away; "
        "float32 with --bf16 does not.",
        "auto",
        choices=["auto", "float32", "bfloat16", "float16"],
    )


@dataclass
class ModelOptions:
    """Which model is measured."""

    model_name_or_path: str = option(
        "A model folder, the checkpoint of a run, or a name on the Hugging Face hub.", metavar="MODEL"
    )
    dtype: str = option(
        "Precision the weights are loaded in.", "auto", choices=["auto", "float32", "bfloat16", "float16"]
    )


@dataclass
class TrainFiles:
    """What goes in; --output_dir is TrainingArguments' own."""

    train_file: str = option(
        "Training records, JSONL: user_id, query, history, response and optionally timestamp.", metavar="FILE"
    )
    eval_file: str | None = option("Evaluation records, in the same form.", None, metavar="FILE")
    effects_file: str | None = option(
        "Token weights from the effects in this output of score for the training file, instead of the model's own: a "
        "frozen estimator, which saves the pass without history where only weights need it.", None, metavar="FILE",
    )  # fmt: skip
    overwrite_output_dir: bool = option("Delete the earlier run that the output folder holds.", False)


@dataclass
class PromptOptions:
    """Unset values come from the model folder where nextquill trained it, else from `PromptTemplate` and the model."""

    max_length: int | None = option(
        "Tokens of prompt and response together; the oldest history items that do not fit are dropped.", None
    )
    max_response_length: int | None = option("Tokens of a response; a longer one is an error.", None)
    prompt_order: str | None = option(
        "Query before history, or history before query.", None, choices=["official", "history_first"]
    )
    counterfactual: str | None = option(
        "What stands for no history: 'None' under its heading, the section removed, or another user's history.", None,
        choices=["none", "removal", "placebo"],
    )  # fmt: skip
    newest_first: bool | None = option("List the past texts from the newest to the oldest.", None)
    show_dates: bool | None = option("Put the day above every past text that has a timestamp.", None)
    prompt_jinja: str | None = option(
        "A Jinja template that words the prompt: it gets query, history (items with text, title, timestamp) and "
        "counterfactual. '' returns to the built-in wording.", None, metavar="FILE",
    )  # fmt: skip
    system_prompt: str | None = option("A system message.", None)
    chat: bool | None = option(
        "Force the tokenizer's chat template on or off; left out: used where there is one.", None
    )

    def settings(self, stored: PromptSettings | None, default_length: int, context: int | None) -> PromptSettings:
        """The flags over what the model was trained with over the defaults.

        Args:
            stored: what the model folder says, or None.
            default_length: `max_length` where neither says.
            context: most positions the model has, or None.

        Raises:
            ArgumentError: a length below 1 or beyond the context, a Jinja template that cannot be used, or a flag for
                the built-in wording beside one.
        """
        check_positive(self, ("max_length", "max_response_length"))
        template = self._template(PromptTemplate() if stored is None else stored.template)
        length = self.max_length or (default_length if stored is None else stored.max_length)
        if context is not None and length > context:
            raise ArgumentError(f"--max_length: expected at most the model's context of {context} tokens, got {length}")
        response = self.max_response_length or (None if stored is None else stored.max_response_length)
        return PromptSettings(template, length, response)

    def _template(self, base: PromptTemplate) -> PromptTemplate:
        given: dict[str, Any] = {
            "order": self.prompt_order,
            "counterfactual": self.counterfactual,
            "system": self.system_prompt,
            "chat": self.chat,
            "newest_first": self.newest_first,
            "show_dates": self.show_dates,
        }
        given = {name: value for name, value in given.items() if value is not None}
        if self.prompt_jinja is not None:
            given["prompt_jinja"] = _read_template(self.prompt_jinja) if self.prompt_jinja else None
        try:
            template = dataclasses.replace(base, **given)
        except ArgumentError as error:  # its message begins with the argument's name
            raise ArgumentError(f"--{error}") from error
        for flag in ("prompt_order", "show_dates"):
            if template.prompt_jinja is not None and getattr(self, flag) is not None:
                whose = "--prompt_jinja" if self.prompt_jinja else "the model's own Jinja template"
                raise ArgumentError(f"--{flag}: has no effect beside {whose}, which words the whole prompt")
        return template


def _read_template(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ArgumentError(
            f"--prompt_jinja: cannot read {path}: {getattr(error, 'strerror', None) or 'not UTF-8'}"
        ) from error


@dataclass
class LossOptions:
    """The objective. What is left out has the published value, in brackets."""

    loss: str = option("The training objective.", "nextquill", choices=sorted(LOSSES))
    threshold: float | None = option("nextquill: least probability difference of a personal token (0.05).", None)
    high_weight: float | None = option("nextquill: weight of personal tokens (0.9).", None)
    low_weight: float | None = option("nextquill: weight of the others (0.1).", None)
    alpha: float | None = option("nextquill: factor of the effect term (0.1).", None)
    weighted_effect: bool | None = option("nextquill: the paper's effect term instead of the code's.", None)
    detach_counterfactual: bool | None = option(
        "nextquill: take the no-history pass as a constant. Recommended: cheaper, and effects stay meaningful.", None
    )
    anchor: float | None = option("nextquill: factor of the no-history pass's own nll (0).", None)
    min_weight: float | None = option("perce: least weight (0.8).", None)
    max_weight: float | None = option("perce, longce: greatest weight (5.0).", None)
    reduction: str | None = option(
        "What is averaged: examples, tokens, or the published code's micro-batch.", None,
        choices=["sequence", "token", "micro_batch"],
    )  # fmt: skip
    chunk_bytes: int | None = option("Bytes of logits held at once.", None)
    impl: str | None = option(
        "Kernels that compute the loss (auto: the best for the device).", None,
        choices=["auto", "triton", "native", "torch"],
    )  # fmt: skip

    def build(self) -> PairLoss:
        """The loss these flags describe.

        Raises:
            ArgumentError: a flag that the chosen loss does not have, or a value it refuses.
        """
        from nextquill import losses

        kind: type[PairLoss] = getattr(losses, LOSSES[self.loss])
        given = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "loss"}
        given = {name: value for name, value in given.items() if value is not None}
        known = {*inspect.signature(kind).parameters, "reduction", "chunk_bytes", "impl"}
        for name in given:
            if name not in known:
                raise ArgumentError(f"--{name}: --loss {self.loss} has no such option")
        try:
            return kind(**given)
        except NextQuillError as error:  # its message begins with the argument's name
            raise ArgumentError(f"--{error}") from error


@dataclass
class BatchOptions:
    """How batches are computed: what prompts share runs once, whatever these say; the gradient stays the same."""

    attention: str = option(
        "How rows of shared prefixes are attended (auto: by device), or padded for a row per prompt.", "auto",
        choices=list(ATTENTIONS),
    )  # fmt: skip
    max_tokens: int | None = option(
        "Most tokens of a forward with gradient; a device's batch that takes more is run in several.", None
    )
    examples_per_user: int = option(
        "Examples of a user to keep together in a batch; with --prompt_order history_first they share the history.", 1
    )

    def check(self) -> None:
        """Raise ArgumentError for values that do not fit."""
        check_positive(self, ("max_tokens", "examples_per_user"))
        if self.attention == "padded" and self.max_tokens is not None:
            raise ArgumentError("--max_tokens: expected none with --attention padded, which has no token budget")


@dataclass
class LoraOptions:
    """Adapters."""

    lora_r: int | None = option("Train LoRA adapters of this rank instead of the whole model.", None)
    lora_alpha: int | None = option("Scale of the adapters (2 · lora_r).", None)
    lora_dropout: float = option("Dropout inside the adapters.", 0.0)
    lora_target_modules: list[str] | None = field(
        default=None, metadata={"help": "Names of the modules that get adapters (all linear layers but the head)."}
    )

    def check(self, model_name: str) -> None:
        """Raise ArgumentError for flags that do not go together."""
        if self.lora_r is None:
            for name in ("lora_alpha", "lora_target_modules"):
                if getattr(self, name) is not None:
                    raise ArgumentError(f"--{name}: expected --lora_r with it")
            return
        check_positive(self, ("lora_r", "lora_alpha"))
        if not 0 <= self.lora_dropout < 1:
            raise ArgumentError(f"--lora_dropout: expected a probability below 1, got {self.lora_dropout}")
        if model_name in SCRATCH_SIZES:
            raise ArgumentError(
                f"--lora_r: a new {model_name!r} model has no trained weights to adapt; train it whole, then give its "
                "folder"
            )

    def apply(self, model: Any) -> Any:
        """Wrap the model in adapters where a rank was given."""
        if self.lora_r is None:
            return model
        if is_adapter(model):
            raise ArgumentError("--lora_r: the model has an adapter, which is trained; leave --lora_r out")
        from peft import LoraConfig, get_peft_model

        config = LoraConfig(
            r=self.lora_r,
            lora_alpha=self.lora_alpha or 2 * self.lora_r,
            lora_dropout=self.lora_dropout,
            target_modules=self.lora_target_modules or "all-linear",
            task_type="CAUSAL_LM",
        )
        try:
            return get_peft_model(model, config)
        except ValueError as error:
            raise ArgumentError(f"--lora_target_modules: {error}") from error


@dataclass
class ScoreFiles:
    """What is measured."""

    eval_file: str = option("Records to score, JSONL.", metavar="FILE")
    limit: int | None = option("Only the first so many records.", None)
    batch_size: int | None = option(
        "Records at a time (64, of which rows are packed; 8 padded ones, or generations).", None
    )
    attention: str = option(
        "How branches that share a prefix are attended in one row; padded: a row for each.", "auto",
        choices=list(ATTENTIONS),
    )  # fmt: skip
    max_tokens: int | None = option(
        "Most tokens of a forward, what branches share counted once (16384; 4096 on a CPU).", None
    )
    seed: int = option("Decides whose history serves as placebo; train's default gives its evaluation.", 42)


@dataclass
class ScoreOptions:
    """Where the effects go."""

    output_file: str = option("Where the per-token effects go, JSONL, one record a line.", metavar="FILE")
    overwrite: bool = option("Replace an existing output file.", False)
    show: int = option("Print so many responses, coloured by effect.", 3)
