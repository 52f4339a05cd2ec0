"""Which passes run, with or without gradient, what reaches the loss, and batches at the edge."""

from __future__ import annotations

import pytest
import torch
from integration_helpers import assert_same_loss, branch_nll, loss_cases, random_examples, tiny_model

from nextquill import NextQuillLoss, PerCELoss, SFTLoss, UnsupportedModelError
from nextquill.integrations.passes import PairPasses


def record_passes(model: torch.nn.Module) -> list[tuple[bool, int]]:
    """(gradient enabled, rows) of every forward pass of the model from now on."""
    seen: list[tuple[bool, int]] = []
    model.base_model.register_forward_hook(
        lambda module, args, kwargs, output: seen.append((torch.is_grad_enabled(), kwargs["input_ids"].shape[0])),
        with_kwargs=True,
    )
    return seen


PASSES = {
    "sft": [(True, 3)],
    "perce": [(False, 3), (True, 3)],
    "longce": [(False, 3), (True, 3)],
    "detached": [(False, 3), (True, 3)],
    "official": [(True, 6)],
    "paper": [(True, 6)],
    "anchored": [(True, 6)],
}


@pytest.mark.parametrize("loss_name", sorted(PASSES))
def test_counterfactual_has_gradient_only_where_the_loss_says_so(loss_name: str) -> None:
    model = tiny_model()
    passes = PairPasses(model, loss_cases()[loss_name].loss)
    seen = record_passes(model)
    passes.training_loss(make_batch(random_examples(3)))
    assert seen == PASSES[loss_name], "(gradient enabled, rows) of the forward passes"


@pytest.mark.parametrize("loss_name", ["perce", "official"])
def test_only_supervised_rows_reach_the_loss(loss_name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    passes = PairPasses(tiny_model(), loss_cases()[loss_name].loss)
    examples, rows = random_examples(3), []
    original = type(passes.loss).compute

    def compute(self, factual, counterfactual, *rest, **options):
        rows.append((len(factual), len(counterfactual)))
        return original(self, factual, counterfactual, *rest, **options)

    monkeypatch.setattr(type(passes.loss), "compute", compute)
    passes.training_loss(make_batch(examples))
    supervised = sum(len(example.factual.response_ids) for example in examples)
    assert rows == [(supervised, supervised)], "rows given to the loss"


def test_no_logits_are_returned() -> None:
    model, shapes = tiny_model(), []
    model.register_forward_hook(lambda module, args, output: shapes.append(output.logits.numel()))
    passes = PairPasses(model, NextQuillLoss())
    shapes.clear()
    passes.training_loss(make_batch(random_examples(3)))
    assert shapes == [1], "elements in what the model returned as logits"


@pytest.mark.parametrize("loss", [SFTLoss(), PerCELoss(), NextQuillLoss()], ids=lambda loss: type(loss).__name__)
def test_batch_without_supervised_rows_gives_zero_loss_and_gradient(loss) -> None:
    model, batch = tiny_model(), make_batch(random_examples(2))
    for branch in ("factual", "counterfactual", "placebo"):
        batch[branch]["labels"].fill_(-100)
    value, output = PairPasses(model, loss).training_loss(batch)
    value.backward()
    assert float(value.detach()) == 0.0
    assert output.num_tokens == 0
    assert all(p.grad is None or not p.grad.any() for p in model.parameters()), "a gradient is not zero"


def test_padding_content_does_not_matter() -> None:
    model, batch = tiny_model(), make_batch(random_examples(3))
    passes = PairPasses(model, NextQuillLoss())
    expected, _ = passes.training_loss(batch)
    for branch in ("factual", "counterfactual"):
        batch[branch]["input_ids"][batch[branch]["attention_mask"] == 0] = 77
    got, _ = passes.training_loss(batch)
    assert_same_loss(got, expected, 1e-6)


@pytest.mark.parametrize("loss_name", sorted(PASSES))
def test_scores_equal_separate_passes(loss_name: str) -> None:
    model, examples = tiny_model(), random_examples(4)
    scores = PairPasses(model, loss_cases()[loss_name].loss).scores(make_batch(examples))
    pair = scores.output.pair_nll
    for name, got in (
        ("factual", pair.factual),
        ("counterfactual", pair.counterfactual),
        ("placebo", scores.placebo_nll),
    ):
        expected = torch.cat([branch_nll(model, getattr(example, name)) for example in examples])
        assert torch.allclose(got, expected, rtol=1e-5, atol=1e-5), f"nll of the {name} branch"
    lengths = torch.tensor([len(example.factual.response_ids) for example in examples])
    assert torch.equal(scores.sequence_ids, torch.arange(4).repeat_interleave(lengths))


def test_a_model_that_inserts_positions_is_refused() -> None:
    model = tiny_model()
    passes = PairPasses(model, SFTLoss())
    model.base_model.register_forward_hook(
        lambda module, args, output: setattr(output, "last_hidden_state", output.last_hidden_state[:, 1:])
    )
    with pytest.raises(UnsupportedModelError, match="positions"):
        passes.training_loss(make_batch(random_examples(2)))
