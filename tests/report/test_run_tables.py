"""Tables hold the figures of the evaluations, and mark only differences that a paired test confirms."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from nextquill.evaluation.bootstrap import paired_difference
from nextquill.evaluation.results import EXAMPLES_FILE, MetricValue
from nextquill.report.data import Cell, Table
from nextquill.report.numbers import rounded
from nextquill.report.run_tables import Pairing, measures_tables, scores_text
from nextquill.report.runs import Run, read_run
from tests.report.example_runs import write_evaluation, write_training


def evaluated(folder: Path, *, gain: float = 0.0, users: int = 8, records: str = "5ca1ab1e") -> Run:
    write_evaluation(folder, examples=40, tokens=8, items_of=(), gain=gain, users=users, records=records)
    return read_run(folder)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Run]:
    """Two runs that differ only by noise, and a third that is much better."""
    root = tmp_path_factory.mktemp("runs")
    return [evaluated(root / name, gain=gain) for name, gain in (("a", 0.0), ("b", 1e-6), ("c", 0.4))]


def table(tables: list[Table], start: str) -> dict[str, list[Cell]]:
    """The rows, by their first cell, of the table whose title begins like this."""
    found = next(each for each in tables if each.title.startswith(start))
    return {row[0].text: list(row[1:]) for row in found.rows}


def test_a_better_run_is_marked_and_noise_is_not(runs: list[Run]) -> None:
    rows = table(measures_tables([runs[0], runs[2]], runs[0]), "Measures")
    assert [cell.marked for cell in rows["nll with the user's history"]] == [False, True]
    assert [cell.marked for cell in rows["nll without history"]] == [False, False], "neither way is better"
    assert [cell.marked for cell in rows["BLEU, generated with history"]] == [False, False], "the texts are as good"
    for title in ("Measures", "Difference"):
        row = table(measures_tables(runs[:2], runs[0]), title)["nll with the user's history"]
        assert not any(cell.marked for cell in row)


def test_the_best_of_three_has_to_beat_both(runs: list[Run], tmp_path: Path) -> None:
    a, b, c = runs
    twin = evaluated(tmp_path / "twin", gain=0.4)
    rows = table(measures_tables([a, b, c], a), "Measures")
    assert [cell.marked for cell in rows["nll with the user's history"]] == [False, False, True]
    rows = table(measures_tables([a, c, twin], a), "Measures")
    assert not any(cell.marked for cell in rows["nll with the user's history"])


def test_few_users_leave_nothing_clear(tmp_path: Path) -> None:
    """Five users can be exchanged in 32 ways, so no p-value is below 2 / 32, whatever the interval."""
    a, c = (evaluated(tmp_path / name, gain=gain, users=5) for name, gain in (("a", 0.0), ("c", 0.4)))
    assert Pairing()(c, a)["nll_factual"].excludes_zero
    rows = table(measures_tables([a, c], a), "Difference")
    assert not any(cell.marked for row in rows.values() for cell in row)


def test_differences_are_those_of_the_scores(runs: list[Run]) -> None:
    a, _, c = runs
    groups = [example.user_id for example in a.examples]
    own, other = ([example.scores["nll_factual"] for example in run.examples] for run in (c, a))
    expected = paired_difference(own, other, groups)
    assert Pairing()(c, a)["nll_factual"] == expected
    cell = table(measures_tables([a, c], a), "Difference")["nll with the user's history"][0]
    assert cell.text == rounded(expected.difference, expected.low, expected.high, sign="+")[0]
    assert cell.detail.startswith(rounded(expected.difference, expected.low, expected.high)[1] + "; p ")


def test_a_pair_turned_round_has_the_other_sign(runs: list[Run]) -> None:
    a, _, c = runs
    pairing = Pairing()
    forth, back = pairing(c, a)["nll_factual"], pairing(a, c)["nll_factual"]
    assert (back.difference, back.low, back.high) == (-forth.difference, -forth.high, -forth.low)
    assert back.p_value == forth.p_value
    computed = Pairing()(a, c)["nll_factual"]
    assert computed.low == pytest.approx(back.low)


def test_other_records_are_not_paired(runs: list[Run], tmp_path: Path) -> None:
    other = evaluated(tmp_path / "other", records="0ddba11")
    assert Pairing()(other, runs[0]) == {}
    tables = measures_tables([runs[0], other], runs[0])
    assert not any(each.title.startswith("Difference") for each in tables)
    assert not any(cell.marked for row in table(tables, "Measures").values() for cell in row)


def test_examples_without_a_score_are_left_out_of_the_pairs(tmp_path: Path) -> None:
    a, _ = evaluated(tmp_path / "a"), evaluated(tmp_path / "b")
    lines = [json.loads(line) for line in (tmp_path / "b" / EXAMPLES_FILE).read_text(encoding="utf-8").splitlines()]
    lines[3]["scores"]["rouge_l"] = None
    del lines[5]["scores"]["rouge_l"]
    lines[7]["scores"]["rouge_l"] = float("nan")
    (tmp_path / "b" / EXAMPLES_FILE).write_text("\n".join(map(json.dumps, lines)) + "\n", encoding="utf-8")
    assert Pairing()(read_run(tmp_path / "b"), a)["rouge_l"].num == 37


def test_counts_stand_with_the_runs_and_intervals_with_the_measures(runs: list[Run]) -> None:
    assert [cell.text for cell in table(measures_tables(runs[:1], None), "Runs")["a"]][3:] == [
        "amazon_reviews", "40", "8", "25",
    ]  # fmt: skip
    rows = table(measures_tables(runs[:1], None), "Measures")
    assert "examples" not in rows
    assert rows["BLEU, generated with history"] == [Cell("12.3", "[11.0, 13.4]")]


def test_small_figures_keep_two_digits(runs: list[Run]) -> None:
    """An interval that excludes 0 must not be printed as one that ends at 0."""
    assert runs[0].evaluation is not None
    metric = dataclasses.replace(runs[0].evaluation.metrics["nll_factual"], value=4.84e-5, low=1.2e-5, high=8.6e-4)
    run = dataclasses.replace(runs[0], evaluation=dataclasses.replace(runs[0].evaluation, metrics={"m": metric}))
    (row,) = table(measures_tables([run], None), "Measures").values()
    assert row == [Cell("0.00005", "[0.00001, 0.00086]")]


def test_measures_of_few_texts_say_of_how_many(runs: list[Run]) -> None:
    few = [dataclasses.replace(each, generated=each.generated if each.index < 6 else {}) for each in runs[0].examples]
    rows = table(measures_tables([dataclasses.replace(runs[0], examples=few)], None), "Measures")
    assert rows["BLEU, generated with history"][0].detail == "[11.0, 13.4]; n 6"
    assert "n 6" not in rows["nll with the user's history"][0].detail


def test_a_measure_of_some_texts_says_of_how_many(runs: list[Run]) -> None:
    assert runs[0].evaluation is not None
    name = "right_person_uncopied_reference"
    few = [dataclasses.replace(each, scores={**each.scores, name: 1.0} if each.index < 7 else each.scores)
           for each in runs[0].examples]  # fmt: skip
    metric = MetricValue("Right person", 1.0, 0.5, 1.0, per_example=name)
    evaluation = dataclasses.replace(runs[0].evaluation, metrics={name: metric})
    (row,) = table(
        measures_tables([dataclasses.replace(runs[0], examples=few, evaluation=evaluation)], None), "Measures"
    ).values()
    assert row[0].detail == "[0.50, 1.00]; n 7"


def test_differences_are_drawn_as_the_evaluation_was(runs: list[Run]) -> None:
    """They are drawn as `nextquill evaluate --baseline` draws them, in any order of runs."""
    a, _, c = runs
    assert c.evaluation is not None
    seeded = dataclasses.replace(c, evaluation=dataclasses.replace(c.evaluation, settings={"seed": 7, "resamples": 90}))
    groups = [example.user_id for example in a.examples]
    own, other = ([example.scores["nll_factual"] for example in run.examples] for run in (c, a))
    expected = paired_difference(own, other, groups, seed=7, resamples=90)
    pairing = Pairing(baseline=a)
    assert pairing(a, seeded)["nll_factual"].low == -expected.high
    assert pairing(seeded, a)["nll_factual"] == expected


def test_nothing_is_minus_zero(runs: list[Run]) -> None:
    assert runs[0].evaluation is not None
    metric = dataclasses.replace(runs[0].evaluation.metrics["nll_factual"], value=-1e-17, low=-2e-16, high=0.0)
    run = dataclasses.replace(runs[0], evaluation=dataclasses.replace(runs[0].evaluation, metrics={"m": metric}))
    (row,) = table(measures_tables([run], None), "Measures").values()
    assert row == [Cell("0.00", "[0.00, 0.00]")]


def test_an_unevaluated_run_has_its_training_among_the_runs(tmp_path: Path) -> None:
    run = read_run(write_training(tmp_path / "a"))
    assert table(measures_tables([run], None), "Runs")["a"][:3] == [Cell("60"), Cell("1.00"), Cell("1.6")]


def test_scores_of_texts_are_named_by_their_branch(runs: list[Run]) -> None:
    example = dataclasses.replace(
        runs[0].examples[0], scores={"rouge_l": 0.25, "rouge_l_counterfactual": 0.5, "tokens": 3.0}
    )
    assert scores_text(example, "factual") == "ROUGE-L 0.25"
    assert scores_text(example, "counterfactual") == "ROUGE-L 0.50"
