"""Selectors keep the right past texts, in the right order, and refuse wrong input."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nextquill.data import HistoryItem, Record
from nextquill.data.histories import SELECTORS, make_selector
from nextquill.errors import ArgumentError, ArgumentTypeError, BackendUnavailableError, RecordError


def letters(texts: list[str]) -> list[list[float]]:
    """An embedding of 26 numbers, the counts of the letters."""
    return [[float(text.count(chr(97 + i))) for i in range(26)] for text in texts]


def selector(name: str, num_items: int | None = 3, **options: Any) -> Any:
    if name == "dense":
        options.setdefault("encoder", letters)
    return make_selector(name, num_items=None if name == "all" else num_items, **options)


def record(*texts: str, query: str = "the sea", times: list[float] | None = None, **fields: Any) -> Record:
    dates: list[float | None] = list(times) if times is not None else [None] * len(texts)
    items = tuple(HistoryItem(text, timestamp=time) for text, time in zip(texts, dates, strict=True))
    return Record(**{"user_id": "ann", "query": query, "response": "Good.", "history": items, **fields})


def texts(selected: Record) -> list[str]:
    return [item.text for item in selected.history]


# ---- what holds for all ----------------------------------------------------------------------------

histories = st.lists(
    st.tuples(st.text("abc sea", max_size=8), st.none() | st.integers(0, 5)).map(
        lambda pair: HistoryItem(pair[0], timestamp=None if pair[1] is None else float(pair[1]))
    ),
    max_size=7,
)


@pytest.mark.parametrize("name", SELECTORS)
@given(history=histories, num_items=st.integers(1, 4), max_tokens=st.none() | st.integers(1, 15))
def test_a_selection_is_a_part_of_the_history_in_its_order_within_the_limits(
    name: str, history: list[HistoryItem], num_items: int, max_tokens: int | None
) -> None:
    given = Record("ann", "the sea", "Good.", tuple(history), timestamp=5.0)
    chooses = selector(name, num_items, max_tokens=max_tokens, count_tokens=len)
    chooses.fit([given])
    selected = chooses.select(given)
    assert replace(selected, history=given.history) == given
    ordered = history
    if all(item.timestamp is not None for item in history):
        ordered = sorted(history, key=lambda item: item.timestamp or 0.0)
    remaining = iter(ordered)
    assert all(item in remaining for item in selected.history), "a subsequence, oldest first"
    assert name == "all" or len(selected.history) <= num_items
    assert max_tokens is None or sum(len(item.text) for item in selected.history) <= max_tokens
    assert chooses.select(given) == selected


@pytest.mark.parametrize("name", SELECTORS)
def test_an_item_from_the_future_is_an_error(name: str) -> None:
    late = record("a", "b", times=[1.0, 5.0], timestamp=4.0)
    place = r"user 'ann' with query 'the sea': field 'history\[1\]\.timestamp'"
    with pytest.raises(RecordError, match=rf"{place}: .*own 4\.0, got 5\.0"):
        selector(name).select(late)


@pytest.mark.parametrize("name", ["dense", "fixed"])
def test_fitting_refuses_an_item_from_the_future_too(name: str) -> None:
    with pytest.raises(RecordError, match="a text from the future leaks the answer"):
        selector(name).fit([record("a", times=[5.0], timestamp=4.0)])


@pytest.mark.parametrize("name", ["all", "recency", "bm25", "dense", "random"])
def test_a_record_without_history_stays_without(name: str) -> None:
    assert selector(name).select(record()).history == ()


# ---- one by one ------------------------------------------------------------------------------------


def test_recency_keeps_the_newest_by_timestamp() -> None:
    given = record("third", "first", "second", times=[3.0, 1.0, 2.0])
    assert texts(selector("recency", 2).select(given)) == ["second", "third"]
    assert texts(selector("all").select(given)) == ["first", "second", "third"]


def test_recency_keeps_the_newest_run_that_fits() -> None:
    given = record("aa", "bbbbbb", "cc", "dd")
    assert texts(selector("recency", None, max_tokens=6, count_tokens=len).select(given)) == ["cc", "dd"]
    assert texts(selector("all", max_tokens=6, count_tokens=len).select(given)) == ["cc", "dd"]


def test_ranked_selectors_pass_over_what_does_not_fit() -> None:
    given = record("sea air", "a sea of very many words", "sea", "hill")
    kept = selector("bm25", None, max_tokens=14, count_tokens=len).select(given)
    assert texts(kept) == ["sea air", "sea", "hill"]


def test_titles_are_counted_and_searched() -> None:
    titled = HistoryItem("good", title="sea")
    given = replace(record("hill"), history=(titled, HistoryItem("hill")))
    assert selector("bm25", 1).select(given).history == (titled,)
    counted: list[str] = []
    selector("recency", None, max_tokens=9, count_tokens=lambda text: counted.append(text) or 1).select(given)
    assert counted == ["hill", "sea\ngood"]


def test_random_depends_on_seed_and_record_alone() -> None:
    records = [record(*map(str, range(20)), query=f"query {i}") for i in range(5)]
    first, second = selector("random", seed=0), selector("random", seed=0)
    forwards = [first.select(each) for each in records]
    assert forwards == [second.select(each) for each in records[::-1]][::-1]
    assert forwards != [selector("random", seed=1).select(each) for each in records]
    assert len({tuple(texts(each)) for each in forwards}) > 1


def test_dense_keeps_the_nearest_and_embeds_every_text_once() -> None:
    calls: list[list[str]] = []

    def encoder(given: list[str]) -> list[list[float]]:
        calls.append(given)
        return letters(given)

    dense = make_selector("dense", num_items=2, encoder=encoder)
    given = record("xyz", "seas", "he teas", "q")
    assert texts(dense.select(given)) == ["seas", "he teas"]
    assert texts(dense.select(given)) == ["seas", "he teas"]
    dense.select(record("xyz", "new"))
    assert calls == [["the sea", "xyz", "seas", "he teas", "q"], ["new"]]


def test_dense_embeds_all_records_at_once_when_fitted() -> None:
    calls: list[list[str]] = []
    dense = make_selector("dense", num_items=2, encoder=lambda given: calls.append(given) or letters(given))
    records = [record("a", "b"), record("b", "c", query="other"), record(query="unused")]
    dense.fit(records)
    for each in records:
        dense.select(each)
    assert calls == [["the sea", "a", "b", "other", "c"]]


def test_dense_prefers_the_more_recent_of_equally_near_items() -> None:
    items = [HistoryItem("sea the", title=None, timestamp=float(i)) for i in range(5)]
    given = replace(record(), history=(*items, HistoryItem("zzz", timestamp=9.0), HistoryItem("", timestamp=8.0)))
    assert [item.timestamp for item in selector("dense", 2).select(given).history] == [3.0, 4.0]


@pytest.mark.parametrize(
    ("encoder", "message"),
    [
        (lambda given: [1.0] * len(given), r"array \[3, size\] for 3 texts, got shape \[3\]"),
        (lambda given: letters(given)[1:], r"array \[3, size\] for 3 texts, got shape \[2, 26\]"),
        (lambda given: [[float("nan")]] * len(given), "finite numbers"),
    ],
)
def test_an_encoder_that_returns_something_else_is_named(encoder: Callable[[list[str]], Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=f"^encoder: expected .*{message}"):
        make_selector("dense", num_items=1, encoder=encoder).select(record("a", "b"))


# ---- fixed -----------------------------------------------------------------------------------------


def growing(*times: float, dated: bool = True, **fields: Any) -> list[Record]:
    """Records whose history is three first texts and every earlier response of the user."""
    items = [HistoryItem(f"start {i}", timestamp=i / 10 if dated else None) for i in range(3)]
    records = []
    for time in times:
        made = record(response=f"at {time}", timestamp=time if dated else None, **fields)
        records.append(replace(made, history=tuple(items)))
        items.append(HistoryItem(f"at {time}", timestamp=time if dated else None))
    return records


@pytest.mark.parametrize("dated", [True, False])
def test_fixed_is_one_history_that_precedes_all_records_of_the_user(dated: bool) -> None:
    records = growing(1.0, 2.0, 3.0, dated=dated)
    fixed = selector("fixed", 2)
    fixed.fit(records[::-1])
    assert [texts(fixed.select(each)) for each in records] == [["start 1", "start 2"]] * 3
    assert fixed.records_without_history == 0


def test_fixed_takes_dated_texts_that_later_histories_no_longer_hold() -> None:
    first, second, third = growing(1.0, 2.0, 3.0)
    third = replace(third, history=third.history[-1:])
    fixed = selector("fixed", 2)
    fixed.fit([first, second, third])
    assert [texts(fixed.select(each)) for each in (first, second, third)] == [["start 1", "start 2"]] * 3


def test_fixed_takes_no_text_of_the_first_records_own_moment() -> None:
    """Such a text may be the record's own response, which has the same date in later histories."""
    first, second = growing(1.0, 2.0)
    first = replace(first, history=())
    fixed = selector("fixed", 5)
    fixed.fit([first, second])
    assert texts(fixed.select(second)) == ["start 0", "start 1", "start 2"]
    assert texts(fixed.select(first)) == ["start 0", "start 1", "start 2"], "dated before it, so no leak"


