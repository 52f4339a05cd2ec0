"""The load-balancing loss of a mixture of experts equals the architecture's own on separate branches."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nextquill import NextQuillLoss, SFTLoss, UnsupportedModelError
from nextquill.data import EncodedExample
from tests.models.model_helpers import (
    assert_same_loss,
    assert_same_tensors,
    gradients,
    random_examples,
    run_loss,
    tiny_model,
)

MODELS: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 4},
    "qwen3_moe": {
        "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "decoder_sparse_step": 1,
    },
}  # fmt: skip
FACTOR = 0.7


def moe(kind: str) -> nn.Module:
    return tiny_model(kind, output_router_logits=True, router_aux_loss_coef=FACTOR, **MODELS[kind])


def own_loss(model: nn.Module, examples: list[EncodedExample], *names: str) -> Tensor:
    """FACTOR times the model's own router loss over the named branches, padded."""
    branches = [getattr(example, name).input_ids for name in names for example in examples]
    longest = max(len(ids) for ids in branches)
    ids = torch.tensor([[*branch, *[0] * (longest - len(branch))] for branch in branches])
    mask = torch.tensor([[1] * len(branch) + [0] * (longest - len(branch)) for branch in branches])
    return FACTOR * model(input_ids=ids, attention_mask=mask, output_router_logits=True).aux_loss


def without_router(kind: str, loss: Any, examples: list[EncodedExample]) -> tuple[nn.Module, Tensor]:
    model = tiny_model(kind, **MODELS[kind])
    return model, run_loss(model, loss, examples)[0]


@pytest.mark.parametrize("attention", ["auto", "mask", "padded"])
@pytest.mark.parametrize("kind", MODELS)
def test_shared_tokens_count_once_per_branch(kind: str, attention: str) -> None:
    examples = random_examples(4, shared=9)
    model, reference = moe(kind), tiny_model(kind, **MODELS[kind])
    loss, _ = run_loss(model, NextQuillLoss(threshold=0.0), examples, attention)
    expected = run_loss(reference, NextQuillLoss(threshold=0.0), examples)[0]
    expected = expected + own_loss(reference, examples, "factual", "counterfactual")
    assert_same_loss(loss, expected)
    assert_same_tensors(gradients(model, loss), gradients(reference, expected), 2e-5, f"gradient of {kind}")


def test_a_constant_counterfactual_has_no_part_in_it() -> None:
    examples = random_examples(3)
    model, reference = moe("mixtral"), tiny_model("mixtral", **MODELS["mixtral"])
    losses = [NextQuillLoss(threshold=0.0, detach_counterfactual=True) for _ in range(2)]
    got, _ = run_loss(model, losses[0], examples)
    expected = run_loss(reference, losses[1], examples)[0] + own_loss(reference, examples, "factual")
    assert_same_loss(got, expected)


def test_checkpointed_layers_are_recorded_once() -> None:
    examples, plain = random_examples(3), moe("mixtral")
    expected = gradients(plain, run_loss(plain, SFTLoss(), examples)[0])
    model = moe("mixtral").train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert_same_tensors(gradients(model, run_loss(model, SFTLoss(), examples)[0]), expected, 1e-5, "gradient")


def test_reentrant_checkpointing_is_refused() -> None:
    model = moe("mixtral").train()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    with pytest.raises(UnsupportedModelError, match=r"use_reentrant=True the router loss would have no gradient"):
        run_loss(model, SFTLoss(), random_examples(2))


def test_no_hook_stays_behind() -> None:
    model = moe("mixtral")
    run_loss(model, SFTLoss(), random_examples(2))  # transformers puts recording hooks of its own in at the first call
    before = [len(module._forward_hooks) for module in model.modules()]
    run_loss(model, SFTLoss(), random_examples(2))
    assert [len(module._forward_hooks) for module in model.modules()] == before


def test_frozen_routers_are_accepted() -> None:
    model = moe("mixtral")
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    model.lm_head.weight.requires_grad_(True)
    loss, _ = run_loss(model, SFTLoss(), random_examples(2))
    loss.backward()
    assert model.lm_head.weight.grad.norm() > 0
