"""Trees inside transformers' models: the loss and every gradient equal those of separate unpadded passes."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

import nextquill.models.attention
import nextquill.tree.dense_blocks
from nextquill import UnsupportedModelError
from nextquill.models import self_check
from nextquill.models.attention import TreeAttention
from nextquill.models.branch_passes import PairPasses
from tests.models.model_helpers import (
    assert_same_loss,
    assert_same_tensors,
    gradients,
    loss_cases,
    reference_loss,
    run_loss,
    shared_examples,
    tiny_model,
)

# Windows are shorter than the branches, which have 14 to 19 tokens, and than the path into most segments.
TWO_TYPES = {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1}
EAGER = {"attn_implementation": "eager"}
GEMMA = {"sliding_window": 5, "query_pre_attn_scalar": 8}
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "qwen2": ("qwen2", TWO_TYPES),
    "qwen3": ("qwen3", TWO_TYPES),
    "mistral": ("mistral", {"sliding_window": 5}),
    "mistral without a window": ("mistral", {"sliding_window": None}),
    "gemma2": ("gemma2", {**GEMMA, "attn_logit_softcapping": 3.0, "final_logit_softcapping": 7.3}),
    "gemma3": ("gemma3_text", {**GEMMA, "layer_types": ["sliding_attention", "full_attention"]}),
    # The last two layers attend to keys of those before.
    "gemma3n": ("gemma3n_text", {
        "sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"] * 2, "num_hidden_layers": 4,
        "num_kv_shared_layers": 2, "activation_sparsity_pattern": [0.5, 0.0, 0.0, 0.0], "altup_num_inputs": 2,
        "laurel_rank": 4, "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 96,
    }),
    "phi3": ("phi3", {"sliding_window": 6, "resid_pdrop": 0.0}),
    "gpt2": ("gpt2", {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}),
    "olmo2": ("olmo2", {}),
    "gpt_neox": ("gpt_neox", {}),
    "smollm3": ("smollm3", {"use_sliding_window": True, "sliding_window": 5, "no_rope_layers": [1, 0]}),
    "granite": ("granite", {"logits_scaling": 6.0, "attention_multiplier": 0.3}),
    "cohere2": ("cohere2", {"sliding_window": 5, "logit_scale": 0.5}),
    "mixtral": ("mixtral", {"num_local_experts": 4, "sliding_window": 6}),
    "gpt_oss": ("gpt_oss", {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 5, **EAGER}),
    # Latent attention: values have another head size than keys.
    "deepseek_v3": ("deepseek_v3", {
        "head_dim": 4, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 8, "q_lora_rank": 8,
        "kv_lora_rank": 8, "num_key_value_heads": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1,
        "topk_group": 1, "first_k_dense_replace": 1, "moe_intermediate_size": 24,
    }),
    "qwen3_moe": (
        "qwen3_moe",
        {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "decoder_sparse_step": 1},
    ),
}  # fmt: skip
WINDOWED = sorted(name for name, (_, options) in ARCHITECTURES.items() if options.get("sliding_window"))


@cache
def expected(name: str, loss_name: str) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss and the gradients of separate passes."""
    kind, options = ARCHITECTURES[name]
    model = tiny_model(kind, **options)
    loss = reference_loss(loss_cases()[loss_name], model, shared_examples())
    return loss.detach(), gradients(model, loss)


def assert_exact(name: str, loss_name: str, attention: str) -> None:
    kind, options = ARCHITECTURES[name]
    model = tiny_model(kind, **options)
    loss, _ = run_loss(model, loss_cases()[loss_name].loss, shared_examples(), attention)
    want, want_gradients = expected(name, loss_name)
    assert_same_loss(loss, want)
    assert_same_tensors(gradients(model, loss), want_gradients, 2e-5, f"gradient of {name} with {attention}")


@pytest.mark.covering(1)
@pytest.mark.parametrize("attention", ["auto", "mask", "padded"])
@pytest.mark.parametrize("name", sorted(ARCHITECTURES))
def test_loss_and_gradients_equal_separate_passes(name: str, attention: str) -> None:
    assert_exact(name, "official", attention)


@pytest.mark.parametrize("attention", ["auto", "mask"])
@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma2", "gpt2", "qwen3_moe"])
def test_a_counterfactual_without_gradient_equals_separate_passes(name: str, attention: str) -> None:
    assert_exact(name, "detached", attention)


def test_the_kernel_can_be_named() -> None:
    assert_exact("qwen2", "official", "pieces")


@pytest.mark.parametrize("loss_name", sorted(loss_cases()))
def test_every_loss_under_trees(loss_name: str) -> None:
    assert_exact("llama", loss_name, "auto")


