"""With attention="auto", a model that padded rows can run is never refused, and one warning gives the reason."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from nextquill import ArgumentError, BudgetError, UnsupportedModelError
from nextquill.data import Branch, EncodedExample
from nextquill.evaluation.scoring import BranchScorer, score_examples
from nextquill.models.branch_passes import PairPasses
from tests.models.model_helpers import (
    assert_same_loss,
    assert_same_tensors,
    branch_nll,
    gradients,
    loss_cases,
    make_trainer,
    parameters,
    random_examples,
    reference_loss,
    shared_examples,
    tiny_model,
)
from tests.models.test_attention import ARCHITECTURES
from tests.models.test_attention_refusals import DROPOUTS, NO_MASK, ROPE

NO_KWARGS = ("stablelm", {"attention_dropout": 0.0, "hidden_dropout": 0.0})
NO_FUNCTION = ("gpt_neox_japanese", {"attn_implementation": "eager", "hidden_dropout": 0.0, "attention_dropout": 0.0})
#: A model, the attention that "auto" takes, and the reason that it gives.
TAKEN: dict[str, tuple[tuple[str, dict[str, Any]], str, str]] = {
    "masks, no keyword arguments": (NO_KWARGS, "mask", "whole masks.*StableLm.*does not run on a row of branches"),
    "masks, no function": (NO_FUNCTION, "mask", "whole masks.*GPTNeoXJapanese.*: its attention cannot be replaced"),
    **{
        name: ((kind, {"attn_implementation": "eager", **options}), "padded", f"a padded row of its own: {shown}: ")
        for name, (kind, options, shown) in NO_MASK.items()
    },
}


def make(name: str) -> tuple[nn.Module, str, str]:
    (kind, options), taken, message = TAKEN[name]
    return tiny_model(kind, **options), taken, message


def attention_of(passes: PairPasses) -> str:
    return "padded" if passes.trees is None else passes.trees.attention


@pytest.mark.parametrize("name", sorted(TAKEN))
def test_the_loss_and_every_gradient_are_those_of_separate_passes(name: str) -> None:
    model, taken, message = make(name)
    case, examples = loss_cases()["official"], shared_examples()
    with pytest.warns(RuntimeWarning, match=message):
        passes = PairPasses(model, case.loss)
    assert attention_of(passes) == taken
    expected = reference_loss(case, model, examples)
    want = gradients(model, expected)
    loss, _ = passes.training_loss(passes.collator()(examples))
    assert_same_loss(loss, expected)
    assert_same_tensors(gradients(model, loss), want, 2e-5, "gradient")


def test_the_reason_is_given_once() -> None:
    model, _, message = make("padding masks alone")
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("default")
        for _ in range(3):
            PairPasses(model, loss_cases()["sft"].loss)
    (given,) = seen
    assert given.category is RuntimeWarning
    assert message.split(": ")[1] in str(given.message)


@pytest.mark.filterwarnings("ignore:attention. 'auto' computes:RuntimeWarning")
@pytest.mark.parametrize("name", ["masks, no function", "padding masks alone"])
def test_models_are_scored_and_trained(name: str, tmp_path: Path) -> None:
    (model, taken, _), examples = make(name), shared_examples()
    for scores in score_examples(model, examples):
        assert torch.allclose(scores.nll_factual, branch_nll(model, scores.example.factual), rtol=1e-5, atol=1e-5)
    branches = [example.factual for example in examples]
    with BranchScorer(model) as scorer:
        for nll, branch in zip(scorer(branches), branches, strict=True):
            assert torch.allclose(nll, branch_nll(model, branch), rtol=1e-5, atol=1e-5)
    trained = []
    for attention in ("auto", taken):
        trainer = make_trainer(tmp_path / attention, None, make(name)[0], attention=attention, max_steps=2)
        trainer.train()
        trained.append(parameters(trainer))
    assert_same_tensors(*trained, 1e-6, "parameter")


@pytest.mark.parametrize("name", ["gpt_oss", "deepseek_v3"])
def test_trees_with_sinks_or_latent_attention_train_as_padded_rows(name: str, tmp_path: Path) -> None:
    kind, options = ARCHITECTURES[name]
    trained = []
    for attention in ("auto", "padded"):
        model = tiny_model(kind, **options)
        settings = {"attention": attention, "optim": "sgd", "learning_rate": 0.1, "max_steps": 3}
        trainer = make_trainer(tmp_path / attention, None, model, **settings)
        trainer.train()
        trained.append(parameters(trainer))
    assert_same_tensors(*trained, 2e-5, "parameter")
    start = dict(tiny_model(kind, **options).named_parameters())
    assert any(not torch.equal(start[each], value) for each, value in trained[0].items()), "nothing was trained"


@pytest.mark.parametrize("name", sorted(TAKEN))
def test_a_named_attention_is_never_replaced(name: str) -> None:
    with pytest.raises(UnsupportedModelError, match="use attention="):
        PairPasses(make(name)[0], loss_cases()["sft"].loss, "pieces")


def test_a_model_that_padding_changes_is_refused() -> None:
    """cpmant's tokens see the padding after them."""
    model = tiny_model("cpmant", attn_implementation="eager", dim_head=8, dim_ff=48)
    for attention in ("auto", "padded"):
        with pytest.raises(UnsupportedModelError, match="CpmAntForCausalLM: rows with padding on the right do not"):
            PairPasses(model, loss_cases()["sft"].loss, attention)


