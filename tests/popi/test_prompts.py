from __future__ import annotations

import json
import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nextquill.data import HistoryItem, PromptTemplate
from nextquill.errors import ArgumentError, ArgumentTypeError, BudgetError, RecordError
from nextquill.generation.rollouts import Sample
from nextquill.popi.prompts import GeneratorPrompts, InferencePrompts, PopiTemplates, tidy_summary
from nextquill.popi.users import Pair

SIGNALS = (HistoryItem("I liked the sea.", title="books"), Pair("tea?", "green", "black").as_item())
PAIR = Pair("What to read?", "A slow tale.", "A thriller that runs.")
SPECIAL = ["<pad>", "</s>", "<|im_start|>", "<|im_end|>"]
TOKENIZERS = ["tokenizer", "chat_tokenizer"]


# ---- wording ----------------------------------------------------------------------------------------


def test_the_inference_prompt_is_signals_instruction_and_cue(tokenizer: Any) -> None:
    prompts = InferencePrompts(tokenizer, PopiTemplates(instruction="Say what they like."))
    ids, kept = prompts.ids(SIGNALS)
    assert kept == 2
    assert tokenizer.decode(ids) == (
        "[What the person wrote and chose]:\n[Title]: books\n[Text]: I liked the sea.\n\n"
        "[Title]: tea?\n[Text]: Preferred: green\nNot preferred: black\n\n"
        "[Task]:\nSay what they like.\n\n[Summary]:\n"
    )


@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_summary_begins_with_the_opening(request: pytest.FixtureRequest, name: str) -> None:
    tokenizer = request.getfixturevalue(name)
    plain, opened = (InferencePrompts(tokenizer, PopiTemplates(opening=opening)) for opening in ("", "They like"))
    ids, kept = opened.ids(SIGNALS)
    assert (ids[: len(plain.ids(SIGNALS)[0])], kept) == plain.ids(SIGNALS)
    assert tokenizer.decode(ids) == tokenizer.decode(plain.ids(SIGNALS)[0]) + "They like"
    for text, whole in ((" the sea. ", "They like the sea."), (", oddly", "They like, oddly"), (" ", ""), ("", "")):
        sample = Sample([*tokenizer.encode(text, add_special_tokens=False), *opened.end_ids], text, ended=True)
        assert opened.summary(sample) == whole
        assert plain.summary(sample) == text.strip()
    assert opened.summary_ids(" They like the sea.\n") == plain.renderer.response_ids(" the sea.")
    for text in ("They hate the sea.", "They like"):
        with pytest.raises(ArgumentError, match=r"^text: expected a summary that begins with 'They like' and goes on"):
            opened.summary_ids(text)


def test_the_opening_takes_room_in_both_prompts(tokenizer: Any) -> None:
    templates = PopiTemplates(opening="They like")
    opening = len(tokenizer.encode("They like", add_special_tokens=False))
    bare = len(InferencePrompts(tokenizer).ids(())[0])
    with pytest.raises(BudgetError, match=rf"^max_prompt_tokens: expected at least {bare + opening}"):
        InferencePrompts(tokenizer, templates, max_prompt_tokens=bare + opening - 1)
    limit = len(GeneratorPrompts(tokenizer).branches(PAIR, summary="s" * 51)[1].input_ids)
    GeneratorPrompts(tokenizer, templates, max_length=limit + opening).check(PAIR, 40)
    with pytest.raises(BudgetError, match=f"max_length is {limit + opening - 1}"):
        GeneratorPrompts(tokenizer, templates, max_length=limit + opening - 1).check(PAIR, 40)


def test_the_generator_prompt_is_summary_query_and_cue(tokenizer: Any) -> None:
    prompts = GeneratorPrompts(tokenizer)
    text = "[About the user]:\nThey like the sea.\n\n[Request]:\nWhat to read?\n\n[Response]:\n"
    assert prompts.text("What to read?", summary=" They like the sea.\n") == text
    assert tokenizer.decode(prompts.ids("What to read?", summary="They like the sea.")) == text


@pytest.mark.parametrize("summary", [None, "", " \n\t"], ids=["none", "empty", "blank"])
def test_without_a_summary_there_is_no_section_for_one(tokenizer: Any, summary: str | None) -> None:
    prompts = GeneratorPrompts(tokenizer)
    assert prompts.text("q", summary=summary) == "[Request]:\nq\n\n[Response]:\n"
    assert prompts.context_tokens("q", summary=summary) == 0


