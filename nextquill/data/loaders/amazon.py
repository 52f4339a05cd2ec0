"""Reads Amazon reviews as NextQuill and DPL use them.

The reviews are `hf://SnowCharmQ/DPL-main/CATEGORY`, and the metadata `hf://SnowCharmQ/DPL-meta/CATEGORY`.

A row has `user_id`, `profile`, a list of the user's earlier reviews, and `data`, the review to write. A review has
`asin`, `rating`, `title`, `text` and `timestamp`. The metadata hold each item's title and description, by `asin`. The
wording is from NextQuill's published code: the query names the item, the rating and the review's title, and a past
review also shows its text.

Times in this release are milliseconds, so the default `time_unit` of this format is "ms".
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from nextquill.data.loaders.row import Row
from nextquill.data.loaders.source import Place, Source
from nextquill.data.records import Record, check_text
from nextquill.data.skipped import unexpected
from nextquill.errors import ArgumentError


class _Product(NamedTuple):
    title: str
    description: str


def load_amazon(
    source: Source, *, metadata: Place | None = None, metadata_split: str = "full"
) -> Iterator[tuple[str, Record]]:
    """Yield the reviews as records. The metadata, rows {asin, title, description}, are held in memory.

    Raises:
        ArgumentError: `metadata` is missing.
        RecordError: the metadata are malformed.
    """
    if metadata is None:
        raise ArgumentError("metadata: required by format 'amazon', the items' titles and descriptions")
    items = _items(source.other("metadata", metadata, metadata_split))
    return source.each(lambda row: _record(row, items))


def _items(metadata: Source) -> dict[str, _Product]:
    def convert(row: Row) -> tuple[str, _Product]:
        return row.user_id("asin", "parent_asin"), _Product(row.optional_text("title") or "", _description(row))

    return dict(item for _, item in metadata.each(convert))


def _description(row: Row) -> str:
    """The description as one string: a list of paragraphs in Amazon's own files, a string in this release."""
    value = row.values.get("description")
    if isinstance(value, Sequence) and not isinstance(value, (str, bytes)):
        return " ".join(check_text(part, row.where, "description") for part in value)
    if value is not None and not isinstance(value, str):
        raise unexpected(row.where, "description", "a string or a list of strings", value)
    return row.optional_text("description") or ""


def _record(row: Row, items: Mapping[str, _Product]) -> Record:
    review = row.row("data")
    item = _item_of(review, items)
    query = (
        f"[Item Title]: {item.title}\n[Item Description]: {item.description}\n"
        f"[Output Review Rating]: {review.label('rating')}\n[Output Review Title]: {review.text('title')}"
    )
    return row.record(
        user_id=row.user_id("user_id"),
        query=query,
        response=review.response("text"),
        history=[_past(past, items) for past in row.rows("profile")],
        timestamp=review.seconds("timestamp"),
        asin=review.user_id("asin"),
        **({"data": rest} if (rest := review.with_others({})) else {}),
    )


def _past(review: Row, items: Mapping[str, _Product]) -> dict[str, object]:
    item = _item_of(review, items)
    text = (
        f"- [Item Title]: {item.title}\n- [Item Description]: {item.description}\n"
        f"- [Review Rating]: {review.label('rating')}\n- [Review Title]: {review.text('title')}\n"
        f"- [Review Text]: {review.text('text')}"
    )
    return {"text": text, "timestamp": review.seconds("timestamp")}


def _item_of(review: Row, items: Mapping[str, _Product]) -> _Product:
    asin = review.user_id("asin")
    if asin not in items:
        raise review.error("asin", f"expected an item from the metadata, got {asin!r}", kind="metadata")
    return items[asin]
