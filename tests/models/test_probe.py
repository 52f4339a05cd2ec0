"""Each architecture's changes to its logits are found, undone during the forward, and restored."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from nextquill import ArgumentError, NextQuillLoss, SFTLoss, UnsupportedModelError
from nextquill.models.branch_passes import PairPasses
from nextquill.models.head import LossInHead
from tests.models.model_helpers import (
    VOCABULARY,
    assert_same_loss,
    loss_cases,
    random_examples,
    reference_loss,
    run_loss,
    tiny_model,
)

# Options, and the (scale, soft cap) that must be found.
ARCHITECTURES = {
    "llama": ({}, (1.0, None)),
    "qwen2": ({}, (1.0, None)),
    "qwen3": ({}, (1.0, None)),
    "mistral": ({}, (1.0, None)),
    "gemma2": ({"final_logit_softcapping": 7.3, "query_pre_attn_scalar": 8}, (1.0, 7.3)),
    "gemma3_text": ({"final_logit_softcapping": 5.1, "query_pre_attn_scalar": 8}, (1.0, 5.1)),
    # A cap that its config may not be without.
    "gemma3n_text": (
        {
            "num_kv_shared_layers": 0, "layer_types": ["full_attention"] * 2, "activation_sparsity_pattern": [0.0, 0.0],
            "altup_num_inputs": 2, "laurel_rank": 4, "hidden_size_per_layer_input": 8,
            "vocab_size_per_layer_input": VOCABULARY,
        },
        (1.0, 30.0),
    ),
    "granite": ({"logits_scaling": 6.0}, (1 / 6.0, None)),
    "cohere2": ({"logit_scale": 0.0625}, (0.0625, None)),
    "gpt2": ({}, (1.0, None)),
    "phi3": ({"resid_pdrop": 0.0}, (1.0, None)),
    "olmo2": ({}, (1.0, None)),
    "gpt_neox": ({}, (1.0, None)),
    "smollm3": ({"pad_token_id": 0}, (1.0, None)),
    "mixtral": ({"num_local_experts": 4}, (1.0, None)),
}  # fmt: skip


@pytest.mark.parametrize("kind", sorted(ARCHITECTURES))
def test_scale_and_soft_cap_are_found(kind: str) -> None:
    """test_attention.py shows that the loss and its gradient then equal the model's own."""
    options, (scale, softcap) = ARCHITECTURES[kind]
    model, case, examples = tiny_model(kind, **options), loss_cases()["official"], random_examples()
    passes = PairPasses(model, case.loss, "padded")
    assert passes.loss.logit_scale == pytest.approx(scale, rel=1e-12), "the scale found by probing"
    assert passes.loss.softcap == softcap, "the soft cap found by probing"
    loss, _ = passes.training_loss(passes.collator()(examples))
    assert_same_loss(loss, reference_loss(case, model, examples))


def test_bfloat16_model_is_probed_exactly() -> None:
    model = tiny_model("granite", torch.bfloat16, logits_scaling=6.0)
    assert LossInHead(model).logit_scale == pytest.approx(1 / 6.0, rel=1e-6)
    model = tiny_model("gemma2", torch.bfloat16, final_logit_softcapping=7.3)
    assert LossInHead(model).softcap == pytest.approx(7.3, rel=1e-6)


def test_a_head_narrower_than_the_hidden_states_does_not_round_them() -> None:
    case, examples = loss_cases()["official"], random_examples()
    model = tiny_model(tie_word_embeddings=False)
    model.lm_head.to(torch.bfloat16)
    loss, _ = run_loss(model, case.loss, examples, "padded")
    loss.backward()
    assert model.lm_head.weight.grad.dtype == torch.bfloat16
    model.lm_head.float()
    assert_same_loss(loss, reference_loss(case, model, examples))


def test_head_and_config_are_restored_when_the_loss_raises() -> None:
    model = tiny_model("gemma2", final_logit_softcapping=7.3)
    runner, ids = LossInHead(model), torch.tensor([[3, 4, 5]])
    before = model(input_ids=ids).logits
    inside = []

    def explode(state):
        inside.append(model.config.final_logit_softcapping)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        runner.forward(explode, {"input_ids": ids})
    assert inside == [None], "the soft cap was not switched off inside"
    assert model.config.final_logit_softcapping == 7.3, "the soft cap was not switched on again"
    assert "forward" not in model.lm_head.__dict__, "the head's forward was not restored"
    assert torch.equal(model(input_ids=ids).logits, before)


