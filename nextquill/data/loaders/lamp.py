"""Reads LaMP 1 to 7 (Salemi et al., arXiv 2304.11406), both by users and by time.

A task comes as two files: `*_questions.json`, a list of {id, input, profile}, and `*_outputs.json`,
{task, golds: [{id, output}]}. The query is the question's input, and the response is its output. A past item with a
label by the user is worded as in the benchmark's own prompts, as the label would be lost otherwise:

| task | keys of an item | text | title |
|---|---|---|---|
| 1 citations, 5 paper titles | title, abstract | the abstract | title |
| 2 movies | tag, description | the tag for the movie: "…" is "tag" | |
| 2 news, the first release | title, text, category | the category for the article: "…" is "category" | title |
| 3 products | text, score | score is the score for "…" | |
| 4 headlines | title, text | the text | title |
| 6 e-mails | text, title or subject | the text | title or subject |
| 7 tweets | text | the text | |

The releases by time have a `date` for every item. LaMP has no user ids, so each question counts as one user, named by
the question's id unless it has a `user_id`. `extra` keeps `id` and `task`, which the benchmark's evaluation needs.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping

from nextquill.data.lines import HUB, opened, parsed_json
from nextquill.data.loaders.row import Row
from nextquill.data.loaders.source import Place, Source
from nextquill.data.records import Record
from nextquill.data.times import Clock
from nextquill.errors import ArgumentError, RecordError


def load_lamp(source: Source, *, outputs: Place | None = None, task: str | None = None) -> Iterator[tuple[str, Record]]:
    """Yield LaMP's questions as records, with outputs from that file, or their own `output` if there is none."""
    golds: Mapping[str, str] | None = None
    if outputs is not None:
        found, golds = _golds(outputs)
        task = task or found
    return source.each(lambda row: _record(row, golds, task))


def _record(row: Row, golds: Mapping[str, str] | None, task: str | None) -> Record:
    identity = row.user_id("id")
    query = row.text("input")
    if task is not None and task.endswith("6") and query and not any(map(str.isspace, query)):
        raise row.error("input", f"expected an e-mail, got the id {query!r}; LaMP's own script fills in the texts")
    if golds is None:
        response = row.response("output", "response")
    elif identity in golds:
        response = golds[identity]
    else:
        raise row.error("id", f"expected an id from the outputs, got {identity!r}", kind="outputs")
    return row.record(
        user_id=row.user_id("user_id", "id"),
        query=query,
        response=response,
        history=[_item(item, task) for item in row.rows("profile")],
        timestamp=row.date("date", "timestamp"),
        id=identity,
        **({} if task is None else {"task": task}),
    )


def _item(item: Row, task: str | None) -> dict[str, object]:
    if task is not None and task.endswith("3") and not item.has("score"):
        raise item.error("score", f"expected the review's score, which {task} needs, got none")
    if item.has("tag", "description"):
        text = f'the tag for the movie: "{item.text("description")}" is "{item.label("tag")}"'
    elif item.has("category", "text"):
        text = f'the category for the article: "{item.text("text")}" is "{item.label("category")}"'
    elif item.has("score", "text"):
        text = f'{item.label("score")} is the score for "{item.text("text")}"'
    elif item.has("text"):
        text = item.text("text")
    elif "abstract" in item.values and item.has("title"):
        text = item.optional_text("abstract") or ""  # some papers have none
    else:
        expected = "tag and description, text (with score or category), or title and abstract"
        raise item.error(None, f"expected {expected}, got {item.keys()}")
    return {"text": text, "title": item.optional_text("title", "subject"), "timestamp": item.date("date")}


def _golds(place: Place) -> tuple[str | None, dict[str, str]]:
    """The task, and the outputs by id. The file is small enough to be read at once."""
    name = os.fspath(place)
    if name.startswith(HUB):
        raise ArgumentError(f"outputs: expected a file, got {name}")
    with opened(place) as file:
        raw = parsed_json(name, file.read())
    if not isinstance(raw, Mapping) or not isinstance(raw.get("golds"), list):
        raise RecordError(f"{name}: expected an object with a list 'golds', as LaMP's outputs are")
    outputs: dict[str, str] = {}
    for gold in Row(raw, name, Clock()).rows("golds"):
        identity = gold.user_id("id")
        if identity in outputs:
            raise gold.error("id", f"expected every id once, got {identity!r} again")
        outputs[identity] = gold.response("output")
    task = raw.get("task")
    return (task if isinstance(task, str) else None), outputs
