"""The code, the reference and the tests' oracle all give stored mpmath values, so that none can change alone."""

import json
import math
from pathlib import Path

import pytest
import torch

import nextquill as nq
from nextquill import reference
from tests import oracle
from tests.helpers import assert_close

GOLDEN = json.loads(Path(__file__).with_name("nextquill.json").read_text(encoding="utf-8"))
LABELS, IDS = torch.tensor(GOLDEN["labels"]), torch.tensor(GOLDEN["sequence_ids"])
HEAD = {"softcap": GOLDEN["softcap"], "logit_scale": GOLDEN["logit_scale"]}
NAMES = ("hidden_factual", "hidden_counterfactual", "lm_head_weight", "bias")
TOLERANCE = 1e-13
ORACLE = {
    "nextquill": (oracle.nextquill_sequence, {}),
    "nextquill_paper": (oracle.nextquill_sequence, {"paper": True, "alpha": 0.3}),
    "nextquill_detached": (oracle.nextquill_sequence, {"detached": True, "alpha": 0.25}),
    "nextquill_anchored": (oracle.nextquill_sequence, {"anchor": 0.2}),
    "perce": (oracle.perce_sequence, {"low": 0.05, "high": 0.4}),
    "longce": (oracle.longce_sequence, {"high": 1.3}),
    "sft": (oracle.sft_sequence, {}),
}


def inputs():
    parse = lambda values: [parse(v) for v in values] if isinstance(values, list) else float(values)  # noqa: E731
    return [torch.tensor(parse(GOLDEN["inputs"][name]), dtype=torch.float64, requires_grad=True) for name in NAMES]


def check_gradients(tensors, variant):
    for name, tensor in zip(NAMES, tensors, strict=True):
        expected = torch.tensor(variant["gradients"][name], dtype=torch.float64)
        actual = torch.zeros_like(expected) if tensor.grad is None else tensor.grad
        assert_close(actual, expected, TOLERANCE, f"gradient of {name}")


@pytest.mark.parametrize("field", ["factual", "counterfactual", "effect"])
@pytest.mark.parametrize("function", [nq.linear_pair_nll, reference.linear_pair_nll], ids=["nextquill", "reference"])
def test_pair_nll_is_the_golden_value(function, field):
    h1, h0, weight, bias = inputs()
    nll = getattr(function(h1, h0, weight, LABELS, bias=bias, **HEAD), field)
    assert_close(nll, torch.tensor(GOLDEN["nll"][field], dtype=torch.float64), TOLERANCE)


@pytest.mark.parametrize("name", GOLDEN["losses"])
def test_loss_and_gradients_are_the_golden_values(name):
    variant, tensors = GOLDEN["losses"][name], inputs()
    h1, h0, weight, bias = tensors
    loss_fn = getattr(nq, variant["loss"])(**variant["options"], **HEAD)
    output = loss_fn.compute(h1, h0, weight, LABELS, bias, IDS)
    output.loss.backward()
    assert math.isclose(output.loss.item(), variant["value"], rel_tol=TOLERANCE)
    assert_close(output.token_weights, torch.tensor(variant["token_weights"], dtype=torch.float64), TOLERANCE)
    check_gradients(tensors, variant)


@pytest.mark.parametrize("name", GOLDEN["losses"])
def test_oracle_agrees_with_the_golden_values(name):
    variant, tensors = GOLDEN["losses"][name], inputs()
    h1, h0, weight, bias = tensors
    sequence_loss, options = ORACLE[name]
    scale, cap = HEAD["logit_scale"], HEAD["softcap"]
    loss = oracle.batch_loss(sequence_loss, h1, h0, weight, LABELS, IDS, bias=bias, scale=scale, softcap=cap, **options)
    loss.backward()
    assert math.isclose(loss.item(), variant["value"], rel_tol=TOLERANCE)
    check_gradients(tensors, variant)


@pytest.mark.parametrize("name", GOLDEN["losses"])
def test_reference_agrees_with_the_golden_values(name):
    variant, tensors = GOLDEN["losses"][name], inputs()
    h1, h0, weight, bias = tensors
    nextquill = variant["loss"] == "NextQuillLoss"
    loss = reference.pair_loss(
        h1, h0, weight, LABELS, bias=bias, sequence_ids=IDS, **HEAD,
        token_weights=torch.tensor(variant["token_weights"], dtype=torch.float64),
        normalize_weights=nextquill,
        alpha=variant["options"].get("alpha", 0.1 if nextquill else 0.0),
        weighted_effect=variant["options"].get("weighted_effect", False),
        detach_counterfactual=variant["options"].get("detach_counterfactual", False),
        anchor=variant["options"].get("anchor", 0.0),
    )  # fmt: skip
    loss.backward()
    assert math.isclose(loss.item(), variant["value"], rel_tol=TOLERANCE)
    check_gradients(tensors, variant)


def test_logits_of_log_three_by_hand():
    """z1 = (ln 3, 0), z0 = (0, 0), y = 0: p = 3/4 and 1/2, and the effect logits are z1 itself."""
    h1 = torch.tensor([[math.log(3.0), 0.0]], dtype=torch.float64)
    pair = nq.linear_pair_nll(h1, torch.zeros_like(h1), torch.eye(2, dtype=torch.float64), torch.tensor([0]))
    assert pair.factual.item() == pytest.approx(math.log(4 / 3), rel=1e-15)
    assert pair.counterfactual.item() == pytest.approx(math.log(2), rel=1e-15)
    assert pair.effect.item() == pytest.approx(math.log(4 / 3), rel=1e-15)
    assert pair.effect_prob.item() == pytest.approx(1 / 4, rel=1e-14)
    assert pair.effect_logprob.item() == pytest.approx(math.log(3 / 2), rel=1e-14)


def test_nextquill_loss_of_two_tokens_by_hand():
    """The first token gains 1/4 in probability (weight .9), the second nothing (weight .1)."""
    h1 = torch.tensor([[math.log(3.0), 0.0], [0.0, 0.0]], dtype=torch.float64)
    loss = nq.NextQuillLoss()(h1, torch.zeros_like(h1), torch.eye(2, dtype=torch.float64), torch.tensor([0, 1]))
    ln43, ln2 = math.log(4 / 3), math.log(2)
    assert loss.item() == pytest.approx(0.9 * ln43 + 0.1 * ln2 + 0.1 * (ln43 + ln2) / 2, rel=1e-14)


def test_golden_weights_tell_the_weightings_apart():
    """If all tokens had equal weights, these values could not show a wrong weighting."""
    distinct = {name: len(set(variant["token_weights"]) - {0.0}) for name, variant in GOLDEN["losses"].items()}
    assert (distinct["nextquill"], distinct["perce"], distinct["longce"], distinct["sft"]) == (2, 3, 4, 1)
