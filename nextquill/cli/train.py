"""`nextquill train`: fine-tunes a model on records and writes its folder."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from textwrap import shorten
from typing import TYPE_CHECKING, Any

from transformers import TrainingArguments, set_seed

from nextquill.cli.flags import check_file
from nextquill.cli.load_and_score import encode_records, history_notes, quieten_transformers, read_records
from nextquill.cli.main import INTERRUPTED, OK
from nextquill.cli.options import (
    WHOLE_LEARNING_RATE,
    BatchOptions,
    GuardOptions,
    LoraOptions,
    LossOptions,
    MirrorOptions,
    PromptOptions,
    TrainFiles,
    TrainModelOptions,
)
from nextquill.cli.parsing import parse, refusals
from nextquill.cli.run_folder import check_output_dir, check_tokenizer, open_output_dir, resume_point
from nextquill.cli.terminal import draws_bars, duration
from nextquill.cli.training_checks import check_arguments, check_optimizer
from nextquill.data import EncodedDataset, ExampleEncoder, PromptTemplate, Record
from nextquill.data.prepared import PreparedDataset, is_prepared
from nextquill.errors import ArgumentError, naming
from nextquill.models.configs import context_length, default_max_length
from nextquill.models.loading import PROMPT_FILE, PromptSettings, load_model
from nextquill.models.tiny_models import is_new
from nextquill.report.numbers import counted
from nextquill.report.text import plain
from nextquill.storage import checkpoints
from nextquill.storage.atomic_files import write_whole

if TYPE_CHECKING:
    from transformers import Trainer

DESCRIPTION = (
    "Fine-tune a causal language model on users' histories. Every field of transformers' TrainingArguments is a flag "
    "too. The output folder holds the model, its tokenizer, the prompt settings, the metrics and the checkpoints. "
    "Ctrl-C finishes the step and saves a checkpoint."
)
OPTIONS = (
    TrainModelOptions,
    TrainFiles,
    PromptOptions,
    LossOptions,
    MirrorOptions,
    BatchOptions,
    LoraOptions,
    GuardOptions,
    TrainingArguments,
)
FLAGS = {"train_dataset": "train_file", "eval_dataset": "eval_file"}
#: No learning rate, as `set_learning_rate` fills it in.
DEFAULTS: dict[str, Any] = {"logging_steps": 10, "logging_first_step": True, "save_total_limit": 2, "report_to": "none"}
DEFAULTS["learning_rate"] = None
#: Length of prompt and response for a new model, whose whole context would be slow on a CPU.
SCRATCH_MAX_LENGTH = 1024
#: Characters of the query in the command that is recommended at the end.
_QUERY_WIDTH = 60
#: The contents of --train_file or --eval_file.
Source = list[Record] | PreparedDataset


def run(arguments: Sequence[str]) -> int:
    """Run the command; its exit code."""
    parsed = parse("train", DESCRIPTION, OPTIONS, arguments, defaults=DEFAULTS, required=["output_dir"])
    model_options, files, prompt_options, loss_options, mirror_options, batches, lora, guard, args = parsed
    loss, sampling = loss_options.build(), mirror_options.given(loss_options)
    lora.check(model_options.model)
    if loss_options.is_mirror and args.learning_rate is None:  # at that of adapters, responses soon repeat themselves
        args.learning_rate = WHOLE_LEARNING_RATE
    lora.set_learning_rate(args)
    batches.check()
    finite = guard.build()
    check_arguments(args, has_eval_file=files.eval_file is not None)
    folder = Path(args.output_dir)
    resume = resume_point(folder, args.resume_from_checkpoint)
    if args.should_save:
        inputs = (files.train_file, files.eval_file, files.effects_file, model_options.model)
        check_output_dir(folder, resume, overwrite=files.overwrite, inputs=inputs)
    if files.effects_file is not None:
        check_file("effects_file", files.effects_file)
    if loss_options.is_mirror:
        check_samples_can_be_made(files, loss_options.loss)
    paths = {"train": files.train_file, "eval": files.eval_file}
    sources = {name: read_source(f"{name}_file", path) for name, path in paths.items() if path is not None}
    quieten(args)
    set_seed(args.seed)
    usual = PromptTemplate(order="history_first") if loss_options.is_mirror else None
    model, tokenizer, settings = load(model_options, prompt_options, sources["train"], args.seed, usual)
    model = lora.apply(model, model_options.revision)
    lora.set_learning_rate(args, model)
    check_optimizer(args, model)
    if resume is not None:
        check_tokenizer(resume, tokenizer)
    records = {"train_dataset": sources.pop("train")} if loss_options.is_mirror else {}
    data = {**datasets(tokenizer, settings, sources, args, args.seed), **records}
    trainer_class = trainer_of(loss_options)
    from nextquill.cli import dry_run

    with dry_run.without_output(args) if files.dry_run else nullcontext():
        with refusals():
            trainer = trainer_class(
                model,
                args,
                **data,
                processing_class=tokenizer,
                loss=loss,
                effects_file=files.effects_file,
                **sampling,
                **vars(batches),
                **vars(settings),
            )
        trainer.add_callback(finite)
        if files.dry_run:
            return rehearse(trainer, model_options.model, settings)
    following = next_commands(folder, files, records.get("train_dataset") or sources["train"])
    return train(trainer, folder, resume, summary(trainer, str(loss_options)), following, settings)


def check_samples_can_be_made(files: TrainFiles, loss: str) -> None:
    """Raise ArgumentError for inputs that a loss of sampled responses cannot use."""
    if files.effects_file is not None:
        raise ArgumentError(f"effects_file: --loss {loss} has no token weights; leave it out")
    if is_prepared(files.train_file):
        raise ArgumentError(
            f"train_file: --loss {loss} reads records, as the teacher's prompt shows the user's response; got the "
            f"prepared folder {files.train_file}; give the file that it was prepared from"
        )


def trainer_of(options: LossOptions) -> type[Any]:
    """The class of the trainer for a loss."""
    if options.is_mirror:
        from nextquill.mirror import MirrorTrainer

        return MirrorTrainer
    from nextquill.training.trainer import NextQuillTrainer

    return NextQuillTrainer


def rehearse(trainer: Any, name: str, settings: PromptSettings) -> int:
    """Make two steps and print what the training would take; the exit code."""
    from nextquill.cli import dry_run

    data = trainer.train_dataset
    trained = trainable(p for p in trainer.model.parameters() if p.requires_grad)
    rows = [("model", name), ("trained", trained), ("loss", trainer.loss)]
    rows += dry_run.length_rows(data.num_branch_tokens(("factual",)), data.stats, settings)
    rows += [*dry_run.work_of_training(trainer), *dry_run.training_rows(trainer)]
    if trainer.is_world_process_zero():
        dry_run.show(rows)
    return OK


def trainable(parameters: Iterable[Any]) -> str:
    """The number of these parameters in words, such as `4.9M trainable parameters`."""
    count = sum(parameter.numel() for parameter in parameters)
    return f"{f'{count / 1e6:.1f}M' if count >= 1e5 else f'{count:,}'} trainable parameters"


def train(
    trainer: Any,
    folder: Path,
    resume: Path | None,
    report: str,
    following: Sequence[Sequence[str]],
    settings: PromptSettings | None = None,
) -> int:
    """Open the output folder, then train, measure and save; the exit code.

    `report` is shown before, `following` are the commands that a user may want next.
    """
    if resume is not None:  # before the output folder is changed; the trainer would notice later
        trainer.check_resume(resume)
    if trainer.args.should_save:
        open_output_dir(folder, resume)
        if settings is not None:
            write_whole(folder / PROMPT_FILE, settings.with_chat(trainer.encoder.renderer.uses_chat).to_json())
    say(trainer, report)
    code = run_trainer(trainer, folder, resume)
    if code == OK:
        say(trainer, "Next:\n" + "\n".join(f"  nextquill {shlex.join(words)}" for words in following))
    end(trainer)
    return code


def end(trainer: Trainer) -> None:
    """Let the ranks leave their process group together.

    DDP goes first. As the last owner of a gloo group its destructor holds Python's lock while it waits for a thread
    that may be waiting for that lock: seen once in 100 runs on a busy machine, and within ten of a loop made for it.
    """
    model: Any = trainer.model
    trainer.model_wrapped = model
    trainer.accelerator.free_memory()
    trainer.accelerator.end_training()


def run_trainer(trainer: Trainer, folder: Path, resume: Path | None) -> int:
    """Train, measure and save; the exit code. Ctrl-C after the last step ends the evaluation only."""
    from nextquill.cli import progress

    has_eval, metrics = trainer.eval_dataset is not None, dict[str, float]()
    with progress.shown(trainer) as interrupt:
        try:
            trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
            if interrupt.requested and trainer.state.global_step < trainer.state.max_steps:
                say(trainer, interrupt.outcome(folder, trainer.state.global_step))
                return INTERRUPTED
            if has_eval:
                metrics = final_metrics(trainer, may_evaluate=not interrupt.requested)
        except KeyboardInterrupt:
            if not can_be_saved(trainer):
                raise
    save(trainer, folder, metrics)
    say(trainer, ending(trainer, folder, metrics))
    if has_eval and not metrics:
        say(trainer, "nextquill: interrupted in the last evaluation; the model is complete")
        return INTERRUPTED
    return OK


def can_be_saved(trainer: Trainer) -> bool:
    """Whether the model is the one to save although the evaluation after the last step did not end."""
    is_last = 0 < trainer.state.max_steps <= trainer.state.global_step
    wants_best = trainer.is_in_train and trainer.args.load_best_model_at_end
    return is_last and not wants_best and trainer.args.world_size == 1  # other ranks may not have been interrupted


def ending(trainer: Trainer, folder: Path, metrics: dict[str, float]) -> str:
    """A report after training: steps, time, and what was written where."""
    steps, log = counted(trainer.state.global_step, "step"), trainer.state.log_history
    seconds = next((entry["train_runtime"] for entry in reversed(log) if "train_runtime" in entry), None)
    time = "" if seconds is None else f" in {duration(seconds)}"
    kept = [path.name for path in checkpoints.found_checkpoints(folder)]
    files = [f"{'log and evaluation' if metrics else 'log'}: {checkpoints.METRICS_FILE}", *kept]
    return f"Trained {steps}{time}\nSaved the model to {folder} ({', '.join(files)})"


def next_commands(folder: Path, files: TrainFiles, source: Source) -> list[list[str]]:
    """Commands that measure the model and write with it, on the run's own files where they can be used."""
    test = files.eval_file if files.eval_file is not None and not is_prepared(files.eval_file) else "test.jsonl"
    model = ["--model", str(folder)]
    history, query = ["--history_file", "texts.jsonl"], "What to write"
    if isinstance(source, list):
        history = ["--records_file", files.train_file, "--user_id", source[-1].user_id]
        query = shorten(source[-1].query, _QUERY_WIDTH, placeholder="") or query
    return [
        ["evaluate", *model, "--eval_file", test, "--output_dir", str(folder / "evaluation")],
        ["generate", *model, *history, "--query", query, "--compare_history"],
    ]


