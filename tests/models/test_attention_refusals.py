"""Models that cannot share prefixes exactly are refused with the reason, before training if possible."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoHaConfig, LoraConfig, TaskType, get_peft_model
from torch import Tensor, nn

from nextquill import ArgumentError, SFTLoss, UnsupportedModelError
from nextquill.data import PaddedCollator, TreeCollator
from nextquill.evaluation.scoring import score_examples
from nextquill.models import attention as attention_module
from nextquill.models.attention import TreeAttention
from nextquill.models.branch_passes import PairPasses
from nextquill.tree import TreeLayout, tree_attention
from tests.models.model_helpers import (
    assert_same_loss,
    assert_same_tensors,
    gradients,
    loss_cases,
    make_trainer,
    random_examples,
    reference_loss,
    run_loss,
    shared_examples,
    shares_states,
    tiny_model,
)

HYBRID: dict[str, tuple[str, dict[str, Any], str]] = {
    "Mamba-1": (
        "jamba", {"attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 2, "mamba_dt_rank": 4},
        r"JambaForCausalLM: its layers of type linear_attention let a token depend .*attention='padded'",
    ),
    "lightning attention": (
        "minimax", {"layer_types": ["linear_attention", "full_attention"], "num_local_experts": 2},
        r"MiniMaxForCausalLM: its layers of type linear_attention let a token depend ",
    ),
    "Mamba-2 without attention": (
        "mamba2", {"num_heads": 8, "head_dim": 8, "state_size": 4, "n_groups": 2, "attn_implementation": "eager"},
        r"Mamba2ForCausalLM: its layers of type linear_attention let a token depend ",
    ),
    "chunks": ("llama4_text", {"num_local_experts": 2}, "Llama4ForCausalLM: its layers of type chunked_attention "),
}  # fmt: skip


# ---- architectures ---------------------------------------------------------------------------------


@shares_states
@pytest.mark.parametrize("attention", ["pieces", "mask"])
@pytest.mark.parametrize("name", sorted(HYBRID))
def test_layers_that_see_other_paths_are_refused(name: str, attention: str) -> None:
    kind, options, message = HYBRID[name]
    with pytest.raises(UnsupportedModelError, match=message):
        PairPasses(tiny_model(kind, **options), SFTLoss(), attention)


@pytest.mark.parametrize("name", ["Mamba-1", "lightning attention"])
def test_such_layers_are_accepted_in_separate_rows(name: str) -> None:
    kind, options, _ = HYBRID[name]
    model = tiny_model(kind, **options)
    loss, _ = run_loss(model, loss_cases()["official"].loss, shared_examples(), "padded")
    assert_same_loss(loss, reference_loss(loss_cases()["official"], model, shared_examples()), 1e-4)


def test_recurrent_models() -> None:
    model = tiny_model()
    type(model)._is_stateful = True
    try:
        with pytest.raises(UnsupportedModelError, match="LlamaForCausalLM: a model with recurrent state"):
            TreeAttention(model)
    finally:
        del type(model)._is_stateful


def test_encoder_decoder_models() -> None:
    model = tiny_model()
    model.config.is_encoder_decoder = True
    with pytest.raises(UnsupportedModelError, match="expected a decoder-only model"):
        PairPasses(model, loss_cases()["sft"].loss)


def test_models_that_take_no_attention_function() -> None:
    model = tiny_model("gpt_neox_japanese", attn_implementation="eager", hidden_dropout=0.0, attention_dropout=0.0)
    with pytest.raises(UnsupportedModelError, match=r"GPTNeoXJapanese.*: its attention cannot be replaced .*'mask'"):
        TreeAttention(model, "pieces")
    loss, _ = run_loss(model, loss_cases()["official"].loss, shared_examples(), "mask")
    assert_same_loss(loss, reference_loss(loss_cases()["official"], model, shared_examples()))


NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
NO_MASK: dict[str, tuple[str, dict[str, Any], str]] = {
    "alibi of a padding mask": (
        "bloom", {"n_head": 4, "n_layer": 2, "hidden_dropout": 0.0, "attention_dropout": 0.0}, "BloomForCausalLM"
    ),
    "padding masks alone": (
        "openai-gpt", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, **NO_DROPOUT},
        "OpenAIGPTLMHeadModel",
    ),
    "padding masks alone, asserted": (
        "xlm",
        {
            "emb_dim": 32, "n_layers": 2, "n_heads": 4, "n_words": 96, "causal": True, "dropout": 0.0,
            "attention_dropout": 0.0,
        },
        "XLMWithLMHeadModel",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(NO_MASK))
def test_models_that_take_no_mask_between_tokens(name: str) -> None:
    kind, options, shown = NO_MASK[name]
    model = tiny_model(kind, attn_implementation="eager", **options)
    with pytest.raises(UnsupportedModelError, match=rf"^{shown}: its attention does not run .*attention='padded'$"):
        TreeAttention(model, "mask")
    loss, _ = run_loss(model, loss_cases()["official"].loss, shared_examples(), "padded")
    assert_same_loss(loss, reference_loss(loss_cases()["official"], model, shared_examples()))


# ---- rotary embeddings that follow the longest position --------------------------------------------


LONG = {"short_factor": [1.0, 1.3, 1.1, 1.2], "long_factor": [4.0, 2.0, 3.0, 5.0]}
ROPE: dict[str, tuple[str, dict[str, Any]]] = {
    "dynamic": (
        "llama",
        {"max_position_embeddings": 16, "rope_parameters": {"rope_type": "dynamic", "factor": 3.0, "rope_theta": 1e4}},
    ),
    "longrope": (
        "llama",
        {
            "max_position_embeddings": 64,
            "rope_parameters": {
                "rope_type": "longrope", "factor": 4.0, "rope_theta": 1e4, "original_max_position_embeddings": 16,
                **LONG,
            },
        },
    ),
    "longrope of phi3": (
        "phi3",
        {
            "resid_pdrop": 0.0, "original_max_position_embeddings": 16,
            "rope_parameters": {
                "rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 16, **LONG,
            },
        },
    ),
}  # fmt: skip


def examples_up_to(length: int) -> list[Any]:
    found = [e for e in random_examples(12) if max(len(b.input_ids) for b in (e.factual, e.counterfactual)) <= length]
    assert len(found) > 2
    return found


@pytest.mark.parametrize("attention", ["pieces", "mask"])
@pytest.mark.parametrize("name", sorted(ROPE))
def test_rope_that_follows_the_longest_position(name: str, attention: str) -> None:
    """Branches of up to 16 tokens are exact in a longer row. Longer branches would be wrong and are refused."""
    kind, options = ROPE[name]
    model, case = tiny_model(kind, **options), loss_cases()["official"]
    passes = PairPasses(model, case.loss, attention)
    assert passes.trees.max_depth == 16
    examples = examples_up_to(16)
    batch = passes.collator()(examples)
    assert batch["parts"][0]["num_tokens"] > 16
    loss, _ = passes.training_loss(batch)
    assert_same_loss(loss, reference_loss(case, model, examples))
    long = [e for e in random_examples(12) if len(e.factual.input_ids) > 16][:2]
    with pytest.raises(UnsupportedModelError, match=r"beyond 16 tokens, got up to \d+; set max_length to 16"):
        passes.training_loss(passes.collator()(long))
    passes.check_training(16)
    with pytest.raises(UnsupportedModelError, match="got up to 17; set max_length to 16"):
        passes.check_training(17)


def test_such_rope_needs_its_limit_because_it_would_be_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    kind, options = ROPE["dynamic"]
    model, case = tiny_model(kind, **options), loss_cases()["official"]
    passes = PairPasses(model, case.loss)
    passes.trees.max_depth = None
    examples = [*examples_up_to(14), *[e for e in random_examples(12) if len(e.factual.input_ids) > 18][:1]]
    loss, _ = passes.training_loss(passes.collator()(examples))
    expected = float(reference_loss(case, model, examples).detach())
    assert abs(float(loss.detach()) - expected) > 1e-3 * abs(expected)


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "default", "rope_theta": 1e4},
        {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4},
        {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4, "original_max_position_embeddings": 16},
        {
            "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "rope_theta": 1e4,
            "original_max_position_embeddings": 16,
        },
    ],
    ids=lambda rope: rope["rope_type"],
)  # fmt: skip
def test_constant_frequencies_have_no_limit(rope: dict[str, Any]) -> None:
    model, case = tiny_model(rope_parameters=rope), loss_cases()["official"]
    assert TreeAttention(model).max_depth is None
    loss, _ = run_loss(model, case.loss, shared_examples())
    assert_same_loss(loss, reference_loss(case, model, shared_examples()))


def test_a_trainer_refuses_a_length_beyond_the_limit(tmp_path: Path) -> None:
    kind, options = ROPE["longrope"]
    for attention, max_length in (("pieces", None), ("pieces", 17), ("mask", 17)):
        with pytest.raises(UnsupportedModelError, match="set max_length to 16"):
            make_trainer(
                tmp_path / "run", None, tiny_model(kind, **options), attention=attention, max_length=max_length
            )
    assert not (tmp_path / "run").exists()
    make_trainer(tmp_path, None, tiny_model(kind, **options), max_length=16)
    make_trainer(tmp_path, None, tiny_model(kind, **options), attention="padded")


# ---- dropout ---------------------------------------------------------------------------------------


def with_lora(rate: float) -> nn.Module:
    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], lora_dropout=rate, task_type=TaskType.CAUSAL_LM)
    return get_peft_model(tiny_model(), config)


def with_loha() -> nn.Module:
    config = LoHaConfig(r=2, target_modules=["q_proj"], module_dropout=0.3, task_type=TaskType.CAUSAL_LM)
    return get_peft_model(tiny_model(), config)


def module_with_dropout() -> nn.Module:
    model = tiny_model()
    model.model.layers[1].mlp = nn.Sequential(model.model.layers[1].mlp, nn.Dropout(0.2))
    return model


OPT = {"word_embed_proj_dim": 32, "ffn_dim": 48, "dropout": 0.1, "attention_dropout": 0.0}
DROPOUTS: dict[str, tuple[Any, str]] = {
    "modules": (module_with_dropout, r"model\.layers\.1\.mlp\.1\.p=0\.2"),
    "gpt2": (lambda: tiny_model("gpt2"), r"drop\.p=0\.1"),
    "attention": (lambda: tiny_model(attention_dropout=0.2), r"self_attn\.attention_dropout=0\.2"),
    "gpt_neox attention": (lambda: tiny_model("gpt_neox", attention_dropout=0.2), r"attention_dropout=0\.2"),
    "residual": (lambda: tiny_model("phi3", resid_pdrop=0.1), r"resid_attn_dropout\.p=0\.1"),
    "functional": (lambda: tiny_model("opt", **OPT), r"model\.decoder\.dropout=0\.1"),
    "router noise": (lambda: tiny_model("mixtral", num_local_experts=4, router_jitter_noise=0.1), "jitter_noise=0.1"),
    "LoHa": (lambda: with_loha(), r"module_dropout=0\.3"),
    "LoRA": (lambda: with_lora(0.1), r"lora_dropout\.default\.p=0\.1"),
}


@pytest.mark.covering(1)
@pytest.mark.parametrize("attention", ["pieces", "mask"])
@pytest.mark.parametrize("name", sorted(DROPOUTS))
def test_dropout_in_training(name: str, attention: str) -> None:
    """Refused in training mode and by a trainer; without effect in evaluation."""
    make, message = DROPOUTS[name]
    model, case, examples = make().eval(), loss_cases()["official"], shared_examples()
    passes = PairPasses(model, case.loss, attention)
    batch = passes.collator()(examples)
    loss, _ = passes.training_loss(batch)
    assert_same_loss(loss, reference_loss(case, model, examples))
    with pytest.raises(UnsupportedModelError, match=rf"dropout: .*{message} would drop the same units"):
        passes.check_training(64)
    model.train()
    with pytest.raises(UnsupportedModelError, match=rf"dropout: .*{message} would drop the same units"):
        passes.training_loss(batch)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if i % 4 else ()) for i, name in enumerate(sorted(DROPOUTS))]
)
def test_dropout_is_accepted_in_rows_of_their_own(tmp_path: Path, name: str) -> None:
    make, message = DROPOUTS[name]
    for attention in ("pieces", "mask"):
        with pytest.raises(UnsupportedModelError, match=message):
            make_trainer(tmp_path / "run", None, make(), attention=attention)
    assert not (tmp_path / "run").exists()
    make_trainer(tmp_path / "run", None, make(), attention="padded", max_steps=1).train()


def test_a_model_with_dropout_can_be_scored() -> None:
    model = tiny_model("gpt2").train()
    assert len(list(score_examples(model, shared_examples()))) == 6


# ---- arguments and batches -------------------------------------------------------------------------


@pytest.mark.parametrize("attention", ["flash", "", None, "Pieces", "sdpa", True, 3])
def test_unknown_attention(tmp_path: Path, attention: Any) -> None:
    message = r"^attention: expected one of auto, pieces, varlen, flex, mask, padded, got "
    with pytest.raises(ArgumentError, match=message):
        PairPasses(tiny_model(), SFTLoss(), attention)
    with pytest.raises(ArgumentError, match=message):
        next(score_examples(tiny_model(), random_examples(1), attention=attention))
    with pytest.raises(ArgumentError, match=message):
        make_trainer(tmp_path / "run", attention=attention)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("implementation", ["flex_attention", "flash_attention_2", "some_other"])
def test_masks_need_sdpa_or_eager(implementation: str) -> None:
    model = tiny_model()
    model.config._attn_implementation = implementation
    with pytest.raises(
        UnsupportedModelError, match=f"attention='mask': expected .* sdpa or eager .*'{implementation}'"
    ):
        TreeAttention(model, "mask")


def test_an_implementation_that_is_changed_later_is_noticed() -> None:
    model = tiny_model()
    passes = PairPasses(model, SFTLoss(), "mask")
    batch = passes.collator()(random_examples(2))
    passes.training_loss(batch)
    model.config._attn_implementation = "flex_attention"
    with pytest.raises(UnsupportedModelError, match="changed to 'flex_attention'"):
        passes.training_loss(batch)


def test_changing_between_sdpa_and_eager_changes_the_masks() -> None:
    model, case, examples = tiny_model(), loss_cases()["official"], shared_examples()
    passes = PairPasses(model, case.loss, "mask")
    expected = gradients(model, reference_loss(case, model, examples))
    for implementation in ("eager", "sdpa"):
        model.set_attn_implementation(implementation)
        loss, _ = passes.training_loss(passes.collator()(examples))
        assert_same_tensors(gradients(model, loss), expected, 1e-5, f"gradient under {implementation}")


def test_batches_of_another_collator() -> None:
    examples = random_examples(2)
    for attention, other in (("pieces", PaddedCollator(0)), ("mask", PaddedCollator(0)), ("padded", TreeCollator())):
        passes = PairPasses(tiny_model(), loss_cases()["official"].loss, attention)
        with pytest.raises(ArgumentError, match="batch: expected a batch of this object's own collator"):
            passes.training_loss(other(examples))


def test_dropout_of_a_part_in_training_mode() -> None:
    model = module_with_dropout().eval()
    model.model.layers.train()
    with pytest.raises(UnsupportedModelError, match=r"mlp\.1\.p=0\.2"):
        run_loss(model, loss_cases()["sft"].loss, shared_examples(), "pieces")


@pytest.mark.parametrize("kind", ["llama", "gpt2", "opt"])
def test_a_window_that_the_model_ignores_is_ignored(kind: str) -> None:
    options = {"gpt2": {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}, "opt": {**OPT, "dropout": 0.0}}
    model, case, examples = tiny_model(kind, sliding_window=5, **options.get(kind, {})), loss_cases()["official"], []
    examples = shared_examples()
    loss, _ = run_loss(model, case.loss, examples, "mask")
    assert_same_loss(loss, reference_loss(case, model, examples))


def test_copies_made_while_trees_are_in_use_are_given_their_own_attention_back() -> None:
    model, case, examples = tiny_model(), loss_cases()["sft"], shared_examples()
    with PairPasses(model, case.loss) as passes:
        passes.training_loss(passes.collator()(examples))
        copied = copy.deepcopy(model)
    assert copied.config._attn_implementation != "sdpa"
    with PairPasses(copied, case.loss) as passes:
        assert_same_loss(passes.training_loss(passes.collator()(examples))[0], reference_loss(case, model, examples))
    assert copied.config._attn_implementation == "sdpa"


def test_attention_set_by_the_user_stays_set() -> None:
    model, case, examples = tiny_model(), loss_cases()["sft"], shared_examples()
    expected = reference_loss(case, model, examples)
    with PairPasses(model, case.loss) as passes:
        for _ in range(2):
            assert_same_loss(passes.training_loss(passes.collator()(examples))[0], expected)
            model.set_attn_implementation("eager")
    assert model.config._attn_implementation == "eager"


# ---- kernels that are wrong on a device -----------------------------------------------------------


@pytest.mark.parametrize("asked", ["auto", "varlen", "pieces"])
def test_auto_becomes_flex_if_the_kernel_it_chose_is_wrong_in_the_model(
    monkeypatch: pytest.MonkeyPatch, asked: str
) -> None:
    """A named kernel is never replaced."""

    def attend(query: Tensor, key: Tensor, value: Tensor, layout: TreeLayout, *, kernel: str, **options: Any) -> Tensor:
        right = tree_attention(query, key, value, layout, **options)
        return right if kernel == "flex" else right * 3

    monkeypatch.setattr(attention_module, "attend", attend)
    monkeypatch.setattr(attention_module, "_on_gpu", lambda base: True)
    if asked != "auto":
        with pytest.raises(UnsupportedModelError, match="do not give the same logits"):
            TreeAttention(tiny_model("llama"), asked)
        return
    with pytest.warns(RuntimeWarning, match="'auto' chose, LlamaForCausalLM fails its check .* uses FlexAttention"):
        chosen = TreeAttention(tiny_model("llama"))
    assert chosen.attention == "flex"


def test_a_model_that_is_wrong_with_flex_too_takes_masks_for_the_first_reason(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def attend(query: Tensor, key: Tensor, value: Tensor, layout: TreeLayout, *, kernel: str, **options: Any) -> Tensor:
        if kernel == "flex":
            raise RuntimeError("flex does not compile")
        return 3 * tree_attention(query, key, value, layout, **options)

    monkeypatch.setattr(attention_module, "attend", attend)
    monkeypatch.setattr(attention_module, "_on_gpu", lambda base: True)
    with pytest.warns(RuntimeWarning, match="whole masks.*do not give the same logits"):
        assert TreeAttention(tiny_model("llama")).attention == "mask"
