from __future__ import annotations

import itertools
import pickle
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nextquill.data import (
    EncodedExample,
    EncodingStats,
    ExampleEncoder,
    HistoryItem,
    PromptTemplate,
    Record,
    encoding,
    stream_placebo_histories,
)
from nextquill.data.placebo import COUNTERFACTUAL, EVALUATION
from nextquill.errors import ArgumentError, ArgumentTypeError, BudgetError, RecordError

TOKENIZERS = ["plain_tokenizer", "bos_tokenizer", "crossing_tokenizer", "chatml_tokenizer", "gemma_tokenizer"]


@pytest.fixture(scope="session")
def tokenizers(request: pytest.FixtureRequest) -> dict[str, Any]:
    return {name: request.getfixturevalue(name) for name in TOKENIZERS}


def _most_recent_that_fit(encoder: ExampleEncoder, query: str, history: tuple[HistoryItem, ...], room: int) -> int:
    """The specification: drop the oldest item until the whole prompt takes at most `room` tokens."""
    for kept in range(len(history), 0, -1):
        if len(encoder.renderer.prompt_ids(query, history[len(history) - kept :])) <= room:
            return kept
    return 0


def test_branches_share_the_response_and_differ_in_the_history(plain_tokenizer: Any, make_record: Any) -> None:
    example = ExampleEncoder(plain_tokenizer).encode(
        make_record("Thin plot.", "Long waves."), index=5, placebo_history=[HistoryItem("Loud.")]
    )
    assert plain_tokenizer.decode(example.factual.input_ids) == (
        "[Request]:\na tale\n\n[User's past texts]:\n[Text]: Thin plot.\n\n[Text]: Long waves.\n\n[Response]:\n"
        "Slow, and good.</s>"
    )
    assert plain_tokenizer.decode(example.counterfactual.input_ids) == (
        "[Request]:\na tale\n\n[User's past texts]:\nNone\n\n[Response]:\nSlow, and good.</s>"
    )
    assert example.placebo is not None
    assert plain_tokenizer.decode(example.placebo.input_ids) == (
        "[Request]:\na tale\n\n[User's past texts]:\n[Text]: Loud.\n\n[Response]:\nSlow, and good.</s>"
    )
    assert (example.user_id, example.index, example.history_kept, example.history_total) == ("ann", 5, 2, 2)


def test_without_history_the_branches_are_equal_and_there_is_no_placebo(plain_tokenizer: Any, make_record: Any) -> None:
    for counterfactual in ("none", "removal"):
        example = ExampleEncoder(plain_tokenizer, PromptTemplate(counterfactual=counterfactual)).encode(make_record())
        assert example.factual == example.counterfactual
        assert example.placebo is None


def test_an_exact_fit_is_kept_and_one_token_less_drops_the_oldest_item(plain_tokenizer: Any, make_record: Any) -> None:
    record = make_record("Thin plot.", "Long waves.")
    whole = len(ExampleEncoder(plain_tokenizer).encode(record).factual.input_ids)
    assert ExampleEncoder(plain_tokenizer, max_length=whole).encode(record).history_kept == 2
    example = ExampleEncoder(plain_tokenizer, max_length=whole - 1).encode(record)
    text = plain_tokenizer.decode(example.factual.input_ids)
    assert example.history_kept == 1
    assert "Long waves." in text
    assert "Thin plot." not in text


def test_budget_of_the_bare_example_is_exact(plain_tokenizer: Any, make_record: Any) -> None:
    record = make_record("Thin plot.")
    bare = ExampleEncoder(plain_tokenizer).encode(record).counterfactual
    needed = len(bare.input_ids)
    assert ExampleEncoder(plain_tokenizer, max_length=needed).encode(record).history_kept == 0
    with pytest.raises(BudgetError) as caught:
        ExampleEncoder(plain_tokenizer, max_length=needed - 1).encode(record, index=3)
    assert str(caught.value) == (
        f"record 3 (user 'ann'): the prompt without any history takes {len(bare.prompt_ids)} tokens and the response "
        f"{len(bare.response_ids)}, together {needed}; max_length is {needed - 1}"
    )


