"""Reads the folders of runs: the log of a training, its evaluation, and the tokens of some examples.

A run is a folder of `nextquill train`, with or without an `evaluation/` in it, or the folder of an evaluation alone. A
missing part is not an error: the run says what it lacks and which command makes it.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nextquill.errors import ArgumentError, RecordError
from nextquill.evaluation.measures import NEW_USERS
from nextquill.evaluation.results import (
    EFFECTS_FILE,
    EVALUATION_FILE,
    EVALUATION_FOLDER,
    EXAMPLES_FILE,
    ITEM_EFFECTS_FILE,
    EvaluatedExample,
    Evaluation,
    ItemEffects,
    MetricValue,
    are_numbers,
    is_number,
    line_index,
    line_tokens,
    read_evaluation,
    read_examples,
    read_item_effects,
)
from nextquill.report.data import TokenEffect
from nextquill.storage.checkpoints import METRICS_FILE, RUN_FILE, STATE_FILE, last_checkpoint
from nextquill.storage.input_files import real_path
from nextquill.storage.json_files import json_object, json_objects
from nextquill.storage.manifests import is_changed

#: The settings of a run of `nextquill popi train`.
POPI_FILE = "popi.json"
_POPI_CONTEXTS = {"none": "none", "signals": "the raw signals", "placebo": "another person's"}
_ACCURACY = "share of pairs"
#: The task of an evaluation by `nextquill popi evaluate`.
POPI = "popi"


@dataclass(frozen=True)
class Training:
    """A trainer's log.

    `log` holds its entries in order, `final` the measures of its last evaluation; `is_finished` is false if the log
    comes from a checkpoint.
    """

    log: Sequence[Mapping[str, Any]]
    final: Mapping[str, float]
    is_finished: bool = True


@dataclass(frozen=True)
class Run:
    """One run; `folder` is as it was given, and `missing` says what the run lacks and how to get it."""

    folder: Path
    label: str
    training: Training | None = None
    evaluation_folder: Path | None = None
    evaluation: Evaluation | None = None
    examples: Sequence[EvaluatedExample] = ()
    missing: Sequence[str] = ()

    @property
    def is_popi(self) -> bool:
        """Whether it is an evaluation of summaries, which has pairs and no responses."""
        return self.evaluation is not None and self.evaluation.task == POPI

    @property
    def metrics(self) -> Mapping[str, MetricValue]:
        """The measures of its evaluation; empty without one."""
        return {} if self.evaluation is None else self.evaluation.metrics

    @property
    def final(self) -> Mapping[str, float]:
        """The measures of its trainer's last evaluation; empty without one."""
        return {} if self.training is None else self.training.final


def read_run(folder: Path, label: str | None = None) -> Run:
    """A run, without the tokens of its examples, which may be many.

    Args:
        folder: the folder of a training run or of an evaluation.
        label: the run's name on the page; the folder's name by default.

    Raises:
        ArgumentError: `folder` holds neither.
        RecordError: one of its files is damaged; the message names file and line.
    """
    if not folder.is_dir():
        raise ArgumentError(f"runs: expected a folder, {folder} is {'a file' if folder.exists() else 'not there'}")
    training = _read_training(folder)
    inside = folder / EVALUATION_FOLDER
    place = next((each for each in (folder, inside) if (each / EVALUATION_FILE).is_file()), None)
    if training is None and place is None and not (folder / RUN_FILE).is_file():
        raise ArgumentError(
            f"runs: {folder} is not a run: it holds neither {METRICS_FILE} of nextquill train nor {EVALUATION_FILE} of "
            "nextquill evaluate"
        )
    label = label or real_path(folder).name
    missing = [] if place == folder else _missing_of_training(folder, training)
    if place is None:
        command = f"nextquill evaluate --model {folder} --eval_file FILE --output_dir {inside}"
        if (folder / POPI_FILE).is_file():
            command = (
                f"nextquill popi evaluate --model {folder} --eval_file FILE --output_file {folder / EVALUATION_FILE}"
            )
        missing.append(f"no evaluation, so no measures with intervals and no examples: {command}")
        return Run(folder, label, training, missing=missing)
    raw = json_object(place / EVALUATION_FILE)
    if "generator" in raw:
        return Run(folder, label, training, place, _popi_evaluation(place / EVALUATION_FILE, raw), missing=missing)
    evaluation = read_evaluation(place)
    examples = read_examples(place) if (place / EXAMPLES_FILE).is_file() else []
    missing += [
        f"no {name} in {place}, so {what}; repeat the same nextquill evaluate with --overwrite to write it"
        for name, what in ((EXAMPLES_FILE, "no texts and no paired tests"), (EFFECTS_FILE, "no coloured tokens"))
        if not (place / name).is_file()
    ]
    if not (place / ITEM_EFFECTS_FILE).is_file():
        missing.append("no effects of single history items: nextquill evaluate --item_effects 20 measures them")
    return Run(folder, label, training, place, evaluation, examples, missing)


