from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nextquill.data import HistoryItem, PromptRenderer, PromptTemplate
from nextquill.errors import ArgumentError

HISTORY = (HistoryItem("Thin plot."),)
RESPONSES = ["Good.", "  padded on both sides \n", "a </think> b", "<b>&amp; 'quotes'", "naïve 海 🙂", "x" * 50]


def test_without_chat_template_the_prompt_is_the_text_and_a_newline(plain_tokenizer: Any) -> None:
    template = PromptTemplate(system="Be brief.")
    renderer = PromptRenderer(template, plain_tokenizer)
    expected = f"Be brief.\n\n{template.render('a tale', HISTORY)}\n"
    assert renderer.prompt("a tale", HISTORY) == expected
    assert plain_tokenizer.decode(renderer.prompt_ids("a tale", HISTORY)) == expected


def test_without_chat_template_the_response_ends_with_eos(plain_tokenizer: Any) -> None:
    ids = PromptRenderer(PromptTemplate(), plain_tokenizer).response_ids("Good.")
    assert ids == [*plain_tokenizer.encode("Good.", add_special_tokens=False), plain_tokenizer.eos_token_id]


def test_bos_is_prepended_where_the_tokenizer_would(bos_tokenizer: Any, plain_tokenizer: Any) -> None:
    with_bos = PromptRenderer(PromptTemplate(), bos_tokenizer)
    without = PromptRenderer(PromptTemplate(), plain_tokenizer).prompt_ids("a tale")
    assert with_bos.prompt_ids("a tale") == [bos_tokenizer.bos_token_id, *without]
    assert bos_tokenizer.bos_token_id not in with_bos.response_ids("Good.")


def test_a_bos_token_the_tokenizer_does_not_add_is_not_added(with_chat_template: Callable[..., Any]) -> None:
    tokenizer = with_chat_template("", bos_token="<s>")
    ids = PromptRenderer(PromptTemplate(chat=False), tokenizer).prompt_ids("a tale")
    assert tokenizer.bos_token_id not in ids


