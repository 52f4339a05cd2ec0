"""The page of several runs holds all its parts, names missing ones, and shows the same examples of each run."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from nextquill.errors import ArgumentError, RecordError
from nextquill.report.data import LeftOutItem
from nextquill.report.html import render_page
from nextquill.report.numbers import rounded
from nextquill.report.run_page import runs_page
from nextquill.report.runs import Run, read_items, read_run
from tests.report.example_runs import write_evaluation, write_training


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Run]:
    root = tmp_path_factory.mktemp("runs")
    made = []
    for name, gain in (("a", 0.0), ("b", 0.3)):
        write_training(root / name)
        write_evaluation(root / name / "evaluation", gain=gain, users=24, examples=48)
        made.append(read_run(root / name))
    return made


def test_two_runs_stand_side_by_side(runs: list[Run]) -> None:
    page = runs_page(runs, examples=6)
    assert page.charts is not None
    assert [panel.title for panel in page.charts.panels][:2] == ["Loss", "nll with the user's history"]
    assert page.charts.legend == [("a", 0), ("b", 1)]
    assert [series.label for series in page.charts.panels[0].series] == [
        "a, training", "a, evaluation", "b, training", "b, evaluation",
    ]  # fmt: skip
    assert [table.title.split(",")[0] for table in page.folded] == [
        "Runs", "Measures on the evaluated records", "Difference to a (run minus a)",
    ]  # fmt: skip
    assert len(page.responses) == 6
    for view in page.responses:
        assert [variant.label for variant in view.variants] == ["a", "b"]
        assert [text.label for text in view.texts] == [
            "the user's own response",
            "a: generated with history", "a: generated without history",
            "b: generated with history", "b: generated without history",
        ]  # fmt: skip
    assert any(variant.items for view in page.responses for variant in view.variants)
    assert page.notices == []


def test_a_page_says_how_large_the_effects_are_and_where_texts_end(runs: list[Run]) -> None:
    """This explains tokens without colour, and texts that are cut off."""
    evaluation = runs[0].evaluation
    assert evaluation is not None
    bounded = dataclasses.replace(evaluation, settings={"max_new_tokens": 40})
    page = runs_page([dataclasses.replace(runs[0], evaluation=bounded), runs[1]], examples=1)
    (view,) = page.responses
    effect = runs[0].examples[int(view.title.split()[-1])].scores["effect_logprob"]
    assert f"(whole history {rounded(effect, sign='+')[0]} nats per token in a)" in dict(view.context)["Shown for"]
    assert page.responses_lead.endswith("Generated texts end at 40 tokens, finished or not.")
    assert "Generated texts" not in runs_page(runs, examples=1).responses_lead


def test_the_same_runs_give_the_same_page(runs: list[Run]) -> None:
    assert render_page(runs_page(runs)) == render_page(runs_page([read_run(run.folder) for run in runs]))


def test_asked_for_examples_are_shown_in_that_order(runs: list[Run]) -> None:
    page = runs_page(runs, indices=[7, 0, 7])
    assert [view.title for view in page.responses] == ["Example 7", "Example 0"]
    assert not any("Shown for" in dict(view.context) for view in page.responses)


def test_examples_of_other_records_are_shown_apart_and_not_compared(runs: list[Run], tmp_path: Path) -> None:
    other = read_run(write_evaluation(tmp_path / "other", records="0ddba11", examples=3, seed=9))
    page = runs_page([*runs, other], examples=3)
    assert any("other: evaluated on other records than a" in notice for notice in page.notices)
    assert [len(view.variants) for view in page.responses] == [2, 2, 2, 1, 1, 1]
    assert page.responses[3].title.endswith("of other")
    difference = next(table for table in page.folded if table.title.startswith("Difference"))
    assert [column.heading for column in difference.columns] == ["measure", "b"]


def test_a_baseline_without_evaluation_is_said(runs: list[Run], tmp_path: Path) -> None:
    plain = read_run(write_training(tmp_path / "plain"))
    page = runs_page([plain, *runs], baseline=plain)
    assert "plain has no evaluation, so nothing is compared with it." in page.notices
    assert any(notice.startswith("plain: no evaluation") for notice in page.notices)
    assert not any(table.title.startswith("Difference") for table in page.folded)


def test_a_run_without_anything_but_a_log_is_a_page(tmp_path: Path) -> None:
    page = runs_page([read_run(write_training(tmp_path / "a"))])
    assert page.responses == []
    assert page.charts is not None
    assert [series.label for series in page.charts.panels[0].series] == ["training", "evaluation"]
    assert "<h2>Curves</h2>" in render_page(page)


def test_examples_without_effects_show_their_texts(tmp_path: Path) -> None:
    folder = write_evaluation(tmp_path / "a")
    (folder / "effects.jsonl").unlink()
    views = runs_page([read_run(folder)], indices=[0, 1]).responses
    assert views[0].variants == []
    assert views[0].texts[0].label == "the user's own response"
    items = read_items(read_run(folder))[1]
    assert views[1].variants[0].items == [
        LeftOutItem(item["title"], item["text"], effects)
        for item, effects in zip(items.items, items.effects, strict=True)
    ]
    # Example 1 has item effects, whose tokens are shown without probabilities.
    assert [token.p_with == token.p_with for token in views[1].variants[0].tokens] == [False] * 25


def test_tokens_that_disagree_between_files_are_refused(tmp_path: Path) -> None:
    folder = write_evaluation(tmp_path / "a", items_of=(1,))
    path = folder / "item_effects.jsonl"
    path.write_text(path.read_text(encoding="utf-8").replace('"tokens": ["', '"tokens": ["x'), encoding="utf-8")
    with pytest.raises(RecordError, match=r"item_effects\.jsonl: field 'tokens': expected those of effects\.jsonl"):
        runs_page([read_run(folder)], indices=[1])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"examples": -1}, "examples: expected 0 or more, got -1"),
        ({"indices": [3, 99]}, "index: no example 99; the runs have 48 examples, 0 to 47"),
    ],
)
def test_bad_arguments_are_refused(runs: list[Run], options: dict[str, object], said: str) -> None:
    with pytest.raises(ArgumentError, match=said):
        runs_page(runs, **options)  # type: ignore[arg-type]


def test_no_runs_and_a_foreign_baseline_are_refused(runs: list[Run]) -> None:
    with pytest.raises(ArgumentError, match="runs: expected at least one"):
        runs_page([])
    with pytest.raises(ArgumentError, match="baseline: expected one of a, got c"):
        runs_page(runs[:1], baseline=dataclasses.replace(runs[1], label="c"))


def test_one_user_alone_is_said(tmp_path: Path) -> None:
    page = runs_page([read_run(write_evaluation(tmp_path / "a", users=1))])
    assert page.notices == ["Only 1 person: no intervals and no tests, because one person says nothing about others."]


def test_a_text_of_spaces_is_not_nothing(tmp_path: Path) -> None:
    folder = write_evaluation(tmp_path / "a", examples=2, text=lambda _, count: [" "] * count)
    html = render_page(runs_page([read_run(folder)]))
    assert html.count("white space only") == 2 * 3


def test_texts_of_few_people_are_warned_of(runs: list[Run]) -> None:
    few = [dataclasses.replace(each, generated=each.generated if each.index < 6 else {}) for each in runs[0].examples]
    page = runs_page([dataclasses.replace(runs[0], examples=few)])
    assert page.notices == ["a: texts of only 6 people, so the intervals of their measures are too narrow."]
    assert runs_page(runs[:1]).notices == []


def test_copied_phrases_reach_the_page(runs: list[Run]) -> None:
    copied = {"factual": [[0, 5]], "reference": [[0, 3]]}
    examples = [dataclasses.replace(each, copied=copied) for each in runs[0].examples]
    (view,) = runs_page([dataclasses.replace(runs[0], examples=examples)], indices=[2]).responses
    assert [text.copied for text in view.texts if text.copied] == [[[0, 3]], [[0, 5]]]