def test_budget_of_the_response_is_exact(plain_tokenizer: Any, make_record: Any) -> None:
    record = make_record()
    needed = len(ExampleEncoder(plain_tokenizer).encode(record).factual.response_ids)
    encoded = ExampleEncoder(plain_tokenizer, max_response_length=needed).encode(record)
    assert len(encoded.factual.response_ids) == needed
    with pytest.raises(BudgetError) as caught:
        ExampleEncoder(plain_tokenizer, max_response_length=needed - 1).encode(record, index=2)
    assert str(caught.value) == (
        f"record 2 (user 'ann'): the response takes {needed} tokens, max_response_length is {needed - 1}"
    )


ITEM_TEXTS = st.text("aeolt .\n", max_size=40) | st.sampled_from(["I loved the plot", "None", "\n\n", ""])
ITEMS = st.builds(HistoryItem, text=ITEM_TEXTS, title=st.none() | st.sampled_from(["Sea", "a tale"]))


@settings(max_examples=150, deadline=None)
@given(
    name=st.sampled_from(TOKENIZERS),
    template=st.builds(
        PromptTemplate,
        order=st.sampled_from(["official", "history_first"]),
        counterfactual=st.sampled_from(["none", "removal"]),
        newest_first=st.booleans(),
    ),
    history=st.lists(ITEMS, max_size=8).map(tuple),
    placebo=st.none() | st.lists(ITEMS, max_size=8).map(tuple),
    extra_room=st.integers(0, 120),
)
def test_the_most_recent_items_that_fit_are_kept(
    tokenizers: dict[str, Any],
    name: str,
    template: PromptTemplate,
    history: tuple[HistoryItem, ...],
    placebo: tuple[HistoryItem, ...] | None,
    extra_room: int,
) -> None:
    record = Record("ann", "a tale", "Good.", history)
    bare = ExampleEncoder(tokenizers[name], template).encode(record).counterfactual
    encoder = ExampleEncoder(tokenizers[name], template, max_length=len(bare.input_ids) + extra_room)
    example = encoder.encode(record, placebo_history=placebo)
    room = encoder.max_length - len(bare.response_ids)

    kept = _most_recent_that_fit(encoder, record.query, history, room)
    assert example.history_kept == kept
    assert example.factual.prompt_ids == encoder.renderer.prompt_ids(record.query, history[len(history) - kept :])
    assert example.counterfactual == bare
    assert example.factual.response_ids == bare.response_ids
    if placebo is None:
        assert example.placebo is None
    else:
        kept = _most_recent_that_fit(encoder, record.query, placebo, room)
        assert example.placebo is not None
        assert example.placebo.response_ids == bare.response_ids
        assert example.placebo.prompt_ids == encoder.renderer.prompt_ids(record.query, placebo[len(placebo) - kept :])


