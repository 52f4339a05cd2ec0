"""`nextquill train`: records in, a fine-tuned model folder out."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import TrainingArguments, set_seed
from transformers.trainer_utils import get_last_checkpoint
from transformers.utils import logging as transformers_logging

from nextquill.cli import progress
from nextquill.cli.main import INTERRUPTED, OK
from nextquill.cli.options import (
    SCRATCH_MAX_LENGTH,
    LoraOptions,
    LossOptions,
    ModelOptions,
    PromptOptions,
    TrainFiles,
)
from nextquill.cli.parsing import parse
from nextquill.data import EncodingStats, Record, read_jsonl
from nextquill.errors import CheckpointError, OutputExistsError
from nextquill.integrations import checkpoints
from nextquill.integrations.loading import PROMPT_FILE, PromptSettings, load_model, load_prompt_settings
from nextquill.integrations.scratch import SCRATCH_SIZES
from nextquill.integrations.trainer import NextQuillTrainer, default_max_length

DESCRIPTION = (
    "Fine-tune a causal language model on users' histories. Besides the flags of nextquill, every field of transformers' "
    "TrainingArguments is one. The output folder holds the model, its tokenizer, the prompt settings, the metrics and the "
    "checkpoints."
)
DEFAULTS = {"logging_steps": 10, "save_total_limit": 2, "report_to": ["none"]}


def run(arguments: Sequence[str]) -> int:
    kinds = (ModelOptions, TrainFiles, LossOptions, PromptOptions, LoraOptions, TrainingArguments)
    parsed = parse("train", DESCRIPTION, kinds, arguments, defaults=DEFAULTS, required=["output_dir"])
    model_options, files, loss_options, prompt_options, lora, args = parsed
    loss = loss_options.build()
    folder = Path(args.output_dir)
    resume = resume_point(folder, args.resume_from_checkpoint)
    if resume is None and args.should_save:
        claim_output_dir(folder, overwrite=files.overwrite_output_dir)

    records = read_jsonl(files.train_file)
    eval_records = None if files.eval_file is None else read_jsonl(files.eval_file)
    transformers_logging.set_verbosity_error()
    set_seed(args.seed)
    model, tokenizer, settings = _load(model_options, prompt_options, records, args.seed)
    trainer = NextQuillTrainer(
        model=lora.apply(model),
        args=args,
        train_dataset=records,
        eval_dataset=eval_records,
        processing_class=tokenizer,
        loss=loss,
        template=settings.template,
        max_length=settings.max_length,
        max_response_length=settings.max_response_length,
    )
    if trainer.is_world_process_zero():
        print(summary(trainer, loss_options.loss), file=sys.stderr)
    interrupt = progress.install(trainer)
    try:
        trainer.train(resume_from_checkpoint=resume)
    finally:
        interrupt.restore()
    if interrupt.interrupted:
        step = trainer.state.global_step
        print(f"nextquill: saved checkpoint-{step}; go on with --resume_from_checkpoint true", file=sys.stderr)
        return INTERRUPTED
    metrics = trainer.evaluate() if eval_records is not None else {}
    save(trainer, settings, metrics)
    return OK


def resume_point(folder: Path, given: str | None) -> str | None:
    """The checkpoint folder to resume from, or None.

    Raises:
        CheckpointError: one was asked for and is not there.
    """
    if given is None or given.lower() in ("false", "no", "0", ""):
        return None
    if given.lower() in ("true", "yes", "1"):
        last = get_last_checkpoint(str(folder)) if folder.is_dir() else None
        if last is None:
            raise CheckpointError(f"--resume_from_checkpoint: no complete checkpoint in {folder}")
        return last
    if not (Path(given) / "trainer_state.json").is_file():
        raise CheckpointError(f"--resume_from_checkpoint: {given} is not a complete checkpoint")
    return given


def claim_output_dir(folder: Path, *, overwrite: bool) -> None:
    """Make sure a new run starts in an empty folder.

    Raises:
        OutputExistsError: it holds something; with `overwrite`, something that is not a nextquill run.
    """
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    if not folder.is_dir():
        raise OutputExistsError(f"--output_dir: {folder} is a file")
    is_run = (folder / checkpoints.RUN_FILE).is_file()
    if not is_run:
        raise OutputExistsError(f"--output_dir: {folder} holds files that are not of a nextquill run; choose another")
    if not overwrite:
        raise OutputExistsError(
            f"--output_dir: {folder} holds another run; go on with it by --resume_from_checkpoint true, replace it by "
            "--overwrite_output_dir, or choose another"
        )
    shutil.rmtree(folder)


def summary(trainer: NextQuillTrainer, loss: str) -> str:
    """What is about to be trained on, and what the token budget dropped."""
    stats = EncodingStats.from_examples(trainer.train_dataset.examples)
    parameters = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    lines = [
        f"{stats.examples} examples, {stats.response_tokens} supervised tokens, {stats.prompt_tokens} prompt tokens; "
        f"{parameters / 1e6:.1f}M trainable parameters; loss {loss}"
    ]
    if stats.history_items_dropped:
        lines.append(
            f"{stats.history_items_dropped} of {stats.history_items} history items dropped to fit {trainer.encoder.max_length} "
            f"tokens, in {stats.examples_truncated} examples; raise --max_length to keep them"
        )
    if stats.examples_without_history:
        lines.append(f"{stats.examples_without_history} examples have no history left: both of their branches are equal")
    return "\n".join(lines)


def save(trainer: NextQuillTrainer, settings: PromptSettings, metrics: dict[str, float]) -> None:
    """Write the final model and its metrics into the output folder, each file complete or absent."""
    folder = Path(trainer.args.output_dir)
    with checkpoints.staged_files(folder) as staging:
        trainer.save_model(str(staging))
        if trainer.is_world_process_zero():
            (staging / PROMPT_FILE).write_text(settings.to_json(), encoding="utf-8")
            log = {"log_history": trainer.state.log_history, "eval": metrics}
            (staging / "metrics.json").write_text(json.dumps(log, indent=2) + "\n", encoding="utf-8")


def _load(
    model_options: ModelOptions, prompt_options: PromptOptions, records: list[Record], seed: int
) -> tuple[Any, Any, PromptSettings]:
    name = model_options.model_name_or_path
    model, tokenizer = load_model(name, dtype=model_options.dtype, records=lambda: records, seed=seed)
    length = SCRATCH_MAX_LENGTH if name in SCRATCH_SIZES else default_max_length(model)
    return model, tokenizer, prompt_options.settings(load_prompt_settings(name), length)