def test_every_sink_gets_its_gradient() -> None:
    kind, options = ARCHITECTURES["gpt_oss"]
    model = tiny_model(kind, **options)
    passes = PairPasses(model, loss_cases()["official"].loss)
    assert passes.trees.attention == "auto", "our kernels are not in use"
    loss, _ = passes.training_loss(passes.collator()(shared_examples()))
    found = {name: grad for name, grad in gradients(model, loss).items() if name.endswith("sinks")}
    assert len(found) == 2
    for name, grad in found.items():
        assert grad.all(), name
        want = expected("gpt_oss", "official")[1][name]
        assert float((grad - want).norm() / want.norm()) <= 2e-5, name


def test_the_examples_share_what_they_should() -> None:
    """Without shared tokens, the tests above would show little."""
    (part,) = PairPasses(tiny_model(), loss_cases()["official"].loss).collator()(shared_examples())["parts"]
    assert part["num_branch_tokens"] / part["num_tokens"] > 2, "tokens of the branches by tokens of the tree"
    segments = part["forwards"][0]["layout"].segments
    depth_of_segment = {-1: 0}
    for index, parent in enumerate(segments[:, 4].tolist()):
        depth_of_segment[index] = depth_of_segment[parent] + 1
    assert max(depth_of_segment.values()) >= 4, "forks on the deepest path"


# ---- windows ---------------------------------------------------------------------------------------


def _value(name: str, attention: str) -> float:
    kind, options = ARCHITECTURES[name]
    loss, _ = run_loss(tiny_model(kind, **options), loss_cases()["official"].loss, shared_examples(), attention)
    return float(loss.detach())


def assert_other_loss(value: float, want: Tensor) -> None:
    """Assert a difference of ten times the tolerance of `assert_same_loss`. Its exact size depends on the processor."""
    assert abs(value - float(want)) > 1e-4 * abs(float(want)), "the window made no difference"


