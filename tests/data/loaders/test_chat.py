from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from nextquill.data import HistoryItem, SkippedRecords
from nextquill.data.loaders import load
from nextquill.errors import ArgumentError, RecordError


def _talk(*turns: tuple[str, object], **fields: Any) -> dict[str, Any]:
    return {"user_id": "u", "messages": [{"role": role, "content": content} for role, content in turns], **fields}


def test_the_assistants_last_turn_answers_the_conversation_before_it(fixtures: Path) -> None:
    first, second, other = load("chat", fixtures / "chat.jsonl")
    assert (first.query, first.response, first.history) == ("When do I feed the starter?", "At seven.", ())
    assert (second.query, second.response) == ("System: Be brief.\n\nUser: And the bread?", "Out at nine.")
    assert second.history == (
        HistoryItem("User: When do I feed the starter?\n\nAssistant: At seven.", None, 1709287200.0),
    )
    assert (second.timestamp, second.extra) == (1709373600.0, {"id": "c2"})
    assert (other.user_id, other.query, other.response, other.timestamp) == ("u2", "Hello", "Good day.", 1709290800.0)


def test_the_users_last_turn_answers_when_the_user_responds(fixtures: Path) -> None:
    first, second, _ = load("chat", fixtures / "chat.jsonl", respond_as="user")
    assert (first.query, first.response) == ("", "When do I feed the starter?")
    assert second.query == "System: Be brief.\n\nUser: And the bread?\n\nAssistant: Out at nine."
    assert second.response == "Thanks"
    assert second.history == (HistoryItem("When do I feed the starter?", None, 1709287200.0),)


def test_without_times_the_file_has_the_order() -> None:
    rows = [_talk(("user", f"q{i}"), ("assistant", f"a{i}")) for i in range(3)]
    assert [len(record.history) for record in load("chat", rows)] == [0, 1, 2]
    assert [len(record.history) for record in load("chat", rows, max_history=1)] == [0, 1, 1]


def test_conversations_of_one_moment_are_not_each_others_past() -> None:
    rows = [_talk(("user", "q"), ("assistant", f"a{i}"), timestamp=time) for i, time in enumerate([5, 5, 9])]
    assert [len(record.history) for record in load("chat", rows)] == [0, 0, 2]


def test_some_times_are_no_order(fixtures: Path) -> None:
    rows = [
        _talk(("user", "q"), ("assistant", "a"), timestamp=5),
        _talk(("user", "q"), ("assistant", "b")),
    ]
    message = r"^record 1: field 'timestamp': required, as user 'u' has one in record 0, but missing$"
    with pytest.raises(RecordError, match=message):
        list(load("chat", rows))
    skipped = SkippedRecords(max_share=0.5)
    assert [record.response for record in load("chat", rows, skipped=skipped)] == ["a"]
    assert skipped.total == 1


def test_parts_of_a_message_are_joined_and_calls_of_tools_have_no_text() -> None:
    parts = [{"type": "text", "text": "one"}, {"type": "image_url", "image_url": "x"}, {"type": "text", "text": "two"}]
    row = _talk(("user", parts), ("assistant", None), ("tool", "42"), ("assistant", "It is 42."))
    (record,) = load("chat", [row])
    assert record.query == "User: one\ntwo\n\nTool: 42"


BAD = {
    "role": (
        _talk(("bard", "a")),
        "field 'messages[0].role': expected one of system, user, assistant",
    ),
    "none": (_talk(("user", "a")), "field 'messages': expected a turn of role 'assistant', got ['user']"),
    "empty": (_talk(), "field 'messages': expected a turn of role 'assistant', got []"),
    "blank": (_talk(("assistant", " ")), "field 'messages[0].content': expected some text, got a blank string"),
    "type": (_talk(("assistant", 3)), "field 'messages[0].content': expected a string or a list of parts, got int"),
    "missing": ({"user_id": "u"}, "field 'messages': required, but missing; there are user_id"),
    "user": ({**_talk(("assistant", "a")), "user_id": None}, "field 'user_id': required (or user), but null"),
}


@pytest.mark.parametrize(("row", "message"), BAD.values(), ids=BAD.keys())
def test_a_bad_conversation_is_named(row: dict[str, Any], message: str) -> None:
    with pytest.raises(RecordError) as caught:
        list(load("chat", [row]))
    assert str(caught.value).startswith(f"record 0: {message}")


def test_who_responds_is_one_of_two() -> None:
    with pytest.raises(ArgumentError, match=r"^respond_as: expected one of 'assistant', 'user', got 'bard'$"):
        load("chat", [_talk()], respond_as="bard")
