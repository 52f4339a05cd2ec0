from __future__ import annotations

from typing import Any

import pytest

from nextquill.data import HistoryItem, PromptTemplate
from nextquill.errors import ArgumentError, ArgumentTypeError, RecordError

HISTORY = (HistoryItem("Long waves.", title="Sea"), HistoryItem("Thin plot."))
SECTION = "[User's past texts]:\n[Title]: Sea\n[Text]: Long waves.\n\n[Text]: Thin plot."


def test_official_order_is_query_history_cue() -> None:
    assert PromptTemplate().render("a tale", HISTORY) == f"[Request]:\na tale\n\n{SECTION}\n\n[Response]:"


def test_history_first_order_is_history_query_cue() -> None:
    rendered = PromptTemplate(order="history_first").render("a tale", HISTORY)
    assert rendered == f"{SECTION}\n\n[Request]:\na tale\n\n[Response]:"


def test_empty_history_is_none_under_its_heading() -> None:
    assert PromptTemplate().render("a tale") == "[Request]:\na tale\n\n[User's past texts]:\nNone\n\n[Response]:"


def test_removal_takes_heading_and_section_away() -> None:
    assert PromptTemplate(counterfactual="removal").render("a tale") == "[Request]:\na tale\n\n[Response]:"


def test_removal_leaves_a_history_that_is_there() -> None:
    assert PromptTemplate(counterfactual="removal").render("a", HISTORY) == PromptTemplate().render("a", HISTORY)


def test_newest_first_reverses_the_items() -> None:
    rendered = PromptTemplate(newest_first=True).render("a tale", HISTORY)
    assert rendered.index("Thin plot.") < rendered.index("Long waves.")


def test_an_empty_query_has_no_section() -> None:
    assert PromptTemplate().render("", HISTORY) == f"{SECTION}\n\n[Response]:"


def test_a_placebo_counterfactual_shows_an_empty_history_as_none() -> None:
    placebo = PromptTemplate(counterfactual="placebo")
    assert placebo.render("a tale") == PromptTemplate().render("a tale")
    assert placebo.render("a tale", HISTORY) == PromptTemplate().render("a tale", HISTORY)


def test_dates_stand_above_the_items_that_have_one() -> None:
    dated = HistoryItem("Long waves.", title="Sea", timestamp=1711843200.0)  # 2024-03-31 00:00 UTC
    rendered = PromptTemplate(show_dates=True, query_heading="", closing_cue="").render("", [dated, HISTORY[1]])
    assert rendered == (
        "[User's past texts]:\n[Date]: 2024-03-31\n[Title]: Sea\n[Text]: Long waves.\n\n[Text]: Thin plot."
    )
    assert "2024" not in PromptTemplate().render("", [dated])
    assert "1969-12-31" in PromptTemplate(show_dates=True).render("", [HistoryItem("Old.", timestamp=-1.0)])


@pytest.mark.parametrize("timestamp", [1711843200000.0, -1e300])
def test_a_timestamp_that_is_no_day_is_named(timestamp: float) -> None:
    history = [HistoryItem("Long waves.", timestamp=timestamp)]
    with pytest.raises(RecordError, match=r"^timestamp: expected seconds since 1970 for a date in the years 1 to 9999"):
        PromptTemplate(show_dates=True).render("", history)
    assert "Long waves." in PromptTemplate().render("", history)


def test_users_texts_are_cleaned_and_the_templates_words_are_not() -> None:
    rendered = PromptTemplate().render("a tale", HISTORY, str.upper)
    assert rendered == (
        "[Request]:\nA TALE\n\n[User's past texts]:\n[Title]: SEA\n[Text]: LONG WAVES.\n\n[Text]: THIN PLOT."
        "\n\n[Response]:"
    )


def test_every_wording_can_be_replaced_and_empty_lines_are_left_out() -> None:
    template = PromptTemplate(
        history_heading="Past:",
        query_heading="",
        closing_cue="",
        title_label="# ",
        text_label="",
        empty_history="nothing yet",
    )
    assert template.render("a tale", HISTORY) == "a tale\n\nPast:\n# Sea\nLong waves.\n\nThin plot."
    assert template.render("a tale") == "a tale\n\nPast:\nnothing yet"


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ({"order": "query_first"}, "order: expected one of 'official', 'history_first', got 'query_first'"),
        ({"counterfactual": None}, "counterfactual: expected one of 'none', 'removal', 'placebo', got None"),
    ],
    ids=["order", "counterfactual"],
)
def test_an_unknown_choice_is_refused(argument: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError) as caught:
        PromptTemplate(**argument)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    "argument",
    [
        {"system": 3},
        {"chat": "yes"},
        {"newest_first": 1},
        {"history_heading": None},
        {"query_heading": 1},
        {"closing_cue": None},
        {"title_label": b""},
        {"text_label": None},
        {"empty_history": None},
        {"date_label": 1},
        {"show_dates": "yes"},
        {"prompt_jinja": b"{{ query }}"},
    ],
    ids=lambda argument: next(iter(argument)),
)
def test_an_argument_of_the_wrong_type_is_named(argument: dict[str, Any]) -> None:
    name, value = next(iter(argument.items()))
    with pytest.raises(ArgumentTypeError) as caught:
        PromptTemplate(**argument)
    assert str(caught.value).startswith(f"{name}: expected ")
    assert str(caught.value).endswith(f", got {value!r}")