def test_a_long_history_takes_few_tokenisations_of_whole_prompts(
    plain_tokenizer: Any, make_record: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = ExampleEncoder(plain_tokenizer, max_length=600)
    record = make_record(*[f"Text number {number} was thin." for number in range(400)])
    calls: list[int] = []
    whole = encoder.renderer.prompt

    def counting(query: str, history: Any = ()) -> str:
        calls.append(len(history))
        return whole(query, history)

    monkeypatch.setattr(encoder.renderer, "prompt", counting)
    kept = encoder.encode(record).history_kept
    assert 10 < kept < 100
    assert len(calls) <= 4
    assert max(calls) < 2 * kept


@pytest.mark.parametrize("name", ["max_length", "max_response_length"])
def test_a_bad_length_is_named(plain_tokenizer: Any, name: str) -> None:
    with pytest.raises(ArgumentError, match=f"^{name}: expected at least 1, got 0$"):
        ExampleEncoder(plain_tokenizer, PromptTemplate(), **{name: 0})
    wrong_types: tuple[Any, ...] = (2.5, True, "9")
    for value in wrong_types:
        with pytest.raises(ArgumentTypeError, match=f"^{name}: expected an integer, got"):
            ExampleEncoder(plain_tokenizer, PromptTemplate(), **{name: value})


def test_a_template_without_any_prompt_token_is_refused(
    with_chat_template: Callable[..., Any], make_record: Any
) -> None:
    template = PromptTemplate(counterfactual="removal", closing_cue="")
    encoder = ExampleEncoder(with_chat_template("{% for m in messages %}{{ m['content'] }}{% endfor %}"), template)
    with pytest.raises(ArgumentError, match=r"^record 0 .*at least one prompt token, got none$"):
        encoder.encode(make_record(query=""))


def test_encode_all_numbers_the_records_and_shows_progress(plain_tokenizer: Any, make_record: Any) -> None:
    seen: list[Any] = []

    def progress(iterable: Iterable[Any], total: int, desc: str) -> Iterable[Any]:
        seen.append((total, desc))
        return iterable

    records = [make_record(response=text) for text in ("One.", "Two.", "Three.")]
    encoder = ExampleEncoder(plain_tokenizer)
    examples = encoder.encode_all(iter(records), progress=progress)
    assert examples == [encoder.encode(record, index) for index, record in enumerate(records)]
    assert [example.index for example in examples] == [0, 1, 2]
    assert seen == [(3, "Encoding")]


def test_encode_all_draws_placebos_by_seed(plain_tokenizer: Any, make_record: Any) -> None:
    records = [make_record(f"Text of {user}.", user_id=user) for user in "abcdefgh"]
    encoder = ExampleEncoder(plain_tokenizer)

    def placebos(seed: int) -> list[str]:
        examples = encoder.encode_all(records, placebo=True, seed=seed)
        return [plain_tokenizer.decode(example.placebo.prompt_ids) for example in examples if example.placebo]

    assert len(placebos(0)) == len(records)
    assert placebos(0) == placebos(0) != placebos(1)
    assert all(f"Text of {record.user_id}." not in text for record, text in zip(records, placebos(0), strict=True))


def test_encode_all_names_the_record_over_budget(plain_tokenizer: Any, make_record: Any) -> None:
    records = [make_record(), make_record(user_id="bob", response="word " * 100)]
    with pytest.raises(BudgetError, match=r"^record 1 \(user 'bob'\): "):
        ExampleEncoder(plain_tokenizer, max_length=80).encode_all(records)


def test_stats_count_what_was_kept_and_dropped(plain_tokenizer: Any, make_record: Any) -> None:
    records = [make_record("Thin plot.", "Long waves."), make_record("Long."), make_record("word " * 60), make_record()]
    whole = len(ExampleEncoder(plain_tokenizer).encode(records[0]).factual.input_ids)
    examples = ExampleEncoder(plain_tokenizer, max_length=whole - 1).encode_all(records)
    assert EncodingStats.from_examples(examples) == EncodingStats(
        examples=4,
        history_items=4,
        history_items_dropped=2,
        examples_truncated=2,
        examples_without_history=2,
        prompt_tokens=sum(len(example.factual.prompt_ids) for example in examples),
        response_tokens=4 * len(examples[0].factual.response_ids),
    )
    assert EncodingStats.from_examples([]) == EncodingStats(0, 0, 0, 0, 0, 0, 0)


def test_an_example_can_be_pickled(plain_tokenizer: Any, make_record: Any) -> None:
    example: EncodedExample = ExampleEncoder(plain_tokenizer).encode(make_record("Thin plot."))
    assert pickle.loads(pickle.dumps(example)) == example


@settings(max_examples=60, deadline=None)
@given(
    name=st.sampled_from(TOKENIZERS),
    template=st.builds(
        PromptTemplate,
        order=st.sampled_from(["official", "history_first"]),
        counterfactual=st.sampled_from(["none", "removal", "placebo"]),
        newest_first=st.booleans(),
    ),
    histories=st.lists(st.lists(ITEMS, max_size=6).map(tuple), min_size=2, max_size=9),
    room=st.integers(90, 260),
    batch_size=st.integers(1, 4),
    placebo=st.booleans(),
)
def test_records_together_give_what_each_gives_alone(
    tokenizers: dict[str, Any],
    name: str,
    template: PromptTemplate,
    histories: list[tuple[HistoryItem, ...]],
    room: int,
    batch_size: int,
    placebo: bool,
) -> None:
    """Batches, threads, caches and estimates of other records change nothing."""
    records = [Record(f"user {i % 3}", f"tale {i}", "Good, and slow.", each) for i, each in enumerate(histories)]
    purposes = (EVALUATION,) * placebo + (COUNTERFACTUAL,) * (template.counterfactual == "placebo")
    expected: list[Any] = []
    for index, (record, drawn) in enumerate(stream_placebo_histories(records, 5, purposes)):
        named = dict(zip(purposes, drawn, strict=True))
        alone = ExampleEncoder(tokenizers[name], template, room)
        try:
            expected.append(alone.encode(record, index, named.get(EVALUATION), named.get(COUNTERFACTUAL)))
        except BudgetError as error:
            expected.append(str(error))
    encoder, bad = ExampleEncoder(tokenizers[name], template, room), list[str]()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encoding, "_BATCH_SIZE", batch_size)
        patch.setattr(encoding, "_CACHED_COUNTS", 3)
        found = list(encoder.encode_iter(iter(records), placebo, 5, lambda i, r, error: bad.append(str(error))))
        tail = list(encoder.encode_iter(iter(records), placebo, 5, lambda *_: None, skip=2))
    assert found == [each for each in expected if not isinstance(each, str)]
    assert bad == [each for each in expected if isinstance(each, str)]
    assert tail == [example for example in found if example.index >= 2]


