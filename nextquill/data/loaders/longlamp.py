"""Reads LongLaMP (Kumar et al., arXiv 2407.11016): `hf://LongLaMP/LongLaMP/CONFIG`, splits train, val and test.

CONFIG is abstract_generation, product_review or topic_writing, each with `_user` or `_temporal`. A row has the user
(`name`, `reviewerId`, `author`), `input`, `output` and `profile`. The release and the authors' own code spell some keys
differently, and both spellings are read:

| task | keys of an item | text | title |
|---|---|---|---|
| abstracts | title, abstract, year | the abstract | title |
| reviews | overall, description, summary, reviewText | as in the benchmark's prompts, with rating and summary | |
| topics | summary, content; or input, output | the content | summary |
"""

from __future__ import annotations

from collections.abc import Iterator

from nextquill.data.loaders.row import Row
from nextquill.data.loaders.source import Source
from nextquill.data.records import Record

_USERS = ("user_id", "name", "reviewerId", "reviewerID", "author")
_RATINGS = ("overall", "rating")
_REVIEWS = ("reviewText", "review_text")


def load_longlamp(source: Source) -> Iterator[tuple[str, Record]]:
    """Yield LongLaMP's rows as records."""
    return source.each(_record)


def _record(row: Row) -> Record:
    return row.record(
        user_id=row.user_id(*_USERS),
        query=row.text("input"),
        response=row.response("output"),
        history=[_item(item) for item in row.rows("profile")],
        timestamp=row.date("date", "year"),
    )


def _item(item: Row) -> dict[str, object]:
    title: str | None = None
    if "abstract" in item.values and item.has("title"):
        text, title = item.optional_text("abstract") or "", item.text("title")
    elif any(map(item.has, _REVIEWS)) and any(map(item.has, _RATINGS)):
        about, summary = item.optional_text("description") or "", item.optional_text("summary") or ""
        text = (
            f'"{item.label(*_RATINGS)}" is a rating for the product with description "{about}". '
            f'"{summary}" is summary for "{item.text(*_REVIEWS)}"'
        )
    elif item.has("content"):
        text, title = item.text("content"), item.optional_text("summary")
    elif item.has("output"):
        text, title = item.text("output"), item.optional_text("input")
    else:
        expected = "title and abstract, overall and reviewText, summary and content, or input and output"
        raise item.error(None, f"expected {expected}, got {item.keys()}")
    return {"text": text, "title": title, "timestamp": item.date("date", "year")}
