"""The arms of a comparison, their losses, and refused choices."""

import pytest

from nextquill.comparison.arms import ARMS, BASE, choose_arms, in_running_order, own_pace
from nextquill.errors import ArgumentError
from nextquill.losses import LongCELoss, NextQuillLoss, PerCELoss, SFTLoss

EXPECTED = {
    "sft": SFTLoss(),
    "sft_2lr": SFTLoss(),
    "sft_time": SFTLoss(),
    "nextquill": NextQuillLoss(),
    "nextquill_paper": NextQuillLoss(weighted_effect=True),
    "nextquill_detached": NextQuillLoss(detach_counterfactual=True),
    "perce": PerCELoss(),
    "longce": LongCELoss(),
}


def test_every_arm_is_the_published_loss():
    assert {name: repr(arm.loss()) for name, arm in ARMS.items()} == {k: repr(v) for k, v in EXPECTED.items()}
    assert all(type(ARMS[name].loss()) is type(loss) for name, loss in EXPECTED.items())
    assert BASE not in ARMS


def test_only_the_controls_differ_from_sft_in_anything_but_the_loss():
    assert {name for name, arm in ARMS.items() if arm.learning_rate_factor != 1} == {"sft_2lr"}
    assert ARMS["sft_2lr"].learning_rate_factor == 2
    assert {name for name, arm in ARMS.items() if arm.matches_time} == {"sft_time"}
    assert {name for name, arm in ARMS.items() if arm.is_sft} == {"sft", "sft_2lr", "sft_time"}
    assert own_pace(ARMS["sft_time"]) is ARMS["sft"]


def test_options_reach_every_loss():
    assert all(arm.loss(reduction="token").reduction == "token" for arm in ARMS.values())


def test_chosen_in_the_order_given_and_run_with_matched_times_last():
    chosen = choose_arms(["sft_time", "perce", "sft"], "sft", "perce")
    assert [arm.name for arm in chosen] == ["sft_time", "perce", "sft"]
    assert [arm.name for arm in in_running_order(chosen)] == ["perce", "sft", "sft_time"]


@pytest.mark.parametrize(
    ("names", "baseline", "reference", "message"),
    [
        ([], "sft", "perce", "names: expected at least one"),
        (["sft", "nextqil"], "sft", "perce", "names: no arm 'nextqil'; did you mean nextquill?"),
        (["sft", "NextQuill-Detached"], "sft", "perce", "did you mean nextquill_detached?"),
        (["sft", "zzz"], "sft", "perce", "names: no arm 'zzz'; expected some of sft, sft_2lr"),
        (["sft", "perce", "sft"], "sft", "perce", "names: sft is given twice"),
        (["perce"], "sft", "perce", r"baseline: expected one of the arms \(perce\), got 'sft'"),
        (["sft", "sft_time"], "sft", "perce", r"names: sft_time expects perce among them.*time_reference"),
        (["sft_time", "perce"], "perce", "perce", "names: sft_time expects sft among them"),
        (["sft", "sft_time"], "sft", "sft_time", "time_reference: expected one of sft, .* got 'sft_time'"),
        (["sft", "sft_time"], "sft", "fast", "time_reference: expected one of sft, .* got 'fast'"),
    ],
)
def test_choices_that_cannot_be_compared(names, baseline, reference, message):
    with pytest.raises(ArgumentError, match=message):
        choose_arms(names, baseline, reference)
