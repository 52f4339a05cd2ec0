"""LoRA on the backbone and on the head, a fully trained head, and refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, PrefixTuningConfig, PromptTuningConfig, TaskType, get_peft_model
from torch import nn

import nextquill.ops.gradients
from nextquill import UnsupportedModelError
from nextquill.models.branch_passes import PairPasses
from tests.models.model_helpers import (
    assert_same_loss,
    assert_same_tensors,
    gradients,
    loss_cases,
    random_examples,
    reference_loss,
    run_loss,
    shared_examples,
    tiny_model,
)

ATTENTION = ["q_proj", "v_proj"]
MLP = ["gate_proj", "up_proj", "down_proj"]


def with_lora(model: nn.Module, targets: list[str], **options: Any) -> PeftModel:
    """A LoRA with a non-zero B, so that it changes the results."""
    torch.manual_seed(5)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=targets, task_type=TaskType.CAUSAL_LM, **options)
    adapted = get_peft_model(model, config)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.2)
    return adapted.eval()


def untied(**options: Any) -> nn.Module:
    return tiny_model(tie_word_embeddings=False, **options)


@pytest.fixture
def computed_gradients(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The gradients that each loss call computed: the `needs` given to its buffers."""
    seen: list[Any] = []
    original = nextquill.ops.gradients.HeadGradients.__init__

    def record(self, head, factual, counterfactual, needs) -> None:
        seen.append(needs)
        original(self, head, factual, counterfactual, needs)

    monkeypatch.setattr(nextquill.ops.gradients.HeadGradients, "__init__", record)
    return seen


CASES = {
    "attention": lambda: with_lora(untied(), ATTENTION),
    "attention and mlp": lambda: with_lora(untied(), [*ATTENTION, *MLP]),
    "tied": lambda: with_lora(tiny_model(tie_word_embeddings=True), [*ATTENTION, *MLP]),
    "two kinds of layers": lambda: with_lora(
        tiny_model("qwen2", use_sliding_window=True, sliding_window=5, max_window_layers=1), ATTENTION
    ),
    "head": lambda: with_lora(untied(), [*ATTENTION, "lm_head"]),
    "head only, rank-stabilised": lambda: with_lora(untied(), ["lm_head"], use_rslora=True),
    "head saved in full": lambda: with_lora(untied(), ATTENTION, modules_to_save=["lm_head"]),
    "head with bias": lambda: with_lora(tiny_model("phi", tie_word_embeddings=False), ["lm_head"]),
}


@pytest.mark.covering(1)
@pytest.mark.parametrize("attention", ["auto", "mask", "padded"])
@pytest.mark.parametrize("loss_name", ["official", "detached", "sft"])
@pytest.mark.parametrize("adapters", sorted(CASES))
def test_gradients_equal_the_ordinary_forward(adapters: str, loss_name: str, attention: str) -> None:
    model, case, examples = CASES[adapters](), loss_cases()[loss_name], shared_examples()
    loss, _ = run_loss(model, case.loss, examples, attention)
    expected = reference_loss(case, model, examples)
    assert_same_loss(loss, expected)
    got = gradients(model, loss)
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert got.keys() == trainable, "gradients are not of the trainable parameters"
    assert_same_tensors(got, gradients(model, expected), 2e-5, f"gradient with LoRA on {adapters}")


@pytest.mark.parametrize(("adapters", "needed"), [("attention", False), ("head", True), ("head saved in full", True)])
def test_frozen_head_costs_no_weight_gradient(adapters: str, needed: bool, computed_gradients: list[Any]) -> None:
    run_loss(CASES[adapters](), loss_cases()["official"].loss, random_examples())
    assert [needs.weight for needs in computed_gradients] == [needed], "dW computed"


def test_lora_on_the_head_equals_the_merged_model() -> None:
    case, examples = loss_cases()["official"], random_examples()
    model = CASES["head"]()
    adapted, _ = run_loss(model, case.loss, examples)
    merged, _ = run_loss(model.merge_and_unload(), case.loss, examples)
    assert_same_loss(adapted, merged)


