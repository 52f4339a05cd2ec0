"""Run folders as `nextquill train` and `nextquill evaluate` write them, from a seed instead of a model."""

from __future__ import annotations

import dataclasses
import json
import math
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from nextquill.evaluation.results import (
    EFFECTS_FILE,
    EVALUATION_FILE,
    EXAMPLES_FILE,
    ITEM_EFFECTS_FILE,
    EvaluatedExample,
    Evaluation,
    ItemEffects,
    MetricValue,
)

WORDS = (
    "the soup was salty but warm and our waiter naïve café über 東京 ramen 🍜 friendly again I would honestly say "
    "portions small prices fair music loud garden lovely".split()
)
_NATS = "nats per token"


def write_training(folder: Path, *, steps: int = 60, every: int = 2, evals: int = 15, rate: float = 0.03) -> Path:
    """Write a finished training's `metrics.json`."""
    log: list[dict[str, Any]] = []
    draw = random.Random(str(folder.name))
    for step in range(every, steps + 1, every):
        nll = 5 * math.exp(-rate * step) + 2 + draw.gauss(0, 0.08)
        entry = {"loss": nll + 0.1, "nll_factual": nll, "nll_counterfactual": nll + 0.4 + 0.3 * step / steps}
        entry |= {"share_above_threshold": 0.2 * step / steps, "learning_rate": 1e-3 * (1 - step / steps)}
        log.append(entry | {"epoch": step / steps, "step": step})
        if step % evals < every:
            entry = {"eval_loss": nll, "eval_nll_factual": nll + 0.1, "eval_nll_counterfactual": nll + 0.7}
            entry |= {"eval_nll_placebo": nll + 0.4, "eval_effect_placebo": 0.3 * step / steps}
            log.append(entry | {"eval_share_above_threshold": 0.18 * step / steps, "epoch": step / steps, "step": step})
    final = {name: value for name, value in log[-1].items() if name.startswith("eval_")}
    log.append({"train_runtime": 94.2, "train_loss": 4.1, "epoch": 1.0, "step": steps})
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.json").write_text(json.dumps({"log_history": log, "eval": final}), encoding="utf-8")
    return folder


def write_evaluation(
    folder: Path,
    *,
    examples: int = 12,
    tokens: int = 25,
    seed: int = 0,
    gain: float = 0.0,
    items_of: Sequence[int] = (1, 4),
    records: str = "5ca1ab1e",
    users: int = 5,
    text: Callable[[random.Random, int], list[str]] | None = None,
) -> Path:
    """Write an evaluation's folder: equal texts for equal seeds, lower NLLs and better texts for a greater `gain`."""
    folder.mkdir(parents=True, exist_ok=True)
    draw, noise = random.Random(seed), random.Random(f"{seed} {gain}")
    make = text or (lambda r, n: [(" " if i else "") + r.choice(WORDS) for i in range(n)])
    lines, effects, item_lines = [], [], []
    for index in range(examples):
        pieces = make(draw, tokens)
        own, rows = _nlls(draw, noise, len(pieces), gain)
        effects.append({"index": index, "user_id": f"u{index % users}", "history_kept": 4, "tokens": pieces} | rows)
        items = [
            {"title": " ".join(make(draw, 3)), "text": "".join(make(draw, 30)), "timestamp": None} for _ in range(4)
        ]
        response = "".join(pieces)
        generated = {"factual": "".join(make(draw, tokens)), "counterfactual": "".join(make(draw, tokens // 2))}
        scores = own | {
            "rouge_l": min(1.0, 0.2 + gain + draw.random() / 5),
            "rouge_l_counterfactual": draw.random() / 5,
        }
        query = "Write a review of " + "".join(make(draw, 4))
        lines.append(EvaluatedExample(index, f"u{index % users}", query, response, 4, 6, generated, scores))
        if index in items_of:
            matrix = [[round(noise.gauss(0, 0.1) + 2 * (noise.random() > 0.93), 6) for _ in pieces] for _ in items]
            item_lines.append(ItemEffects(index, items, matrix, pieces))
    _write(folder, lines, effects, item_lines, records)
    return folder


def _nlls(
    draw: random.Random, noise: random.Random, count: int, gain: float
) -> tuple[dict[str, float], dict[str, Any]]:
    without = [abs(draw.gauss(2, 1.5)) for _ in range(count)]
    own = [max(0.0, nll - draw.choice((0, 0, 0, 0, 1.5, -0.4)) - gain + noise.gauss(0, 0.02)) for nll in without]
    other = [max(0.0, nll - 0.1 + noise.gauss(0, 0.05)) for nll in without]
    rows = {"nll_factual": own, "nll_counterfactual": without, "nll_placebo": other}

    def mean(values: list[float]) -> float:
        return sum(values) / len(values)

    scores = {f"{name}": mean(values) for name, values in rows.items()} | {"tokens": float(count)}
    scores |= {"effect_logprob": mean(without) - mean(own), "effect_placebo": mean(other) - mean(own)}
    return scores, {name: [round(value, 6) for value in values] for name, values in rows.items()}


def _write(
    folder: Path, examples: list[EvaluatedExample], effects: list[Any], items: list[ItemEffects], records: str
) -> None:
    def mean(name: str) -> float:
        return sum(example.scores[name] for example in examples) / len(examples)

    shown = (
        ("nll_factual", "nll with the user's history", _NATS, False),
        ("nll_counterfactual", "nll without history", _NATS, None),
        ("effect_placebo", "effect against the placebo (another's - own)", _NATS, None),
        ("rouge_l", "ROUGE-L, generated with history", "", True),
        ("rouge_l_counterfactual", "ROUGE-L, generated without history", "", None),
    )
    metrics = {
        name: MetricValue(label, mean(name), mean(name) - 0.05, mean(name) + 0.05, unit, better, name)
        for name, label, unit, better in shown
    }
    metrics["bleu"] = MetricValue("BLEU, generated with history", 12.3, 11.0, 13.4, "of 100", True)
    counts = {"examples": len(examples), "users": len({each.user_id for each in examples}), "tokens": 25}
    metrics |= {name: MetricValue(name, float(count)) for name, count in counts.items()}
    evaluation = Evaluation("runs/model", records, len(examples), "amazon_reviews", metrics=metrics)
    (folder / EVALUATION_FILE).write_text(evaluation.to_json(), encoding="utf-8")
    for name, lines in (
        (EXAMPLES_FILE, [dataclasses.asdict(example) for example in examples]),
        (EFFECTS_FILE, effects),
        (ITEM_EFFECTS_FILE, [dataclasses.asdict(item) for item in items]),
    ):
        text = "".join(json.dumps(line, ensure_ascii=True) + "\n" for line in lines)
        (folder / name).write_text(text, encoding="utf-8")
