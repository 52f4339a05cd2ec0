"""Figures from finished runs with planted scores, so that every difference is known."""

import json
import statistics

import numpy as np
import pytest

from nextquill.comparison.arms import BASE
from nextquill.errors import CheckpointError
from nextquill.evaluation.permutation import holm
from nextquill.evaluation.results import read_examples
from nextquill.report.comparison.collect import collect


def collected(folder, arms, seeds=(0, 1), baseline="sft", **options):
    options = {"resamples": 500, **options}
    return collect(folder, arms, seeds, baseline=baseline, model="m", num_train_examples=7, **options)


@pytest.fixture
def compared(planted, named_arms, tmp_path):
    """SFT, an arm that equals it, and two that do not."""
    shifts = {"sft": {}, "twin": {}, "perce": {"nll_factual": -0.2}, "longce": {"nll_factual": 0.1}}
    return collected(planted(tmp_path, shifts), named_arms(*shifts))


def test_an_arm_that_equals_the_baseline_differs_by_exactly_nothing(compared):
    twin = compared.arm("twin").against["sft"]
    assert set(twin) >= {"nll_factual", "rouge_l", "effect_placebo"}
    for name, difference in twin.items():
        assert (difference.value, difference.low, difference.high) == (0.0, 0.0, 0.0), name
        assert difference.p_value == difference.p_adjusted == 1.0, name


def test_a_planted_difference_is_found_and_bounded(compared):
    for name, shift in (("perce", -0.2), ("longce", 0.1)):
        difference = compared.arm(name).against["sft"]["nll_factual"]
        assert difference.low < shift < difference.high
        assert difference.value == pytest.approx(shift, abs=0.01)
        assert difference.p_adjusted < 0.03
        assert compared.arm(name).against["sft"]["rouge_l"].p_adjusted > 0.05


def test_seeds_are_paired_so_that_what_a_seed_does_to_both_arms_cancels(planted, named_arms, tmp_path):
    """Between seeds both arms move by a nat; the interval of their difference is a hundredth of that."""
    folder = planted(
        tmp_path, {name: {"nll_factual": lambda seed, by=by: seed + by} for name, by in (("sft", 0.0), ("perce", -0.1))}
    )
    comparison = collected(folder, named_arms("sft", "perce"))
    difference = comparison.arm("perce").against["sft"]["nll_factual"]
    assert difference.high - difference.low < 0.05
    estimate = comparison.arm("sft").estimates["nll_factual"]
    assert estimate.high - estimate.low > 0.9


def test_differences_agree_with_numpy(compared, tmp_path):
    """A mean over tokens weighs examples by their tokens, and both arms have the same tokens."""
    differences = []
    for seed in (0, 1):
        rows = {arm: read_examples(tmp_path / arm / f"seed-{seed}" / "evaluation") for arm in ("perce", "sft")}
        tokens = np.array([row.scores["tokens"] for row in rows["sft"]])
        nll = {arm: np.array([row.scores["nll_factual"] for row in each]) for arm, each in rows.items()}
        differences.append(((nll["perce"] - nll["sft"]) * tokens).sum() / tokens.sum())
    found = compared.arm("perce").against["sft"]["nll_factual"].value
    assert found == pytest.approx(statistics.mean(differences), rel=1e-9)


def test_p_values_are_holms_over_the_arms(compared):
    arms = [arm for arm in compared.arms if "sft" in arm.against]
    for measure in ("nll_factual", "rouge_l"):
        found = [arm.against["sft"][measure] for arm in arms]
        assert [each.p_adjusted for each in found] == pytest.approx(holm([each.p_value for each in found]))


def test_what_every_arm_is_compared_with(compared):
    """An arm is compared with the baseline, other forms of SFT and the untrained model, but never with itself."""
    assert set(compared.arm("perce").against) == {"sft", "twin", BASE}
    assert set(compared.arm("twin").against) == {"sft", BASE}
    assert set(compared.arm("sft").against) == {"twin", BASE}
    assert compared.arm(BASE).against == {}