def test_chatml_prompt_and_response(chatml_tokenizer: Any) -> None:
    template = PromptTemplate(system="Be brief.")
    renderer = PromptRenderer(template, chatml_tokenizer)
    assert renderer.prompt("a tale", HISTORY) == (
        f"<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n{template.render('a tale', HISTORY)}<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    assert chatml_tokenizer.decode(renderer.prompt_ids("a tale", HISTORY)) == renderer.prompt("a tale", HISTORY)
    assert chatml_tokenizer.decode(renderer.response_ids("Good.")) == "Good.<|im_end|>"


def test_chat_markers_are_single_tokens_and_bos_is_not_doubled(gemma_tokenizer: Any) -> None:
    ids = PromptRenderer(PromptTemplate(), gemma_tokenizer).prompt_ids("a tale")
    names = gemma_tokenizer.convert_ids_to_tokens(ids)
    assert names[:2] == ["<s>", "<start_of_turn>"]
    assert (names.count("<s>"), names.count("<start_of_turn>"), names.count("<end_of_turn>")) == (1, 2, 1)


def test_a_refused_system_role_is_merged_into_the_user_message(gemma_tokenizer: Any) -> None:
    template = PromptTemplate(system="Be brief.")
    assert PromptRenderer(template, gemma_tokenizer).prompt("a tale") == (
        f"<s><start_of_turn>user\nBe brief.\n\n{template.render('a tale')}<end_of_turn>\n<start_of_turn>model\n"
    )


def test_a_silently_dropped_system_role_is_merged_too(with_chat_template: Callable[..., Any]) -> None:
    drops = "{% for m in messages %}{% if m['role'] != 'system' %}({{ m['content'] }}){% endif %}{% endfor %}"
    template = PromptTemplate(system="Be brief.")
    prompt = PromptRenderer(template, with_chat_template(drops)).prompt("a tale")
    assert prompt == f"(Be brief.\n\n{template.render('a tale')})"


def test_chat_false_ignores_the_chat_template(chatml_tokenizer: Any, plain_tokenizer: Any) -> None:
    ignoring = PromptRenderer(PromptTemplate(chat=False), chatml_tokenizer)
    plain = PromptRenderer(PromptTemplate(), plain_tokenizer)
    assert ignoring.prompt("a tale", HISTORY) == plain.prompt("a tale", HISTORY)
    assert ignoring.response_ids("Good.") == plain.response_ids("Good.")


def test_chat_true_requires_a_chat_template(plain_tokenizer: Any) -> None:
    with pytest.raises(ArgumentError, match=r"^chat: expected a tokenizer with a chat template"):
        PromptRenderer(PromptTemplate(chat=True), plain_tokenizer)


@pytest.mark.parametrize(
    "template",
    ["{{ raise_exception('broken') }}", "the same for everyone"],
    ids=["raises", "drops-the-user"],
)
def test_a_chat_template_without_user_message_is_refused(template: str, with_chat_template: Callable[..., Any]) -> None:
    with pytest.raises(ArgumentError, match=r"^tokenizer: expected a chat template that"):
        PromptRenderer(PromptTemplate(), with_chat_template(template))


def test_a_tokenizer_without_any_end_is_refused(with_chat_template: Callable[..., Any]) -> None:
    tokenizer = with_chat_template("", eos_token=None)
    with pytest.raises(ArgumentError, match=r"^tokenizer: expected an end-of-sequence token"):
        PromptRenderer(PromptTemplate(chat=False), tokenizer)


ODD_TEMPLATES = {
    "upper-case": "{% for m in messages %}[{{ m['content'] | upper if m['role'] == 'assistant' else m['content'] }}]"
    "{% endfor %}",
    "twice": "{% for m in messages %}{{ m['content'] }}{{ m['content'] if m['role'] == 'assistant' }}{% endfor %}",
    "no-assistant": "{% for m in messages %}{% if m['role'] == 'assistant' %}{{ raise_exception('no') }}{% endif %}"
    "{{ m['content'] }}{% endfor %}",
    "no-end": "{% for m in messages %}{{ m['content'] }}\n{% endfor %}",
}


@pytest.mark.parametrize("template", ODD_TEMPLATES.values(), ids=ODD_TEMPLATES.keys())
@pytest.mark.parametrize("response", RESPONSES, ids=range(len(RESPONSES)))
def test_an_odd_chat_template_leaves_the_response_whole_and_ends_it_with_eos(
    template: str, response: str, with_chat_template: Callable[..., Any]
) -> None:
    tokenizer = with_chat_template(template)
    ids = PromptRenderer(PromptTemplate(), tokenizer).response_ids(response)
    assert tokenizer.decode(ids) == f"{response}</s>"


STRIPPING = {
    "trims": "{% for m in messages %}{{ m['content'] | trim }}<|im_end|>\n{% endfor %}",
    "cuts-thoughts": "{% for m in messages %}{{ m['content'].split('</think>')[-1] }}<|im_end|>\n{% endfor %}",
}


@pytest.mark.parametrize("template", STRIPPING.values(), ids=STRIPPING.keys())
@pytest.mark.parametrize("response", RESPONSES, ids=range(len(RESPONSES)))
def test_a_stripping_chat_template_leaves_the_response_whole_and_ends_its_turn(
    template: str, response: str, with_chat_template: Callable[..., Any]
) -> None:
    tokenizer = with_chat_template(template)
    ids = PromptRenderer(PromptTemplate(), tokenizer).response_ids(response)
    assert tokenizer.decode(ids) == f"{response}<|im_end|>"


@settings(deadline=None)
@given(response=st.text(st.characters(codec="utf-8"), max_size=30))
def test_the_response_is_whole_under_every_tokenizer(
    plain_tokenizer: Any, bos_tokenizer: Any, chatml_tokenizer: Any, gemma_tokenizer: Any, response: str
) -> None:
    for tokenizer, end in [
        (plain_tokenizer, "</s>"),
        (bos_tokenizer, "</s>"),
        (chatml_tokenizer, "<|im_end|>"),
        (gemma_tokenizer, "<end_of_turn>"),
    ]:
        ids = PromptRenderer(PromptTemplate(), tokenizer).response_ids(response)
        assert tokenizer.decode(ids) == response + end
