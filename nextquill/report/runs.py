"""Reading what a run left behind: the log of its training, its evaluation, and the tokens of some examples.

A run is the folder of `nextquill train`, with or without an `evaluation/` in it, or the folder of an evaluation alone.
What is not there is none's mistake: the run says what it lacks and which command makes it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nextquill.errors import ArgumentError, RecordError
from nextquill.evaluation.results import (
    EFFECTS_FILE,
    EVALUATION_FILE,
    EXAMPLES_FILE,
    ITEM_EFFECTS_FILE,
    EvaluatedExample,
    Evaluation,
    ItemEffects,
    json_objects,
    read_evaluation,
    read_examples,
    read_item_effects,
)
from nextquill.report.data import LeftOutItem, TokenEffect

EVALUATION_FOLDER = "evaluation"
METRICS_FILE = "metrics.json"
_STATE_FILE = "trainer_state.json"
_RUN_FILE = "nextquill_run.json"


@dataclass(frozen=True)
class Training:
    """What the trainer logged.

    `log` are its entries in order, `final` the last evaluation's measures; `is_finished` is false where only a
    checkpoint's log is there.
    """

    log: Sequence[Mapping[str, Any]]
    final: Mapping[str, float]
    is_finished: bool = True


@dataclass(frozen=True)
class Run:
    """One run; `folder` is as it was given, and `missing` says what it lacks and how to get it."""

    folder: Path
    label: str
    training: Training | None = None
    evaluation_folder: Path | None = None
    evaluation: Evaluation | None = None
    examples: Sequence[EvaluatedExample] = ()
    missing: Sequence[str] = ()


def read_run(folder: Path, label: str | None = None) -> Run:
    """A run, without the tokens of its examples, which may be many.

    Args:
        folder: of a training run, or of an evaluation.
        label: what the run is called; the folder's name by default.

    Raises:
        ArgumentError: `folder` holds neither.
        RecordError: one of its files is damaged; the message names file and line.
    """
    if not folder.is_dir():
        raise ArgumentError(f"runs: expected a folder, {folder} is {'a file' if folder.exists() else 'not there'}")
    training = read_training(folder)
    inside = folder / EVALUATION_FOLDER
    place = next((each for each in (folder, inside) if (each / EVALUATION_FILE).is_file()), None)
    if training is None and place is None and not (folder / _RUN_FILE).is_file():
        raise ArgumentError(
            f"runs: {folder} is no run: it holds neither {METRICS_FILE} of nextquill train nor {EVALUATION_FILE} of "
            "nextquill evaluate"
        )
    label = label or folder.resolve().name
    missing = [] if place == folder else _missing_of_training(folder, training)
    if place is None:
        missing.append(
            "no evaluation, so no measures with intervals and no examples: "
            f"nextquill evaluate --model_name_or_path {folder} --eval_file FILE --output_dir {inside}"
        )
        return Run(folder, label, training, missing=missing)
    evaluation = read_evaluation(place)
    examples = _read_examples(place) if (place / EXAMPLES_FILE).is_file() else []
    again = "; the same nextquill evaluate with --overwrite writes it anew"
    missing += [
        f"no {name} in {place}, so {what}{again}"
        for name, what in ((EXAMPLES_FILE, "no texts and no paired tests"), (EFFECTS_FILE, "no coloured tokens"))
        if not (place / name).is_file()
    ]
    if not (place / ITEM_EFFECTS_FILE).is_file():
        missing.append("no effects of single history items: nextquill evaluate --item_effects 20 measures them")
    return Run(folder, label, training, place, evaluation, examples, missing)


def labels(folders: Sequence[Path]) -> list[str]:
    """A name for each folder that sets it apart: as much of the end of its path as that takes."""
    parts = [folder.resolve().parts for folder in folders]
    # An evaluation's folder is called by its run.
    parts = [part[:-1] if part[-1] == EVALUATION_FOLDER and len(part) > 2 else part for part in parts]
    depth = 1
    while depth < max(map(len, parts)) and len({part[-depth:] for part in parts}) < len(set(parts)):
        depth += 1
    return ["/".join(part[-depth:]) for part in parts]


def read_training(folder: Path) -> Training | None:
    """The log of a finished run, or of the last checkpoint of an unfinished one; None where there is neither.

    Raises:
        RecordError: the file is damaged.
    """
    path = folder / METRICS_FILE
    if path.is_file():
        raw = _json_object(path)
        return Training(_log(path, raw), _numbers(path, "eval", raw.get("eval", {})))
    states = [each for each in folder.glob(f"checkpoint-*/{_STATE_FILE}") if each.parent.name[11:].isdigit()]
    if not states:
        return None
    path = max(states, key=lambda each: int(each.parent.name[11:]))
    return Training(_log(path, _json_object(path)), {}, is_finished=False)


def read_tokens(run: Run, indices: Collection[int]) -> dict[int, list[TokenEffect]]:
    """The response tokens of some examples with their probabilities; none where the run has no such file.

    Raises:
        RecordError: a line is damaged.
    """
    if run.evaluation_folder is None or not (run.evaluation_folder / EFFECTS_FILE).is_file():
        return {}
    lines = json_objects(run.evaluation_folder / EFFECTS_FILE)
    return {raw["index"]: _tokens(raw, where) for where, raw in lines if _index(raw, where) in indices}


def read_items(run: Run, indices: Collection[int]) -> dict[int, tuple[list[str], list[LeftOutItem]]]:
    """The response tokens and history items of those of the examples whose item effects were measured.

    Raises:
        RecordError: a line is damaged.
    """
    if run.evaluation_folder is None:
        return {}
    path = run.evaluation_folder / ITEM_EFFECTS_FILE
    found = {}
    for number, line in enumerate(read_item_effects(run.evaluation_folder), start=1):
        where = f"{path} line {number}"
        if _index({"index": line.index}, where) in indices:
            found[line.index] = (_texts(line.tokens, where), _items(line, where))
    return found


def _missing_of_training(folder: Path, training: Training | None) -> list[str]:
    if training is None:
        return ["no log of its training yet, so no curves"]
    if training.is_finished:
        return []
    goes_on = f"nextquill train --output_dir {folder} --resume_from_checkpoint true, with its other flags, goes on"
    return [f"no {METRICS_FILE}: its training has not finished, the curves end at its last checkpoint; {goes_on}"]


def _json_object(path: Path) -> dict[str, Any]:
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RecordError(f"{path}: cannot be read: {error.strerror or error}") from error
    except ValueError as error:
        raise RecordError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(raw, dict):
        raise RecordError(f"{path}: expected an object, got {type(raw).__name__}")
    return raw


def _log(path: Path, raw: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    log = raw.get("log_history")
    if not isinstance(log, list) or not all(isinstance(entry, dict) for entry in log):
        raise RecordError(f"{path}: field 'log_history': expected a list of objects")
    for position, entry in enumerate(log):
        if not _is_number(entry.get("step")):
            raise RecordError(f"{path}: field 'log_history', entry {position}: expected a number 'step'")
    return log


def _numbers(path: Path, name: str, values: Any) -> dict[str, float]:
    if not isinstance(values, dict):
        raise RecordError(f"{path}: field '{name}': expected an object, got {type(values).__name__}")
    return {str(key): float(value) for key, value in values.items() if _is_number(value)}


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _read_examples(folder: Path) -> list[EvaluatedExample]:
    seen: set[int] = set()
    examples = read_examples(folder)
    for number, example in enumerate(examples, start=1):
        where = f"{folder / EXAMPLES_FILE} line {number}"
        if _index({"index": example.index}, where) in seen:
            raise RecordError(f"{where}: field 'index': expected each index once, got {example.index} again")
        seen.add(example.index)
        for name in ("user_id", "query", "response"):
            if not isinstance(getattr(example, name), str):
                raise RecordError(f"{where}: field '{name}': expected a string")
        for name, kind in (("generated", str), ("scores", (int, float, type(None)))):
            values = getattr(example, name)
            if not isinstance(values, dict) or not all(isinstance(value, kind) for value in values.values()):
                what = "texts" if name == "generated" else "numbers"
                raise RecordError(f"{where}: field '{name}': expected an object of {what}")
    return examples


def _index(raw: Mapping[str, Any], where: str) -> int:
    index = raw.get("index")
    if not isinstance(index, int) or isinstance(index, bool):
        raise RecordError(f"{where}: field 'index': expected an integer, got {index!r}")
    return index


def _tokens(raw: Mapping[str, Any], where: str) -> list[TokenEffect]:
    texts = _texts(raw.get("tokens"), where)
    names = ["nll_factual", "nll_counterfactual", *(["nll_placebo"] if "nll_placebo" in raw else [])]
    columns = [_probabilities(raw.get(name), name, len(texts), where) for name in names]
    return [TokenEffect(text, *values) for text, *values in zip(texts, *columns, strict=True)]


def _texts(texts: Any, where: str) -> list[str]:
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise RecordError(f"{where}: field 'tokens': expected a list of strings")
    return texts


def _probabilities(nlls: Any, name: str, count: int, where: str) -> Iterator[float]:
    if not isinstance(nlls, list) or len(nlls) != count or not all(map(_is_number, nlls)):
        raise RecordError(f"{where}: field '{name}': expected {count} numbers, one a token")
    return (math.exp(-max(0.0, nll)) if math.isfinite(nll) else math.nan for nll in nlls)


def _items(line: ItemEffects, where: str) -> list[LeftOutItem]:
    if not isinstance(line.items, list) or not all(isinstance(item, dict) for item in line.items):
        raise RecordError(f"{where}: field 'items': expected a list of objects")
    if not isinstance(line.effects, list) or len(line.effects) != len(line.items):
        raise RecordError(f"{where}: field 'effects': expected a list for each of {len(line.items)} items")
    count = len(line.tokens)
    for row in line.effects:
        if not isinstance(row, list) or len(row) != count or not all(map(_is_number, row)):
            raise RecordError(f"{where}: field 'effects': expected {count} numbers for each item, one a token")
    return [
        LeftOutItem(str(item.get("title") or ""), str(item.get("text") or ""), effects)
        for item, effects in zip(line.items, line.effects, strict=True)
    ]
