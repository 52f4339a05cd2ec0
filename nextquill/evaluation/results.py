"""The files of an evaluation's folder: their values, how they are read, and how they are written.

    evaluation.json      an `Evaluation`: which model on which records, and every measure with its interval
    examples.jsonl       one `EvaluatedExample` a line, in the records' order
    effects.jsonl        the effect of every response token, as `nextquill score` writes it, and its calibration
    prose.jsonl          the summed nll of each window of general prose, if a text was given
    item_effects.jsonl   one `ItemEffects` a line, for the examples it was measured for

`evaluation.json` also lists the sizes and digests of the other files, in `files`, and has a `digest` of itself. So a
changed or missing file is found when the folder is read. Folders of earlier versions have neither.

Two evaluations can be compared example by example if they saw the same records, which their digests, `records`, tell.

While an evaluation runs, each of its stages is a file of JSON lines. The same evaluation, started again, resumes from
these lines. The results follow from them alone, so it gives the same bytes as an uninterrupted one.

    evaluation.json.partial   says which evaluation writes here; one process at a time holds it
    NAME.partial              lines of an unfinished stage
    NAME                      a finished stage
    evaluation.json           appears last
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nextquill.errors import OutputExistsError, RecordError
from nextquill.ranks import SharedFile, check_agreement, on_first, partial_file
from nextquill.storage.atomic_files import write_whole
from nextquill.storage.json_files import json_object, json_objects
from nextquill.storage.manifests import difference, is_changed, listed, with_digest
from nextquill.storage.resumable_jsonl import BegunFile

#: The folder of an evaluation within that of its run.
EVALUATION_FOLDER = "evaluation"
EVALUATION_FILE = "evaluation.json"
EXAMPLES_FILE = "examples.jsonl"
EFFECTS_FILE = "effects.jsonl"
ITEM_EFFECTS_FILE = "item_effects.jsonl"
PREFERENCES_FILE, GENERATED_FILE, PREDICTIONS_FILE = "preferences.jsonl", "generated.jsonl", "predictions.json"
JUDGED_FILE, PROSE_FILE = "judged.jsonl", "prose.jsonl"
# Stages whose content ends up in the examples' file.
_PROGRESS = (PREFERENCES_FILE, GENERATED_FILE, JUDGED_FILE)
# All files but `evaluation.json`.
_FILES = (EFFECTS_FILE, ITEM_EFFECTS_FILE, PROSE_FILE, *_PROGRESS, EXAMPLES_FILE, PREDICTIONS_FILE)
#: Fields of `evaluation.json` that tell whether the folder is as it was written: the other files, and its own digest.
MANIFEST_FIELDS = ("files", "digest")

# Settings that change no score, or only decide which scores exist.
_IRRELEVANT = ("resamples", "level", "batch_size", "max_tokens", "attention", "item_effects", "metrics", "task")

Progress = Callable[..., Iterable[Any]]


@dataclass(frozen=True)
class MetricValue:
    """One measure over all examples.

    Args:
        label: its name in tables.
        value: over all examples.
        low, high: its bootstrap interval, or None without one, as for a count.
        unit: such as "nats per token"; empty for shares and scores.
        higher_is_better: None where neither direction is better, as for an effect.
        per_example: the examples' score that the measure is the mean of, by name; None for another kind of measure.
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
    """What was evaluated, and the measures.

    Args:
        model: the model's name or folder as given.
        records: digest of the evaluated records, in their order.
        num_examples: the number of records.
        task: name of a task of `tasks.py`, or None.
        level: confidence level of the intervals.
        settings: prompt settings and generation options.
        metrics: the measures by name, in the order in which tables show them.
    """

    model: str
    records: str
    num_examples: int
    task: str | None = None
    level: float = 0.95
    settings: Mapping[str, Any] = field(default_factory=dict)
    metrics: Mapping[str, MetricValue] = field(default_factory=dict)

    @property
    def template(self) -> Mapping[str, Any]:
        """The settings of the prompts' template; empty where they are unknown."""
        return self.settings.get("template") or {}

    def to_json(self, files: Mapping[str, Any] | None = None) -> str:
        """Return the text of its file; `files` are the entries of a manifest for the other files of its folder."""
        fields = {**dataclasses.asdict(self), **({} if files is None else {"files": dict(files)})}
        return json.dumps(with_digest(fields), indent=2, ensure_ascii=False) + "\n"