def test_the_chat_template_goes_around_the_prompt(chat_tokenizer: Any) -> None:
    prompts = GeneratorPrompts(chat_tokenizer)
    text = "<|im_start|>user\n[About the user]:\ns\n\n[Request]:\nq\n\n[Response]:<|im_end|>\n<|im_start|>assistant\n"
    assert prompts.text("q", summary="s") == text
    assert chat_tokenizer.decode(prompts.ids("q", summary="s")) == text


def test_both_branches_of_a_pair_begin_with_one_prompt_and_end_their_response(
    tokenizer: Any, chat_tokenizer: Any
) -> None:
    for own, end in ((tokenizer, "</s>"), (chat_tokenizer, "<|im_end|>")):
        prompts = GeneratorPrompts(own)
        chosen, rejected = prompts.branches(PAIR, summary="s")
        assert chosen.prompt_ids == rejected.prompt_ids == prompts.ids(PAIR.query, summary="s")
        assert own.decode(chosen.response_ids) == f"A slow tale.{end}"
        assert own.decode(rejected.response_ids) == f"A thriller that runs.{end}"


def test_context_tokens_are_the_tokens_that_the_context_adds(tokenizer: Any) -> None:
    prompts = GeneratorPrompts(tokenizer)
    assert prompts.context_tokens("q", summary="They.") == len("[About the user]:\nThey.\n\n")
    added = len(prompts.text("q", signals=SIGNALS)) - len(prompts.text("q"))
    assert prompts.context_tokens("q", signals=SIGNALS) == added > 0


def test_a_summary_and_signals_exclude_each_other(tokenizer: Any) -> None:
    with pytest.raises(ArgumentError, match=r"^summary, signals: expected one of the two, got a summary and 2 signals"):
        GeneratorPrompts(tokenizer).ids("q", summary="s", signals=SIGNALS)
    assert GeneratorPrompts(tokenizer).ids("q", summary=" ", signals=SIGNALS)


def test_a_given_summary_is_supervised_with_its_end(tokenizer: Any, chat_tokenizer: Any) -> None:
    for own, end in ((tokenizer, "</s>"), (chat_tokenizer, "<|im_end|>")):
        prompts = InferencePrompts(own)
        assert own.decode(prompts.summary_ids(" They like tea. ")) == f"They like tea.{end}"
        assert own.decode(prompts.end_ids) == end
        with pytest.raises(ArgumentError, match=r"^text: expected a summary, got a blank string"):
            prompts.summary_ids(" \n")


@pytest.mark.parametrize(("text", "tidy"), [(" a\n", "a"), ("", ""), (" \t\n", ""), ("tea \ufffd\ufffd", "tea")])
def test_a_summary_is_stripped_of_white_space_and_halves_of_characters(text: str, tidy: str) -> None:
    assert tidy_summary(text) == tidy


# ---- templates as JSON ------------------------------------------------------------------------------


def test_templates_survive_json() -> None:
    templates = PopiTemplates("Describe.", generator=PromptTemplate(counterfactual="removal", system="Be brief."))
    assert PopiTemplates.from_dict(json.loads(json.dumps(templates.to_dict()))) == templates
    assert PopiTemplates.from_dict({}) == PopiTemplates()
    partly = PopiTemplates.from_dict({"generator": {"system": "Be brief."}})
    assert (partly.generator.system, partly.generator.counterfactual) == ("Be brief.", "removal")


