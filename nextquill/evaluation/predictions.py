"""Prediction files as LaMP's and LongLaMP's own scorers read them, written and scored.

    {"task": "LaMP_4", "golds": [{"id": "310", "output": "a headline"}, …]}

Predictions and right answers have the same form, under the same key (README.md of github.com/LaMP-Benchmark/LaMP and of
github.com/LongLaMP-benchmark/LongLaMP-Benchmark). A scorer takes two files that name the same task and the same ids.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

from nextquill.errors import ArgumentError, ArgumentTypeError, RecordError
from nextquill.evaluation.metrics import MetricScores
from nextquill.evaluation.tasks import Task, task_of_file
from nextquill.storage.atomic_files import write_whole
from nextquill.storage.json_files import json_object

#: The scorer compares ids as they are: "310" is not 310.
Id = str | int


@dataclass(frozen=True)
class PredictionFile:
    """The content of a file of predictions or of right answers.

    Args:
        task: as the file names it.
        outputs: text by id, in the file's order.
    """

    task: str
    outputs: dict[Id, str]


def write_predictions(path: Path, task: Task, predictions: Iterable[tuple[Id, str]]) -> None:
    """Write the file whole, or leave the one that was there.

    Args:
        path: the file, which is replaced.
        task: a task with such files.
        predictions: id and text of every example.

    Raises:
        ArgumentTypeError: an id or a text has the wrong type.
        ArgumentError: an id is given twice, or the task has no such files.
    """
    if not task.file_names:
        raise ArgumentError(f"task: {task.name} has no prediction file of its own")
    outputs: dict[Id, str] = {}
    for k, (key, text) in enumerate(predictions):
        if not is_id(key):
            raise ArgumentTypeError(f"predictions[{k}]: expected a string or an integer as id, got {key!r}")
        if not isinstance(text, str):
            raise ArgumentTypeError(f"predictions[{k}]: expected a string as text, got {type(text).__name__}")
        if key in outputs:
            raise ArgumentError(f"predictions[{k}]: id {key!r} comes twice")
        outputs[key] = text
    golds = [{"id": key, "output": text} for key, text in outputs.items()]
    write_whole(path, json.dumps({"task": task.file_names[0], "golds": golds}, indent=1) + "\n")


def read_predictions(path: Path) -> PredictionFile:
    """A file of predictions or of right answers.

    Raises:
        RecordError: it cannot be read, does not have the form, or has an id twice; the message names file and entry.
    """
    raw = json_object(path)
    if not isinstance(raw.get("task"), str) or not isinstance(raw.get("golds"), list):
        raise RecordError(f"{path}: expected an object with a string 'task' and a list 'golds'")
    outputs: dict[Id, str] = {}
    for k, entry in enumerate(raw["golds"]):
        key, text = _entry(entry, f"{path}: golds[{k}]")
        if key in outputs:
            raise RecordError(f"{path}: golds[{k}]: id {key!r} comes twice")
        outputs[key] = text
    return PredictionFile(raw["task"], outputs)


def score_predictions(predictions: Path, golds: Path, task: Task | None = None) -> dict[str, MetricScores]:
    """The scores of a prediction file, in its task's metrics and in the order of the right answers.

    Args:
        predictions, golds: the two files.
        task: the task to score it as, if it is not the one that the files name.

    Raises:
        RecordError: a file is damaged, or the files are of different tasks or ids.
        ArgumentError: no task has the files' name, or a right answer is not one of the task's.
    """
    given, right = read_predictions(predictions), read_predictions(golds)
    if given.task != right.task:
        raise RecordError(f"{predictions}: expected predictions of {right.task!r} as in {golds}, got {given.task!r}")
    _check_ids(predictions, given.outputs, golds, right.outputs)
    task = task or task_of_file(right.task)
    references = [task.read_reference(text, f"{golds}: id {key!r}") for key, text in right.outputs.items()]
    return task.compute(references, [given.outputs[key] for key in right.outputs])


def is_id(value: object) -> TypeGuard[Id]:
    """Whether a value can be an example's id."""
    return isinstance(value, (str, int)) and not isinstance(value, bool)


def _entry(entry: Any, where: str) -> tuple[Id, str]:
    if not isinstance(entry, dict):
        raise RecordError(f"{where}: expected an object, got {type(entry).__name__}")
    for field in ("id", "output"):
        if field not in entry:
            raise RecordError(f"{where}: field {field!r} is missing")
    key, text = entry["id"], entry["output"]
    if not is_id(key):
        raise RecordError(f"{where}: field 'id': expected a string or an integer, got {type(key).__name__}")
    # A rating may have been written as a number; LaMP's scorer turns it into a string as well.
    if not isinstance(text, (str, int, float)) or isinstance(text, bool):
        raise RecordError(f"{where}: field 'output': expected a string, got {type(text).__name__}")
    return key, str(text)


def _check_ids(name: Path, given: Collection[Id], other: Path, wanted: Collection[Id]) -> None:
    for keys, known, what in (
        (wanted, set(given), f"no prediction for id {{!r}} of {other}"),
        (given, set(wanted), f"id {{!r}} is not in {other}"),
    ):
        strange = [key for key in keys if key not in known]
        if strange:
            more = f" and {len(strange) - 1} more" if len(strange) > 1 else ""
            raise RecordError(f"{name}: {what.format(strange[0])}{more}")