def unlike_settings(own: Evaluation, other: Evaluation) -> str:
    """The settings that decide scores and differ, as `name here, there other; ...`; empty if they agree."""

    def deciding(evaluation: Evaluation) -> dict[str, Any]:
        settings = {
            name: value for name, value in evaluation.settings.items() if name not in (*_IRRELEVANT, "template")
        }
        return {**settings, **{f"template {name}": value for name, value in evaluation.template.items()}}

    here, there = deciding(own), deciding(other)
    unlike = [name for name in {**here, **there} if here.get(name) != there.get(name)]
    if None in (here.get("personal_from"), there.get("personal_from")):  # then no measure of both depends on it
        unlike = [name for name in unlike if name != "personal_from"]
    return "; ".join(f"{name} {here.get(name)!r:.40}, there {there.get(name)!r:.40}" for name in unlike)


@dataclass(frozen=True)
class EvaluatedExample:
    """One record, the texts generated for it, and its scores.

    Args:
        index: the record's position.
        user_id, query, response: the record's own.
        history_kept, history_total: the number of history items in the prompt, and in the record.
        generated: generated texts by branch: "factual", "counterfactual" and "placebo", as far as they were asked for.
        scores: scores by name; NLLs and effects are means over the response's tokens, `tokens` is their number. The
            names of generated texts' scores carry the branch, as `rouge_l` (factual) and `rouge_l_counterfactual`.
        copied: where phrases of the record's own history stand, by branch, and in the response as "reference": pairs of
            the first character and the one after the last, in order. Texts without a copied phrase are left out.
        statistics: rows of the measures of `token_measures`, by name: values other than 0 by column.
    """

    index: int
    user_id: str
    query: str
    response: str
    history_kept: int = 0
    history_total: int = 0
    generated: Mapping[str, str] = field(default_factory=dict)
    scores: Mapping[str, float] = field(default_factory=dict)
    copied: Mapping[str, Sequence[Sequence[int]]] = field(default_factory=dict)
    statistics: Mapping[str, Mapping[str, float]] = field(default_factory=dict)


