"""The flags of the command line as dataclasses: one class per subject, shared by the commands that need it."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from nextquill.cli.flags import check_positive, dry_run_option, option
from nextquill.cli.terminal import say
from nextquill.data import PromptTemplate
from nextquill.data.templates import BRANCHES
from nextquill.errors import ArgumentError, naming
from nextquill.generation import PLAUSIBILITY
from nextquill.mirror.settings import MirrorSettings
from nextquill.models import ATTENTIONS
from nextquill.models.configs import is_adapter
from nextquill.models.loading import PROMPT_FILE, Loading, PromptSettings, load_prompt_settings
from nextquill.models.tiny_models import is_new
from nextquill.storage.input_files import MIB, read_input

if TYPE_CHECKING:
    from nextquill.losses import PairLoss
    from nextquill.training.finite import FiniteGuard

PRECISIONS = ["auto", "float32", "bfloat16", "float16"]
#: The arms of compare without its controls, the default of train first. Their classes would import torch.
LOSSES = ("perce", "nextquill_detached", "nextquill", "nextquill_paper", "longce", "sft")
#: The losses of responses that the model samples itself, which train adds, with the arguments that define them.
MIRROR_LOSSES: dict[str, dict[str, Any]] = {"mirror": {"alpha": 0.0}, "mirror_f": {}}


def attention_option() -> Any:
    """The field of --attention, which several commands have."""
    help = "Attention over prompts that share a prefix (auto: by device); padded: a row per prompt."
    return option(help, "auto", choices=list(ATTENTIONS))


@dataclass
class SavedModelOptions:
    """Model: one that was saved, whatever revision it has."""

    model: str = option(
        "A model folder, the checkpoint of a run, a .gguf file, or a name on the Hugging Face hub.",
        aliases=["model_name_or_path"], metavar="MODEL",
    )  # fmt: skip
    dtype: str = option("Precision the weights are loaded in.", "auto", choices=PRECISIONS)
    attn_implementation: str | None = option(
        "The model's own attention, such as eager, sdpa or flash_attention_2; passes that share prefixes replace it.",
        None, metavar="NAME",
    )  # fmt: skip
    load_in_4bit: bool = option("Quantise the weights to 4 bits (NF4), with bitsandbytes.", False)
    load_in_8bit: bool = option("Quantise the weights to 8 bits, with bitsandbytes.", False)

    def loading(self) -> dict[str, Any]:
        """The arguments of `load_model` except the name."""
        return {field.name: getattr(self, field.name, None) for field in dataclasses.fields(Loading)}

    def check(self) -> None:
        """Raise ArgumentError for flags that do not go together, or with the model."""
        Loading(**self.loading()).check(self.model)


@dataclass
class ModelOptions(SavedModelOptions):
    """Model: the one that is measured."""

    revision: str | None = option("Branch, tag or commit of a model on the hub.", None)


@dataclass
class TrainModelOptions(ModelOptions):
    """Model: the one that is trained."""

    model: str = option(
        "A model folder, a .gguf file, a name on the Hugging Face hub, or 'tiny' / 'small' to build a model and its "
        "tokenizer from the training text.",
        aliases=["model_name_or_path"],
        metavar="MODEL",
    )
    dtype: str = option(
        "Precision of the weights; 'auto': as stored. Training all weights in half precision rounds small updates "
        "away; float32 with --bf16 does not.",
        "auto",
        choices=PRECISIONS,
    )


@dataclass
class TrainFiles:
    """Data: the records, and the folder that a run writes."""

    OUTPUT_DIR = "Where the run is written; must be empty, or hold the run that is resumed."
    train_file: str = option(
        "Training records, JSONL or hf://OWNER/NAME[/CONFIG][:SPLIT]: user_id, query, history, response and optionally "
        "timestamp.",
        metavar="FILE",
    )
    eval_file: str | None = option("Evaluation records, in the same form.", None, metavar="FILE")
    effects_file: str | None = option(
        "Output of score for the training file. Its stored effects weight the tokens, instead of the model's own. "
        "This saves the pass without history if only the weights need it.", None, metavar="FILE",
    )  # fmt: skip
    overwrite: bool = option("Delete the earlier run that the output folder holds.", False, ["overwrite_output_dir"])
    dry_run: bool = dry_run_option()


@dataclass
class PromptOptions:
    """Prompt: unset values come from a model folder that nextquill wrote, else from `PromptTemplate` and the model."""

    prompt_from: str | None = option(
        "A run whose prompt settings are used where no flag sets them, for example to measure a base model with the "
        "prompts of a trained run.", None, metavar="RUN",
    )  # fmt: skip
    max_length: int | None = option(
        "Tokens of prompt and response together; the oldest history items that do not fit are dropped.", None
    )
    max_response_length: int | None = option("Tokens of a response; a longer one is an error.", None)
    prompt_order: str | None = option(
        "Query before history, or history before query.", None, choices=["official", "history_first"]
    )
    counterfactual: str | None = option(
        "The prompt without history: 'None' under its heading, the section removed, or another user's history.", None,
        choices=["none", "removal", "placebo"],
    )  # fmt: skip
    newest_first: bool | None = option("List the past texts from the newest to the oldest.", None)
    show_dates: bool | None = option("Put the day above every past text that has a timestamp.", None)
    prompt_jinja: str | None = option(
        "A Jinja template for the prompt. Its variables: query, history (items with text, title, timestamp), "
        "counterfactual. '' returns to the built-in wording.", None, metavar="FILE",
    )  # fmt: skip
    system_prompt: str | None = option("A system message.", None)
    chat: bool | None = option(
        "Turn the tokenizer's chat template on or off; by default it is used if there is one.", None
    )

    def stored(self, model: str) -> PromptSettings | None:
        """The settings in the folder of --prompt_from, or else in that of the model; None if it has none."""
        if self.prompt_from is None:
            return None if is_new(model) else load_prompt_settings(model)
        with naming("prompt_from"):
            stored = load_prompt_settings(self.prompt_from)
        if stored is None:
            raise ArgumentError(
                f"prompt_from: expected the folder of a run, got {self.prompt_from} without {PROMPT_FILE}"
            )
        return stored

    def settings(self, stored: PromptSettings | None, default_length: int, context: int | None) -> PromptSettings:
        """The settings from the flags, else those `stored` in the model folder, else the defaults.

        `context` is the model's number of positions, if that is known.
        """
        check_positive(self, ("max_length", "max_response_length"))
        template = self._template(PromptTemplate() if stored is None else stored.template)
        length = self.max_length or (default_length if stored is None else stored.max_length)
        if context is not None and length > context:
            raise ArgumentError(f"max_length: expected at most the model's context of {context} tokens, got {length}")
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
        template = dataclasses.replace(base, **given)
        for flag in ("prompt_order", "show_dates"):
            if template.prompt_jinja is not None and getattr(self, flag) is not None:
                whose = "--prompt_jinja" if self.prompt_jinja else "the model's own Jinja template"
                raise ArgumentError(f"{flag}: has no effect beside {whose}, which decides the whole prompt")
        return template


def _read_template(path: str) -> str:
    try:
        return read_input(path, MIB).decode()
    except (OSError, UnicodeDecodeError) as error:
        raise ArgumentError(
            f"prompt_jinja: cannot read {path}: {getattr(error, 'strerror', None) or 'not UTF-8'}"
        ) from error


@dataclass
class LossComputation:
    """Loss: how it is averaged and computed."""

    reduction: str | None = option(
        "Average the loss over examples, over tokens, or, as the published code does, over a micro-batch.", None,
        choices=["sequence", "token", "micro_batch"],
    )  # fmt: skip
    chunk_bytes: int | None = option("Most bytes of logits and of their gradient held at once.", None)
    impl: str | None = option(
        "Kernels that compute the loss (auto: the best on the device).", None,
        choices=["auto", "triton", "native", "torch"],
    )  # fmt: skip


@dataclass
class LossOptions(LossComputation):
    """Loss: the objective. The defaults are the published values."""

    loss: str = option(
        "The training objective, by its name in compare. perce: tokens count by how much likelier the history makes "
        "them. nextquill: as in its authors' code; nextquill_paper: with the paper's effect term; nextquill_detached: "
        "no gradient through the pass without history, so it is cheaper, and more overconfident. mirror: the model's "
        "own responses, towards what it predicts with the user's in view; mirror_f: also the user's informative "
        "tokens.",
        LOSSES[0], choices=[*LOSSES, *MIRROR_LOSSES],
    )  # fmt: skip
    threshold: float | None = option("nextquill: smallest effect of a personal token (default: 0.05).", None)
    high_weight: float | None = option("nextquill: weight of personal tokens (default: 0.9).", None)
    low_weight: float | None = option("nextquill: weight of the other tokens (default: 0.1).", None)
    alpha: float | None = option(
        "nextquill: factor of the effect term (default: 0.1); mirror_f: weight of the user's informative tokens, in "
        "[0, 1] (default: 0.5).", None,
    )  # fmt: skip
    beta: float | None = option(
        "mirror, mirror_f: weight of the teacher in the mixture, in [0, 1] (default: 0.5).", None
    )
    weighted_effect: bool | None = option("nextquill: the paper's effect term, as in nextquill_paper.", None)
    detach_counterfactual: bool | None = option(
        "nextquill: no gradient through the pass without history, as in nextquill_detached.", None
    )
    anchor: float | None = option(
        "nextquill, nextquill_paper: factor of a further term, the nll without history (default: 0).", None
    )
    min_weight: float | None = option("perce: smallest weight (default: 0.8).", None)
    max_weight: float | None = option("perce, longce: largest weight (default: 5.0).", None)

    def build(self) -> PairLoss:
        """The loss these flags describe; a flag that it does not have is an error."""
        kind, fixed = self._kind()
        given = self._given()
        known = {*inspect.signature(kind).parameters, "reduction", "chunk_bytes", "impl"}
        for name, value in given.items():
            if name not in known:
                raise ArgumentError(f"{name}: --loss {self.loss} has no such option")
            if fixed.get(name, value) != value:
                other = "mirror_f" if self.is_mirror else "nextquill"
                raise ArgumentError(
                    f"{name}: --loss {self.loss} sets it to {fixed[name]}, got {value}; see --loss {other}"
                )
        if given.get("anchor") and fixed.get("detach_counterfactual"):
            raise ArgumentError(f"anchor: --loss {self.loss} has no gradient without history, --loss nextquill has one")
        return kind(**{**fixed, **given})

    @property
    def is_mirror(self) -> bool:
        """Whether the model learns from responses that it samples."""
        return self.loss in MIRROR_LOSSES

    def _kind(self) -> tuple[Callable[..., PairLoss], Mapping[str, Any]]:
        """What makes the loss, and the arguments that its name fixes."""
        if self.is_mirror:
            from nextquill.mirror import MirrorLoss

            return functools.partial(MirrorLoss, alpha=0.5), MIRROR_LOSSES[self.loss]
        from nextquill.comparison.arms import ARMS

        return ARMS[self.loss].kind, ARMS[self.loss].arguments

    def _given(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "loss" and value is not None}

    def __str__(self) -> str:
        given = self._given()
        if self.loss == "nextquill" and given.pop("detach_counterfactual", False):
            return str(dataclasses.replace(self, loss="nextquill_detached", detach_counterfactual=None))
        return ", ".join([self.loss, *(f"{name} {value}" for name, value in given.items())])


@dataclass
class MirrorOptions:
    """MIRROR: the responses that --loss mirror and mirror_f sample at every step."""

    max_new_tokens: int | None = option("Most tokens of a sampled response (default: 64).", None)
    temperature: float | None = option("Sampling temperature (default: 1, the model's own distribution).", None)
    num_rollouts: int | None = option("Responses sampled for each example in a step (default: 1).", None)
    reference: str | None = option(
        "The words after the query that show the teacher the user's own response, which replaces '{response}'.", None,
        metavar="TEXT",
    )  # fmt: skip
    log_samples_every: int | None = option(
        "Append the sampled responses to sampled_responses.jsonl every INT steps; 0: never (default: 1).", None
    )

    def given(self, loss: LossOptions) -> dict[str, Any]:
        """The arguments of `MirrorTrainer` that were given; ArgumentError for bad ones, or any with another loss."""
        found = {name: value for name, value in vars(self).items() if value is not None}
        if found and not loss.is_mirror:
            raise ArgumentError(f"{next(iter(found))}: --loss {loss.loss} samples no responses; see --loss mirror")
        MirrorSettings(**found)
        return found


@dataclass
class BatchOptions:
    """Batches: how they are computed. These change speed and memory, not the gradient."""

    attention: str = attention_option()
    max_tokens: int | None = option(
        "Most tokens of one forward pass with gradient; a device's batch with more tokens runs in several passes.", None
    )
    examples_per_user: int = option(
        "Examples of a user to keep together in a batch; with --prompt_order history_first they share the history.", 1
    )

    def check(self) -> None:
        """Raise ArgumentError for values that do not fit."""
        check_positive(self, ("examples_per_user", "max_tokens"))


@dataclass
class GuardOptions:
    """Steps that cannot be applied."""

    max_skipped_steps: int = option(
        "Skip and count this many steps whose loss or gradient is not finite. The next one stops the run, as the first "
        "one does by default.", 0,
    )  # fmt: skip

    def build(self) -> FiniteGuard:
        """The callback that makes a trainer skip such steps; ArgumentError for a negative number."""
        from nextquill.training.finite import FiniteGuard

        return FiniteGuard(self.max_skipped_steps)


#: Adapters need a larger one than whole models: 1e-4 to 3e-4 are usual.
LORA_LEARNING_RATE, WHOLE_LEARNING_RATE = 2e-4, 5e-5


@dataclass
class AdapterOptions:
    """LoRA: adapters instead of the whole model."""

    LEARNING_RATE = (
        f"The initial learning rate (default: 5e-5; {LORA_LEARNING_RATE:g} for adapters, except for mirror and "
        "mirror_f)."
    )
    _fills_rate = False  # no flag: whether none was given
    lora_r: int | None = None  # each command's own option
    lora_alpha: int | None = option("Scale of the adapters (default: 2 · lora_r).", None)
    lora_target_modules: list[str] | None = option(
        "Names of the modules that get adapters (default: all linear layers except the head).", None
    )

    def set_learning_rate(self, args: Any, model: Any = None) -> None:
        """Fill in the learning rate where none was given, and say it if it is that of adapters.

        Called again with the loaded `model`, which may turn out to be an adapter.
        """
        self._fills_rate = self._fills_rate or args.learning_rate is None
        adapters = bool(self.lora_r) or is_adapter(model)
        rate = LORA_LEARNING_RATE if adapters else WHOLE_LEARNING_RATE
        if self._fills_rate and args.learning_rate != rate:
            args.learning_rate = rate
            if adapters and args.process_index == 0:
                say(f"learning rate {rate:g}, the default for adapters; --learning_rate sets another")

    def config(self, **more: Any) -> Any:
        """PEFT's config of the adapters."""
        from peft import LoraConfig

        assert self.lora_r
        return LoraConfig(
            r=self.lora_r,
            lora_alpha=self.lora_alpha or 2 * self.lora_r,
            target_modules=self.lora_target_modules or "all-linear",
            task_type="CAUSAL_LM",
            **more,
        )

    def apply(self, model: Any, revision: str | None = None) -> Any:
        """Wrap the model in adapters where there is a rank; they name the revision of their base."""
        if not self.lora_r:
            if getattr(model, "is_quantized", False) and not is_adapter(model):
                raise ArgumentError("lora_r: expected a rank, as a quantised model's own weights cannot be trained")
            return model
        from peft import get_peft_model

        config = self.config(revision=revision)
        try:
            return get_peft_model(model, config)
        except ValueError as error:
            raise ArgumentError(f"lora_target_modules: {error}") from error


