"""The sentences follow the figures: with reversed figures, they say the opposite."""

import pytest

from nextquill.report.comparison.collect import collect
from nextquill.report.comparison.findings import LEAST_EFFECT, find


@pytest.fixture
def found(planted, named_arms, tmp_path):
    """Headings and texts of the findings on planted shifts."""

    def call(shifts, seeds=(0, 1), **options):
        shifts = {"sft": {}, **shifts}
        folder = planted(tmp_path, shifts, seeds=seeds, **options)
        comparison = collect(
            folder, named_arms(*shifts), seeds, baseline="sft", model="m", num_train_examples=7, resamples=500
        )
        return {finding.heading: finding for finding in find(comparison)}

    return call


NLL = "label of nll_factual"


def test_no_difference_is_said_to_be_none(found):
    findings = found({"perce": {}, "longce": {}})
    assert f"{NLL}: no clear difference from SFT" in findings
    assert "label of rouge_l" in findings["No clear difference in the other measures"].text
    assert not any(finding.is_warning for finding in findings.values())
    assert "does not mean that there is none" in findings["How far it reaches"].text


def test_better_and_worse_follow_from_the_direction_of_the_measure(found):
    findings = found({"perce": {"nll_factual": -0.2, "rouge_l": -0.1}, "longce": {"nll_factual": 0.2, "rouge_l": 0.1}})
    assert f"{NLL}: PerCE better, LongCE worse than SFT" in findings
    assert "label of rouge_l: LongCE better, PerCE worse than SFT" in findings
    assert "-0.2" in findings[f"{NLL}: PerCE better, LongCE worse than SFT"].text


@pytest.mark.parametrize(
    ("control", "heading"),
    [
        (-0.05, "PerCE beats SFT, and SFT, 2× LR"),
        (-0.2, "PerCE beats SFT, but not clearly SFT, 2× LR"),
        (-0.4, "PerCE beats SFT, but not clearly SFT, 2× LR"),
    ],
)
def test_a_gain_is_held_against_better_tuned_sft(found, control, heading):
    findings = found({"sft_2lr": {"nll_factual": control}, "perce": {"nll_factual": -0.2}})
    assert heading in findings
    if control == -0.4:
        assert "higher than SFT, 2× LR's" in findings[heading].text


def test_sft_itself_is_not_held_against_its_controls(found):
    findings = found({"sft_2lr": {"nll_factual": -0.2}, "perce": {}})
    assert not any("beats" in heading for heading in findings)


COLLAPSE = "Without a history the model got worse than it was before training"
UNSUPPORTED = "A larger effect of the history that the placebo does not support"


def test_a_ruined_pass_without_history_is_warned_of(found):
    findings = found({"nextquill": {"nll_counterfactual": 2.0, "effect_logprob": 2.0}, "perce": {}})
    assert findings[COLLAPSE].is_warning
    assert "NextQuill (official) 3.49 → 5.49" in findings[COLLAPSE].text
    assert "PerCE" not in findings[COLLAPSE].text
    assert "NextQuill (official)" in findings[UNSUPPORTED].text


@pytest.mark.parametrize("size", [0.005, 0.02])
def test_an_effect_of_no_size_is_not(found, size):
    findings = found({"perce": {"nll_counterfactual": size, "effect_logprob": size}})
    assert (UNSUPPORTED in findings) is (size > LEAST_EFFECT)


def test_an_effect_that_the_placebo_supports_is_not(found):
    findings = found({"perce": {"nll_counterfactual": -0.2, "effect_logprob": 0.5, "effect_placebo": 0.4}})
    assert COLLAPSE not in findings
    assert UNSUPPORTED not in findings


def test_one_seed_is_said(found):
    findings = found({"perce": {"nll_factual": -0.2}, "sft_2lr": {}}, seeds=(7,))
    assert "One seed (7): intervals and tests are over users alone" in findings["How far it reaches"].text
    warning = findings["One seed: these trained models are compared, not the methods"]
    assert warning.is_warning
    assert next(iter(findings)) == warning.heading
    assert f"{NLL}: PerCE better than SFT (these models, one seed)" in findings
    assert "PerCE beats SFT, and SFT, 2× LR (these models, one seed)" in findings


@pytest.mark.parametrize(("shifts", "is_clear"), [((-0.3, -0.1, -0.2), False), ((-0.21, -0.2, -0.19), True)])
def test_what_is_clear_is_so_over_seeds_too(found, shifts, is_clear):
    """Mean and users are the same, and only the seeds differ. t = 4.3 with two degrees of freedom."""
    findings = found({"perce": {"nll_factual": lambda seed: shifts[seed]}}, seeds=(0, 1, 2))
    assert (f"{NLL}: PerCE better than SFT" in findings) == is_clear


def test_a_ruined_pass_is_warned_of_though_seeds_disagree_how_much(found):
    findings = found({"nextquill": {"nll_counterfactual": lambda seed: 0.5 + 2 * seed}})
    assert "over users" in findings[COLLAPSE].text


def test_too_few_users_for_any_test_are_said(found):
    findings = found({"perce": {"nll_factual": -0.5}}, users=4)
    assert f"{NLL}: no clear difference from SFT" in findings
    assert "With 4 users no test could give less than p = 0.12" in findings["How far it reaches"].text


@pytest.mark.parametrize(("seconds", "is_said"), [(7.2, False), (9.0, True), (5.0, True)])
def test_times_that_are_not_equal_are_said(found, seconds, is_said):
    costs = {"sft_time": {"seconds": seconds, "matched": {"seconds": 7.0}}}
    findings = found({"sft_time": {}}, costs=costs)
    assert ("The times that should be equal are not" in findings) == is_said


def test_a_difference_that_seeds_disagree_about_is_not_clear(found):
    """It is in every user's mean over both seeds, so a test over users alone would find it significant."""
    findings = found({"perce": {"nll_factual": lambda seed: -0.5 if seed == 0 else 0.2}})
    text = findings[f"{NLL}: no clear difference from SFT"].text
    assert float(text.rpartition("p = ")[2].rstrip(".")) > 0.1
