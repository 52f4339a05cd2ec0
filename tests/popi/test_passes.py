"""Log-probabilities of branches, and weighted sums of them, against plain forwards; soft caps, scales, temperatures."""

from __future__ import annotations

import copy
import random
from contextlib import closing
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from nextquill.data import Branch
from nextquill.popi.passes import BranchPasses
from tests.helpers import assert_rounds_like


def model_of(kind: str) -> nn.Module:
    own: dict[str, Any] = {
        "llama": {},
        "gemma2": {"final_logit_softcapping": 2.0, "attn_logit_softcapping": None, "head_dim": 16, "sliding_window": 6},
        "granite": {"logits_scaling": 3.0},
    }[kind]
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        kind, vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64, initializer_range=0.3, pad_token_id=0, **own,
    )  # fmt: skip
    implementation = "eager" if kind == "gemma2" else "sdpa"
    return AutoModelForCausalLM.from_config(config, attn_implementation=implementation).eval()  # type: ignore[no-any-return]


def branches_of(seed: int = 0) -> list[Branch]:
    rng = random.Random(seed)
    shared = [rng.randrange(3, 40) for _ in range(7)]
    return [
        Branch(
            shared[: rng.randint(2, 7)] + [rng.randrange(3, 40) for _ in range(rng.randint(0, 4))],
            [rng.randrange(3, 40) for _ in range(rng.randint(1, 5))],
        )
        for _ in range(7)
    ]


def plain(model: nn.Module, branch: Branch, temperature: float) -> Tensor:
    ids, size = torch.tensor([branch.input_ids]), branch.response_length
    logits = model(ids).logits[0, -size - 1 : -1] / temperature
    return logits.log_softmax(-1).gather(1, ids[0, -size:, None]).sum()


def one_by_one(model: nn.Module, branches: list[Branch], weights: list[float], temperature: float) -> Tensor:
    """Log-probabilities from a forward of each branch. The gradient of their weighted negative sum stays in `model`."""
    values = torch.stack([plain(model, branch, temperature) for branch in branches])
    (torch.tensor(weights) * -values).sum().backward()
    return values.detach()


@pytest.mark.parametrize("attention", ["auto", "padded"])
@pytest.mark.parametrize("temperature", [1.0, 0.7, 2.0])
@pytest.mark.parametrize("kind", ["llama", "gemma2", "granite"])
def test_values_and_gradients_are_those_of_forwards_one_by_one(kind: str, temperature: float, attention: str) -> None:
    model, branches = model_of(kind), branches_of()
    weights = [0.5, -1.0, 0.0, 2.0, -0.25, 1.0, -0.75]
    terms = sum(len(branch.input_ids) for branch in branches)  # the longest sum in a gradient: over all tokens
    exact = copy.deepcopy(model).double()  # except Gemma's attention, whose softmax stays in float32
    plain_values, truth = (one_by_one(m, branches, weights, temperature) for m in (model, exact))
    plain_gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    max_tokens = None if attention == "padded" else 24  # several parts
    with closing(BranchPasses(model, attention=attention, max_tokens=max_tokens)) as passes:
        passes.set_temperature(temperature)
        assert_rounds_like(passes.log_probs(branches).float(), plain_values, truth, terms)
        parts = passes.parts(branches, weights)
        assert sum(part["num_sequences"] for part in parts) == 6  # branches with weight 0 are not computed
        assert attention == "padded" or len(parts) > 1
        for part in parts:
            passes.loss(part).backward()
        passes.set_temperature(1.0)
        found = passes.log_probs(branches).float()
        with torch.no_grad():
            ones = [torch.stack([plain(m, branch, 1.0) for branch in branches]) for m in (model, exact)]
        assert_rounds_like(found, *ones, terms)
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert gradients.keys() == plain_gradients.keys()
    for name, gradient in gradients.items():
        assert_rounds_like(gradient, plain_gradients[name], exact.get_parameter(name).grad, terms, name)


def test_no_branches_give_no_values_and_no_parts() -> None:
    with closing(BranchPasses(model_of("llama"))) as passes:
        assert passes.log_probs([]).shape == (0,)
        assert passes.parts(branches_of(), [0.0] * 7) == []
