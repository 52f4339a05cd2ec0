"""The flags of the command line as dataclasses: one class per subject, shared by the commands that need it."""

from __future__ import annotations

import dataclasses
import inspect
from dataclasses import dataclass, field
from typing import Any

from nextquill.data import PromptTemplate
from nextquill.errors import ArgumentError
from nextquill.integrations.loading import PromptSettings
from nextquill.losses import LongCELoss, NextQuillLoss, PairLoss, PerCELoss, SFTLoss

LOSSES: dict[str, type[PairLoss]] = {
    "nextquill": NextQuillLoss,
    "perce": PerCELoss,
    "longce": LongCELoss,
    "sft": SFTLoss,
}
#: Lengths of prompt and response for a new model, whose context is larger than a CPU wants to pay for.
SCRATCH_MAX_LENGTH = 1024


def option(help: str, default: Any = dataclasses.MISSING, **metadata: Any) -> Any:
    return field(default=default, metadata={"help": help, **metadata})


@dataclass
class ModelOptions:
    model_name_or_path: str = option(
        "A model folder, a name on the Hugging Face hub, or 'tiny' / 'small' to build a model and its tokenizer from the "
        "training text."
    )
    dtype: str = option(
        "Precision the weights are loaded in.", "auto", choices=["auto", "float32", "bfloat16", "float16"]
    )


@dataclass
class TrainFiles:
    train_file: str = option("Training records, JSONL: user_id, query, history, response and optionally timestamp.")
    eval_file: str | None = option("Evaluation records, in the same form.", None)
    overwrite_output_dir: bool = option("Delete what an output folder of an earlier run holds.", False)


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
        "The prompt without history: 'None' under its heading, or the section removed.", None,
        choices=["none", "removal"],
    )  # fmt: skip
    system_prompt: str | None = option("A system message.", None)
    chat: bool | None = option("Force the tokenizer's chat template on or off; by default used where there is one.", None)

    def settings(self, stored: PromptSettings | None, default_length: int) -> PromptSettings:
        template = PromptTemplate() if stored is None else stored.template
        given = {
            "order": self.prompt_order,
            "counterfactual": self.counterfactual,
            "system": self.system_prompt,
            "chat": self.chat,
        }
        template = dataclasses.replace(template, **{k: v for k, v in given.items() if v is not None})
        length = self.max_length or (default_length if stored is None else stored.max_length)
        response = self.max_response_length or (None if stored is None else stored.max_response_length)
        return PromptSettings(template, length, response)


@dataclass
class LossOptions:
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

    def build(self) -> PairLoss:
        """The loss these flags describe.

        Raises:
            ArgumentError: a flag that the chosen loss does not have, or a value it refuses.
        """
        kind = LOSSES[self.loss]
        given = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "loss"}
        given = {name: value for name, value in given.items() if value is not None}
        known = {*inspect.signature(kind).parameters, "reduction", "chunk_bytes"}
        for name in given:
            if name not in known:
                raise ArgumentError(f"--{name}: --loss {self.loss} has no such option")
        return kind(**given)


@dataclass
class LoraOptions:
    lora_r: int | None = option("Train LoRA adapters of this rank instead of the whole model.", None)
    lora_alpha: int | None = option("Scale of the adapters (2 · lora_r).", None)
    lora_dropout: float = option("Dropout inside the adapters.", 0.0)
    lora_target_modules: list[str] | None = option(
        "Names of the modules that get adapters (all linear layers but the head).", None
    )

    def apply(self, model: Any) -> Any:
        """Wrap the model in adapters where a rank was given."""
        if self.lora_r is None:
            return model
        if self.lora_r < 1:
            raise ArgumentError(f"--lora_r: expected a positive rank, got {self.lora_r}")
        from peft import LoraConfig, get_peft_model

        targets = self.lora_target_modules or "all-linear"
        config = LoraConfig(
            r=self.lora_r,
            lora_alpha=self.lora_alpha or 2 * self.lora_r,
            lora_dropout=self.lora_dropout,
            target_modules=targets,
            task_type="CAUSAL_LM",
        )
        return get_peft_model(model, config)


@dataclass
class ScoreFiles:
    eval_file: str = option("Records to score, JSONL.")
    limit: int | None = option("Only the first so many records.", None)
    batch_size: int = option("Records at a time.", 8)
    seed: int = option("Decides whose history serves as placebo.", 0)


@dataclass
class EvaluateOptions:
    output_file: str | None = option("Also write the metrics here, as JSON.", None)
    generate: bool = option("Generate responses greedily and report ROUGE-L.", True)
    max_new_tokens: int = option("Bound on a generated response.", 128)
    generate_limit: int | None = option("Generate for only the first so many records.", None)


@dataclass
class ScoreOptions:
    output_file: str = option("Where the per-token effects go, JSONL, one record a line.")
    show: int = option("Print so many responses, coloured by effect.", 3)
    overwrite: bool = option("Replace an existing output file.", False)


@dataclass
class DemoOptions:
    output_dir: str = option("Where the picture, the page and the figures go.", "demo")
    seed: int = option("Users, models and data order follow from it.", 0)
    quick: bool = option("A few seconds' run that shows the machinery, not the result.", False)