def quieten(args: TrainingArguments) -> None:
    """Show bars on a terminal only, and hide transformers' own log and bars."""
    if args.disable_tqdm is not True and not draws_bars():
        args.disable_tqdm = True
    args.log_level_replica = "error"
    quieten_transformers()


def read_source(flag: str, path: str) -> Source:
    """A file's records, or a folder of prepared examples; an error in them names the flag."""
    if not is_prepared(path):
        return read_records(flag, path)
    with naming(flag):
        return PreparedDataset(path)


def load(
    model_options: TrainModelOptions,
    prompt_options: PromptOptions,
    source: Source,
    seed: int,
    usual: PromptTemplate | None = None,
) -> tuple[Any, Any, PromptSettings]:
    """The model, its tokenizer and its prompt settings: from the flags, else its folder, else the prepared examples.

    `usual` is the template where none of them has any.
    """
    name, prepared = model_options.model, isinstance(source, PreparedDataset)
    new = is_new(name)
    if new and prepared:
        raise ArgumentError(
            f"model: a new {name!r} model takes its tokenizer from the records' text, which a prepared "
            "--train_file does not hold; give the records, or the model that they were prepared for"
        )
    records: Any = source  # for a new model, which has no prepared examples
    stored = prompt_options.stored(name)
    model, tokenizer = load_model(name, **model_options.loading(), records=lambda: records, seed=seed)
    length = SCRATCH_MAX_LENGTH if new else default_max_length(model)
    if stored is None and isinstance(source, PreparedDataset):
        encoded_with = source.settings
        stored = PromptSettings(source.template, encoded_with["max_length"], encoded_with["max_response_length"])
    if stored is None and usual is not None:
        stored = PromptSettings(usual, length, None)
    return model, tokenizer, prompt_options.settings(stored, length, context_length(model))


