"""The sentences follow the figures: with reversed figures, they say the opposite."""

from __future__ import annotations

from dataclasses import replace

import pytest

from demos.losses.findings import compare, find, timing_note
from demos.losses.measuring import BASE, LossRow, LossRun, RowTable
from demos.losses.recipe import LossRecipe
from demos.losses.training import ANCHORED, DETACHED, OFFICIAL, SFT, SFT_FAST
from nextquill.report.comparison.findings import Finding

RECIPE = LossRecipe(seeds=2)
READ = (LossRun(0, 175, 1.0), LossRun(1, 200, 0.99))
METHODS = (SFT, SFT_FAST, "PerCE", OFFICIAL, DETACHED, ANCHORED)


def row(method: str, step: int, seed: int, **figures: float) -> LossRow:
    """A row that differs from SFT only in the given values."""
    usual = {
        "personal_nll": 0.3,
        "generic_nll": 0.4,
        "personal_nll_other": 5.0,
        "generic_nll_other": 0.4,
        "personal_nll_none": 3.0,
        "generic_nll_none": 0.4,
        "f1": 0.95,
        "exact_match": 0.0,
        "seconds_per_step": 0.02,
        "time_vs_sft": 1.2,
    }
    rate = None if method == BASE else 4e-4
    return LossRow(seed=seed, method=method, learning_rate=rate, step=step, **(usual | figures))


def findings(changes: dict[str, dict[str, float]], seeds: tuple[LossRun, ...] = READ) -> dict[str, Finding]:
    rows = [row(BASE, 0, seed) for seed in (0, 1)]
    rows += [row(m, step, seed, **changes.get(m, {})) for m in METHODS for step in (16, 28) for seed in (0, 1)]
    return {finding.heading: finding for finding in find(RowTable(rows), RECIPE, seeds)}


def has(found: dict[str, Finding], part: str) -> bool:
    return any(part in heading for heading in found)


def test_equal_figures_claim_nothing() -> None:
    found = findings({})
    assert has(found, "no causal loss moves personal tokens sooner in this run")
    assert has(found, "Generic tokens are not clearly worse with any of them")
    assert has(found, "No clear harm to the counterfactual after 28 steps in this run")
    assert has(found, "A better-tuned SFT matches them")


def test_all_lower_is_said_of_all_and_some_of_some() -> None:
    lower = {"personal_nll": 0.1}
    causal = METHODS[2:]
    assert has(findings(dict.fromkeys(causal, lower)), "the causal losses move personal tokens sooner")
    some = findings({DETACHED: lower})
    heading = "At equal steps and learning rate, some of the causal losses move personal tokens sooner"
    assert "lower with NextQuill (detached) 0.100" in some[heading].text


def test_a_detached_form_behind_sft_is_said_to_be_higher() -> None:
    found = findings({DETACHED: {"personal_nll": 0.5}})
    text = found["At equal steps and learning rate, no causal loss moves personal tokens sooner in this run"].text
    assert "higher with NextQuill (detached) 0.500" in text


@pytest.mark.parametrize(
    ("ruined", "heading"),
    [
        ((OFFICIAL,), "The published second term ruins its own counterfactual; the detached form does not"),
        ((OFFICIAL, DETACHED), "Both the published and the detached form ruin their counterfactual in this run"),
        ((DETACHED,), "The detached form ruins its counterfactual in this run, the published one does not"),
    ],
)
def test_whose_counterfactual_is_ruined(ruined: tuple[str, ...], heading: str) -> None:
    assert has(findings({method: {"generic_nll_none": 1.4} for method in ruined}), heading)


@pytest.mark.parametrize(
    ("personal", "heading"),
    [
        (0.1, "A better-tuned SFT does"),
        (0.3, "A better-tuned SFT matches them"),
        (0.9, "SFT at twice the learning rate does not match them"),
    ],
)
def test_sft_at_twice_the_rate(personal: float, heading: str) -> None:
    assert has(findings({SFT_FAST: {"personal_nll": personal}}), heading)


def test_a_base_that_cannot_read_compares_nothing() -> None:
    found = findings({OFFICIAL: {"generic_nll_none": 9.0}}, (READ[0], LossRun(1, 500, 0.6)))
    assert len(found) == 2
    assert has(found, "this run compares nothing")


def test_one_seed_is_called_one_draw() -> None:
    rows = [row(BASE, 0, 0), *(row(m, step, 0) for m in METHODS for step in (16, 28))]
    scope = find(RowTable(rows), replace(RECIPE, seeds=1), READ[:1])[-1]
    assert "one draw" in scope.text


def test_a_difference_needs_one_sign_in_every_seed() -> None:
    assert compare([0.8, 0.9], [1.0, 1.0]) == "lower"
    assert compare([0.8, 0.96], [1.0, 1.0]) == "unclear"
    assert compare([1.2, 1.1], [1.0, 1.0]) == "higher"
    assert compare([1.2, 0.5], [1.0, 1.0]) == "unclear"


def test_timing_names_each_causal_loss() -> None:
    rows = [row(m, 28, 0) for m in METHODS]
    note = timing_note(RowTable(rows), replace(RECIPE, seeds=1))
    assert "A step of SFT took 20 ms" in note
    assert note.count("1.20×") == 4
