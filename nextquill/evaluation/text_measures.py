"""Metrics of texts that were written for records, whoever wrote them: beside the references, and as whose they are.

    found = text_measures(records, texts)
    found["right_person"].value, found["right_person_reference"].value

The metrics that look for the person are measured on the references too, the people's own texts. Their names then end in
`_reference`. They are the ceiling of a judge, and the usual share of copies.
"""

from __future__ import annotations

from collections.abc import Sequence

from nextquill.data import Record
from nextquill.errors import ArgumentError, RecordError
from nextquill.evaluation.metrics import METRICS, Authors, MetricScores, compute
from nextquill.evaluation.tasks import task_named

#: Stands for the people's own texts where a branch names the prompt of generated ones.
REFERENCE = "reference"


def text_measures(
    records: Sequence[Record],
    texts: Sequence[str],
    metrics: Sequence[str] | None = None,
    *,
    task: str = "text",
    among: Sequence[Record] | None = None,
    seed: int = 42,
) -> dict[str, MetricScores]:
    """Score texts that were written for records, in all metrics of a task.

    Args:
        records: the records.
        texts: a text for each of them.
        metrics: names of metrics, instead of the task's; by default those that look for the person are left out where
            fewer than two people have a history.
        task: name of a task in `nextquill.evaluation.tasks.TASKS`.
        among: records of all people that a judge chooses from; by default `records`. An evaluation of many records
            that generated texts for the first few takes all of them.
        seed: decides, with a record's position, whom a judge chooses from; an evaluation's own `seed`.

    Returns:
        The scores by name, as an evaluation of the same texts has them, with those of the people's own texts.

    Raises:
        ArgumentError: a name is unknown, `texts` and `records` differ in number, or a metric lacks what it needs.
        ArgumentTypeError: a text is not a string.
        RecordError: a response is not an answer of the task.
    """
    known = task_named(task)
    authors = authors_of(records, among=among, seed=seed)
    try:
        references = [known.read_reference(each.response, f"record {i}") for i, each in enumerate(records)]
    except ArgumentError as error:
        raise RecordError(str(error), argument="records") from error
    names = usable(known.metrics, authors) if metrics is None else metrics
    found = compute(names, references, texts, labels=known.labels, authors=authors)
    return found | reference_scores(names, references, authors)


def reference_scores(names: Sequence[str], references: Sequence[str], authors: Authors) -> dict[str, MetricScores]:
    """The people's own texts in those of the named metrics that look for the person, by name."""
    personal = [name for name in names if METRICS[name].needs_authors]
    found = compute(personal, references, references, authors=authors) if personal else {}
    return {f"{name}_{REFERENCE}": scores for name, scores in found.items()}


def usable(names: Sequence[str], authors: Authors) -> tuple[str, ...]:
    """Those of the named metrics that these people suffice for."""
    return tuple(name for name in names if authors.are_several or not METRICS[name].needs_authors)


def authors_of(records: Sequence[Record], *, among: Sequence[Record] | None = None, seed: int = 42) -> Authors:
    """The users and histories of records; `among` and `seed` as for `text_measures`."""
    everyone = {user: history_texts(each) for user, each in longest_histories(among or records).items()}
    return Authors([each.user_id for each in records], [history_texts(each) for each in records], everyone, seed)


def longest_histories(records: Sequence[Record]) -> dict[str, Record]:
    """Each user's record with the longest history, the first of several; users without a history are left out."""
    found: dict[str, Record] = {}
    for record in records:
        known = found.get(record.user_id)
        if len(record.history) > (0 if known is None else len(known.history)):
            found[record.user_id] = record
    return found


def history_texts(record: Record) -> tuple[str, ...]:
    """The titles and texts of a record's history, oldest first."""
    return tuple(part for item in record.history for part in (item.title, item.text) if part)