def datasets(
    tokenizer: Any, settings: PromptSettings, sources: Mapping[str, Source], args: TrainingArguments, seed: int
) -> dict[str, Any]:
    """The trainer's `train_dataset` and, where there are records for it, `eval_dataset`; `seed` draws its placebos."""
    encoder = ExampleEncoder(tokenizer, settings.template, settings.max_length, settings.max_response_length)
    encoded: dict[str, Any] = {}
    for name, source in sources.items():
        if isinstance(source, PreparedDataset):
            with naming(f"{name}_file"):
                source.check(encoder)
            encoded[f"{name}_dataset"] = source
            continue
        options: dict[str, Any] = {"placebo": name == "eval", "seed": seed, "hidden": bool(args.disable_tqdm)}
        encoded[f"{name}_dataset"] = EncodedDataset(encode_records(f"{name}_file", encoder, source, **options))
    return encoded


def summary(trainer: Any, loss: str) -> str:
    """A report before training: examples, parameters, and what the token budget dropped."""
    stats = trainer.train_dataset.stats
    trained = [p for p in trainer.model.parameters() if p.requires_grad]
    lines = [
        f"{stats.examples} examples, {stats.response_tokens} supervised tokens, {stats.prompt_tokens} prompt tokens",
        f"{trainable(trained)}, loss {loss}",
    ]
    if any(p.element_size() < 4 for p in trained):
        lines.append(
            "the trained weights are in half precision, which rounds small updates away; --dtype float32 with --bf16 "
            "keeps them"
        )
    return "\n".join(lines + history_notes(stats, trainer.encoder.max_length))


