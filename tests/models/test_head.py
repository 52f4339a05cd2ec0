"""The loss inside the head against separate unpadded passes outside it: the value and every parameter's gradient."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from nextquill.data import EncodedExample
from nextquill.reference.linear import linear_logits
from tests.models.model_helpers import (
    LossCase,
    assert_same_loss,
    assert_same_tensors,
    branch_rows,
    gradients,
    loss_cases,
    random_examples,
    reference_loss,
    reference_pair_loss,
    run_loss,
    tiny_model,
)

LOSSES = sorted(loss_cases())
GPT2 = {"tie_word_embeddings": True, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
MODELS = {
    "untied": ("llama", torch.float32, 1e-5, {"tie_word_embeddings": False}),
    "tied": ("llama", torch.float32, 1e-5, {"tie_word_embeddings": True}),
    "float64": ("gpt2", torch.float64, 1e-11, GPT2),
    "head bias": ("phi", torch.float32, 1e-5, {"tie_word_embeddings": False}),
}


def hidden_states_loss(case: LossCase, model: nn.Module, examples: list[EncodedExample]) -> torch.Tensor:
    """The reference through the backbone's hidden states and full logits."""
    head = model.get_output_embeddings()

    def logits(branch) -> torch.Tensor:
        hidden = model.base_model(input_ids=torch.tensor([branch.input_ids]), use_cache=False).last_hidden_state
        return linear_logits(hidden[0, branch_rows(branch)], head.weight, head.bias)

    return reference_pair_loss(
        case,
        [logits(example.factual) for example in examples],
        [logits(example.counterfactual) for example in examples],
        [example.factual.response_ids for example in examples],
    )


@pytest.mark.covering(1)
@pytest.mark.parametrize("model_name", sorted(MODELS))
@pytest.mark.parametrize("loss_name", LOSSES)
def test_gradient_of_every_parameter_equals_separate_passes(loss_name: str, model_name: str) -> None:
    kind, dtype, tolerance, options = MODELS[model_name]
    model, case, examples = tiny_model(kind, dtype, **options), loss_cases()[loss_name], random_examples()
    loss, _ = run_loss(model, case.loss, examples)
    expected = hidden_states_loss(case, model, examples)
    assert_same_loss(loss, expected, tolerance)
    got = gradients(model, loss)
    assert len(got) == len(list(model.parameters())), "a parameter got no gradient"
    assert_same_tensors(got, gradients(model, expected), tolerance, "gradient inside the head")


@pytest.mark.parametrize("loss_name", ["detached", "official"])
def test_gradient_checkpointing_changes_nothing(loss_name: str) -> None:
    model, case, examples = tiny_model(), loss_cases()[loss_name], random_examples()
    expected = gradients(model, reference_loss(case, model, examples))
    # transformers 5.20 or so gave it the first name.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    model.train()
    loss, _ = run_loss(model, case.loss, examples)
    assert_same_tensors(gradients(model, loss), expected, 1e-5, "gradient under gradient checkpointing")


@pytest.mark.parametrize("reduction", ["sequence", "token", "micro_batch"])
@pytest.mark.parametrize("loss_name", ["official", "perce"])
def test_reductions(loss_name: str, reduction: str) -> None:
    model, case, examples = tiny_model(), loss_cases(reduction=reduction)[loss_name], random_examples(4)
    loss, _ = run_loss(model, case.loss, examples)
    expected = reference_loss(case, model, examples, reduction)
    assert_same_tensors(gradients(model, loss), gradients(model, expected), 1e-5, f"gradient of reduction {reduction}")


def test_loss_of_equal_branches_is_exact() -> None:
    """An example whose history was dropped: both branches are the same tokens."""
    model, case = tiny_model(), loss_cases()["official"]
    examples = [EncodedExample("u", 0, example.factual, example.factual, None, 0, 1) for example in random_examples(2)]
    loss, output = run_loss(model, case.loss, examples)
    assert torch.allclose(output.pair_nll.factual, output.pair_nll.counterfactual, atol=1e-6)
    expected = gradients(model, reference_loss(case, model, examples))
    assert_same_tensors(gradients(model, loss), expected, 1e-5, "gradient of equal branches")
