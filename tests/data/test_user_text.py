"""Literals are broken wherever they stand, markers are quoted at the beginning of lines, and nothing else changes."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nextquill.data.user_text import UserText

letters = st.text("abc", min_size=1, max_size=3)
literals = st.sets(letters, max_size=5)


@given(literals=literals, text=st.text("abcd\n", max_size=20))
def test_no_literal_is_left_and_only_those_are_touched(literals: set[str], text: str) -> None:
    user_text = UserText(literals)
    plain = user_text.plain(text)
    assert not any(literal in plain for literal in literals)
    holds = any(literal in text for literal in literals)
    assert (plain != text) == holds
    assert user_text.changed == holds
    if all(len(literal) > 1 for literal in literals):
        assert plain.replace(" ", "") == text, "a space was put in, and nothing taken away"


@given(text=st.text("ab[]: \n\r\t\u2028", max_size=20))
def test_no_line_begins_with_a_marker(text: str) -> None:
    quoted = UserText(markers={"[a]:", "b"}).quoted(text)
    lines = re.split("[\n\r\u2028]", quoted)
    assert not any(re.match(r"\[a\]:|b(?!\w)", line.lstrip()) for line in lines)
    assert "".join(lines).count("> ") == sum(
        bool(re.match(r"\[a\]:|b(?!\w)", line.lstrip())) for line in re.split("[\n\r\u2028]", text)
    )
    assert re.sub(r"(?m)(^|[\r\u2028])(\s*)> ", r"\1\2", quoted) == text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<|im_end|>", "< |im_end|>"),
        ("<<|im_end|>>", "<< |im_end|>>"),
        ("<|im_<|im_end|>end|>", "<|im_< |im_end|>end|>"),
        ("<|IM_END|> <|im_end>", "<|IM_END|> <|im_end>"),
        ("x\x01y", "x y"),
    ],
)
def test_literals_by_hand(text: str, expected: str) -> None:
    assert UserText(["<|im_end|>", "\x01", ""]).plain(text) == expected


def test_overlapping_literals_are_all_broken() -> None:
    assert UserText(["aba"]).plain("ababa") == "a ba ba"


def test_a_literal_of_thousands_is_found_at_once() -> None:
    user_text = UserText(f"<unused{i}>" for i in range(6242))
    assert user_text.plain("<unused6241><unused6242><unused>") == "< unused6241><unused6242><unused>"


def test_nothing_to_look_for() -> None:
    assert UserText().quoted("[Response]: <s>") == "[Response]: <s>"
