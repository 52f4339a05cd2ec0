"""PairNLL's derived quantities and the immutability of the records."""

import dataclasses
import math

import pytest
import torch

import nextquill as nq
from tests.helpers import make_case


def test_effects_are_differences_of_log_probability_and_probability():
    pair = nq.PairNLL(torch.tensor([math.log(2.0)]), torch.tensor([math.log(8.0)]), None)
    assert pair.effect_logprob.item() == pytest.approx(math.log(4.0), rel=1e-6)
    assert pair.effect_prob.item() == pytest.approx(0.375, rel=1e-6)


def test_effects_of_an_ignored_row_are_zero():
    pair = nq.PairNLL(torch.zeros(1), torch.zeros(1), torch.zeros(1))
    assert pair.effect_logprob.item() == 0
    assert pair.effect_prob.item() == 0


@pytest.mark.parametrize("name", ["effect_logprob", "effect_prob"])
def test_effects_without_a_counterfactual_say_so(name):
    with pytest.raises(AttributeError, match="one stream only"):
        getattr(nq.PairNLL(torch.zeros(3), None, None), name)


def test_effects_are_differentiable():
    case = make_case(8, 4, 5).leaves()
    nq.linear_pair_nll(*case.pair_args).effect_prob.sum().backward()
    assert case.factual.grad.any()
    assert case.counterfactual.grad.any()


def test_loss_output_is_frozen():
    case = make_case(8, 4, 5)
    output = nq.NextQuillLoss().compute(*case.pair_args)
    with pytest.raises(dataclasses.FrozenInstanceError):
        output.loss = torch.zeros(())


def test_only_the_loss_carries_a_gradient():
    case = make_case(8, 4, 5).leaves()
    output = nq.NextQuillLoss().compute(*case.pair_args)
    values = {f.name: getattr(output, f.name) for f in dataclasses.fields(output)}
    pair = values.pop("pair_nll")
    tensors = {name: v for name, v in values.items() if isinstance(v, torch.Tensor)}
    assert [name for name, v in tensors.items() if v.requires_grad] == ["loss"]
    assert not any(nll.requires_grad for nll in pair)