@dataclass
class LoraOptions(AdapterOptions):
    """LoRA: adapters instead of the whole model."""

    lora_r: int | None = option("Rank of the adapters. With it, only they are trained.", None)
    lora_dropout: float = option("Dropout inside the adapters.", 0.0)

    def check(self, model_name: str) -> None:
        """Raise ArgumentError for flags that do not go together."""
        if self.lora_r is None:
            for name in ("lora_alpha", "lora_target_modules"):
                if getattr(self, name) is not None:
                    raise ArgumentError(f"{name}: expected --lora_r with it")
            return
        check_positive(self, ("lora_r", "lora_alpha"))
        if not 0 <= self.lora_dropout < 1:
            raise ArgumentError(f"lora_dropout: expected a probability below 1, got {self.lora_dropout}")
        if is_new(model_name):
            raise ArgumentError(
                f"lora_r: a new {model_name!r} model has no trained weights to adapt; train the whole model, then "
                "adapt its folder"
            )

    def config(self, **more: Any) -> Any:
        return super().config(lora_dropout=self.lora_dropout, **more)

    def apply(self, model: Any, revision: str | None = None) -> Any:
        if self.lora_r is not None and is_adapter(model):
            raise ArgumentError("lora_r: the model already has an adapter, which is trained; leave --lora_r out")
        return super().apply(model, revision)