@pytest.mark.parametrize("name", WINDOWED)
def test_a_window_by_row_would_show(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By depth, a query sees the last tokens of its own path. By row, it would also see siblings."""

    def rows(segments: Tensor) -> Tensor:
        return torch.arange(int((segments[:, 1] - segments[:, 0]).sum()))

    monkeypatch.setattr(nextquill.tree.dense_blocks, "row_depths", rows)
    monkeypatch.setattr(self_check, "_compare", lambda *_: None)
    assert_other_loss(_value(name, "auto"), expected(name, "official")[0])


def test_a_mask_with_a_window_by_row_would_show(monkeypatch: pytest.MonkeyPatch) -> None:
    original = nextquill.models.attention.visibility_mask

    def by_row(position_ids: Tensor, subtree_end: Tensor, window: int | None = None) -> Tensor:
        rows = torch.arange(len(position_ids))
        return original(rows, subtree_end, window)

    monkeypatch.setattr(nextquill.models.attention, "visibility_mask", by_row)
    monkeypatch.setattr(self_check, "_compare", lambda *_: None)
    assert_other_loss(_value("mistral", "mask"), expected("mistral", "official")[0])


@pytest.mark.parametrize("attention", ["auto", "mask"])
def test_layers_with_and_without_a_window_differ(attention: str) -> None:
    """A model with both kinds of layers differs from one with a window in all layers, or in none."""
    want = float(expected("qwen2", "official")[0])
    for layers in (0, 2):
        model = tiny_model("qwen2", **{**TWO_TYPES, "max_window_layers": layers})
        loss, _ = run_loss(model, loss_cases()["official"].loss, shared_examples(), attention)
        assert abs(float(loss.detach()) - want) > 1e-3 * abs(want)


# ---- masks -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "gemma2", "qwen2", "gpt2"])
def test_masks_are_added_under_eager_attention_and_booleans_under_sdpa(kind: str) -> None:
    """eager adds its mask to the scores, so a boolean mask would give wrong results without an error."""
    for implementation, dtype in (("eager", torch.float32), ("sdpa", torch.bool)):
        if kind == "gemma2" and implementation == "sdpa":
            continue  # which has no cap on the scores
        model = tiny_model(kind, attn_implementation=implementation)
        passes = PairPasses(model, loss_cases()["official"].loss, "mask")
        examples = shared_examples()
        batch = passes.collator()(examples)
        masks = passes.trees.model_inputs(batch["parts"][0]["forwards"][0])["attention_mask"]
        for mask in masks.values() if isinstance(masks, dict) else [masks]:
            assert mask.dtype == dtype
            assert mask.shape == (1, 1, *[batch["parts"][0]["num_tokens"]] * 2)
            if dtype != torch.bool:
                assert set(mask.unique().tolist()) == {0.0, torch.finfo(dtype).min}
        loss, _ = passes.training_loss(batch)
        assert_same_loss(loss, reference_loss(loss_cases()["official"], model, examples))


@pytest.mark.parametrize("attention", ["auto", "mask"])
def test_half_precision_is_as_near_as_separate_passes(attention: str) -> None:
    """Against float32, the error of trees is at most twice that of separate passes."""
    case, examples = loss_cases()["official"], shared_examples()
    exact = float(expected("llama", "official")[0])
    model = tiny_model(dtype=torch.bfloat16)
    wide = tiny_model()
    wide.load_state_dict({name: tensor.float() for name, tensor in model.state_dict().items()})
    exact = float(reference_loss(case, wide, examples).detach())
    apart = abs(float(reference_loss(case, model, examples).detach()) - exact)
    loss, _ = run_loss(model, case.loss, examples, attention)
    assert abs(float(loss.detach()) - exact) <= max(2 * apart, 1e-2 * abs(exact))


# ---- the check by running --------------------------------------------------------------------------


def look_at_the_previous_row(model: torch.nn.Module, amount: float = 1.0) -> torch.nn.Module:
    """A model in which a token depends on the row before it, which may belong to another branch in a tree."""

    def mix(module: Any, args: Any, output: Any) -> Any:
        hidden = output[0] if isinstance(output, tuple) else output
        mixed = torch.cat([hidden[:, :1], hidden[:, 1:] + amount * hidden[:, :-1]], dim=1)
        return (mixed, *output[1:]) if isinstance(output, tuple) else mixed

    model.model.layers[0].register_forward_hook(mix)
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("attention", ["pieces", "mask"])
def test_a_model_that_looks_across_branches_is_found(attention: str, dtype: torch.dtype) -> None:
    model = look_at_the_previous_row(tiny_model(dtype=dtype))
    with pytest.raises(UnsupportedModelError, match=r"LlamaForCausalLM: branches that share a prefix .*='padded'$"):
        PairPasses(model, loss_cases()["sft"].loss, attention)
    assert model.config._attn_implementation == "sdpa", "its own attention was not put back"
    loss, _ = run_loss(model, loss_cases()["official"].loss, shared_examples(), "padded")
    expected = reference_loss(loss_cases()["official"], model, shared_examples())
    assert_same_loss(loss, expected, 1e-5 if dtype == torch.float32 else 1e-2)


def test_positions_that_count_rows_are_found() -> None:
    model = tiny_model()
    model.model.register_forward_pre_hook(
        lambda module, args, kwargs: (args, {**kwargs, "position_ids": None}), with_kwargs=True
    )
    with pytest.raises(UnsupportedModelError, match="branches that share a prefix"):
        TreeAttention(model)


def test_models_whose_attention_gets_no_tree_are_found() -> None:
    """nemotron passes no keyword arguments to its attention, which would then see every row before it."""
    with pytest.raises(UnsupportedModelError, match="its attention does not run on a row of branches"):
        TreeAttention(tiny_model("nemotron"), "pieces")
    loss, _ = run_loss(tiny_model("nemotron"), loss_cases()["official"].loss, shared_examples(), "mask")
    assert_same_loss(loss, reference_loss(loss_cases()["official"], tiny_model("nemotron"), shared_examples()))


MASK_ONLY = {
    "use_sliding_window": True, "max_window_layers": 1, "num_experts": 4, "num_experts_per_tok": 2,
    "moe_intermediate_size": 24, "shared_expert_intermediate_size": 16,
}  # fmt: skip


@pytest.mark.parametrize(
    "window",
    [5, 12],
)
def test_a_window_that_a_model_puts_into_its_mask_alone_is_found(window: int) -> None:
    """qwen2_moe does not pass the window to its attention function; 12 is longer than the check's branches."""
    model = tiny_model("qwen2_moe", **MASK_ONLY, sliding_window=window)
    with pytest.raises(UnsupportedModelError):
        TreeAttention(model, "pieces")


@pytest.mark.parametrize("window", [5, 12])
def test_a_window_that_a_model_puts_into_its_mask_alone_works_with_masks(window: int) -> None:
    model = tiny_model("qwen2_moe", **MASK_ONLY, sliding_window=window)
    loss, _ = run_loss(model, loss_cases()["official"].loss, shared_examples(), "mask")
    assert_same_loss(loss, reference_loss(loss_cases()["official"], model, shared_examples()))


@pytest.mark.parametrize("vocabulary", [2, 3, 5, 8])
def test_a_tiny_vocabulary_can_be_checked(vocabulary: int) -> None:
    TreeAttention(tiny_model(vocab_size=vocabulary, eos_token_id=1))


def test_a_model_without_weights_is_not_run() -> None:
    with torch.device("meta"):
        model = tiny_model()
    TreeAttention(model)


@pytest.mark.parametrize("attention", ["auto", "mask"])
def test_the_check_leaves_modes_gradients_and_random_state_alone(attention: str) -> None:
    model = tiny_model().train()
    model.model.layers[0].eval()
    state = torch.random.get_rng_state()
    TreeAttention(model, attention)
    assert torch.equal(torch.random.get_rng_state(), state), "random numbers were used"
    assert model.model.layers[1].mlp.training
    assert not model.model.layers[0].mlp.training, "a module frozen in eval mode was put into training mode"
    assert all(p.grad is None for p in model.parameters())
    assert model.config._attn_implementation == "sdpa"
