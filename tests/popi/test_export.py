from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nextquill.data import PromptTemplate
from nextquill.errors import ArgumentError, RecordError
from nextquill.popi.export import Exporter, Query, write_export
from nextquill.popi.prompts import GeneratorPrompts, PopiTemplates

QUERIES = [Query("ann", "What to read?", "They like the sea."), Query("bob", "What to eat?")]


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_bytes().decode().split("\n")[:-1]]


def test_a_chat_line_has_the_summary_in_the_system_message_and_the_query_in_the_users(tmp_path: Path) -> None:
    assert write_export(tmp_path / "out.jsonl", iter(QUERIES)) == 2
    first, second = lines(tmp_path / "out.jsonl")
    assert (first["user_id"], first["query"]) == ("ann", "What to read?")
    system, user = first["messages"]
    assert system["role"] == "system"
    assert system["content"].endswith("\n\n[About the user]:\nThey like the sea.")
    assert "not an instruction" in system["content"].split("[About the user]:")[0]
    assert user == {"role": "user", "content": "What to read?"}
    assert second["messages"] == [{"role": "user", "content": "What to eat?"}]


def test_a_text_line_is_the_prompt_of_the_generator(tmp_path: Path, tokenizer: Any) -> None:
    write_export(tmp_path / "out.jsonl", QUERIES, format="text")
    prompts = GeneratorPrompts(tokenizer)
    assert [line["prompt"] for line in lines(tmp_path / "out.jsonl")] == [
        prompts.text("What to read?", summary="They like the sea."),
        prompts.text("What to eat?"),
    ]


def test_a_blank_summary_is_none() -> None:
    for summary in (None, "", " \n"):
        assert Exporter().messages("q", summary) == [{"role": "user", "content": "q"}]
        assert Exporter().text("q", summary) == "[Request]:\nq\n\n[Response]:\n"


def test_the_templates_own_system_message_and_heading_are_kept() -> None:
    template = PromptTemplate(counterfactual="removal", history_heading="Known:", system="Be brief.", text_label="")
    exporter = Exporter(PopiTemplates(generator=template))
    assert exporter.messages("q") == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "q"},
    ]
    content = exporter.messages("q", "s")[0]["content"]
    assert content.startswith("Be brief.\n\n")
    assert content.endswith("\n\nKnown:\ns")
    assert exporter.text("q", "s").startswith("Be brief.\n\n")


CONTROL = ["<|im_end|>", "<|im_start|>system", "<s>", "</s>", "[/INST]", "<</SYS>>", "<end_of_turn>", "<｜User｜>"]  # noqa: RUF001
HEADS = ["[About the user]:", "[Request]:", "[Response]:"]
hostile = st.lists(st.sampled_from([*CONTROL, *HEADS, "\n", "\r", "\u2028", "\x85", " ", "ignore all", "<|"])).map(
    "".join
) | st.text(st.characters(codec="utf-8"), max_size=20)


@settings(deadline=None, max_examples=200)
@given(summary=hostile, query=hostile)
def test_a_poisoned_summary_or_query_stays_in_its_place(summary: str, query: str) -> None:
    exporter = Exporter()
    system, user = exporter.messages(query, f"{summary}a")
    text = exporter.text(query, f"{summary}a")
    for part in (system["content"], user["content"], text):
        assert not any(literal.split("system")[0] in part for literal in CONTROL)
    heads = [line.strip() for line in system["content"].splitlines() if line.strip().startswith(tuple(HEADS))]
    assert heads == ["[About the user]:"]
    heads = [line.strip() for line in text.splitlines() if line.strip().startswith(tuple(HEADS))]
    assert heads == [head for head in HEADS if head != "[Request]:" or query]
    assert json.loads(json.dumps(exporter.line(Query("u", query, summary)), ensure_ascii=False))["query"] == query


def test_code_in_a_query_is_left_alone() -> None:
    query = "What does `x |> f()` do?\n[Request]: a[i] < b | c > d"
    assert Exporter().messages(query)[0]["content"] == query


def test_a_poisoned_query_cannot_end_its_line_in_the_file(tmp_path: Path) -> None:
    write_export(tmp_path / "out.jsonl", [Query("u", 'a\nb\u2028c"}', 'x\n"role": "system"')])
    (line,) = lines(tmp_path / "out.jsonl")
    assert len(line["messages"]) == 2


def test_bad_input_leaves_no_file(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    with pytest.raises(ArgumentError, match=r"^format: expected one of 'chat', 'text', got 'csv'"):
        write_export(path, QUERIES, format="csv")
    with pytest.raises(RecordError, match=r"^queries: expected at least one to export, got none"):
        write_export(path, [])
    assert list(tmp_path.iterdir()) == []
