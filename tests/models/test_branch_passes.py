"""The passes that run, their gradients, the inputs of the loss, and unusual batches."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from nextquill import ArgumentError, NextQuillLoss, PerCELoss, SFTLoss, UnsupportedModelError
from nextquill.models.branch_passes import PairPasses
from nextquill.tree import build_prefix_tree
from tests.models.model_helpers import (
    assert_same_loss,
    assert_same_tensors,
    branch_nll,
    gradients,
    loss_cases,
    random_examples,
    reference_loss,
    shared_examples,
    tiny_model,
)

ATTENTIONS = ("auto", "padded")


def record_passes(model: torch.nn.Module) -> list[tuple[bool, tuple[int, ...]]]:
    """Record every forward pass of the model from now on, as (gradient enabled, shape of the input)."""
    seen: list[tuple[bool, tuple[int, ...]]] = []
    model.base_model.register_forward_hook(
        lambda module, args, kwargs, output: seen.append((torch.is_grad_enabled(), tuple(kwargs["input_ids"].shape))),
        with_kwargs=True,
    )
    return seen


# (gradient enabled, branches) of each forward
ONE, CONSTANT, BOTH = (
    [(True, ["factual"])],
    [(False, ["counterfactual"]), (True, ["factual"])],
    [(True, ["factual", "counterfactual"])],
)
PASSES = {
    "sft": ONE, "perce": CONSTANT, "longce": CONSTANT, "detached": CONSTANT, "official": BOTH, "paper": BOTH,
    "anchored": BOTH,
}  # fmt: skip


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("loss_name", sorted(PASSES))
def test_counterfactual_has_gradient_only_where_the_loss_says_so(loss_name: str, attention: str) -> None:
    model, examples = tiny_model(), shared_examples()
    passes = PairPasses(model, loss_cases()[loss_name].loss, attention)
    seen = record_passes(model)
    passes.training_loss(passes.collator()(examples))
    expected = []
    for gradient, names in PASSES[loss_name]:
        branches = [getattr(example, name).input_ids for name in names for example in examples]
        padded = (len(branches), max(map(len, branches)))
        expected.append((gradient, padded if attention == "padded" else (1, len(build_prefix_tree(branches)))))
    assert seen == expected, "(gradient enabled, shape) of the forward passes"


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("loss_name", ["perce", "official"])
def test_only_supervised_rows_reach_the_loss(loss_name: str, attention: str, monkeypatch: pytest.MonkeyPatch) -> None:
    passes = PairPasses(tiny_model(), loss_cases()[loss_name].loss, attention)
    examples, rows = random_examples(3), []
    original = type(passes.loss).compute

    def compute(self, factual, counterfactual, *rest, **options):
        rows.append((len(factual), len(counterfactual)))
        return original(self, factual, counterfactual, *rest, **options)

    monkeypatch.setattr(type(passes.loss), "compute", compute)
    passes.training_loss(passes.collator()(examples))
    supervised = sum(len(example.factual.response_ids) for example in examples)
    assert rows == [(supervised, supervised)], "rows given to the loss"


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_no_logits_are_returned(attention: str) -> None:
    model, shapes = tiny_model(), []
    model.register_forward_hook(lambda module, args, output: shapes.append(output.logits.numel()))
    passes = PairPasses(model, NextQuillLoss(), attention)
    shapes.clear()
    passes.training_loss(passes.collator()(random_examples(3)))
    assert shapes == [1], "elements in what the model returned as logits"


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("loss", [SFTLoss(), PerCELoss(), NextQuillLoss()], ids=lambda loss: type(loss).__name__)
def test_a_part_without_labels_gives_zero_loss_and_gradient(loss, attention: str) -> None:
    """A rank runs it while another has more parts: it uses every parameter and adds nothing."""
    model = tiny_model()
    passes = PairPasses(model, loss, attention)
    value, output = passes.part_loss(passes.collator().empty_part(), 7.0)
    value.backward()
    assert float(value.detach()) == 0.0
    assert (output.num_tokens, output.num_sequences) == (0, 0)
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters()), "a gradient is not zero"


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("placebo", [True, False])
def test_a_part_without_labels_can_be_scored(placebo: bool, attention: str) -> None:
    passes = PairPasses(tiny_model(), NextQuillLoss(), attention)
    scores = passes.scores(passes.scoring_collator(placebo=placebo).empty_part())
    assert scores.sequence_ids.shape == scores.output.pair_nll.factual.shape == (0,)
    assert (scores.placebo_nll is not None) is placebo


def test_padding_content_does_not_matter() -> None:
    passes = PairPasses(tiny_model(), NextQuillLoss(), "padded")
    examples = random_examples(3)
    expected, _ = passes.training_loss(passes.collator(0)(examples))
    got, _ = passes.training_loss(passes.collator(77)(examples))
    assert_same_loss(got, expected, 1e-6)


# ---- parts -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", ["sequence", "token"])
@pytest.mark.parametrize("loss_name", ["official", "detached", "sft"])
def test_parts_add_up_to_the_batch(loss_name: str, reduction: str) -> None:
    """The loss and every gradient stay the same when a token budget divides a batch of seven into parts."""
    case, examples = loss_cases(reduction=reduction)[loss_name], shared_examples(7)
    model = tiny_model()
    passes = PairPasses(model, case.loss)
    whole, parts = {}, {}
    budget = None
    for results in (whole, parts):
        batch = passes.collator(0, budget)(examples)
        loss, outputs = passes.training_loss(batch)
        results["count"] = len(outputs)
        results["items"] = passes.count_items(batch)
        results["loss"], results["gradients"] = loss.detach(), gradients(model, loss)
        budget = batch["parts"][0]["forwards"][-1]["input_ids"].numel() * 2 // 5
    assert (whole["count"], parts["count"] > 2) == (1, True)
    tokens = sum(len(example.factual.response_ids) for example in examples)
    assert whole["items"] == parts["items"] == (7 if reduction == "sequence" else tokens)
    assert_same_loss(parts["loss"], whole["loss"])
    assert_same_tensors(parts["gradients"], whole["gradients"], 1e-5, "gradient of the parts")
    expected = reference_loss(case, tiny_model(), examples, reduction)
    assert_same_loss(parts["loss"], expected)


# ---- scores ----------------------------------------------------------------------------------------


@pytest.mark.covering(1)
@pytest.mark.parametrize(("attention", "budget"), [("auto", None), ("mask", None), ("padded", None), ("auto", 60)])
@pytest.mark.parametrize("loss_name", sorted(PASSES))
def test_scores_equal_separate_passes(loss_name: str, attention: str, budget: int | None) -> None:
    model, examples = tiny_model(), shared_examples()
    passes = PairPasses(model, loss_cases()[loss_name].loss, attention)
    parts = passes.scoring_collator(0, budget, placebo=True)(examples)["parts"]
    assert (len(parts) > 1) is (budget is not None)
    for part in parts:
        scores, pair = (found := passes.scores(part)), found.output.pair_nll
        members = part["sequence_ids"].unique_consecutive().tolist()
        for name, got in (
            ("factual", pair.factual),
            ("counterfactual", pair.counterfactual),
            ("placebo", scores.placebo_nll),
        ):
            expected = torch.cat([branch_nll(model, getattr(examples[index], name)) for index in members])
            assert torch.allclose(got, expected, rtol=1e-5, atol=1e-5), f"nll of the {name} branch"
        assert torch.equal(scores.sequence_ids, part["sequence_ids"])


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_a_model_that_inserts_positions_is_refused(attention: str) -> None:
    model = tiny_model()
    passes = PairPasses(model, SFTLoss(), attention)
    model.base_model.register_forward_hook(
        lambda module, args, output: setattr(output, "last_hidden_state", output.last_hidden_state[:, 1:])
    )
    with pytest.raises(UnsupportedModelError, match="positions"):
        passes.training_loss(passes.collator()(random_examples(2)))


# ---- batches that do not fit the loss --------------------------------------------------------------


def test_a_loss_that_is_changed_to_need_a_gradient_raises() -> None:
    model, examples = tiny_model(), shared_examples()
    passes = PairPasses(model, NextQuillLoss(threshold=0.0, alpha=0.0))
    batch = passes.collator()(examples)
    passes.training_loss(batch)
    passes.loss.objective = replace(passes.loss.objective, alpha=0.3)
    with pytest.raises(ArgumentError, match="make a new collator after changing the objective"):
        passes.training_loss(batch)
    case = loss_cases()["official"]
    passes.loss.objective = replace(passes.loss.objective, alpha=0.3)
    loss, _ = passes.training_loss(passes.collator()(examples))
    assert_same_loss(loss, reference_loss(case, model, examples))


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_a_batch_that_was_cut_raises(attention: str) -> None:
    passes = PairPasses(tiny_model(), SFTLoss(), attention)
    batch = passes.collator()(shared_examples())
    part = batch["parts"][0]
    part |= {"labels": part["labels"][:3], "sequence_ids": part["sequence_ids"][:3]}
    with pytest.raises(ArgumentError, match=r"expected .* labels, got 3; it was cut, as"):
        passes.training_loss(batch)


def test_a_micro_batch_is_not_cut_into_parts() -> None:
    passes = PairPasses(tiny_model(), SFTLoss(reduction="micro_batch"))
    with pytest.raises(ArgumentError, match="max_tokens: expected None with reduction='micro_batch'"):
        passes.collator(max_tokens=50)


@pytest.mark.parametrize("reduction", ["sequence", "token"])
def test_a_response_may_hold_the_token_that_the_loss_ignores(reduction: str) -> None:
    examples, model = shared_examples(), tiny_model()
    token = examples[0].factual.response_ids[0]
    results = []
    for ignored in (-100, token):
        passes = PairPasses(model, SFTLoss(reduction=reduction, ignore_index=ignored))
        results.append(passes.training_loss(passes.collator()(examples))[0])
    assert_same_loss(results[1], results[0])
