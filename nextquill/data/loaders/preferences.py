"""Reads preference pairs: FSPO's ELIX, Review and Roleplay sets, AlignX, and any file of prompt, chosen and rejected.

The response is the chosen one. `extra` keeps `chosen` and `rejected` for losses that compare the two. These fields are
read, and others are kept in `extra`:

| set | fields |
|---|---|
| ELIX, Review (arXiv 2502.19312) | prompt, response_x, response_y, label (0 for x, 1 for y), user: scorer_level |
| Roleplay | x, yw, yl, user: level |
| AlignX (arXiv 2503.15463) | prompt, chosen, rejected, "User-Generated Content", "Pair-wise Comparative Feedback" |
| others | prompt, chosen, rejected, user_id, perhaps history (as in a record) and timestamp |

A user's history comes from one of three places: from the row's own `history`, if it is there; in AlignX, from the row's
comments, and pairs, which are rendered as text; otherwise from the user's `max_pairs` pairs before the row, without
those of its moment or later. AlignX names no user, so rows with the same history count as one user, named by a digest.
In all cases, items with the record's own prompt or response are left out, as they would give the answer away.
"""

from __future__ import annotations

import json
from collections import defaultdict, deque
from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

from nextquill.data._checks import check_integer
from nextquill.data.loaders.row import Row
from nextquill.data.loaders.source import Source
from nextquill.data.loaders.tables import history_of
from nextquill.data.records import Record
from nextquill.storage.fingerprints import digest_of

_CONTENT, _FEEDBACK = "User-Generated Content", "Pair-wise Comparative Feedback"
_PERSON = "Demographic Information"


class _Pair(NamedTuple):
    prompt: str
    chosen: str
    rejected: str
    timestamp: float | None

    def item(self) -> dict[str, object]:
        text = f"Preferred: {self.chosen}\nNot preferred: {self.rejected}"
        return {"title": self.prompt, "text": text, "timestamp": self.timestamp}

    def gives_away(self, answer: _Pair) -> bool:
        return self.prompt == answer.prompt or answer.chosen in (self.chosen, self.rejected)

    def is_before(self, other: _Pair) -> bool:
        return self.timestamp is None or other.timestamp is None or self.timestamp < other.timestamp


def load_preferences(source: Source, *, max_pairs: int = 8) -> Iterator[tuple[str, Record]]:
    """Yield preference pairs as records."""
    check_integer("max_pairs", max_pairs, 0)
    # Twice as many are held, as some may give the answer away.
    earlier: defaultdict[str, deque[_Pair]] = defaultdict(lambda: deque(maxlen=2 * max_pairs))

    def convert(row: Row) -> Record:
        pair = _pair(row)
        if row.has(_CONTENT) or row.has(_FEEDBACK):
            user = row.user_id("user_id") if row.has("user_id") else _name(row, pair)
            return _record(row, user, pair, history_of(row) if row.has("history") else _own(row, pair))
        user = row.user_id("user_id", "scorer_level", "level")
        others = [other for other in earlier[user] if other.is_before(pair) and not other.gives_away(pair)]
        latest = [other.item() for other in others[max(0, len(others) - max_pairs) :]]
        record = _record(row, user, pair, history_of(row) if row.has("history") else latest)
        earlier[user].append(pair)
        return record

    return source.each(convert)


def _record(row: Row, user: str, pair: _Pair, history: object) -> Record:
    if row.has("query") and row.text("query") != pair.prompt:  # a set may name the prompt twice
        raise row.error("query", "expected the text of the prompt, or no query")
    record = row.record(
        user_id=user,
        query=pair.prompt,
        response=pair.chosen,
        history=history,
        timestamp=pair.timestamp,
        chosen=pair.chosen,
        rejected=pair.rejected,
    )
    kept = (item for item in record.history if item.title != pair.prompt and item.text != pair.chosen)
    return replace(record, history=tuple(kept))


def _pair(row: Row) -> _Pair:
    if row.has("response_x") or row.has("response_y"):
        x, y = row.response("response_x"), row.response("response_y")
        label = row.label("label")
        if label not in ("0", "1", "0.0", "1.0"):
            raise row.error("label", f"expected 0 for response_x or 1 for response_y, got {label!r}")
        chosen, rejected = (x, y) if label.startswith("0") else (y, x)
        return _Pair(row.text("prompt"), chosen, rejected, row.seconds("timestamp"))
    chosen, rejected = row.response("chosen", "yw"), row.text("rejected", "yl")
    return _Pair(row.text("prompt", "x"), chosen, rejected, row.seconds("timestamp"))


def _name(row: Row, pair: _Pair) -> str:
    """A user's name that is equal, in all files, for rows with the same history; without history, unique to the row."""
    known = [row.values.get(name) for name in (_CONTENT, _FEEDBACK, _PERSON)]
    text = json.dumps(known if any(known[:2]) else [*known, *pair], sort_keys=True, default=str)
    return f"row-{digest_of(text, 6).hex()}"


def _own(row: Row, answer: _Pair) -> list[dict[str, object]]:
    """AlignX's history in the row itself: comments first, then pairs."""
    comments = row.rows(_CONTENT) if row.has(_CONTENT) else []
    pairs = [_pair(pair) for pair in row.rows(_FEEDBACK)] if row.has(_FEEDBACK) else []
    texts: list[dict[str, object]] = [{"title": each.text("prompt"), "text": each.text("comment")} for each in comments]
    return texts + [pair.item() for pair in pairs if not pair.gives_away(answer)]