def test_fixed_reports_users_for_whom_nothing_precedes_all() -> None:
    first, second = growing(1.0, 2.0, dated=False)
    fixed = selector("fixed", 2)
    fixed.fit([replace(first, history=()), second, *growing(1.0, user_id="bob")])
    assert texts(fixed.select(second)) == []
    assert fixed.users_without_history == ("ann",)
    assert fixed.records_without_history == 2


def test_fixed_refuses_records_it_was_not_fitted_on() -> None:
    fixed = selector("fixed", 2)
    fixed.fit(growing(1.0, 2.0))
    with pytest.raises(RecordError, match=r"user 'bob'.*expected a user from the records given to `fit`"):
        fixed.select(record(user_id="bob"))
    with pytest.raises(RecordError, match="a text of the user's fixed history does not precede"):
        fixed.select(record(timestamp=0.05))
    assert texts(fixed.select(record(timestamp=9.0))) == ["start 1", "start 2"], "a later record of a known user"


def test_fixed_histories_make_history_first_prompts_share_their_prefix(plain_tokenizer: Any) -> None:
    from nextquill.data import PromptRenderer, PromptTemplate

    records = growing(1.0, 2.0, 3.0)
    fixed = selector("fixed", 2)
    fixed.fit(records)
    renderer = PromptRenderer(PromptTemplate(order="history_first"), plain_tokenizer)
    prompts = [renderer.prompt(f"query {i}", fixed.select(each).history) for i, each in enumerate(records)]
    assert len({prompt.partition("[Request]:")[0] for prompt in prompts}) == 1