def test_a_corpus_measure_has_its_values_and_no_test(compared):
    bleu = compared.arm("sft").estimates["bleu"]
    assert (bleu.value, bleu.low, bleu.high, bleu.by_seed) == (10.5, None, None, [10.0, 11.0])
    assert "bleu" not in compared.arm("perce").against["sft"]


def test_counts_and_doubles_are_no_measures(compared):
    assert list(compared.measures) == [
        "nll_factual", "nll_counterfactual", "effect_logprob", "effect_placebo", "rouge_l", "bleu"
    ]  # fmt: skip


def test_one_seed_has_intervals_over_users(planted, named_arms, tmp_path):
    folder = planted(tmp_path, {"sft": {}, "perce": {"nll_factual": -0.2}}, seeds=(4,))
    difference = collected(folder, named_arms("sft", "perce"), seeds=(4,)).arm("perce").against["sft"]["nll_factual"]
    assert difference.low < -0.2 < difference.high < 0


def test_one_user_has_no_interval_and_json_has_no_infinity(planted, named_arms, tmp_path):
    folder = planted(tmp_path, {"sft": {}, "perce": {"nll_factual": -0.2}}, users=1)
    comparison = collected(folder, named_arms("sft", "perce"))
    raw = json.loads(comparison.to_json(), parse_constant=pytest.fail)
    perce = next(arm for arm in raw["arms"] if arm["name"] == "perce")
    assert perce["against"]["sft"]["nll_factual"]["low"] is None


def test_one_base_stands_for_all_seeds(planted, named_arms, tmp_path):
    import shutil

    folder = planted(tmp_path, {"sft": {}})
    shutil.rmtree(folder / BASE / "seed-1")
    base = collected(folder, named_arms("sft")).arm(BASE).estimates["nll_factual"]
    assert base.by_seed[0] == base.by_seed[1]


def test_costs(planted, named_arms, tmp_path):
    costs = {
        "sft": {"seconds": 4.0, "peak_memory": 100},
        "perce": {"seconds": 8.0, "sessions": 2, "matched": {"seconds": 7.0}, "machine": {"device": "other"}},
    }
    comparison = collected(planted(tmp_path, {"sft": {}, "perce": {}}, costs=costs), named_arms("sft", "perce"))
    sft, perce = comparison.arm("sft").cost, comparison.arm("perce").cost
    assert (sft.seconds, sft.seconds_per_step, sft.examples_per_second, sft.peak_memory) == (4.0, 0.4, 10.0, 100)
    assert (perce.reference_seconds, perce.peak_memory, perce.learning_rate) == (7.0, None, 1e-3)
    assert comparison.arm(BASE).cost is None
    assert comparison.resumed == ["perce/seed-0", "perce/seed-1"]
    assert comparison.machines == [{}, {"device": "other"}]
    assert (comparison.num_examples, comparison.num_users, comparison.num_train_examples) == (40, 20, 7)


def test_other_records_are_not_compared(planted, named_arms, tmp_path):
    planted(tmp_path, {"sft": {}})
    planted(tmp_path / "other", {"perce": {}}, records="s")
    (tmp_path / "other" / "perce").rename(tmp_path / "perce")
    with pytest.raises(CheckpointError, match=r"perce/seed-0: evaluated on other records than .*base/seed-0"):
        collected(tmp_path, named_arms("sft", "perce"))


def test_a_run_that_is_not_finished_is_named(planted, named_arms, tmp_path):
    planted(tmp_path, {"sft": {}, "perce": {}})
    (tmp_path / "perce" / "seed-1" / "run.json").unlink()
    with pytest.raises(CheckpointError, match=r"expected a finished run of perce with seed 1"):
        collected(tmp_path, named_arms("sft", "perce"))
