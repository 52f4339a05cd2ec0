"""Tables, Markdown and the page of a comparison."""

import dataclasses
import re

import pytest

from nextquill.report.comparison.collect import collect
from nextquill.report.comparison.findings import find
from nextquill.report.comparison.page import markdown, page
from nextquill.report.comparison.tables import notes, tables
from nextquill.report.html import render_page


@pytest.fixture
def comparison(planted, named_arms, tmp_path):
    shifts = {"sft": {}, "perce": {"nll_factual": -0.2, "nll_counterfactual": 1.0}}
    costs = {"perce": {"peak_memory": 3 * 2**20, "seconds": 10.0, "machine": {"device": "cpu"}, "sessions": 2}}
    costs["perce"]["processes"] = 3
    folder = planted(tmp_path, shifts, costs=costs)
    model = "a|b_<script>*"
    return collect(
        folder, named_arms(*shifts), (0, 1), baseline="sft", model=model, num_train_examples=7, resamples=500
    )


def cells(table):
    headings = [column.heading for column in table.columns]
    return {row[0].text: dict(zip(headings[1:], row[1:], strict=True)) for row in table.rows}


def test_every_arm_has_a_row_and_the_base_one_without_costs(comparison):
    measures, differences, costs = map(cells, tables(comparison))
    assert list(measures) == ["no training", "SFT", "PerCE"]
    assert list(differences) == ["PerCE"]
    assert list(costs) == ["SFT", "PerCE"]
    assert costs["PerCE"]["× s"].text == "2.00"
    assert costs["PerCE"]["peak MiB"].text == "3"
    assert costs["SFT"]["peak MiB"].text == ""


def test_a_star_marks_what_is_clear_and_nothing_else(comparison):
    row = cells(tables(comparison)[1])["PerCE"]
    assert row["nll ↓"].text.endswith("*")
    assert row["nll ↓"].marked
    assert re.fullmatch(r"\[-0\.\d+, -0\.\d+\] p = 0\.004", row["nll ↓"].detail)
    assert not row["label of rouge_l ↑"].text.endswith("*")
    assert not row["label of rouge_l ↑"].marked


def test_what_is_clearly_worse_is_starred_but_not_bold(comparison):
    worse = dataclasses.replace(comparison.measures["nll_factual"], higher_is_better=True)
    turned = dataclasses.replace(comparison, measures={**comparison.measures, "nll_factual": worse})
    cell = cells(tables(turned)[1])["PerCE"]["nll ↑"]
    assert cell.text.endswith("*")
    assert not cell.marked


def test_a_measure_without_a_test_is_in_the_first_table_only(comparison):
    first, second, _ = tables(comparison)
    assert "BLEU ↑" in {column.heading for column in first.columns}
    assert "BLEU ↑" not in {column.heading for column in second.columns}
    assert cells(first)["SFT"]["BLEU ↑"].detail == ""


def test_notes_say_what_stands_for_no_history(comparison):
    said = "Without history: under another user's history, which these prompts put in its place."
    assert said not in " ".join(notes(comparison))
    assert said in " ".join(notes(dataclasses.replace(comparison, counterfactual="placebo")))


def test_notes_name_machines_and_interruptions(comparison):
    text = " ".join(notes(comparison))
    assert "made on different machines" in text
    assert "interrupted and resumed, so their times are sums of parts: perce/seed-0, perce/seed-1." in text


def test_a_note_says_that_runs_were_made_at_the_same_time(comparison):
    said = "Up to 3 runs were made at the same time. They shared the processor"
    assert said in " ".join(notes(comparison))
    on_gpus = dataclasses.replace(comparison, machines=[{"device": "NVIDIA"}])
    assert "They shared the machine, each with a device of its own" in " ".join(notes(on_gpus))
    assert "at the same time" not in " ".join(notes(dataclasses.replace(comparison, processes=1)))


def test_markdown_tables_are_whole_and_texts_are_escaped(comparison):
    findings = find(comparison)
    text = markdown(page(comparison, findings), findings)
    rows = [line for line in text.splitlines() if line.startswith("|")]
    widths = {len(re.findall(r"(?<!\\)\|", row)) for row in rows[:4]}
    assert len(widths) == 1
    assert len(rows) == (2 + 3) + (2 + 1) + (2 + 2)
    assert r"a\|b\_\<script\>\*" in text
    assert "<script>" not in text


def test_the_page_holds_findings_warnings_and_tables(comparison):
    html = render_page(page(comparison, find(comparison)))
    assert "<script>*" not in html
    assert "PerCE better than SFT" in html
    assert "Without a history the model got worse" in html
    assert html.count("<table") == 3
