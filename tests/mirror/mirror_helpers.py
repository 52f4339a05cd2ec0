"""Trainers of MIRROR on tiny models, and responses that are known beforehand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from nextquill.generation import Prompt
from nextquill.generation.rollouts import Rollouts, Sample
from nextquill.mirror import MirrorTrainer
from tests.models import model_helpers
from tests.models.model_helpers import make_args, make_records, tiny_model, word_tokenizer

REFERENCE = " w79 {response}"
TEMPLATE = replace(model_helpers.TEMPLATE, order="history_first")


def make_trainer(folder: Any, model: Any = None, records: Any = None, **options: Any) -> MirrorTrainer:
    names = (
        "eval_dataset",
        "rollouts",
        "loss",
        "max_tokens",
        "attention",
        "examples_per_user",
        "temperature",
        "max_length",
        "max_new_tokens",
        "num_rollouts",
        "log_samples_every",
        "callbacks",
        "processing_class",
        "max_response_length",
    )
    given = {name: options.pop(name) for name in names if name in options}
    usual = {"processing_class": word_tokenizer(), "max_new_tokens": 6}
    return MirrorTrainer(
        tiny_model() if model is None else model,
        make_args(folder, **options),
        train_dataset=make_records() if records is None else records,
        template=TEMPLATE,
        reference=REFERENCE,
        **{**usual, **given},
    )


def known_response(prompt: Sequence[int]) -> list[int]:
    """Three tokens that depend on the prompt."""
    return [10 + prompt[-2] % 7, 20, 1]


class Fixed(Rollouts):
    """Responses of known tokens."""

    def sample(self, prompts: Sequence[Prompt]) -> list[Sample]:
        return [Sample(known_response(prompt.ids), "w4 w14", True) for prompt in prompts]
