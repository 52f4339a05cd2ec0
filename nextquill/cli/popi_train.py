"""`nextquill popi train`: trains a model that writes summaries, and one that reads them, on preference pairs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import TrainingArguments, set_seed

from nextquill.cli.flags import UsageError, check_positive, dry_run_option, option
from nextquill.cli.main import OK
from nextquill.cli.options import LORA_LEARNING_RATE, AdapterOptions, GuardOptions, ModelOptions, attention_option
from nextquill.cli.parsing import parse, refusals
from nextquill.cli.popi_options import RECORDS, PopiFormat
from nextquill.cli.run_folder import check_output_dir, check_tokenizer, resume_point
from nextquill.cli.train import DEFAULTS, quieten, say, train, trainable
from nextquill.cli.training_checks import check_arguments, check_optimizer
from nextquill.data import HistoryItem, Record
from nextquill.errors import ArgumentError, naming
from nextquill.models.configs import is_adapter
from nextquill.models.loading import load_model
from nextquill.models.tiny_models import is_new
from nextquill.popi.config import POPIConfig
from nextquill.popi.prompts import INSTRUCTION, PopiTemplates
from nextquill.popi.roles import INFERENCE, check_roles
from nextquill.popi.users import User

if TYPE_CHECKING:
    from nextquill.popi.trainer import POPITrainer

DESCRIPTION = (
    "Train POPI: an inference model that summarises a user's signals, and a generator that reads the summary, with one "
    "preference loss. By default both are LoRA adapters of one model. Every field of transformers' TrainingArguments "
    "is a flag too; batch sizes are in users. The output folder holds popi.json, both adapters, the sampled summaries, "
    "the metrics and the checkpoints."
)
#: Choices of --metric_for_best_model.
METRICS = ("accuracy", "margin", "loss")


@dataclass
class PopiModelOptions(ModelOptions):
    """Models: one for both roles, or one for each."""

    model: str = option(
        "One model for both roles: a folder, a .gguf file, a name on the Hugging Face hub, or 'tiny' / 'small' to "
        "build a model and its tokenizer from the training text.", "", ["model_name_or_path"], metavar="MODEL",
    )  # fmt: skip
    inference_model: str | None = option("Instead of --model: the model that writes summaries.", None, metavar="MODEL")
    generator_model: str | None = option("With --inference_model: the model that reads them.", None, metavar="MODEL")

    @property
    def names(self) -> dict[str, str]:
        """The given models, by the name of POPITrainer's argument."""
        names = ("model", "inference_model", "generator_model")
        return {name: value for name in names if (value := getattr(self, name))}

    def check(self) -> None:
        """Raise UsageError unless there is one model, or one for each role."""
        if set(self.names) not in ({"model"}, {"inference_model", "generator_model"}):
            raise UsageError("expected --model, or --inference_model and --generator_model together")
        if self.revision is not None and not self.model:
            raise UsageError("revision: expected one --model with it, as each model has revisions of its own")
        super().check()


@dataclass
class PopiFiles:
    """Data: pairs and the run's folder."""

    OUTPUT_DIR = "Where the run is written; must be empty, or hold the run that is resumed."
    train_file: list[str] = option("Preference pairs: files, or hf://OWNER/NAME[/CONFIG][:SPLIT].", metavar="PATH")
    eval_file: list[str] | None = option("Pairs of other users, for evaluation during training.", None, metavar="PATH")
    overwrite: bool = option("Delete the earlier run that the output folder holds.", False, ["overwrite_output_dir"])
    dry_run: bool = dry_run_option()


@dataclass
class PopiPromptOptions:
    """Prompts: wording and attention."""

    instruction: str | None = option("The instruction to the inference model, instead of nextquill's default.", None)
    opening: str = option("Words that every summary begins with, such as 'This person writes'.", "")
    attention: str = attention_option()
    max_tokens: int | None = option("Most tokens of one forward pass; shared tokens count once, padding counts.", None)

    def build(self) -> dict[str, Any]:
        """These flags as arguments of POPITrainer."""
        check_positive(self, ("max_tokens",))
        templates = PopiTemplates(INSTRUCTION if self.instruction is None else self.instruction, opening=self.opening)
        return {"templates": templates, "attention": self.attention, "max_tokens": self.max_tokens}


@dataclass
class PopiLoraOptions(AdapterOptions):
    """LoRA: the adapters of both roles."""

    LEARNING_RATE = f"The initial learning rate (default: {LORA_LEARNING_RATE:g}; 5e-5 for whole models)."
    lora_r: int = option("Rank of the adapters; 0 trains whole models, and needs a model for each role.", 16)

    def check(self, models: Mapping[str, str]) -> None:
        """Raise ArgumentError for flags that do not fit each other or the models."""
        shared = "model" in models
        if self.lora_r < 0 or (shared and self.lora_r == 0):
            least = "1, as both roles are adapters of --model" if shared else "0"
            raise ArgumentError(f"lora_r: expected at least {least}, got {self.lora_r}")
        if self.lora_alpha is not None and self.lora_alpha < 1:
            raise ArgumentError(f"lora_alpha: expected a positive number, got {self.lora_alpha}")
        if not shared and self.lora_r and (new := [name for name in models.values() if is_new(name)]):
            raise ArgumentError(f"lora_r: expected 0 with a new {new[0]!r} model for a role, got {self.lora_r}")
        for name in ("lora_alpha", "lora_target_modules"):
            if self.lora_r == 0 and getattr(self, name) is not None:
                raise ArgumentError(f"{name}: expected --lora_r above 0 with it")