@dataclass
class DecodingOptions:
    """Decoding: how the next token is chosen."""

    guidance: float = option(
        "Strengthen the user's own history: score a token by log p1 + NUMBER · (log p1 - log p0), with p1 from the "
        "user's prompt and p0 from that of --guidance_against. 0: off; start with 0.5.", 0.0,
    )  # fmt: skip
    guidance_against: str = option(
        "The prompt that gives p0: without history (counterfactual), or with another user's (placebo).",
        "counterfactual", choices=list(BRANCHES[1:]),
    )  # fmt: skip
    plausibility: float = option(
        "With --guidance, choose only among tokens with at least this share of the largest probability.", PLAUSIBILITY
    )
    max_new_tokens: int = option("Most tokens of a response.", 128)
    temperature: float = option("Sampling temperature; 0: greedy.", 0.0)
    top_p: float = option("Sample only from the most likely tokens, whose probabilities add up to this share.", 1.0)
    best_of: int = option(
        "Draw INT responses and take the one whose tokens gain most from the history: the largest sum of log p1 - "
        "log p0, as with --guidance. It needs a --temperature. 1: off; try 8, at temperature 0.8 and top_p 0.95.", 1,
    )  # fmt: skip


@dataclass
class ScoreFiles:
    """Data: the records, and how they are computed."""

    eval_file: str = option(
        "Records to measure on, JSONL or hf://OWNER/NAME[/CONFIG][:SPLIT].", aliases=["records_file", "test_file"],
        metavar="FILE",
    )  # fmt: skip
    limit: int | None = option("Use only the first INT records.", None)
    batch_size: int | None = option("Records at a time (default: 64 to score, 8 to generate).", None)
    attention: str = attention_option()
    max_tokens: int | None = option(
        "Most tokens of one forward pass; shared tokens count once, padding too (default: 16384; 4096 on a CPU).",
        None,
    )
    seed: int = option("Seed that decides whose history is the placebo; the default is that of train.", 42)


@dataclass
class ScoreOptions:
    """Output: effects in a file and on the screen."""

    output_file: str = option("Where to write each token's effect: JSONL, one record per line.", metavar="FILE")
    overwrite: bool = option("Replace an existing output file.", False)
    show: int = option("Responses to print, coloured by effect.", 3)