@dataclass(frozen=True)
class ItemEffects:
    """Which items of the history a response depends on: what leaving each one out does to every token.

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


def read_evaluation(folder: Path) -> Evaluation:
    """The evaluation that a folder holds.

    Raises:
        RecordError: there is none, or a file of it is missing, damaged or changed; the message names the file.
    """
    path = folder / EVALUATION_FILE
    raw = json_object(path)
    if (wrong := changed_file(folder, raw)) is not None:
        raise RecordError(f"{folder}: {wrong}; restore the file, or evaluate again with --overwrite")
    raw = {name: value for name, value in raw.items() if name not in MANIFEST_FIELDS}
    try:
        metrics = {name: MetricValue(**value) for name, value in raw.pop("metrics").items()}
        return Evaluation(**raw, metrics=metrics)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise RecordError(f"{path}: not an evaluation: {error}") from error


def changed_file(folder: Path, raw: Mapping[str, Any] | None = None) -> str | None:
    """The first difference between a folder and what its evaluation wrote, in words that name the file.

    `raw` is the content of `evaluation.json`, if it has been read. None if there is no difference, and for a folder of
    an earlier version.
    """
    if raw is None:
        try:
            raw = json_object(folder / EVALUATION_FILE)
        except RecordError as error:
            return str(error)
    if is_changed(raw):
        return f"{EVALUATION_FILE} is damaged or was changed: its digest differs"
    return difference(folder, raw.get("files", {}), EVALUATION_FILE)


def read_examples(folder: Path) -> list[EvaluatedExample]:
    """The examples of an evaluation's folder.

    Raises:
        RecordError: the file is missing, or a line of it is damaged.
    """
    examples = dict[int, EvaluatedExample]()
    for where, raw in json_objects(folder / EXAMPLES_FILE):
        example = _built(EvaluatedExample, raw, where)
        if example.index in examples:
            raise RecordError(f"{where}: field 'index': expected each index once, got {example.index} again")
        for name in ("user_id", "query", "response"):
            if not isinstance(raw[name], str):
                raise RecordError(f"{where}: field '{name}': expected a string")
        for name, kind, what in (("generated", str, "texts"), ("scores", (int, float, type(None)), "numbers")):
            values = getattr(example, name)
            if not isinstance(values, dict) or not all(isinstance(value, kind) for value in values.values()):
                raise RecordError(f"{where}: field '{name}': expected an object of {what}")
        if not isinstance(example.copied, dict) or not all(
            _are_spans(spans, example.response if branch == "reference" else example.generated.get(branch, ""))
            for branch, spans in example.copied.items()
        ):
            raise RecordError(f"{where}: field 'copied': expected an object of places in the texts")
        rows = example.statistics.values() if isinstance(example.statistics, dict) else [None]
        if not all(isinstance(row, dict) and are_numbers([*row.values()], len(row)) for row in rows):
            raise RecordError(f"{where}: field 'statistics': expected an object of rows, each of numbers by column")
        examples[example.index] = example
    return list(examples.values())


def read_item_effects(folder: Path) -> list[ItemEffects]:
    """The item effects of an evaluation's folder; an empty list where the file is missing.

    Raises:
        RecordError: a line is damaged.
    """
    path = folder / ITEM_EFFECTS_FILE
    return [_item_effects(raw, where) for where, raw in json_objects(path)] if path.is_file() else []


def line_index(raw: Mapping[str, Any], where: str) -> int:
    """The record's position that a line of JSON names.

    Raises:
        RecordError: it names none.
    """
    index = raw.get("index")
    if not isinstance(index, int) or isinstance(index, bool):
        raise RecordError(f"{where}: field 'index': expected an integer, got {index!r}")
    return index


def line_tokens(raw: Mapping[str, Any], where: str) -> list[str]:
    """The response's tokens as text that a line of JSON holds.

    Raises:
        RecordError: it holds something else.
    """
    texts = raw.get("tokens")
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise RecordError(f"{where}: field 'tokens': expected a list of strings")
    return texts


def are_numbers(values: Any, count: int) -> bool:
    """Whether a value from JSON is a list of `count` numbers."""
    return isinstance(values, list) and len(values) == count and all(map(is_number, values))


def is_number(value: Any) -> bool:
    """Whether a value from JSON is a number; true and false are not."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def finite(value: float | None) -> float | None:
    """The value, or None if it is not finite, because JSON has no number for that."""
    return value if value is not None and math.isfinite(value) else None


def check_folder(folder: Path, *, overwrite: bool = False) -> None:
    """Refuse a folder that cannot be written into, before any work.

    Raises:
        OutputExistsError: it holds a finished evaluation, or is not a folder.
    """
    if (folder / EVALUATION_FILE).exists() and not overwrite:
        raise OutputExistsError(f"folder: {folder} holds a finished evaluation; give another, or overwrite=True")
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not existing.is_dir():
        raise OutputExistsError(f"folder: expected a folder, {existing} is a file")


