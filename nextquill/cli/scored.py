"""What `evaluate` and `score` share: a model, its prompts, and the scores of some records."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from typing import Any

from tqdm.auto import tqdm
from transformers.utils import logging as transformers_logging

from nextquill.cli.options import ModelOptions, PromptOptions, ScoreFiles
from nextquill.data import EncodedExample, ExampleEncoder, read_jsonl
from nextquill.errors import ArgumentError
from nextquill.integrations.loading import load_model, load_prompt_settings
from nextquill.integrations.scoring import ExampleScores, score_examples
from nextquill.integrations.trainer import check_vocabulary, default_max_length


class Scored:
    """Records encoded for a model; `scores()` runs it over them."""

    def __init__(self, model_options: ModelOptions, prompt_options: PromptOptions, files: ScoreFiles) -> None:
        for name in ("limit", "batch_size"):
            value = getattr(files, name)
            if value is not None and value < 1:
                raise ArgumentError(f"--{name}: expected a positive number, got {value}")
        records = read_jsonl(files.eval_file)[: files.limit]
        transformers_logging.set_verbosity_error()
        transformers_logging.disable_progress_bar()
        name = model_options.model_name_or_path
        self.model, self.tokenizer = load_model(name, dtype=model_options.dtype)
        check_vocabulary(self.model, self.tokenizer)
        self.model.to(_device())
        self.settings = prompt_options.settings(load_prompt_settings(name), default_max_length(self.model))
        encoder = ExampleEncoder(
            self.tokenizer, self.settings.template, self.settings.max_length, self.settings.max_response_length
        )
        self.records = records
        self.batch_size = files.batch_size
        self.examples: Sequence[EncodedExample] = encoder.encode_all(records, True, files.seed, bar)

    def scores(self) -> Iterator[ExampleScores]:
        pad = self.tokenizer.pad_token_id
        pad = pad if pad is not None else self.tokenizer.eos_token_id
        scored = score_examples(self.model, self.examples, pad or 0, self.batch_size)
        return iter(bar(scored, total=len(self.examples), desc="Scoring"))


def bar(iterable: Any, total: int, desc: str) -> Any:
    """A progress bar on stderr, so that stdout stays a command's result."""
    return tqdm(iterable, total=total, desc=desc, file=sys.stderr)


def _device() -> Any:
    import torch

    return torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
