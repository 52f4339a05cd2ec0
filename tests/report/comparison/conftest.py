"""Finished runs with planted scores, and a tiny model on a few records, for tests that train."""

import dataclasses
import json
import random

import pytest

from nextquill.comparison.arms import ARMS, BASE
from nextquill.comparison.folder import RunRecord, run_folder, write_record
from nextquill.evaluation.results import (
    EVALUATION_FILE,
    EVALUATION_FOLDER,
    EXAMPLES_FILE,
    EvaluatedExample,
    Evaluation,
    MetricValue,
)

NUM_EXAMPLES, NUM_USERS = 40, 20
SCORES = {"nll_factual": 3.0, "nll_counterfactual": 3.5, "effect_logprob": 0.5, "effect_placebo": 0.2, "rouge_l": 0.3}
BETTER = {"nll_factual": False, "rouge_l": True}


def plant(folder, shifts=None, *, seeds=(0, 1), users=NUM_USERS, noise=0.01, records="r", costs=None):
    """Write finished runs whose scores differ from SFT's by `shifts`: arm → measure → number or function of the seed.

    Scores are `SCORES` plus noise that depends only on seed and example, plus an arm's own noise of size `noise`.
    """
    for place, name in enumerate((BASE, *(shifts or {}))):
        for seed in seeds:
            moved = {} if name == BASE else (shifts or {})[name]
            moved = {key: shift(seed) if callable(shift) else shift for key, shift in moved.items()}
            own = noise if any(moved.values()) else 0.0
            shared, private = random.Random(seed), random.Random(100 * place + seed)
            rows = []
            for index in range(NUM_EXAMPLES):
                row = {name: value + shared.gauss(0, 0.3) for name, value in SCORES.items()}
                row = {name: value + moved.get(name, 0.0) + private.gauss(0, own) for name, value in row.items()}
                rows.append(row | {"tokens": float(3 + index % 7)})
            write_run(folder, name, seed, rows, users=users, records=records, **(costs or {}).get(name, {}))
    return folder


def write_run(folder, name, seed, rows, *, users=NUM_USERS, records="r", **cost):
    """Write one finished run, with token means of NLLs and effects, and a corpus measure."""
    place = run_folder(folder, name, seed)
    evaluation = place / EVALUATION_FOLDER
    evaluation.mkdir(parents=True)
    total = sum(row["tokens"] for row in rows)
    metrics = {}
    for key in SCORES:
        mean = sum(row[key] for row in rows) / len(rows)
        weighted = sum(row[key] * row["tokens"] for row in rows) / total
        over_examples = MetricValue(f"label of {key}", mean, mean, mean, "", BETTER.get(key), key)
        if key == "rouge_l":
            metrics[key] = over_examples
        else:
            metrics[key] = MetricValue(
                f"label of {key}", weighted, weighted, weighted, "nats per token", BETTER.get(key)
            )
            metrics[f"{key}_per_example"] = over_examples
    metrics["bleu"] = MetricValue("BLEU", 10.0 + seed, 9.0, 12.0, "", True)
    metrics["examples"] = MetricValue("examples", float(len(rows)))
    examples = [EvaluatedExample(index, f"u{index % users}", "q", "r", scores=row) for index, row in enumerate(rows)]
    (evaluation / EVALUATION_FILE).write_text(Evaluation(name, records, len(rows), metrics=metrics).to_json())
    lines = [json.dumps(dataclasses.asdict(example)) + "\n" for example in examples]
    (evaluation / EXAMPLES_FILE).write_text("".join(lines))
    usual = {"steps": 10, "examples": 40, "seconds": 5.0, "wall_seconds": 9.0, "learning_rate": 1e-3}
    usual = {"order": f"order {seed}", **usual} if name != BASE else {"wall_seconds": 2.0}
    write_record(place, RunRecord(**{"arm": name, "seed": seed, "start": f"start {seed}", **usual, **cost}))


def arms(*names):
    return [ARMS[name] if name in ARMS else dataclasses.replace(ARMS["sft"], name=name, label=name) for name in names]


@pytest.fixture
def planted():
    return plant


@pytest.fixture
def named_arms():
    return arms
