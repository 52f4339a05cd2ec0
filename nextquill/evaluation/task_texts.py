"""A task on some records: the references of its answers, and the measures of the texts generated for them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from nextquill.data import Record
from nextquill.errors import ArgumentError, RecordError
from nextquill.evaluation.measures import PROMPTS, LabelledScores, measure_name
from nextquill.evaluation.metrics import METRICS, compute
from nextquill.evaluation.options import EvaluationOptions
from nextquill.evaluation.predictions import Id, is_id, write_predictions
from nextquill.evaluation.preferences import has_pair
from nextquill.evaluation.tasks import TASKS, Task


@dataclass(frozen=True)
class TaskTexts:
    """A task on some records.

    Attributes:
        task: the task.
        metrics: names of the metrics of generated texts; empty if nothing is generated.
        branches: the branches whose prompts texts are generated from.
        references: the right text of each record that texts are generated for.
        ids: those records' names in the task's prediction files; None if it has no such files, or a record has no `id`.
    """

    task: Task
    metrics: tuple[str, ...]
    branches: tuple[str, ...]
    references: list[str]
    ids: list[Id] | None = None

    @classmethod
    def of(cls, records: Sequence[Record], options: EvaluationOptions) -> TaskTexts:
        """The task that the options name, on these records.

        Raises:
            RecordError: a record has no answer that the task can score.
            BackendUnavailableError: a library that a metric needs is not installed.
        """
        task, metrics = TASKS[options.task], options.text_metrics()
        if not task.generates:
            for index, record in enumerate(records):
                if not has_pair(record, index):
                    problem = f"{task.name} needs it, with 'rejected'; got none"
                    raise RecordError(f"record {index}: field 'chosen': {problem}", argument="records")
        if not (metrics and options.generate_branches):
            return cls(task, (), (), [])
        try:
            shown = records[: options.generate_limit]
            references = [task.read_reference(record.response, f"record {i}") for i, record in enumerate(shown)]
            # Scoring empty answers finds references that cannot be scored, before hours of generation.
            compute(metrics, references, [""] * len(references), labels=task.labels)
        except ArgumentError as error:
            raise RecordError(str(error), argument=error.argument or "records") from error
        return cls(task, metrics, options.generate_branches, references, _ids(task, shown))

    def measures(self, generated: Sequence[Mapping[str, str]]) -> dict[str, LabelledScores]:
        """Measures of every record's generated texts, which are given by branch."""
        measures = dict[str, LabelledScores]()
        for branch in self.branches:
            members = [index for index, texts in enumerate(generated) if branch in texts]
            right = [self.references[index] for index in members]
            texts = [generated[index][branch] for index in members]
            for kind, scores in compute(self.metrics, right, texts, labels=self.task.labels).items():
                metric, name = METRICS[kind], measure_name(kind, branch)
                label = f"{metric.label}, generated {PROMPTS[branch]}"
                better = metric.higher_is_better if branch == "factual" else None
                own = None if scores.per_example is None else name
                measures[name] = LabelledScores(label, scores, members, metric.unit, better, own)
        return measures

    def write_predictions(self, path: Path, generated: Sequence[Mapping[str, str]]) -> None:
        """Write the texts generated with history as the task's own scorers read them, if the records have ids."""
        if self.ids is not None and "factual" in self.branches:
            texts = [generated[index]["factual"] for index in range(len(self.ids))]
            write_predictions(path, self.task, zip(self.ids, texts, strict=True))


def _ids(task: Task, records: Sequence[Record]) -> list[Id] | None:
    """The records' ids, if all have one and the task has prediction files.

    Raises:
        RecordError: two records have the same id.
    """
    ids = [each for record in records if is_id(each := record.extra.get("id"))]
    if not task.file_names or len(ids) < len(records):
        return None
    first = {each: index for index, each in reversed(list(enumerate(ids)))}
    for index, each in enumerate(ids):
        if first[each] < index:
            problem = f"expected one of its own for {task.name}, got {each!r} again"
            raise RecordError(f"record {index}: field 'id': {problem}", argument="records")
    return ids