def final_metrics(trainer: Trainer, *, may_evaluate: bool = True) -> dict[str, float]:
    """The evaluation of the model that is saved: the last step's, or a new one if that `may_evaluate`; else empty."""
    last = next((log for log in reversed(trainer.state.log_history) if "eval_loss" in log), {})
    if last.get("step") == trainer.state.global_step and not trainer.args.load_best_model_at_end:
        return {name: value for name, value in last.items() if name.startswith("eval_")}
    metrics: dict[str, float] = trainer.evaluate() if may_evaluate else {}
    return metrics


def say(trainer: Trainer, text: str) -> None:
    """Print to stderr, once among all ranks."""
    if trainer.is_world_process_zero():
        print(plain(text), file=sys.stderr)


def save(trainer: Trainer, folder: Path, metrics: dict[str, float]) -> None:
    """Write the final model and its metrics into the output folder, each file complete or absent.

    Every rank takes part in gathering a sharded model; one writes the files, and renames them when all are done.
    """
    wait = trainer.accelerator.wait_for_everyone
    place = checkpoints.staged_files(folder) if trainer.args.should_save else nullcontext(folder)
    with place as staging:
        wait()
        trainer.save_model(str(staging))
        if trainer.is_world_process_zero():
            log = {"log_history": trainer.state.log_history, "eval": metrics}
            (staging / checkpoints.METRICS_FILE).write_text(json.dumps(log, indent=2) + "\n", encoding="utf-8")
        wait()
