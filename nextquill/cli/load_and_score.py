"""Shared by `evaluate` and `score`: a model, its prompts, and the scores of some records."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from transformers.utils import logging as transformers_logging

from nextquill.cli.flags import check_positive
from nextquill.cli.options import ModelOptions, PromptOptions, ScoreFiles
from nextquill.cli.terminal import bar
from nextquill.data import Record, load_records
from nextquill.data.skipped import SkippedRecords
from nextquill.errors import naming
from nextquill.models.configs import check_vocabulary, context_length, default_max_length
from nextquill.models.loading import load_model

if TYPE_CHECKING:
    import torch

    from nextquill.data import EncodedExample, EncodingStats, ExampleEncoder


class Loaded:
    """A model on its device, its tokenizer, the records it is run on, and its prompt settings.

    `stored` are those that its folder or that of --prompt_from holds, if any, before the flags changed them.
    """

    def __init__(self, model_options: ModelOptions, prompt_options: PromptOptions, records: list[Record]) -> None:
        self.records = records
        quieten_transformers()
        name = model_options.model
        self.stored = prompt_options.stored(name)
        self.model, self.tokenizer = load_model(name, **model_options.loading())
        check_vocabulary(self.model, self.tokenizer)
        self.model.to(device())
        self.settings = prompt_options.settings(self.stored, default_max_length(self.model), context_length(self.model))


def quieten_transformers() -> None:
    """Hide transformers' own log and bars."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()


def history_notes(stats: EncodingStats, max_length: int) -> list[str]:
    """Sentences on the histories that did not fit, and on records without one."""
    notes = []
    if stats.history_items_dropped:
        notes.append(
            f"{stats.history_items_dropped} of {stats.history_items} history items dropped to fit {max_length} tokens, "
            f"in {stats.examples_truncated} examples; a larger --max_length keeps them"
        )
    if stats.examples_without_history:
        notes.append(f"{stats.examples_without_history} examples have no history, so their two prompts are equal")
    return notes


def check_files(files: ScoreFiles) -> None:
    """Raise ArgumentError for values that do not fit."""
    check_positive(files, ("limit", "batch_size", "max_tokens"))


def eval_records(files: ScoreFiles, skipped: SkippedRecords | None = None) -> list[Record]:
    """The first --limit records of --eval_file; bad ones are an error, or counted in `skipped`."""
    return read_records("eval_file", files.eval_file, skipped)[: files.limit]


def read_records(flag: str, path: str, skipped: SkippedRecords | None = None) -> list[Record]:
    """Read a JSONL file or a data set of the hub; an error names the flag, or is counted in `skipped`."""
    with naming(flag, "source"):
        return load_records(path, skipped)


def encode_records(
    flag: str, encoder: ExampleEncoder, records: list[Record], *, placebo: bool, seed: int, hidden: bool = False
) -> list[EncodedExample]:
    """Encode with a progress bar; the error of a record that does not fit names the flag of its file."""

    def shown(iterable: Any, total: int, desc: str) -> Any:
        return bar(iterable, total=total, desc=f"{desc} {flag}", leave=False, disable=hidden)

    with naming(flag):
        return encoder.encode_all(records, placebo, seed, shown)


def device() -> torch.device:
    """The device that models run on: the accelerator, or the CPU."""
    import torch

    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