# ---- bad arguments ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"name": "newest", "num_items": 1}, ArgumentError, "name: expected one of 'all', 'recency', "),
        ({"name": "recency", "num_items": 0}, ArgumentError, "num_items: expected at least 1, got 0"),
        ({"name": "recency", "num_items": 1.5}, ArgumentTypeError, "num_items: expected an integer, got 1.5"),
        ({"name": "recency", "num_items": None}, ArgumentError, "num_items: expected a number of items with 'recency'"),
        ({"name": "all", "num_items": 3}, ArgumentError, "num_items: expected None with 'all', got 3"),
        ({"name": "all", "num_items": None, "max_tokens": 5}, ArgumentError, "count_tokens: expected a function"),
        ({"name": "all", "num_items": None, "max_tokens": 0}, ArgumentError, "max_tokens: expected at least 1, got 0"),
        ({"name": "bm25", "num_items": 1, "encoder": letters}, ArgumentError, "encoder: expected none with 'bm25'"),
    ],
)
def test_arguments_that_do_not_fit_are_named(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error) as caught:
        make_selector(**arguments)
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(
    ("name", "module", "message"),
    [
        ("bm25", "bm25s", r"'bm25' needs bm25s.*pip install 'nextquill\[cli\]'"),
        ("dense", "sentence_transformers", r"'dense' needs sentence-transformers.*pip install 'nextquill\[dense\]'"),
    ],
)
def test_packages_that_are_not_installed_are_named(
    monkeypatch: pytest.MonkeyPatch, name: str, module: str, message: str
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(BackendUnavailableError, match=message):
        make_selector(name, num_items=1)


def test_code_in_an_encoders_folder_is_not_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    given: list[Any] = []
    package = ModuleType("sentence_transformers")
    package.SentenceTransformer = lambda *names, **options: (
        given.append((names, options)) or SimpleNamespace(encode=len)
    )  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "sentence_transformers", package)
    known, own = "sentence_transformers.models.Transformer", "coded.Encoder"
    (tmp_path / "modules.json").write_text(json.dumps([{"type": known}]))
    make_selector("dense", num_items=1, encoder=str(tmp_path))
    assert given == [((str(tmp_path),), {"trust_remote_code": False})]
    (tmp_path / "modules.json").write_text(json.dumps([{"type": known}, {"type": own}]))
    with pytest.raises(ArgumentError, match=r"^encoder: .* names its own code, coded\.Encoder, .* is not run"):
        make_selector("dense", num_items=1, encoder=str(tmp_path))
    for broken in ("[", "3", "[{}]", "[" * 100_000, f'[{{"type": "{own}", "type": "{known}"}}]'):
        (tmp_path / "modules.json").write_text(broken)
        with pytest.raises(ArgumentError, match=r"^encoder: .*modules\.json: not a list of modules, each with"):
            make_selector("dense", num_items=1, encoder=str(tmp_path))