OPTIONS = (
    PopiModelOptions,
    PopiFiles,
    PopiFormat,
    POPIConfig,
    PopiPromptOptions,
    PopiLoraOptions,
    GuardOptions,
    TrainingArguments,
)
FLAGS = {"train_dataset": "train_file", "eval_dataset": "eval_file"}


def run(arguments: Sequence[str]) -> int:
    """Run the command; its exit code."""
    parsed = parse("popi train", DESCRIPTION, OPTIONS, arguments, defaults=DEFAULTS, required=["output_dir"])
    models, files, form, config, prompts, lora, guard, args = parsed
    models.check()
    lora.check(models.names)
    finite = guard.build()
    lora.set_learning_rate(args)
    prompting = prompts.build()
    check_arguments(args, has_eval_file=files.eval_file is not None, metrics=METRICS)
    folder = Path(args.output_dir)
    resume = resume_point(folder, args.resume_from_checkpoint)
    if args.should_save:
        inputs = (*files.train_file, *(files.eval_file or ()), *models.names.values())
        check_output_dir(folder, resume, overwrite=files.overwrite, inputs=inputs)
    users = form.users("train_file", files.train_file)
    eval_users = None if files.eval_file is None else form.users("eval_file", files.eval_file)
    quieten(args)
    set_seed(args.seed)
    loaded = _load(models, lora, users, args.seed)
    # One learning rate for both roles: a whole model decides.
    lora.set_learning_rate(args, min((loaded[name] for name in models.names), key=is_adapter))
    if resume is not None:
        check_roles(resume)
        check_tokenizer(resume / INFERENCE, loaded["processing_class"])
    from nextquill.cli import dry_run
    from nextquill.popi.trainer import POPITrainer

    with dry_run.without_output(args) if files.dry_run else nullcontext():
        with refusals():
            trainer = POPITrainer(
                **loaded, **prompting, args=args, config=config, train_dataset=users, eval_dataset=eval_users
            )
        trainer.add_callback(finite)
        check_optimizer(args, trainer.model)
        if files.dry_run:
            rows: dry_run.Rows = [("models", " and ".join(models.names.values())), ("settings", config)]
            say(trainer, _summary(trainer, config))
            rows += dry_run.training_rows(trainer, "users")
            if trainer.is_world_process_zero():
                dry_run.show(rows)
            return OK
    return train(trainer, folder, resume, _summary(trainer, config), _next_commands(folder, files, form))


def _next_commands(folder: Path, files: PopiFiles, form: PopiFormat) -> list[list[str]]:
    """Commands that measure the run and write summaries with it, on its own files where there are any."""
    model = ["--model", str(folder), *([] if form.format == RECORDS else ["--format", form.format])]
    signals = ["--signals_file", *files.train_file, "--output_file", str(folder / "summaries.jsonl")]
    return [
        ["popi", "evaluate", *model, "--test_file", *(files.eval_file or ["test.jsonl"])],
        ["popi", "summarize", *model, *signals],
    ]


def _load(options: PopiModelOptions, lora: PopiLoraOptions, users: list[User], seed: int) -> dict[str, Any]:
    """The models and tokenizers as POPITrainer takes them."""
    result, tokenizers = dict[str, Any](), list[Any]()
    for name, given in options.names.items():
        with naming(name, "model_name_or_path"):
            model, tokenizer = load_model(given, **options.loading(), records=lambda: _as_records(users), seed=seed)
        if name != "model" and not is_adapter(model):
            model = lora.apply(model)
        result[name] = model
        tokenizers.append(tokenizer)
    result["processing_class"] = tokenizers[0]
    if "model" not in result:
        result["generator_tokenizer"] = tokenizers[1]
    elif not is_adapter(result["model"]):
        result["peft_config"] = lora.config(revision=options.revision)
    return result


def _as_records(users: Sequence[User]) -> list[Record]:
    """All texts of the users, for a new tokenizer."""
    return [
        Record(user.user_id, pair.query, pair.chosen, (HistoryItem(pair.rejected), *user.items))
        for user in users
        for pair in user.pairs
    ]


def _summary(trainer: POPITrainer, config: POPIConfig) -> str:
    """A report before training: users, pairs, and users left out."""
    assert trainer.train_users is not None
    pairs = sum(len(user.pairs) for user in trainer.train_users.users)
    size = trainable(p for role in trainer.roles for p in role.parameters())
    each = f"{config.group_size} summaries a user, {config.pairs_per_user} pairs, {config.signals_per_user} signals"
    lines = [
        f"{trainer.train_users}; {pairs} pairs",
        f"{size}, {config.objective} with {config.estimator}: at most {each}",
    ]
    if trainer.eval_users is not None:
        lines.append(f"evaluation: {trainer.eval_users}")
    return "\n".join(lines)
