"""An evaluation of a tiny model on a few records, for several tests."""

from __future__ import annotations

import json

import numpy as np

from nextquill.data import load_records
from nextquill.evaluation.evaluate import evaluate_model
from nextquill.evaluation.options import EvaluationOptions
from nextquill.evaluation.results import MANIFEST_FIELDS
from nextquill.evaluation.token_measures import CONFIDENCE_BINS, TEMPERATURES
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


def without_manifest(folder):
    """Make a folder like one of an earlier version, whose files may be edited."""
    path = folder / "evaluation.json"
    raw = json.loads(path.read_text())
    path.write_text(json.dumps({name: value for name, value in raw.items() if name not in MANIFEST_FIELDS}))
    return folder


def made_up_lines(count=40, seed=0):
    """Lines of `effects.jsonl` with random scores."""
    rng, lines = np.random.default_rng(seed), []
    for index in range(count):
        size = int(rng.integers(1, 9))
        confidence = rng.uniform(0.01, 1.0, size).round(6)
        nll = rng.uniform(0.0, 5.0, size)
        lines.append(
            {
                "index": index,
                "token_ids": [1] * size,
                "nll_factual": nll.tolist(),
                "nll_counterfactual": (nll + rng.normal(0, 1, size)).tolist(),
                "nll_placebo": (nll + rng.normal(0.5, 1, size)).tolist(),
                "top1": (rng.random(size) < confidence**2).astype(int).tolist(),
                "confidence": confidence.tolist(),
                "nll_by_temperature": [float((nll / t + 2 * t).sum().round(6)) for t in TEMPERATURES],
            }
        )
    lines[0]["confidence"][0] = 1.0
    lines[1]["confidence"][0] = 2 / CONFIDENCE_BINS  # the upper end of its bin
    return lines


def lines_of(folder):
    """The lines of a folder's `effects.jsonl`."""
    return [json.loads(line) for line in (folder / "effects.jsonl").read_text().splitlines()]