class EvaluationFolder(AbstractContextManager["EvaluationFolder"]):
    """A folder that one evaluation writes into. If no line was written, leaving the context restores the folder.

    Args:
        folder: created if it is missing.
        run: the settings that must agree for an evaluation to resume, by name; JSON.
        overwrite: delete the evaluation that is there, finished or not.
        progress: `progress(lines, total=..., initial=..., desc=...)` is iterated instead of the lines; `tqdm` fits.

    Raises:
        OutputExistsError: the folder holds a finished evaluation or a file in the way, or another process writes there.
        CheckpointError: another evaluation was started there; the message names the setting that differs.
    """

    def __init__(
        self, folder: Path, run: Mapping[str, Any], *, overwrite: bool = False, progress: Progress | None = None
    ) -> None:
        check_agreement(run)
        self.folder, self._progress = folder, progress
        self._begun: BegunFile | None = None
        on_first(lambda: self._begin(run, overwrite))

    def _begin(self, run: Mapping[str, Any], overwrite: bool) -> None:
        folder = self.folder
        check_folder(folder, overwrite=overwrite)
        folder.mkdir(parents=True, exist_ok=True)
        self._begun = begun = BegunFile(folder / EVALUATION_FILE, run, overwrite=overwrite, argument="folder")
        try:
            (folder / EVALUATION_FILE).unlink(missing_ok=True)
            if begun.is_new:
                self._clear(overwrite)  # first: files beside a partial file of ours would be taken for ours
                begun.begin()
        except BaseException:
            begun.close(remove=begun.is_new)
            raise

    def __exit__(self, *error: object) -> None:
        if self._begun is not None:
            finished = (self.folder / EVALUATION_FILE).exists()
            self._begun.close(remove=finished or not self._present())

    def stage(
        self, name: str, indices: Sequence[int], make: Callable[[SharedFile], Iterable[Mapping[str, Any]]], desc: str
    ) -> list[dict[str, Any]]:
        """The lines of a stage's file: those already written, and those that `make` yields.

        Args:
            name, desc: of the file, and on the progress bar.
            indices: the indices of all its lines, in the order of the file.
            make: called with the lines already written; yields the other lines, in any order.
        """
        path = self.folder / name
        if indices and not on_first(path.exists):
            with partial_file(path, {}, argument="folder") as partial:
                lines = make(partial)
                if self._progress is not None:
                    lines = self._progress(lines, total=len(indices), initial=len(partial), desc=desc)
                for line in lines:
                    partial.write(line)
                partial.finish(indices)
        return on_first(lambda: [value for _, value in json_objects(path)]) if indices else []

    def finish(self, evaluation: Evaluation, examples: Iterable[EvaluatedExample]) -> None:
        """Write the results; the evaluation itself last."""
        lines = [json.dumps(dataclasses.asdict(example), ensure_ascii=False) + "\n" for example in examples]
        write_whole(self.folder / EXAMPLES_FILE, "".join(lines))
        kept = [name for name in _FILES if name not in _PROGRESS and (self.folder / name).is_file()]
        write_whole(self.folder / EVALUATION_FILE, evaluation.to_json(listed(self.folder, kept)))
        # The first are only needed until now; a killed process may have left the others.
        for path in (*(self.folder / name for name in _PROGRESS), *self.folder.glob("*.jsonl.partial")):
            path.unlink(missing_ok=True)

    def _present(self) -> list[Path]:
        """The files an evaluation has written here, without `evaluation.json` and `evaluation.json.partial`."""
        paths = (self.folder / f"{name}{ending}" for name in _FILES for ending in ("", ".partial"))
        return [path for path in paths if path.exists()]

    def _clear(self, overwrite: bool) -> None:
        for path in self._present():
            if not overwrite:
                raise OutputExistsError(f"folder: {path} exists; give another folder, or overwrite=True")
            path.unlink()


def _item_effects(raw: Mapping[str, Any], where: str) -> ItemEffects:
    line: ItemEffects = _built(ItemEffects, raw, where)
    count = len(line_tokens(raw, where))
    if not isinstance(line.items, list) or not all(isinstance(item, dict) for item in line.items):
        raise RecordError(f"{where}: field 'items': expected a list of objects")
    if not isinstance(line.effects, list) or len(line.effects) != len(line.items):
        raise RecordError(f"{where}: field 'effects': expected a list for each of {len(line.items)} items")
    if not all(are_numbers(row, count) for row in line.effects):
        raise RecordError(f"{where}: field 'effects': expected {count} numbers for each item, one per token")
    return line


def _are_spans(value: Any, text: str) -> bool:
    """Whether a value from JSON is a list of places in a text, one after another."""
    if not isinstance(value, list) or not all(are_numbers(span, 2) for span in value):
        return False
    places = [0, *(place for span in value for place in span), len(text)]
    return all(isinstance(place, int) for place in places) and places == sorted(places)


def _built(kind: Any, raw: Mapping[str, Any], where: str) -> Any:
    """A value of this kind from a line with its fields and an index."""
    line_index(raw, where)
    try:
        return kind(**raw)
    except TypeError as error:
        raise RecordError(f"{where}: not a line of an evaluation: {error}") from error