def test_lora_merged_in_place_is_not_added_twice() -> None:
    case, examples = loss_cases()["official"], random_examples()
    model = CASES["head"]()
    passes = PairPasses(model, case.loss)
    expected, _ = passes.training_loss(passes.collator()(examples))
    model.merge_adapter()
    got, _ = passes.training_loss(passes.collator()(examples))
    assert_same_loss(got, expected)


def test_disabled_adapters_are_left_out() -> None:
    case, examples = loss_cases()["official"], random_examples()
    plain, _ = run_loss(untied(), case.loss, examples)
    model = CASES["head"]()
    passes = PairPasses(model, case.loss)
    with model.disable_adapter():
        got, _ = passes.training_loss(passes.collator()(examples))
    assert_same_loss(got, plain)


def test_two_active_adapters_add_up() -> None:
    model, case, examples = CASES["head"](), loss_cases()["official"], random_examples()
    model.add_adapter("other", LoraConfig(r=2, target_modules=["lm_head"], task_type=TaskType.CAUSAL_LM))
    nn.init.normal_(model.base_model.model.lm_head.lora_B["other"].weight, std=0.2)
    model.base_model.set_adapter(["default", "other"])
    loss, _ = run_loss(model, case.loss, examples)
    assert_same_loss(loss, reference_loss(case, model, examples))


def test_float32_lora_over_a_bfloat16_base() -> None:
    """The adapters stay float32 and the head's delta is not rounded to bfloat16."""
    case, examples = loss_cases()["official"], random_examples()
    model = with_lora(untied(dtype=torch.bfloat16), [*ATTENTION, "lm_head"])
    dtypes = {p.dtype for p in model.parameters() if p.requires_grad}
    assert dtypes == {torch.float32}, "peft did not keep the adapters in float32"
    loss, _ = run_loss(model, case.loss, examples)
    assert loss.dtype == torch.float32
    got = gradients(model, loss)
    wide = with_lora(untied(), [*ATTENTION, "lm_head"])
    wide.load_state_dict({name: tensor.float() for name, tensor in model.state_dict().items()})
    expected = reference_loss(case, wide, examples)
    assert_same_loss(loss, expected, 2e-2)
    assert_same_tensors(got, gradients(wide, expected), 0.15, "gradient over a bfloat16 base")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (LoraConfig(target_modules=["lm_head"], lora_dropout=0.1), "dropout"),
        (LoraConfig(target_modules=["lm_head"], use_dora=True), "DoRA"),
        (LoraConfig(target_modules=["lm_head"], lora_bias=True), "lora_bias"),
        (PromptTuningConfig(num_virtual_tokens=3), "prompt learning"),
        (PrefixTuningConfig(num_virtual_tokens=3), "prompt learning"),
    ],
    ids=["dropout", "DoRA", "lora_bias", "prompt tuning", "prefix tuning"],
)
def test_adapters_that_would_be_ignored_are_refused(config: Any, message: str) -> None:
    config.task_type = TaskType.CAUSAL_LM
    model = get_peft_model(tiny_model("phi", tie_word_embeddings=False), config)
    with pytest.raises(UnsupportedModelError, match=message):
        PairPasses(model, loss_cases()["sft"].loss)


def test_other_adapters_on_the_head_are_refused() -> None:
    from peft import IA3Config

    config = IA3Config(target_modules=["lm_head"], feedforward_modules=[], task_type=TaskType.CAUSAL_LM)
    with pytest.raises(UnsupportedModelError, match="only LoRA"):
        PairPasses(get_peft_model(untied(), config), loss_cases()["sft"].loss)


def test_trainable_tokens_on_a_tied_head_are_refused() -> None:
    config = LoraConfig(target_modules=ATTENTION, trainable_token_indices=[3, 4], task_type=TaskType.CAUSAL_LM)
    model = get_peft_model(tiny_model(tie_word_embeddings=True), config)
    with pytest.raises(UnsupportedModelError, match="TrainableTokens"):
        PairPasses(model, loss_cases()["sft"].loss)


def test_dropout_beside_the_head_is_accepted() -> None:
    """With trees only in evaluation; see test_attention_refusals.py."""
    model = with_lora(untied(), ATTENTION, lora_dropout=0.1)
    PairPasses(model, loss_cases()["sft"].loss)
    run_loss(model.train(), loss_cases()["sft"].loss, random_examples(), "padded")