# ---- what trees cannot do for some batches ------------------------------------------------------------


@pytest.mark.parametrize("name", ["gpt2", "LoRA"])
def test_training_with_dropout_is_padded_and_scoring_is_not(name: str) -> None:
    build, message = DROPOUTS[name]
    model, case, examples = build().train(), loss_cases()["official"], shared_examples()
    passes, padded = PairPasses(model, case.loss), PairPasses(model, case.loss, "padded")
    with pytest.warns(RuntimeWarning, match=f"every branch of a training batch in a padded row.*{message}"):
        batch = passes.collator()(examples)
    assert "layout" in passes.scoring_collator()(examples)["parts"][0]["forwards"][0]
    assert "layout" in passes.collator(training=False)(examples)["parts"][0]["forwards"][0]
    losses = []
    for each, own in ((passes, batch), (padded, padded.collator()(examples))):
        torch.manual_seed(0)
        losses.append(each.training_loss(own)[0])
    assert torch.equal(*losses)
    assert losses[0].requires_grad


@pytest.mark.filterwarnings("ignore:attention. 'auto' computes:RuntimeWarning")
def test_a_trainer_trains_with_dropout_and_with_noise(tmp_path: Path) -> None:
    for name, options in (("dropout", {}), ("noise", {"neftune_noise_alpha": 5.0})):
        trained = []
        for attention in ("auto", "padded"):
            model = tiny_model("gpt2") if name == "dropout" else tiny_model()
            trainer = make_trainer(tmp_path / name / attention, None, model, attention=attention, **options)
            trainer.train()
            trained.append(parameters(trainer))
        assert_same_tensors(*trained, 0.0, "parameter")


@pytest.mark.parametrize("name", sorted(ROPE))
def test_a_batch_beyond_the_limit_of_a_rotary_embedding_is_padded(name: str) -> None:
    kind, options = ROPE[name]
    model, case, examples = tiny_model(kind, **options), loss_cases()["official"], random_examples(12)
    passes, padded = PairPasses(model, case.loss), PairPasses(model, case.loss, "padded")
    short = [example for example in examples if len(example.factual.input_ids) <= 16]
    batch = passes.collator()(short)
    assert "layout" in batch["parts"][0]["forwards"][0]
    assert_same_loss(passes.training_loss(batch)[0], reference_loss(case, model, short))
    with pytest.warns(RuntimeWarning, match="some batches in a padded row .* longest branch beyond 16 tokens"):
        loss, _ = passes.training_loss(passes.collator()(examples))
    assert torch.equal(loss, padded.training_loss(padded.collator()(examples))[0])
    with pytest.warns(RuntimeWarning, match="some batches in a padded row"):
        assert len(list(score_examples(model, examples))) == 12


# ---- a token budget for padded rows --------------------------------------------------------------------


@pytest.mark.parametrize("loss_name", ["official", "detached", "sft"])
def test_a_token_budget_divides_padded_batches(loss_name: str) -> None:
    case, examples, model = loss_cases()[loss_name], shared_examples(7), tiny_model()
    passes = PairPasses(model, case.loss, "padded")
    batch = passes.collator(0, 80)(examples)
    sizes = [part["forwards"][-1]["input_ids"].numel() for part in batch["parts"]]
    assert len(sizes) > 1
    assert max(sizes) <= 80
    loss, _ = passes.training_loss(batch)
    assert_same_loss(loss, reference_loss(case, model, examples))
    (whole,) = passes.collator()(examples)["parts"]
    assert whole["num_sequences"] == 7


def test_an_example_that_exceeds_the_budget_alone_is_named(tmp_path: Path) -> None:
    examples, model = shared_examples(), tiny_model()
    with pytest.raises(BudgetError, match=r"max_tokens: expected at least the \d+ tokens .* got 9"):
        next(score_examples(model, examples, attention="padded", max_tokens=9))
    with pytest.raises(BudgetError, match=r"examples\[\d\]: its rows take \d+ tokens together; max_tokens is 9"):
        PairPasses(model, loss_cases()["sft"].loss, "padded").collator(0, 9)(examples)
    with pytest.raises(BudgetError, match="max_tokens: expected at least"):
        make_trainer(tmp_path / "run", attention="padded", max_tokens=9)
    assert not (tmp_path / "run").exists()
    with pytest.raises(ArgumentError, match="max_tokens"):
        PairPasses(model, loss_cases()["sft"].loss, "padded").collator(0, 0)


def test_the_limit_itself_is_within_the_limit() -> None:
    kind, options = ROPE["longrope"]
    collate = PairPasses(tiny_model(kind, **options), loss_cases()["sft"].loss).collator()
    for length, in_trees in ((16, True), (17, False)):
        branch = Branch(list(range(2, length + 1)), [5])
        assert len(branch.input_ids) == length
        batch = collate([EncodedExample("user", 0, branch, branch, None, 1, 1)])
        assert ("layout" in batch["parts"][0]["forwards"][0]) is in_trees
