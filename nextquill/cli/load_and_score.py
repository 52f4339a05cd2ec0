"""What `evaluate` and `score` share: a model, its prompts, the scores of some records, and an output file."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from transformers.utils import logging as transformers_logging

from nextquill.cli.bars import bar
from nextquill.cli.flags import check_positive
from nextquill.cli.options import ModelOptions, PromptOptions, ScoreFiles
from nextquill.data import Record, read_jsonl
from nextquill.data.skipped import SkippedRecords
from nextquill.errors import ArgumentError, BudgetError, RecordError
from nextquill.models.loading import context_length, load_model, load_prompt_settings

if TYPE_CHECKING:
    import torch

    from nextquill.data import EncodedExample, ExampleEncoder
    from nextquill.evaluation.scoring import ExampleScores


class Loaded:
    """A model on its device, its tokenizer, the records it is run on, and how its prompts are made."""

    def __init__(
        self,
        model_options: ModelOptions,
        prompt_options: PromptOptions,
        files: ScoreFiles,
        records: list[Record] | None = None,
    ) -> None:
        from nextquill.models.limits import check_vocabulary, default_max_length

        check_files(files)
        self.records = eval_records(files) if records is None else records
        transformers_logging.set_verbosity_error()
        transformers_logging.disable_progress_bar()
        name = model_options.model_name_or_path
        self.model, self.tokenizer = load_model(name, dtype=model_options.dtype)
        check_vocabulary(self.model, self.tokenizer)
        self.model.to(device())
        stored = load_prompt_settings(name)
        self.settings = prompt_options.settings(stored, default_max_length(self.model), context_length(self.model))


class Scored(Loaded):
    """Records encoded for a model; `scores()` runs it over them."""

    def __init__(self, model_options: ModelOptions, prompt_options: PromptOptions, files: ScoreFiles) -> None:
        from nextquill.data import ExampleEncoder

        super().__init__(model_options, prompt_options, files)
        self._files, settings = files, self.settings
        encoder = ExampleEncoder(self.tokenizer, settings.template, settings.max_length, settings.max_response_length)
        self.examples = encode_records("eval_file", encoder, self.records, placebo=True, seed=files.seed)

    def scores(self, skip: int = 0) -> Iterator[ExampleScores]:
        """The scores of each record as they are computed, without the first `skip`; see `score_examples`."""
        from nextquill.evaluation.scoring import pad_token, score_examples

        pad, size = pad_token(self.tokenizer), self._files.batch_size
        options: dict[str, Any] = {"attention": self._files.attention, "max_tokens": self._files.max_tokens}
        scored = score_examples(self.model, self.examples, pad, size, skip=skip, **options)
        try:
            yield from bar(scored, total=len(self.examples), initial=skip, desc="Scoring")
        except BudgetError as error:  # the library's argument is the flag of that name
            raise BudgetError(f"--{error}") from error


def check_files(files: ScoreFiles) -> None:
    """Raise ArgumentError for flags that have no use as they are."""
    check_positive(files, ("limit", "batch_size", "max_tokens"))
    if files.max_tokens is not None and files.attention == "padded":
        raise ArgumentError("--max_tokens: expected none with --attention padded, which takes --batch_size rows")


def eval_records(files: ScoreFiles, skipped: SkippedRecords | None = None) -> list[Record]:
    """The records of --eval_file, as many as --limit says; bad ones are an error, or counted in `skipped`."""
    return read_records("eval_file", files.eval_file, skipped)[: files.limit]


def read_records(flag: str, path: str, skipped: SkippedRecords | None = None) -> list[Record]:
    """Read a JSONL file; a mistake in it names the flag it was given by, or is counted in `skipped`."""
    try:
        return read_jsonl(path, skipped)
    except RecordError as error:
        raise RecordError(f"--{flag}: {error}") from error


def encode_records(
    flag: str, encoder: ExampleEncoder, records: list[Record], *, placebo: bool, seed: int, hidden: bool = False
) -> list[EncodedExample]:
    """Encode with a progress bar; a record that does not fit names the flag its file was given by."""

    def shown(iterable: Any, total: int, desc: str) -> Any:
        return bar(iterable, total=total, desc=f"{desc} {flag}", leave=False, disable=hidden)

    try:
        return encoder.encode_all(records, placebo, seed, shown)
    except BudgetError as error:
        raise BudgetError(f"--{flag}: {error}") from error


def device() -> torch.device:
    """Where models run: the accelerator, or the CPU."""
    import torch

    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return torch.device("cpu") if accelerator is None else accelerator
