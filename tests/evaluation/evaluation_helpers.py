"""An evaluation of a tiny model on a few records, for several tests."""

from __future__ import annotations

from nextquill.data import load_records
from nextquill.evaluation.evaluate import evaluate_model
from nextquill.evaluation.options import EvaluationOptions
from nextquill.models.loading import PromptSettings
from tests.models.model_helpers import TEMPLATE, make_records, word_tokenizer

SETTINGS = PromptSettings(TEMPLATE, 64)
RECORDS = load_records(
    [raw | {"id": str(i), "chosen": "w1 w2", "rejected": "w3 w4 w5"} for i, raw in enumerate(make_records(6, users=3))]
)
FAST = {"max_new_tokens": 3, "resamples": 50}
#: Everything that can be measured.
ALL = {"item_effects": 2, "generate_branches": ("factual", "counterfactual", "placebo"), "task": "lamp_4"}
FILES = {"evaluation.json", "examples.jsonl", "effects.jsonl", "item_effects.jsonl", "predictions.json"}


def evaluate(model, folder, records=RECORDS, *, settings=SETTINGS, progress=None, **options):
    chosen = EvaluationOptions(**{**FAST, **options})
    return evaluate_model(
        model, word_tokenizer(), records, settings, chosen, folder, model_name="tiny", progress=progress
    )


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
