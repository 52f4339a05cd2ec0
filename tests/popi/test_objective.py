"""The loss against TRL's own code, its slopes and its two parts; advantages against the exact gradient of a reward."""

from __future__ import annotations

import itertools
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from nextquill.errors import ArgumentError
from nextquill.popi.objective import ESTIMATORS, PreferenceLoss, advantages, generator_error, informativeness


def log_probs(pairs: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    policy, reference = (-40 * torch.rand(pairs, 2, generator=generator, dtype=torch.float64) for _ in range(2))
    return policy, reference, torch.randint(1, 30, (pairs, 2), generator=generator)


def trl_loss(kind: str, beta: float, policy: Tensor, reference: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """The loss and its gradient from TRL's DPO trainer, for a batch with these log-probabilities."""
    trl = pytest.importorskip("trl", minversion="1.16")  # its private method takes other arguments before
    longest = int(lengths.max()) + 1
    mask = torch.zeros(2 * len(lengths), longest, dtype=torch.long)
    own = policy.clone().requires_grad_()
    for row, size in enumerate(lengths.T.flatten().tolist()):
        mask[row, 1 : 1 + size] = 1
    # Every token of a response carries the same share of its log-probability.
    each = own.T.flatten()[:, None] * mask[:, 1:] / mask.sum(1, keepdim=True)
    none = torch.zeros_like(each)
    outputs = SimpleNamespace(log_probs=each, entropy=none, mean_logits=none, is_top1=none.bool())
    cpu = torch.device("cpu")
    accelerator = SimpleNamespace(gather=lambda x: x, gather_for_metrics=lambda x: x, device=cpu)
    trainer: Any = SimpleNamespace(
        loss_types=[{"dpo": "sigmoid"}.get(kind, kind)], loss_weights=[1.0], beta=beta, label_smoothing=0.0,
        f_divergence_type="reverse_kl", use_weighting=False, aux_loss_enabled=False, ld_alpha=None,
        precompute_ref_logps=True, accelerator=accelerator, model=SimpleNamespace(training=True),
        _metrics={"train": _Lists(), "eval": _Lists()}, _total_train_tokens=0, _tp_size=1,
    )  # fmt: skip
    inputs = {
        "input_ids": torch.zeros_like(mask), "attention_mask": torch.ones_like(mask), "completion_mask": mask,
        "ref_chosen_logps": reference[:, 0], "ref_rejected_logps": reference[:, 1],
    }  # fmt: skip
    loss = trl.DPOTrainer._compute_loss(trainer, lambda **_: outputs, inputs, False)
    loss.backward()
    assert own.grad is not None
    return loss.detach(), own.grad


class _Lists(dict[str, Any]):
    def __missing__(self, key: str) -> list[float]:
        return []


@pytest.mark.parametrize("kind", ["dpo", "ipo"])
@pytest.mark.parametrize("beta", [0.05, 0.1, 0.7])
def test_losses_and_slopes_are_trls(kind: str, beta: float) -> None:
    policy, reference, lengths = log_probs(7, seed=1)
    found = PreferenceLoss(kind, beta)(policy, reference, lengths)
    loss, gradient = trl_loss(kind, beta, policy, reference, lengths)
    torch.testing.assert_close(found.loss.mean(), loss, rtol=1e-9, atol=1e-12)
    slopes = torch.stack((found.chosen_slope, found.rejected_slope), 1) / len(policy)
    torch.testing.assert_close(slopes, gradient, rtol=1e-7, atol=1e-12)


@pytest.mark.parametrize("kind", ["dpo", "ipo"])
@pytest.mark.parametrize("average", [None, False, True])
def test_losses_are_their_formulas(kind: str, average: bool | None) -> None:
    policy, reference, lengths = log_probs(5, seed=2)
    loss = PreferenceLoss(kind, 0.3, average)
    found = loss(policy, reference, lengths)
    for row in range(5):
        (yes, no), (ref_yes, ref_no), (long, short) = (x[row].tolist() for x in (policy, reference, lengths))
        long, short = (long, short) if loss.averages else (1, 1)
        margin = (yes - ref_yes) / long - (no - ref_no) / short
        expected = math.log1p(math.exp(-0.3 * margin)) if kind == "dpo" else (margin - 1 / 0.6) ** 2
        assert found.margin[row].item() == pytest.approx(margin, rel=1e-12)
        assert found.loss[row].item() == pytest.approx(expected, rel=1e-9)


def test_a_pair_with_a_nan_does_not_change_the_others() -> None:
    policy, reference, lengths = log_probs(3, seed=3)
    policy[1, 0] = math.nan
    found = PreferenceLoss()(policy, reference, lengths)
    assert found.loss.isfinite().tolist() == [True, False, True]
    assert found.chosen_slope.isfinite().tolist() == [True, False, True]


@pytest.mark.parametrize(
    "arguments", [{"kind": "kto"}, {"beta": 0.0}, {"beta": math.nan}, {"beta": -1.0}, {"beta": math.inf}]
)
def test_unusable_settings_are_refused(arguments: dict[str, Any]) -> None:
    with pytest.raises(ArgumentError, match=next(iter(arguments))):
        PreferenceLoss(**arguments)


def test_the_loss_is_entropy_less_information_plus_error() -> None:
    """In a world small enough to sum over: a hidden taste, a summary that often names it, a choice by taste."""
    taste_says = torch.tensor([[0.9, 0.1], [0.2, 0.8]], dtype=torch.float64)  # p(s | taste)
    chooses = torch.tensor([0.85, 0.1], dtype=torch.float64)  # p(first response | taste)
    joint_s = 0.5 * taste_says  # p(taste, s)
    p_s = joint_s.sum(0)
    truth = (joint_s * chooses[:, None]).sum(0) / p_s  # p(first | s)
    marginal = (p_s * truth).sum()

    def entropy(p: Tensor) -> Tensor:
        return -(p * p.log() + (1 - p) * (1 - p).log())

    information = entropy(marginal) - (p_s * entropy(truth)).sum()
    for q in (truth, torch.tensor([0.6, 0.55], dtype=torch.float64)):
        expected_loss = -(p_s * (truth * q.log() + (1 - truth) * (1 - q).log())).sum()
        divergence = (p_s * (truth * (truth / q).log() + (1 - truth) * ((1 - truth) / (1 - q)).log())).sum()
        torch.testing.assert_close(expected_loss, entropy(marginal) - information + divergence)
    # The estimates, weighted as the world draws, are the two parts if the generator is calibrated.
    own, other = truth.log(), truth.flip(0).log()
    against, against_other = (1 - truth).log(), (1 - truth).flip(0).log()
    estimate = sum(
        float(p_s[s] * weight * p_s[t]) * float(informativeness(mine[s : s + 1], theirs[s : s + 1, None]))
        for s in range(2)
        for t, mine_other in ((s, None), (1 - s, 0))
        for weight, mine, theirs in (
            (truth[s], own, own if mine_other is None else other),
            (1 - truth[s], against, against if mine_other is None else against_other),
        )
    )
    assert 0 < estimate < float(information) + 1e-12  # two summaries are a small sample of all
    choices = torch.cat((truth.log(), (1 - truth).log()))
    weights = torch.cat((p_s * truth, p_s * (1 - truth)))
    assert float((weights * generator_error(choices)).sum()) == pytest.approx(0, abs=1e-12)


@given(st.lists(st.floats(-30, 0), min_size=1, max_size=6), st.floats(-30, 0))
def test_informativeness_is_bounded_and_0_if_summaries_agree(own: list[float], same: float) -> None:
    mine = torch.tensor(own, dtype=torch.float64)
    others = torch.full((len(own), 3), same, dtype=torch.float64)
    assert float(informativeness(mine, others)) <= math.log(4) + 1e-9
    assert float(informativeness(others[:, 0], others)) == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("value", [0.0, -1e-300, -1e-12, -800.0, -math.inf])
def test_the_error_of_a_certain_generator_is_a_number_or_infinite(value: float) -> None:
    found = float(generator_error(torch.tensor([value], dtype=torch.float64)))
    assert not math.isnan(found)
    assert found >= -1e-9


# ---- advantages ------------------------------------------------------------------------------------

K, TOKENS = 3, 4
LOGITS = torch.tensor([0.4, -0.3, 0.9, 0.1], dtype=torch.float64)
#: Negative losses, as in POPI: all of one sign, so that a baseline helps.
REWARDS = torch.tensor([-1.1, -0.6, -1.4, -0.3], dtype=torch.float64)


def exact_gradient() -> Tensor:
    logits = LOGITS.clone().requires_grad_()
    (logits.softmax(0) * REWARDS).sum().backward()
    assert logits.grad is not None
    return logits.grad


def estimates(estimator: str) -> tuple[Tensor, Tensor]:
    """The estimate of every group of K summaries [groups, TOKENS], and the group's probability."""
    probabilities = LOGITS.softmax(0)
    groups = torch.tensor(list(itertools.product(range(TOKENS), repeat=K)))
    weights = advantages(REWARDS[groups], estimator).values
    scores = torch.nn.functional.one_hot(groups, TOKENS) - probabilities  # gradient of log p by the logits
    return (weights[..., None] * scores).mean(1), probabilities[groups].prod(1)


def mean_and_variance(estimator: str) -> tuple[Tensor, Tensor]:
    values, p = estimates(estimator)
    mean = (p[:, None] * values).sum(0)
    return mean, (p[:, None] * (values - mean).square()).sum()


@pytest.mark.parametrize("estimator", ["rloo", "reinforce"])
def test_the_mean_over_all_groups_is_the_gradient(estimator: str) -> None:
    torch.testing.assert_close(mean_and_variance(estimator)[0], exact_gradient(), rtol=1e-12, atol=1e-14)


def test_grpo_points_the_gradients_way_with_another_length() -> None:
    """Its direction agrees with the gradient's on average; its length is that of a standardised reward."""
    mean, exact = mean_and_variance("grpo")[0], exact_gradient()
    cosine = float(mean @ exact / (mean.norm() * exact.norm()))
    assert 0.9 < cosine < 1
    assert float((mean - exact).norm()) > 0.1 * float(exact.norm())


def test_leave_one_out_has_less_variance_than_reinforce() -> None:
    rloo, reinforce = mean_and_variance("rloo")[1], mean_and_variance("reinforce")[1]
    assert float(rloo) < 0.5 * float(reinforce)


@given(
    st.lists(st.lists(st.floats(-50, 50), min_size=3, max_size=3), min_size=1, max_size=4),
    st.sampled_from(ESTIMATORS[:2]),
    st.floats(-100, 100),
)
def test_a_constant_changes_nothing(rewards: list[list[float]], estimator: str, constant: float) -> None:
    values = torch.tensor(rewards, dtype=torch.float64)
    spread = values.amax(1) - values.amin(1)
    values = values[(spread > 1e-3) | (spread == 0)]
    if not len(values):
        return
    one, other = advantages(values, estimator).values, advantages(values + constant, estimator).values
    torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(one.sum(1), torch.zeros(len(values), dtype=torch.float64), rtol=0, atol=1e-6)


@pytest.mark.parametrize("estimator", ESTIMATORS[:2])
@pytest.mark.parametrize("size", [4, 7])
@pytest.mark.parametrize("value", [0.1, 1 / 3, -7.3e5 / 3])
def test_equal_rewards_teach_nothing(estimator: str, value: float, size: int) -> None:
    """Also for numbers whose product with 7 differs from the sum of seven in floating point."""
    found = advantages(torch.full((2, size), value, dtype=torch.float64), estimator)
    assert found.equal == 2
    assert found.values.eq(0).all()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_a_reward_that_is_not_finite_is_ignored(bad: float, estimator: str) -> None:
    found = advantages(torch.tensor([[1.0, bad, 2.0, 4.0]]), estimator)
    without = advantages(torch.tensor([[1.0, 2.0, 4.0]]), estimator)
    assert found.not_finite == 1
    assert found.values[0, 1] == 0
    torch.testing.assert_close(found.values[0, [0, 2, 3]], without.values[0])


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_a_group_without_two_numbers_teaches_nothing(estimator: str) -> None:
    found = advantages(torch.tensor([[math.nan, 3.0], [math.nan, math.nan]]), estimator)
    expected = [[0.0, 3.0], [0.0, 0.0]] if estimator == "reinforce" else [[0.0, 0.0], [0.0, 0.0]]
    assert found.values.tolist() == expected


def test_bad_arguments_of_advantages_are_named() -> None:
    with pytest.raises(ArgumentError, match="estimator: expected one of"):
        advantages(torch.zeros(1, 2), "ppo")
    with pytest.raises(ArgumentError, match="group_size: expected at least 2 for rloo, got 1"):
        advantages(torch.zeros(1, 1))
    with pytest.raises(ArgumentError, match="rewards: expected"):
        advantages(torch.zeros(3))