def test_encode_iter_yields_what_stands_before_a_bad_record(plain_tokenizer: Any, make_record: Any) -> None:
    records = [make_record(), make_record(), make_record(user_id="bob", response="word " * 100), make_record()]
    found: list[int] = []
    with pytest.raises(BudgetError, match=r"^record 2 \(user 'bob'\): "):
        found.extend(example.index for example in ExampleEncoder(plain_tokenizer, max_length=80).encode_iter(records))
    assert found == [0, 1]


def test_encode_iter_reads_no_further_than_it_must(plain_tokenizer: Any, make_record: Any) -> None:
    read: list[int] = []

    def endless() -> Iterator[Record]:
        for number in itertools.count():
            read.append(number)
            yield make_record("Thin plot.")

    examples = ExampleEncoder(plain_tokenizer).encode_iter(endless())
    assert [next(examples).index for _ in range(300)] == list(range(300))
    assert max(read) < 300 + 4 * encoding._BATCH_SIZE
    examples.close()


def test_what_a_template_cannot_show_names_the_record(plain_tokenizer: Any) -> None:
    record = Record("ann", "a tale", "Good.", (HistoryItem("Thin.", timestamp=1e15),))
    with pytest.raises(RecordError, match=r"^record 4 \(user 'ann'\): timestamp: "):
        ExampleEncoder(plain_tokenizer, PromptTemplate(show_dates=True)).encode(record, 4)


def test_another_users_history_can_stand_for_none(plain_tokenizer: Any, make_record: Any) -> None:
    template = PromptTemplate(counterfactual="placebo")
    records = [make_record(f"Text of {user}.", user_id=user) for user in "abcdefghijklmnopqrst"]
    examples = ExampleEncoder(plain_tokenizer, template).encode_all(records, placebo=True)
    shown = [plain_tokenizer.decode(each.counterfactual.prompt_ids) for each in examples]
    assert all(
        "Text of " in text and f"Text of {r.user_id}." not in text for r, text in zip(records, shown, strict=True)
    )
    same = sum(each.placebo is not None and each.counterfactual == each.placebo for each in examples)
    assert same < 8, "the evaluation's placebo is drawn apart from what is trained on"
    assert all(each.history_kept == 1 for each in examples)


