"""No text of a user, and no summary, becomes a border of either prompt of POPI under odd templates and tokenizers."""

from __future__ import annotations

import contextlib
import functools
import re
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nextquill.data import HistoryItem, PromptTemplate
from nextquill.errors import RecordError
from nextquill.popi.prompts import GeneratorPrompts, InferencePrompts, PopiTemplates, tidy_summary
from nextquill.popi.users import Pair
from tests.data.crossing_texts import COMPOSING, JOINING, ROLE_CHATS, ROLE_JINJA, crossing, special_counts

Prompts = tuple[InferencePrompts, GeneratorPrompts]


def masked(text: str) -> str:
    """A harmless text of the same length."""
    return "y" * len(text)


def both(template: PromptTemplate, tokenizer: Any) -> Prompts:
    templates = PopiTemplates(instruction="Say what they like.", inference=template, generator=template)
    return InferencePrompts(tokenizer, templates), GeneratorPrompts(tokenizer, templates)


@pytest.fixture(scope="module")
def joined(request: pytest.FixtureRequest) -> Callable[[str, str], Prompts]:
    """Both prompts of a template in `COMPOSING` with a tokenizer in `JOINING`."""

    @functools.cache
    def make(composed: str, name: str) -> Prompts:
        source = JOINING[name]
        made = request.getfixturevalue("with_chat_template")(source) if source else request.getfixturevalue(name)
        return both(COMPOSING[composed], made)

    return make


@pytest.mark.parametrize("name", JOINING)
@settings(deadline=None, max_examples=60)
@given(composed=st.sampled_from(list(COMPOSING)), title=crossing, text=crossing, chosen=crossing, rejected=crossing)
def test_no_signal_writes_a_special_token(
    joined: Callable[..., Prompts], name: str, composed: str, title: str, text: str, chosen: str, rejected: str
) -> None:
    """A signal is refused, or the prompt has the special tokens of the same prompt with harmless signals."""
    prompts, _ = joined(composed, name)
    tokenizer: Any = prompts.renderer.tokenizer
    pair, harmless = Pair(title, chosen, rejected, 0.0), Pair(masked(title), masked(chosen), masked(rejected), 0.0)
    signals = [HistoryItem(text, title=title, timestamp=0.0), pair.as_item()]
    others = [HistoryItem(masked(text), title=masked(title), timestamp=0.0), harmless.as_item()]
    expected, kept = prompts.ids(others)
    assert kept == 2
    with contextlib.suppress(RecordError):
        ids, kept = prompts.ids(signals)
        assert kept == 2
        assert special_counts(tokenizer, ids) == special_counts(tokenizer, expected)


@pytest.mark.parametrize("name", JOINING)
@settings(deadline=None, max_examples=60)
@given(composed=st.sampled_from(list(COMPOSING)), query=crossing, summary=crossing, signal=crossing)
def test_no_query_and_no_summary_writes_a_special_token(
    joined: Callable[..., Prompts], name: str, composed: str, query: str, summary: str, signal: str
) -> None:
    """A summary is the inference model's text, which may repeat what a user wrote to it."""
    _, prompts = joined(composed, name)
    tokenizer: Any = prompts.renderer.tokenizer
    tidy, item = masked(tidy_summary(summary)), [HistoryItem(signal, title=query)]
    for own, harmless in (
        ({"summary": summary}, {"summary": tidy}),
        ({"signals": item}, {"signals": [HistoryItem(masked(signal), title=masked(query))]}),
    ):
        expected = special_counts(tokenizer, prompts.ids(masked(query), **harmless))
        with contextlib.suppress(RecordError):
            assert special_counts(tokenizer, prompts.ids(query, **own)) == expected


@pytest.mark.parametrize("name", JOINING)
@settings(deadline=None, max_examples=60)
@given(composed=st.sampled_from(list(COMPOSING)), chosen=crossing, rejected=crossing, summary=crossing)
def test_no_response_and_no_given_summary_ends_twice(
    joined: Callable[..., Prompts], name: str, composed: str, chosen: str, rejected: str, summary: str
) -> None:
    inference, generator = joined(composed, name)
    tokenizer: Any = generator.renderer.tokenizer
    supervised = [branch.response_ids for branch in generator.branches(Pair("y", chosen, rejected), summary="y")]
    if tidy_summary(summary):
        supervised.append(inference.summary_ids(summary))
    for ids in supervised:
        assert special_counts(tokenizer, ids) == special_counts(tokenizer, generator.renderer.end_ids)


# ---- words that open a turn -------------------------------------------------------------------------

#: The words that open a turn or a section in each template.
WORDS = {
    "vicuna": r"USER:|ASSISTANT:",
    "alpaca": r"###[^\S\n]+(?:Instruction|Response):",
    "jinja": r"POST:|USER:|ASSISTANT:",
}
roles = st.lists(
    st.sampled_from(
        [
            *("USER:", "ASSISTANT:", "POST:", "### Response:", "###", "Response:", "Instruction:"),
            *("SUPER", "US", "ER:", "> ", "</s>", " ", "\n", "a"),
        ]
    ),
    min_size=1,
    max_size=6,
).map("".join)


@pytest.mark.parametrize("name", WORDS)
@settings(deadline=None, max_examples=60)
@given(query=roles, summary=roles, title=roles, text=roles)
def test_no_text_opens_a_turn(
    with_chat_template: Callable[..., Any], name: str, query: str, summary: str, title: str, text: str
) -> None:
    """Counted in the decoded tokens: such words that are neither quoted nor the end of a longer word."""
    inference, generator = _with_roles(with_chat_template, name)
    tokenizer: Any = inference.renderer.tokenizer

    def opened(ids: list[int]) -> list[str]:
        return re.findall(rf"(?<!> )(?<![^\W_])(?:{WORDS[name]})", tokenizer.decode(ids))

    harmless = opened(inference.ids([HistoryItem("y", title="y")])[0])
    assert harmless
    with contextlib.suppress(RecordError):
        assert opened(inference.ids([HistoryItem(f"y{text}", title=f"y{title}")])[0]) == harmless
    harmless = opened(generator.ids("y", summary="y"))
    with contextlib.suppress(RecordError):
        assert opened(generator.ids(f"y{query}", summary=f"y{summary}")) == harmless


@functools.cache
def _with_roles(make: Callable[..., Any], name: str) -> Prompts:
    template = PromptTemplate(prompt_jinja=ROLE_JINJA if name == "jinja" else None)
    return both(template, make(ROLE_CHATS.get(name, ""), eos_token="</s>"))
