"""`--dry_run`: what a command would do and cost, as a table, from one timed step; nothing is written."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from transformers import TrainerCallback, TrainingArguments

from nextquill.cli.terminal import duration
from nextquill.data import EncodedDataset, EncodingStats, ExampleEncoder, TreeCollator
from nextquill.data.records import iter_records
from nextquill.data.templates import BRANCHES
from nextquill.evaluation.options import EvaluationOptions
from nextquill.evaluation.preferences import has_pair
from nextquill.models.loading import PromptSettings
from nextquill.report.text import plain

Rows = list[tuple[str, Any]]
#: Steps whose tokens are counted, and records that are encoded by `prepare` or measured by `evaluate`.
COUNTED_STEPS, PREPARED, MEASURED = 50, 500, 4
_TOGETHER = 64  # examples whose prompts are merged, as in `score_examples`


def show(rows: Rows) -> None:
    """Print a table of names and values to stdout."""
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        print(plain(f"{name:<{width}}  {value}"))
    print("Nothing was written.")


@contextmanager
def without_output(args: TrainingArguments) -> Iterator[None]:
    """Let a trainer that is made and run in this block write into a temporary folder, and report to nobody."""
    with TemporaryDirectory(prefix="nextquill-") as folder:
        args.output_dir, args.report_to, args.push_to_hub = folder, [], False
        args.save_strategy = args.eval_strategy = args.logging_strategy = "no"
        args.eval_on_start = args.load_best_model_at_end = False
        yield


class _TwoSteps(TrainerCallback):
    """Stops after the second step and notes its time; the first step compiles and allocates."""

    seconds = 0.0
    _since = 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._since = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seconds = time.perf_counter() - self._since
        control.should_log = True
        control.should_training_stop = state.global_step >= min(2, state.max_steps)


def training_rows(trainer: Any, items: str = "examples") -> Rows:
    """A table of steps (each of so many `items`), time, memory and settings, from the first two steps of a training."""
    from transformers import ProgressCallback
    from transformers.trainer_callback import PrinterCallback

    from nextquill.comparison.measuring import peak_memory, reset_peak_memory

    timed, args = _TwoSteps(), trainer.args
    for stock in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(stock)
    trainer.add_callback(timed)
    reset_peak_memory()
    trainer.train()
    memory, steps = peak_memory(), trainer.state.max_steps
    logs: dict[str, Any] = next((log for log in reversed(trainer.state.log_history) if "loss" in log), {})
    each, window, ranks = args.per_device_train_batch_size, args.gradient_accumulation_steps, args.world_size
    split = f"{each} a device × {window} accumulated × {ranks} processes"
    schedule = getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type)
    return [
        ("steps", f"{steps}, each of {each * window * ranks} {items} ({split})"),
        ("saved by sharing", f"{logs.get('sharing_factor', 1.0):.2f} × as many tokens without sharing, in a step"),
        ("time", f"about {duration(timed.seconds * steps)}: {duration(timed.seconds)} a step; without evaluations"),
        ("peak memory", _memory(memory, args.device)),
        ("learning rate", f"{args.learning_rate:g}, {schedule}"),
        ("optimiser", getattr(args.optim, "value", args.optim)),
        ("precision", f"{_precision(trainer.model)}{', bf16' * args.bf16}{', fp16' * args.fp16}"),
        ("device", args.device),
    ]


def work_of_training(trainer: Any) -> Rows:
    """The tokens of the first steps of a `NextQuillTrainer`, with and without sharing; or what it samples in a step."""
    if (mirror := getattr(trainer, "settings", None)) is not None:
        return [("samples", f"{mirror.num_rollouts} an example in each step, at most {mirror.max_new_tokens} tokens")]
    window = trainer.args.gradient_accumulation_steps
    batches = list(islice(trainer.get_train_dataloader(), COUNTED_STEPS * window))
    parts = [part for batch in batches for part in batch["parts"]]
    computed, apart = (sum(part[name] for part in parts) for name in ("num_tokens", "num_branch_tokens"))
    steps = -(-len(batches) // window)
    return [("tokens computed", f"{computed:,} in {steps} steps; {apart:,} without sharing")]


def length_rows(lengths: Sequence[int], stats: EncodingStats, settings: PromptSettings) -> Rows:
    """The lengths of the examples with their history, the part of it that was cut, and the prompt settings."""
    template, dropped = settings.template, stats.history_items_dropped
    return [
        ("examples", f"{stats.examples:,} with {stats.response_tokens:,} response tokens"),
        (
            "tokens an example",
            f"median {statistics.median(lengths):.0f}, longest {max(lengths)} of {settings.max_length}",
        ),
        ("cut", f"{dropped} of {stats.history_items} history items, in {stats.examples_truncated} examples"),
        ("without history", f"{stats.examples_without_history} examples"),
        ("prompt", f"{template.order}, counterfactual {template.counterfactual}{_own(template)}"),
    ]


def _own(template: Any) -> str:
    named = {"chat": template.chat, "system prompt": template.system, "Jinja template": template.prompt_jinja}
    return "".join(f", {name}" for name, value in named.items() if value)


class _StageTimes:
    """A `progress` for an evaluation, which measures the seconds per line of each stage."""

    def __init__(self) -> None:
        self.found = dict[str, float]()

    def __call__(self, lines: Any, *, total: int, desc: str, initial: int = 0) -> Iterator[Any]:
        began = time.perf_counter()
        yield from lines
        self.found[desc] = (time.perf_counter() - began) / max(1, total)


def evaluation_rows(loaded: Any, options: EvaluationOptions, name: str) -> Rows:
    """Lengths, time, memory and settings of an evaluation, from a few of its records."""
    from nextquill.comparison.measuring import peak_memory, reset_peak_memory
    from nextquill.evaluation.evaluate import evaluate_model

    records, settings = loaded.records, loaded.settings
    examples = ExampleEncoder(loaded.tokenizer, **vars(settings)).encode_all(records, True, options.seed)
    data = EncodedDataset(sorted(examples, key=lambda example: example.user_id))
    names = BRANCHES if data.has_placebo else BRANCHES[:2]
    batches = (data.examples[start : start + _TOGETHER] for start in range(0, len(data), _TOGETHER))
    shared = sum(part["num_tokens"] for batch in batches for part in TreeCollator((names,))(batch)["parts"])
    some = records[:: max(1, len(records) // MEASURED)][:MEASURED]
    times = _StageTimes()
    # A few records may all be of one person, so that a judge has no choice, and they are not those of another
    # evaluation.
    few = dataclasses.replace(
        options, resamples=1, item_effects=min(options.item_effects, 1), metrics=None, judge_model=None,
        prose_file=None, personal_from=None,
    )  # fmt: skip
    reset_peak_memory()
    with TemporaryDirectory(prefix="nextquill-") as folder:
        evaluate_model(
            loaded.model, loaded.tokenizer, some, settings, few, Path(folder),
            model_name=name, progress=times,
        )  # fmt: skip
    memory = peak_memory()
    texts = min(len(records), options.generate_limit or len(records)) * len(options.generate_branches)
    counts = {
        "Scoring": len(records),
        "Comparing pairs": sum(has_pair(record, index) for index, record in enumerate(records)),
        "Generating": texts,
        "Leaving items out": min(options.item_effects, len(records)),
    }
    seconds = {name: times.found[name] * count for name, count in counts.items() if name in times.found}
    parts = ", ".join(f"{name.lower()} {counts[name]:,}: {duration(value)}" for name, value in seconds.items())
    return [
        *length_rows(data.num_branch_tokens(("factual",)), data.stats, settings),
        (
            "tokens computed",
            f"{shared:,}; {sum(data.num_branch_tokens(names)):,} without sharing; {len(names)} prompts each",
        ),
        ("texts", f"{texts:,}, at most {options.max_new_tokens} tokens each"),
        ("time", f"about {duration(sum(seconds.values()))} from {len(some)} records ({parts}){_untimed(options)}"),
        ("peak memory", _memory(memory, loaded.model.device)),
        ("precision", _precision(loaded.model)),
        ("device", loaded.model.device),
    ]


def _untimed(options: EvaluationOptions) -> str:
    names = [name for name in ("judge_model", "prose_file") if getattr(options, name) is not None]
    return f"; without {' and '.join(names)}" if names else ""


def preparation_rows(encoder: ExampleEncoder, settings: PromptSettings, options: Any) -> Rows:
    """Lengths and time of a preparation, from its first records."""
    source = iter_records(options.records_file)
    records = list(islice(source, PREPARED))
    began = time.perf_counter()
    data = EncodedDataset(encoder.encode_all(records, options.placebo, options.seed))
    seconds = (time.perf_counter() - began) / len(records)
    total = len(records) + sum(1 for _ in source)
    names = BRANCHES if options.placebo else BRANCHES[:2]
    tokens = sum(data.num_branch_tokens(names))
    return [
        ("records", f"{total:,}; the rows below are from the first {len(records):,}"),
        *length_rows(data.num_branch_tokens(("factual",)), data.stats, settings),
        ("tokens written", f"about {tokens * total // len(records):,}, {len(names)} prompts each"),
        ("time", f"about {duration(seconds * total)}"),
    ]


def _precision(model: Any) -> str:
    return str(next(model.parameters()).dtype).removeprefix("torch.")


def _memory(memory: int | None, device: Any) -> str:
    what = "of the whole process" if device.type == "cpu" else "allocated on the device"
    return "not known" if memory is None else f"{memory / 2**30:.2f} GiB {what}"