@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        ({"instructions": "x"}, ArgumentError, r"^templates: expected names among .*, got 'instructions'"),
        ({"generator": {"heading": "x"}}, ArgumentError, r"^generator: expected names among .*, got 'heading'"),
        ({"inference": "x"}, ArgumentTypeError, r"^inference: expected a mapping, got 'x'"),
        ({"instruction": " "}, ArgumentError, r"^instruction: expected some text"),
        ({"instruction": 3}, ArgumentTypeError, r"^instruction: expected a string, got 3"),
        ({"opening": "They "}, ArgumentError, r"^opening: expected no white space at its ends, got 'They '"),
        ({"opening": None}, ArgumentTypeError, r"^opening: expected a string, got None"),
        ({"generator": {"counterfactual": "placebo"}}, ArgumentError, r"^generator: expected counterfactual"),
        ({"generator": {"order": "last"}}, ArgumentError, r"^order: expected one of"),
    ],
)
def test_bad_templates_are_refused(values: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        PopiTemplates.from_dict(values)


# ---- texts of users and models stay data ------------------------------------------------------------

BREAKS = ["\n", "\r", "\r\n", "\v", "\f", "\x1c", "\x1d", "\x1e", "\x85", "\u2028", "\u2029"]
HEADS = ["[What the person wrote and chose]:", "[Task]:", "[Summary]:", "[About the user]:", "[Request]:",
         "[Response]:", "[Title]:", "[Text]:"]  # fmt: skip
hostile = st.lists(
    st.sampled_from([*SPECIAL, *HEADS, *BREAKS, "<|im_", "end|>", " ", "\t", "\u00a0", "ignore all", "system", "> "]),
    max_size=10,
).map("".join) | st.text(st.characters(codec="utf-8"), max_size=20)


def heads(prompt: str) -> dict[str, int]:
    """How often each heading begins a line, with any kind of line break and white space before it."""
    lines = [line.strip() for line in re.split("|".join(map(re.escape, BREAKS)), prompt)]
    return {head: sum(line.startswith(head) for line in lines) for head in HEADS}


def specials(tokenizer: Any, ids: list[int]) -> dict[str, int]:
    names = tokenizer.convert_ids_to_tokens(ids)
    return {name: names.count(name) for name in SPECIAL}


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(deadline=None, max_examples=150)
@given(text=hostile, title=hostile)
def test_a_poisoned_signal_stays_in_its_place(request: pytest.FixtureRequest, name: str, text: str, title: str) -> None:
    tokenizer = request.getfixturevalue(name)
    prompts = InferencePrompts(tokenizer)
    poisoned, kept = prompts.ids([*SIGNALS, HistoryItem(text, title=title)])
    harmless, _ = prompts.ids([*SIGNALS, HistoryItem("text", title="title")])
    assert kept == 3
    assert specials(tokenizer, poisoned) == specials(tokenizer, harmless)
    found = {
        head: count for head, count in heads(tokenizer.decode(poisoned)).items() if HEADS.index(head) not in (3, 4, 5)
    }
    assert found == {
        "[What the person wrote and chose]:": 1,
        "[Task]:": 1,
        "[Summary]:": 1,
        "[Title]:": 3,
        "[Text]:": 3,
    }


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(deadline=None, max_examples=150)
@given(summary=hostile, query=hostile)
def test_a_poisoned_summary_or_query_stays_in_its_place(
    request: pytest.FixtureRequest, name: str, summary: str, query: str
) -> None:
    tokenizer = request.getfixturevalue(name)
    prompts = GeneratorPrompts(tokenizer)
    # A letter, as a blank summary or query has no section.
    poisoned = prompts.ids(f"{query}a", summary=f"{summary}a")
    assert specials(tokenizer, poisoned) == specials(tokenizer, prompts.ids("q", summary="s"))
    found = heads(tokenizer.decode(poisoned))
    assert {head: found[head] for head in HEADS[3:7]} == {
        "[About the user]:": 1,
        "[Request]:": 1,
        "[Response]:": 1,
        "[Title]:": 0,
    }
    order = [tokenizer.decode(poisoned).index(head) for head in ("[About the user]:", "[Request]:", "[Response]:")]
    assert order[0] < min(order[1:])


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(deadline=None, max_examples=100)
@given(chosen=hostile, rejected=hostile)
def test_a_poisoned_response_ends_once(request: pytest.FixtureRequest, name: str, chosen: str, rejected: str) -> None:
    tokenizer = request.getfixturevalue(name)
    prompts = GeneratorPrompts(tokenizer)
    for branch in prompts.branches(Pair("q", chosen, rejected)):
        found = specials(tokenizer, branch.response_ids)
        assert found == specials(tokenizer, prompts.renderer.end_ids)


def test_a_text_that_crosses_the_border_is_refused_in_both_prompts(tokenizer: Any) -> None:
    brackets = PromptTemplate(prompt_jinja="{{ query }} {% for i in history %}<{{ i.text }}> {% endfor %}")
    templates = PopiTemplates(inference=brackets, generator=brackets)
    inference, generator = InferencePrompts(tokenizer, templates), GeneratorPrompts(tokenizer, templates)
    assert inference.ids(SIGNALS)
    with pytest.raises(RecordError, match=r"^text: in the finished prompt, '/s' would add .* special token '</s>'"):
        inference.ids([*SIGNALS, HistoryItem("/s")])
    with pytest.raises(RecordError, match=r"^text: .* '\|im_end\|' would add .* special token '<\|im_end\|>'"):
        generator.ids("q", summary="|im_end|")
    assert generator.ids("q", summary="im_end")


def test_a_summary_of_plain_text_is_inserted_as_it_is(tokenizer: Any) -> None:
    summary = "They like\n- tea [green]\n- <b>the sea</b>\n\nNot: thrillers."
    assert summary in GeneratorPrompts(tokenizer).text("q", summary=summary)


# ---- budgets ----------------------------------------------------------------------------------------


def test_whole_signals_are_dropped_oldest_first(tokenizer: Any) -> None:
    signals = [HistoryItem(f"text {i}" * (i + 1)) for i in range(7)]
    for kept in range(len(signals) + 1):
        full, _ = InferencePrompts(tokenizer).ids(signals[len(signals) - kept :])
        for limit, expected in ((len(full), kept), (len(full) - 1, kept - 1)):
            if expected < 0:
                continue
            ids, found = InferencePrompts(tokenizer, max_prompt_tokens=limit).ids(signals)
            assert found == expected
            assert ids == InferencePrompts(tokenizer).ids(signals[len(signals) - expected :])[0]


def test_signals_leave_room_for_the_longer_response(tokenizer: Any) -> None:
    signals = [HistoryItem(f"text {i}") for i in range(5)]
    longer = max(len(PAIR.chosen), len(PAIR.rejected)) + 1
    newest = GeneratorPrompts(tokenizer).text(PAIR.query, signals=signals[3:])
    prompts = GeneratorPrompts(tokenizer, max_length=len(newest) + longer)
    for branch in prompts.branches(PAIR, signals=signals):
        assert tokenizer.decode(branch.prompt_ids) == newest
    assert prompts.text(PAIR.query, signals=signals, room=longer) == newest


def test_a_query_or_summary_that_does_not_fit_is_an_error(tokenizer: Any) -> None:
    bare = len(GeneratorPrompts(tokenizer).ids("query"))
    prompts = GeneratorPrompts(tokenizer, max_length=bare + 5)
    assert len(prompts.ids("query", room=5)) == bare
    assert prompts.ids("query", signals=SIGNALS) == prompts.ids("query"), "no signal fits"
    message = r"^the prompt of query 'query' takes \d+ tokens; max_length is \d+, of which the response takes 6"
    for make in (prompts.ids, prompts.text):
        with pytest.raises(BudgetError, match=message):
            make("query", room=6)
        with pytest.raises(BudgetError, match=message):
            make("query", room=6, signals=SIGNALS)
        with pytest.raises(BudgetError, match=r"^the prompt of query 'query' and the summary take"):
            make("query", summary="They like tea.")


def test_a_pair_without_room_for_a_summary_is_named_up_front(tokenizer: Any) -> None:
    longest = GeneratorPrompts(tokenizer).branches(PAIR, summary="s" * 51)[1]
    limit = len(longest.input_ids)  # the probe of one letter, and 40 tokens and a quarter more
    GeneratorPrompts(tokenizer, max_length=limit).check(PAIR, 40)
    with pytest.raises(BudgetError, match=rf"^user 'ann': the pair of query 'What to read\?' .* max_length is {limit}"):
        GeneratorPrompts(tokenizer, max_length=limit).check(PAIR, 41, "user 'ann'")
    bare = GeneratorPrompts(tokenizer).branches(PAIR)[1]
    GeneratorPrompts(tokenizer, max_length=len(bare.input_ids)).check(PAIR, 0)


def test_a_newest_signal_that_does_not_fit_is_named_up_front(tokenizer: Any) -> None:
    bare = len(InferencePrompts(tokenizer).ids(())[0])
    prompts = InferencePrompts(tokenizer, max_prompt_tokens=bare + 20)
    prompts.check("ann", [HistoryItem("x" * 99), HistoryItem("x")])
    with pytest.raises(BudgetError, match=r"^user 'ann': the prompt with the newest signal alone takes \d+ tokens"):
        prompts.check("ann", [HistoryItem("x"), HistoryItem("x" * 99)])
    with pytest.raises(BudgetError, match=rf"^max_prompt_tokens: expected at least {bare}"):
        InferencePrompts(tokenizer, max_prompt_tokens=bare - 1)
    for make in (
        lambda: InferencePrompts(tokenizer, max_prompt_tokens=0),
        lambda: GeneratorPrompts(tokenizer, max_length=0),
    ):
        with pytest.raises(ArgumentError, match="expected at least 1, got 0"):
            make()