def test_another_users_history_needs_another_user(plain_tokenizer: Any, make_record: Any) -> None:
    other = PromptTemplate(counterfactual="placebo")
    for call in (lambda e: e.encode_all([make_record()]), lambda e: list(e.encode_iter([make_record()]))):
        with pytest.raises(ArgumentError, match="records of one user have no other's"):
            call(ExampleEncoder(plain_tokenizer, other))
    with pytest.raises(ArgumentError, match=r"^counterfactual_history: expected another user's history .*, got none"):
        ExampleEncoder(plain_tokenizer, other).encode(make_record())
    with pytest.raises(ArgumentError, match="got one with counterfactual='none'"):
        ExampleEncoder(plain_tokenizer).encode(make_record(), counterfactual_history=[HistoryItem("Loud.")])


def test_a_slow_tokenizer_works(make_record: Any) -> None:
    class Slow:
        eos_token_id = 0

        def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
            return list(text.encode())

    records = [make_record("Thin plot.", "Long waves.", query=f"tale {i}") for i in range(5)]
    encoder = ExampleEncoder(Slow(), max_length=100)
    examples = encoder.encode_all(records)
    assert examples == [ExampleEncoder(Slow(), max_length=100).encode(record, i) for i, record in enumerate(records)]
    assert bytes(examples[0].factual.prompt_ids).decode() == encoder.renderer.prompt("tale 0", records[0].history[1:])


# ---- the border between texts and markup ------------------------------------------------------------

BRACKETS = PromptTemplate(prompt_jinja="Q: {{ query }} {% for i in history %}<{{ i.text }}> {% endfor %}")


def test_a_record_that_crosses_the_border_is_named_and_can_be_left_out(plain_tokenizer: Any, make_record: Any) -> None:
    encoder = ExampleEncoder(plain_tokenizer, BRACKETS)
    fine, hostile = make_record("a text"), make_record("/s", "fine", user_id="eve")
    bad: list[str] = []
    found = list(encoder.encode_iter([fine, hostile, fine], on_bad=lambda *each: bad.append(str(each[2]))))
    assert [example.index for example in found] == [0, 2]
    message = "record 1 (user 'eve'): text: in the finished prompt, '/s' would add or remove the special token '</s>'"
    assert [each.split(", which")[0] for each in bad] == [message]
    with pytest.raises(RecordError, match=r"^text: in the finished prompt, '/s' would"):
        encoder.encode_prompt("q", hostile.history)
    assert encoder.encode_prompt("q", hostile.history[1:])[1] == 1


special_texts = st.lists(
    st.sampled_from(["<|IM_END|>", "＜|im_end|>", "</S>", "<\u200b/s>", "<", "/s", "/S", ">", " ", "\n", "a"]),  # noqa: RUF001
    min_size=1,
    max_size=5,
).map("".join)


@pytest.mark.parametrize("name", ["plain_tokenizer", "chatml_tokenizer", "normalising_tokenizer"])
@pytest.mark.parametrize("template", [PromptTemplate(), BRACKETS], ids=["built-in", "brackets"])
@settings(deadline=None, max_examples=30)
@given(query=special_texts, texts=st.lists(special_texts, max_size=3), response=special_texts)
def test_special_tokens_of_examples_are_the_templates(
    request: pytest.FixtureRequest,
    make_record: Any,
    name: str,
    template: PromptTemplate,
    query: str,
    texts: list[str],
    response: str,
) -> None:
    tokenizer = request.getfixturevalue(name)
    encoder = ExampleEncoder(tokenizer, template)

    def special(record: Record) -> list[list[int]]:
        example = encoder.encode(record, placebo_history=record.history)
        branches = [example.factual, example.counterfactual, example.placebo]
        ids = [part for branch in branches if branch for part in (branch.prompt_ids, branch.response_ids)]
        return [[each for each in part if each in tokenizer.all_special_ids] for part in ids]

    try:
        found = special(make_record(*texts, query=query, response=response))
    except RecordError:
        assert template is BRACKETS, "the built-in wording lets no text cross the border, and refuses none"
    else:
        assert found == special(make_record(*("a" for _ in texts), query="a", response="a"))
