"""Advantages against the exact gradient of an expected reward, over a space small enough to enumerate."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from nextquill.errors import ArgumentError
from nextquill.popi.estimators import ESTIMATORS, advantages

K, TOKENS = 3, 4
LOGITS = torch.tensor([0.4, -0.3, 0.9, 0.1], dtype=torch.float64)
#: As rewards of POPI are, negative losses: all of one sign, which is what a baseline takes away.
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
    """Also for numbers whose sevenfold differs from the sum of seven in floating point."""
    found = advantages(torch.full((2, size), value, dtype=torch.float64), estimator)
    assert found.equal == 2
    assert found.values.eq(0).all()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_a_reward_that_is_no_number_takes_no_part(bad: float, estimator: str) -> None:
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


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ArgumentError, match="estimator: expected one of"):
        advantages(torch.zeros(1, 2), "ppo")
    with pytest.raises(ArgumentError, match="group_size: expected at least 2 for rloo, got 1"):
        advantages(torch.zeros(1, 1))
    with pytest.raises(ArgumentError, match="rewards: expected"):
        advantages(torch.zeros(3))
