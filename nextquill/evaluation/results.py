"""What an evaluation's folder holds, as values that go to JSON and back.

    evaluation.json      an `Evaluation`: which model on which records, and every measure with its interval
    examples.jsonl       an `EvaluatedExample` a line, in the records' order
    effects.jsonl        every response token's effect, the lines of `nextquill score`
    item_effects.jsonl   an `ItemEffects` a line, for the examples it was measured for

Whoever compares two evaluations needs the scores of each example, and whether the two saw the same ones: `records` is a
digest of what was evaluated.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nextquill.errors import RecordError

EVALUATION_FILE = "evaluation.json"
EXAMPLES_FILE = "examples.jsonl"
EFFECTS_FILE = "effects.jsonl"
ITEM_EFFECTS_FILE = "item_effects.jsonl"


@dataclass(frozen=True)
class MetricValue:
    """One measure over all examples.

    Args:
        label: what it is called in tables.
        value: over all examples.
        low, high: its bootstrap interval, or None where there is none, as for a count.
        unit: such as "nats per token"; empty for shares and scores.
        higher_is_better: None where neither is, as for an effect.
        per_example: the name of the examples' score it is the mean of, or None where it is no mean of scores.
    """

    label: str
    value: float
    low: float | None = None
    high: float | None = None
    unit: str = ""
    higher_is_better: bool | None = None
    per_example: str | None = None


@dataclass(frozen=True)
class Evaluation:
    """What was evaluated, and what came out.

    Args:
        model: the model's name or folder as given.
        records: digest of the evaluated records, in their order.
        num_examples: how many there were.
        task: name of a task of `tasks.py`, or None.
        level: confidence level of the intervals.
        settings: prompt settings and generation options.
        metrics: by name, in the order they are shown.
    """

    model: str
    records: str
    num_examples: int
    task: str | None = None
    level: float = 0.95
    settings: Mapping[str, Any] = field(default_factory=dict)
    metrics: Mapping[str, MetricValue] = field(default_factory=dict)

    def to_json(self) -> str:
        """Return the text of its file."""
        return json.dumps(dataclasses.asdict(self), indent=2, ensure_ascii=False) + "\n"


@dataclass(frozen=True)
class EvaluatedExample:
    """One record, what was generated for it, and its scores.

    Args:
        index: the record's position.
        user_id, query, response: the record's own.
        history_kept, history_total: items in the prompt, and in the record.
        generated: generated texts by branch: "factual", "counterfactual" and "placebo", as far as they were asked for.
        scores: by name; `nll_*` and effects are means over the response's tokens, `tokens` is their number. Scores of
            generated texts carry their branch, as `rouge_l` (factual) and `rouge_l_counterfactual`.
    """

    index: int
    user_id: str
    query: str
    response: str
    history_kept: int = 0
    history_total: int = 0
    generated: Mapping[str, str] = field(default_factory=dict)
    scores: Mapping[str, float] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return its line of the file, as JSON holds it."""
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class ItemEffects:
    """Which item of the history a response depends on: what leaving each one out does to every token.

    Args:
        index: the record's position.
        items: the history items of the prompt, oldest first: `title`, `text`, `timestamp`.
        effects: `[items][tokens]`, nll without the item minus nll with all, in nats.
        tokens: the response's tokens as text.
    """

    index: int
    items: Sequence[Mapping[str, Any]]
    effects: Sequence[Sequence[float]]
    tokens: Sequence[str]

    def to_dict(self) -> dict[str, Any]:
        """Return its line of the file, as JSON holds it."""
        return dataclasses.asdict(self)


def read_evaluation(folder: Path) -> Evaluation:
    """The evaluation that a folder holds.

    Raises:
        RecordError: there is none, or it is damaged.
    """
    path = folder / EVALUATION_FILE
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        metrics = {name: MetricValue(**value) for name, value in raw.pop("metrics").items()}
        return Evaluation(**raw, metrics=metrics)
    except OSError as error:
        raise RecordError(f"{path}: cannot be read: {error.strerror or error}") from error
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise RecordError(f"{path}: not an evaluation: {error}") from error


def read_examples(folder: Path) -> list[EvaluatedExample]:
    """The examples of an evaluation's folder.

    Raises:
        RecordError: the file is missing, or a line of it is damaged.
    """
    return [_built(EvaluatedExample, raw, where) for where, raw in json_objects(folder / EXAMPLES_FILE)]


def read_item_effects(folder: Path) -> list[ItemEffects]:
    """The item effects of an evaluation's folder; none where the file is not there.

    Raises:
        RecordError: a line is damaged.
    """
    path = folder / ITEM_EFFECTS_FILE
    if not path.is_file():
        return []
    return [_built(ItemEffects, raw, where) for where, raw in json_objects(path)]


def json_objects(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Where each line of a JSONL file stands, and its object.

    Raises:
        RecordError: the file cannot be read, or a line is no JSON object.
    """
    try:
        with path.open(encoding="utf-8") as stream:
            for number, line in enumerate(stream, start=1):
                where = f"{path} line {number}"
                try:
                    value = json.loads(line)
                except ValueError as error:
                    raise RecordError(f"{where}: not valid JSON: {error}") from error
                if not isinstance(value, dict):
                    raise RecordError(f"{where}: expected an object, got {type(value).__name__}")
                yield where, value
    except OSError as error:
        raise RecordError(f"{path}: cannot be read: {error.strerror or error}") from error


def finite(value: float | None) -> float | None:
    """The value, or None for what JSON has no number for."""
    return value if value is not None and math.isfinite(value) else None


def _built(kind: Any, raw: Mapping[str, Any], where: str) -> Any:
    try:
        return kind(**raw)
    except TypeError as error:
        raise RecordError(f"{where}: not a line of an evaluation: {error}") from error
