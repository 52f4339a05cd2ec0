"""Reads chat logs: rows {user_id, messages: [{role, content}], timestamp}, one conversation each.

A record can ask for the assistant's answer to this user, or for the user's own words:

    respond_as="assistant"   response: the assistant's last turn     past texts: the user's earlier conversations
    respond_as="user"        response: the user's last turn          past texts: the user's own turns in those

The query is the conversation before the response; later turns are left out. If the query is a single turn, it stands
alone; otherwise the speaker's name precedes each turn. Conversations are ordered by `timestamp`, and those of the same
moment are not each other's past. In a log without times, the order of the file counts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from nextquill.data._checks import check_integer, check_one_of
from nextquill.data.loaders.by_user import Entry, records_of
from nextquill.data.loaders.row import Row
from nextquill.data.loaders.source import Source
from nextquill.data.records import Record, check_text
from nextquill.data.skipped import unexpected

_SPEAKS = {"system": "System", "user": "User", "assistant": "Assistant", "tool": "Tool"}
_ROLES = {role: role for role in _SPEAKS} | {
    "developer": "system", "human": "user", "gpt": "assistant", "function": "tool",
}  # fmt: skip


class _Turn(NamedTuple):
    role: str
    text: str


def load_chat(
    source: Source, *, respond_as: str = "assistant", max_history: int | None = None
) -> Iterator[tuple[str, Record]]:
    """Yield conversations, which stand in any order, as records with at most the latest `max_history` ones before."""
    check_one_of("respond_as", respond_as, ("assistant", "user"))
    check_integer("max_history", max_history, 0, or_none=True)
    return records_of(source, lambda row: _entry(row, respond_as), max_history=max_history)


def _entry(row: Row, respond_as: str) -> Entry:
    name = next(filter(row.has, ("messages", "conversation", "conversations")), "messages")
    turns = [_turn(message) for message in row.rows(name)]
    last = max((position for position, turn in enumerate(turns) if turn.role == respond_as), default=None)
    if last is None:
        raise row.error(name, f"expected a turn of role {respond_as!r}, got {[turn.role for turn in turns]}")
    response = turns[last].text
    if not response.strip():
        raise row.error(f"{name}[{last}].content", "expected some text, got a blank string")
    own = "\n\n".join(turn.text for turn in turns if turn.role == "user")
    user, time = row.user_id("user_id", "user"), row.seconds("timestamp", "created_at")
    content = {
        "query": _shown(turns[:last]),
        "response": response,
        "text": _shown(turns) if respond_as == "assistant" else own,
        "extra": row.with_others({}),
    }
    return Entry(user, time, row.where, content)


def _turn(message: Row) -> _Turn:
    role = message.text("role", "from")
    if role not in _ROLES:
        raise message.error("role", f"expected one of {', '.join(_ROLES)}, got {role!r}")
    name = next(filter(message.has, ("content", "value")), "content")
    content = message.values.get(name)
    if content is None:  # a turn that only calls tools
        return _Turn(_ROLES[role], "")
    if isinstance(content, Sequence) and not isinstance(content, (str, bytes)):
        parts = [part for part in message.rows(name) if part.values.get("type", "text") == "text"]
        return _Turn(_ROLES[role], "\n".join(part.text("text") for part in parts))
    if not isinstance(content, str):
        raise unexpected(message.where, f"{message.path}{name}", "a string or a list of parts", content)
    return _Turn(_ROLES[role], check_text(content, message.where, f"{message.path}{name}"))


def _shown(turns: Sequence[_Turn]) -> str:
    """The turns as one text; a single turn stands without its speaker's name."""
    turns = [turn for turn in turns if turn.text.strip()]
    if len(turns) == 1 and turns[0].role != "system":
        return turns[0].text
    return "\n\n".join(f"{_SPEAKS[turn.role]}: {turn.text}" for turn in turns)