def test_an_earlier_patch_of_the_head_survives() -> None:
    model = tiny_model()
    original = model.lm_head.forward
    model.lm_head.forward = patched = lambda x: original(x)
    run_loss(model, SFTLoss(), random_examples(2))
    assert model.lm_head.forward is patched


def test_probing_leaves_modes_and_random_state_alone() -> None:
    model = tiny_model().train()
    model.model.layers[0].eval()
    state = torch.random.get_rng_state()
    LossInHead(model)
    assert torch.equal(torch.random.get_rng_state(), state), "probing used random numbers"
    assert model.training
    assert model.model.layers[1].training
    assert not model.model.layers[0].mlp.training, "a module frozen in eval mode was put into training mode"


class _LogitsFunction(nn.Module):
    """A llama whose logits pass through a function."""

    def __init__(self, function) -> None:
        super().__init__()
        self.inner, self.function = tiny_model(), function

    def get_output_embeddings(self) -> nn.Module:
        return self.inner.lm_head

    def forward(self, **inputs):
        outputs = self.inner(**inputs)
        outputs.logits = self.function(outputs.logits)
        return outputs


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda z: z.clamp(-20, 20), "neither a scale nor a soft cap"),
        (lambda z: z + 1, "neither a scale nor a soft cap"),
        (lambda z: z * 0, "neither a scale nor a soft cap"),
        (lambda z: z.log_softmax(-1), "neither a scale nor a soft cap"),
        (lambda z: 9 * torch.tanh(z / 9), "could not be switched off"),
        (lambda z: z[..., :5], "does not return"),
    ],
)
def test_unknown_functions_of_logits_are_refused(function, message: str) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        LossInHead(_LogitsFunction(function))


class _Softcap(nn.Module):
    """As of Inkling-2 in transformers 5.24."""

    softcap = 9.0

    def forward(self, logits):
        return self.softcap * torch.tanh(logits / self.softcap)


def test_a_soft_cap_in_a_module_is_switched_off_inside() -> None:
    model, ids = _LogitsFunction(_Softcap()), torch.tensor([[3, 4, 5]])
    before = model(input_ids=ids).logits
    runner = LossInHead(model)
    assert (runner.logit_scale, runner.softcap) == (1.0, 9.0)
    assert runner.forward(lambda state: state.hidden_states.new_tensor(12.0), {"input_ids": ids}) == 12
    assert torch.equal(model(input_ids=ids).logits, before), "the soft cap was not switched on again"


class _ScaledLinear(nn.Linear):
    def forward(self, x):
        return super().forward(x) * 0.5


@pytest.mark.parametrize(
    ("head", "message"),
    [
        (nn.Sequential(nn.Linear(32, VOCABULARY)), "linear layer"),
        (nn.Embedding(VOCABULARY, 32), "linear layer"),
        (nn.Linear(32, VOCABULARY).to(torch.float8_e4m3fn), "float8"),
        (_ScaledLinear(32, VOCABULARY), "_ScaledLinear is not hidden_states"),
        (None, "got none"),
    ],
    ids=["sequential", "embedding", "float8", "scaled inside", "none"],
)
def test_unsupported_heads_are_refused(head, message: str) -> None:
    model = tiny_model(tie_word_embeddings=False)
    model.lm_head = head
    with pytest.raises(UnsupportedModelError, match=message):
        LossInHead(model)


def test_a_model_without_a_head_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="output embedding"):
        LossInHead(tiny_model().model)


def test_loss_with_the_models_own_softcap_is_accepted() -> None:
    model = tiny_model("gemma2", final_logit_softcapping=7.3)
    assert PairPasses(model, NextQuillLoss(softcap=7.3)).loss.softcap == 7.3


@pytest.mark.parametrize("options", [{"softcap": 30.0}, {"logit_scale": 0.5}], ids=["softcap", "logit_scale"])
def test_loss_with_another_softcap_or_scale_is_refused(options: dict[str, float]) -> None:
    with pytest.raises(ArgumentError, match=next(iter(options))):
        PairPasses(tiny_model(), NextQuillLoss(**options))


def test_the_given_loss_is_not_changed() -> None:
    loss = NextQuillLoss()
    passes = PairPasses(tiny_model("gemma2", final_logit_softcapping=7.3), loss)
    assert (loss.softcap, passes.loss.softcap) == (None, 7.3)