def _popi_evaluation(path: Path, raw: Mapping[str, Any]) -> Evaluation:
    """The result of `nextquill popi evaluate`: accuracy under each context, and what the summary adds to it."""
    if is_changed(raw):
        raise RecordError(f"{path}: damaged or changed, its digest differs; evaluate again with --overwrite")
    try:
        found = raw["generator"]
        metrics = {
            f"summary_minus_{name}": _metric(
                f"Own summary against {_POPI_CONTEXTS[name]}", each["accuracy"], "difference"
            )
            for name, each in found["summary_minus"].items()
        }
        for measure, (label, unit) in {"accuracy": ("Accuracy", _ACCURACY), "margin": ("Margin r", "nats")}.items():
            for name, each in found["contexts"].items():
                text = f"{label}, {_POPI_CONTEXTS.get(name, 'own summary')}"
                metrics[f"{measure}_{name}"] = _metric(text, each[measure], "value", unit, better=True)
        metrics["users"] = MetricValue("users", float(found["users"]))
        if raw.get(NEW_USERS) is not None:
            metrics[NEW_USERS] = MetricValue("users never trained on", float(raw[NEW_USERS]))
        pairs = int(found["pairs"])
        level = raw["settings"].get("level", 0.95)
        return Evaluation(raw["model"], f"{pairs} pairs", pairs, POPI, level, raw["settings"], metrics)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise RecordError(f"{path}: not an evaluation of POPI: {error!r}") from error


def _metric(
    label: str, raw: Mapping[str, Any], value: str, unit: str = "of accuracy", *, better: bool | None = None
) -> MetricValue:
    return MetricValue(label, float(raw[value]), raw["low"], raw["high"], unit, better)


def labels(folders: Sequence[Path]) -> list[str]:
    """A name for each folder that sets it apart: as few of the last parts of its path as that takes."""
    parts = [real_path(folder).parts for folder in folders]
    # An evaluation's folder is named after its run.
    parts = [part[:-1] if part[-1] == EVALUATION_FOLDER and len(part) > 2 else part for part in parts]
    depth = 1
    while depth < max(map(len, parts)) and len({part[-depth:] for part in parts}) < len(set(parts)):
        depth += 1
    return ["/".join(part[-depth:]) for part in parts]


def _read_training(folder: Path) -> Training | None:
    """The log of a finished run, or of the last checkpoint of an unfinished one; None if there is neither."""
    path = folder / METRICS_FILE
    if path.is_file():
        raw = json_object(path)
        final = raw.get("eval", {})
        if not isinstance(final, dict):
            raise RecordError(f"{path}: field 'eval': expected an object, got {type(final).__name__}")
        return Training(_log(path, raw), {name: float(value) for name, value in final.items() if is_number(value)})
    checkpoint = last_checkpoint(folder)
    if checkpoint is None or not (path := checkpoint / STATE_FILE).is_file():
        return None
    return Training(_log(path, json_object(path)), {}, is_finished=False)


def read_tokens(run: Run, indices: Collection[int]) -> dict[int, list[TokenEffect]]:
    """The response tokens of some examples with their probabilities; nothing if the run has no such file."""
    if run.evaluation_folder is None or not (run.evaluation_folder / EFFECTS_FILE).is_file():
        return {}
    lines = json_objects(run.evaluation_folder / EFFECTS_FILE)
    return {raw["index"]: _tokens(raw, where) for where, raw in lines if line_index(raw, where) in indices}


def read_items(run: Run) -> dict[int, ItemEffects]:
    """The item effects of the examples that they were measured for, by index."""
    lines = [] if run.evaluation_folder is None else read_item_effects(run.evaluation_folder)
    return {line.index: line for line in lines}


def _missing_of_training(folder: Path, training: Training | None) -> list[str]:
    if training is None:
        return ["no log of its training yet, so no curves"]
    if training.is_finished:
        return []
    resume = f"nextquill train --output_dir {folder} --resume_from_checkpoint true, with its other flags, resumes it"
    return [f"no {METRICS_FILE}: its training has not finished, the curves end at its last checkpoint; {resume}"]


def _log(path: Path, raw: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    log = raw.get("log_history")
    if not isinstance(log, list) or not all(isinstance(entry, dict) for entry in log):
        raise RecordError(f"{path}: field 'log_history': expected a list of objects")
    for position, entry in enumerate(log):
        if not is_number(entry.get("step")):
            raise RecordError(f"{path}: field 'log_history', entry {position}: expected a number 'step'")
    return log


def _tokens(raw: Mapping[str, Any], where: str) -> list[TokenEffect]:
    texts = line_tokens(raw, where)
    names = ["nll_factual", "nll_counterfactual", *(["nll_placebo"] if "nll_placebo" in raw else [])]
    columns = [_probabilities(raw.get(name), name, len(texts), where) for name in names]
    return [TokenEffect(text, *values) for text, *values in zip(texts, *columns, strict=True)]


def _probabilities(nlls: Any, name: str, count: int, where: str) -> Iterator[float]:
    if not are_numbers(nlls, count):
        raise RecordError(f"{where}: field '{name}': expected {count} numbers, one per token")
    return (math.exp(-max(0.0, nll)) if math.isfinite(nll) else math.nan for nll in nlls)
