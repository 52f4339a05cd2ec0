"""Layers with a state inside trees: equal to separate passes in every architecture, with their gradients."""

from __future__ import annotations

import copy
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, TaskType, get_peft_model
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from benchmarks.float64 import all_in_float64
from nextquill import UnsupportedModelError
from nextquill.data import Branch, EncodedExample
from nextquill.models import attention as attention_module
from nextquill.models import recurrent
from nextquill.models.attention import TreeAttention
from nextquill.models.branch_passes import PairPasses
from nextquill.tree import PrefixTree, TreeLayout, build_prefix_tree
from nextquill.tree.runs import CHUNK
from tests.models.model_helpers import (
    VOCABULARY,
    assert_same_loss,
    assert_same_tensors,
    gradients,
    loss_cases,
    make_trainer,
    parameters,
    random_examples,
    reference_loss,
    run_loss,
    shared_examples,
    shares_states,
    tiny_model,
)

pytestmark = shares_states

EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
DELTA = {
    "layer_types": ["linear_attention", "full_attention", "linear_attention"], "num_hidden_layers": 3,
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
}  # fmt: skip
MAMBA2 = {
    "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 4, "mamba_n_groups": 2, "mamba_expand": 2,
    "mamba_chunk_size": 32,
}  # fmt: skip
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3_next": ("qwen3_next", {**DELTA, **EXPERTS, "shared_expert_intermediate_size": 16}),
    "qwen3_5": ("qwen3_5_text", DELTA),
    "olmo_hybrid": ("olmo_hybrid", {**DELTA, "linear_num_key_heads": 4}),
    "lfm2": ("lfm2", {"layer_types": ["conv", "full_attention", "conv"], "num_hidden_layers": 3}),
    "lfm2_moe": ("lfm2_moe", {"layer_types": ["conv", "full_attention"], **EXPERTS, "num_dense_layers": 1}),
    "bamba": ("bamba", {**MAMBA2, "attn_layer_indices": [1]}),
    "granitemoehybrid": ("granitemoehybrid", {
        **MAMBA2, "layer_types": ["linear_attention", "full_attention"], "num_local_experts": 4,
        "num_experts_per_tok": 2, "shared_intermediate_size": 16,
    }),
    "falcon_h1": ("falcon_h1", {**MAMBA2, "mamba_d_ssm": 64}),
    "nemotron_h": ("nemotron_h", {
        "layers_block_type": ["linear_attention", "full_attention", "mlp", "moe"], "num_hidden_layers": 4,
        "mamba_num_heads": 8, "mamba_head_dim": 8, "ssm_state_size": 4, "n_groups": 2, "chunk_size": 32,
        "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
        "moe_shared_expert_intermediate_size": 16, "n_group": 1, "topk_group": 1,
    }),
    "zamba2": ("zamba2", {
        "layers_block_type": ["linear_attention", "hybrid"], "num_mem_blocks": 1, "mamba_ngroups": 2,
        "n_mamba_heads": 8, "mamba_headdim": 8, "mamba_d_state": 4, "chunk_size": 32, "attention_head_dim": 16,
    }),
}  # fmt: skip
#: With another size of values than of keys, which the kernels for trees do not take.
KIMI = {
    "layer_types": ["linear_attention", "full_attention"], "num_key_value_heads": 4, "q_lora_rank": 8,
    "kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8, "linear_num_heads": 4,
    "linear_head_dim": 8, **EXPERTS, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1,
}  # fmt: skip
#: One architecture for each kind of layer; the slow tests have all.
KINDS = ["bamba", "lfm2", "qwen3_5"]
ALL = [name if name in KINDS else pytest.param(name, marks=pytest.mark.slow) for name in sorted(ARCHITECTURES)]


def make(name: str, **options: Any) -> nn.Module:
    kind, own = ARCHITECTURES[name]
    return tiny_model(kind, **{**own, "max_position_embeddings": 512, **options})


def long_examples() -> list[EncodedExample]:
    """Examples of two users, whose histories are longer than a chunk, with two queries that begin alike."""
    generator = torch.Generator().manual_seed(0)

    def ids(count: int) -> list[int]:
        return torch.randint(2, VOCABULARY, (count,), generator=generator).tolist()

    system, histories, query = ids(2), [ids(CHUNK + 9), ids(2 * CHUNK + 1)], ids(2)
    examples = []
    for index, length in enumerate((1, 5, 2, CHUNK + 3)):
        own, response = query + ids(1 + index % 2), ids(length)
        branches = [Branch(system + history + own, response) for history in (histories[index % 2], [])]
        examples.append(EncodedExample(f"user{index % 2}", index, *branches, None, 1, 1))
    return examples


# ---- exactness ---------------------------------------------------------------------------------------


def largest_error(got: dict[str, Tensor], true: dict[str, Tensor]) -> float:
    """The largest relative error of a tensor; if its norm is nearly zero, the largest norm replaces it."""
    floor = 1e-3 * max(float(tensor.norm()) for tensor in true.values())
    return max(float((got[name] - want).norm()) / max(float(want.norm()), floor) for name, want in true.items())


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("shared", [2, CHUNK])
def test_loss_and_gradients_equal_separate_passes(name: str, shared: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In float64 they are equal; in float32, trees are as near to that as separate passes."""
    monkeypatch.setattr(attention_module, "CHUNK", shared)
    case, examples = loss_cases()["official"], long_examples()
    with all_in_float64(make(name)) as model:
        want = reference_loss(case, model, examples)
        true = gradients(model, want)
        loss, _ = run_loss(model, case.loss, examples)
        assert_same_loss(loss, want, 1e-12)
        assert_same_tensors(gradients(model, loss), true, 1e-10, "gradient in float64")
    model = make(name)
    apart = gradients(model, reference_loss(case, model, examples))
    loss, _ = run_loss(model, case.loss, examples)
    assert_same_loss(loss, want, 1e-5)
    assert largest_error(gradients(model, loss), true) <= 2e-5 + 2 * largest_error(apart, true)


@pytest.mark.parametrize("name", [name for name in ALL if name in KINDS or name.values != ("zamba2",)])
def test_with_masks_they_are_equal_too(name: str) -> None:
    model, case = make(name), loss_cases()["official"]
    loss, _ = run_loss(model, case.loss, shared_examples(), "mask")
    assert_same_loss(loss, reference_loss(case, model, shared_examples()))


@pytest.mark.parametrize("attention", ["auto", "mask"])
def test_with_latent_attention_they_are_equal_too(attention: str) -> None:
    """The values of kimi_linear's attention have another size than its keys."""
    model, case = tiny_model("kimi_linear", **KIMI), loss_cases()["official"]
    loss, _ = run_loss(model, case.loss, shared_examples(), attention)
    assert_same_loss(loss, reference_loss(case, model, shared_examples()))


@st.composite
def long_branches(draw: Any) -> list[list[int]]:
    """Branches that leave others anywhere; parts of one token, of less than a convolution's kernel, and of chunks."""
    branches, token = [[]], iter(range(2, 10**6))
    for _ in range(draw(st.integers(1, 5))):
        old = draw(st.sampled_from(branches))
        kept = draw(st.sampled_from([len(old), len(old) // 2, max(0, len(old) - 1)]))
        length = draw(st.sampled_from([1, 2, 3, 7, CHUNK + 2]))
        branches.append(old[:kept] + [next(token) for _ in range(length)])
    return [[token % (VOCABULARY - 2) + 2 for token in branch] for branch in branches[1:]]


def weighted_logits(logits: Tensor, branch: int) -> Tensor:
    """A scalar that depends on all logits [n, V] of a branch."""
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(branch), dtype=logits.dtype)
    return (weights * logits).sum()


@pytest.mark.parametrize("name", KINDS)
@settings(deadline=None, max_examples=8)
@given(branches=long_branches(), shared=st.sampled_from([0, 5, CHUNK]))
def test_trees_of_any_shape(name: str, branches: list[list[int]], shared: int) -> None:
    tree = build_prefix_tree(branches)
    with all_in_float64(make(name)) as model, pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention_module, "CHUNK", shared)
        alone = [model(input_ids=torch.tensor([branch]), use_cache=False).logits[0] for branch in branches]
        together = model(**TreeAttention(model).model_inputs(forward_of(tree)), use_cache=False).logits[0]
        rows = [together[rows] for rows in tree.branch_rows]
        assert_same_tensors(detached(rows), detached(alone), 1e-11, "logits of branch")
        got, want = (sum(weighted_logits(each, b) for b, each in enumerate(logits)) for logits in (rows, alone))
        assert_same_tensors(gradients(model, got), gradients(model, want), 1e-10, "gradient")


def detached(logits: list[Tensor]) -> dict[str, Tensor]:
    return {str(branch): each.detach() for branch, each in enumerate(logits)}


def forward_of(tree: PrefixTree) -> dict[str, Any]:
    """A forward of a tree batch."""
    tensors = {name: getattr(tree, name)[None] for name in ("input_ids", "position_ids", "subtree_end")}
    return {**tensors, "layout": TreeLayout.of_tree(tree)}


# ---- settings of training ----------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True:UserWarning")
@pytest.mark.parametrize("closed", [False, True], ids=["open", "closed"])
@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not reentrant"])
@pytest.mark.parametrize("name", ["qwen3_5", *[pytest.param(n, marks=pytest.mark.slow) for n in ("bamba", "lfm2")]])
def test_gradient_checkpointing(name: str, reentrant: bool, closed: bool) -> None:
    """Layers run again in the backward, after a forward of another batch. After `close` they raise or are right."""
    case, examples = loss_cases()["official"], long_examples()
    plain = make(name)
    expected = gradients(plain, run_loss(plain, case.loss, examples)[0])
    model = make(name)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.train()
    passes = PairPasses(model, case.loss)
    loss, _ = passes.training_loss(passes.collator()(examples))
    with torch.no_grad():
        passes.training_loss(passes.collator()(shared_examples(3, seed=1)))
        model(torch.randint(2, VOCABULARY, (2, 9)))
    if closed:
        passes.close()
        with pytest.raises(Exception, match=r"size|shape|recomputed"):
            gradients(model, loss)
    else:
        assert_same_tensors(gradients(model, loss), expected, 2e-5, "gradient under gradient checkpointing")


def test_layers_with_a_state_alone_are_right_after_close() -> None:
    """Without attention, nothing in such a layer would fail on the row of branches."""
    layer, tree = make("qwen3_5").model.layers[0].linear_attn, build_prefix_tree([[1, 2, 3], [1, 2, 4, 5]])
    hidden = torch.randn(1, len(tree), 32)
    recurrent.run_over_trees(layer)
    together = layer(hidden, nextquill_tree_runs=(TreeLayout.of_tree(tree), 0))
    for rows in tree.branch_rows:
        assert (together[0, rows] - layer(hidden[:, rows])[0]).abs().max() < 1e-5


@pytest.mark.parametrize("name", KINDS)
def test_lora(name: str) -> None:
    torch.manual_seed(0)
    config = LoraConfig(r=4, target_modules="all-linear", exclude_modules=["out_proj"], task_type=TaskType.CAUSAL_LM)
    model, case = get_peft_model(make(name), config), loss_cases()["official"]
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.2)
    want = reference_loss(case, model, shared_examples())
    expected = gradients(model, want)
    loss, _ = run_loss(model, case.loss, shared_examples())
    assert_same_loss(loss, want)
    assert_same_tensors(gradients(model, loss), expected, 1e-4, "gradient with LoRA")


@pytest.mark.parametrize("autocast", [True, False], ids=["autocast", "weights"])
@pytest.mark.parametrize("name", KINDS)
def test_half_precision_is_as_near_as_separate_passes(name: str, autocast: bool) -> None:
    """Against float32, the error of trees is at most twice that of separate passes, or 2%."""
    case, examples = loss_cases()["official"], long_examples()
    model = make(name, dtype=torch.float32 if autocast else torch.bfloat16)
    exact = copy.deepcopy(model).float()
    want = float(reference_loss(case, exact, examples).detach())
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        apart = abs(float(reference_loss(case, model, examples).detach()) - want)
        loss, _ = run_loss(model, case.loss, examples)
    assert abs(float(loss.detach()) - want) <= max(2 * apart, 2e-2 * abs(want))
    assert all(gradient.isfinite().all() for gradient in gradients(model, loss).values())


def test_a_trainer_learns_the_same_as_in_padded_rows(tmp_path: Path) -> None:
    kind, options = ARCHITECTURES["qwen3_5"]
    trained = {}
    for attention in ("auto", "padded"):
        model = tiny_model(kind, **{**options, "initializer_range": 0.05})
        trainer = make_trainer(tmp_path / attention, None, model, attention=attention, max_steps=3)
        trainer.train()
        trained[attention] = parameters(trainer)
    start = tiny_model(kind, **{**options, "initializer_range": 0.05}).state_dict()
    assert max(float((trained["auto"][name] - start[name]).abs().max()) for name in trained["auto"]) > 1e-3
    for name, value in trained["padded"].items():
        assert (trained["auto"][name] - value).abs().max() < 1e-4, name


# Dynamo itself reads .grad of what goes from one graph to the next.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_compiled_model_keeps_its_graphs() -> None:
    torch._dynamo.reset()
    model, reference, loss = make("lfm2"), make("lfm2"), loss_cases()["official"].loss
    passes, plain = PairPasses(model, loss), PairPasses(reference, loss)
    counter = CompileCounterWithBackend("aot_eager")
    compiled, graphs = torch.compile(model, backend=counter), list[int]()
    for seed, count in enumerate((3, 5, 2, 4)):
        batch = passes.collator()(random_examples(count, seed))
        got = gradients(model, passes.training_loss(batch, call=compiled)[0])
        assert_same_tensors(got, gradients(reference, plain.training_loss(batch)[0]), 2e-5, "gradient")
        graphs.append(counter.frame_count)
    assert graphs[1] == graphs[-1], "one set of graphs for the first shapes, one for all others"
    torch._dynamo.reset()


# ---- a wrong implementation is found -------------------------------------------------------------------


def without(state: str) -> Callable[..., Any]:
    """`_states_before` that forgets one kind of state."""
    original = recurrent._states_before
    return lambda *args: {key: value for key, value in original(*args).items() if key[0] != state}


@pytest.mark.parametrize(
    ("name", "state"),
    [("qwen3_5", "conv"), ("qwen3_5", "recurrent"), ("bamba", "conv"), ("bamba", "recurrent"), ("lfm2", "conv")],
)
def test_a_state_that_is_not_passed_on_is_found(name: str, state: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recurrent, "_states_before", without(state))
    with pytest.raises(UnsupportedModelError, match="branches that share a prefix"):
        TreeAttention(make(name), "pieces")


@pytest.mark.parametrize("name", KINDS)
def test_a_layer_that_reads_the_whole_row_is_found(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_module, "run_over_trees", lambda _: False)
    with pytest.raises(UnsupportedModelError, match="branches that share a prefix"):
        TreeAttention(make(name), "pieces")


def test_chunks_are_the_layers_own_again() -> None:
    model = make("bamba")
    run_loss(model, loss_cases()["official"].loss, shared_examples())
    assert model.model.layers[0].mamba.chunk_size == MAMBA2["mamba_chunk_size"]


# ---- the model's own forward ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", KINDS)
def test_other_forwards_stay_the_models_own(name: str) -> None:
    """With a cache, of padded rows, and in a copy, which no longer depends on the original."""
    model, ids = make(name), torch.randint(2, VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    expected = model(ids, attention_mask=mask).logits
    written = model.generate(ids, attention_mask=mask, max_new_tokens=4, do_sample=False, eos_token_id=None)
    TreeAttention(model)
    copied = copy.deepcopy(model)
    nn.init.zeros_(model.get_input_embeddings().weight)
    assert torch.equal(copied(ids, attention_mask=mask).logits, expected)
    again = copied.generate(ids, attention_mask=mask, max_new_tokens=4, do_sample=False, eos_token_id=None)
    assert torch.equal(again, written)


def test_a_hook_of_another_library_still_runs() -> None:
    """accelerate replaces the forward of a module on the instance."""
    model, calls = make("qwen3_5"), []
    layer = model.model.layers[0].linear_attn
    own = layer.forward
    layer.forward = lambda *args, **kwargs: calls.append(1) or own(*args, **kwargs)
    passes = PairPasses(model, loss_cases()["official"].loss)
    calls.clear()
    passes.training_loss(passes.collator()(shared_examples()))
    assert calls, "the forward that was there before is not called"
    before = layer.forward
    TreeAttention(model)
    assert layer.forward is before, "replaced twice"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["lfm2", "qwen3_5"])
def test_a_shared_history_makes_a_step_cheaper(name: str) -> None:
    """Eight examples with one history of 400 tokens take at most .7 of the time of padded rows; one thread."""
    model, loss = make(name, hidden_size=128, max_position_embeddings=1024), loss_cases()["official"].loss
    examples = random_examples(8, shared=400)
    passes = {attention: PairPasses(model, loss, attention) for attention in ("padded", "auto")}
    batches = {attention: each.collator()(examples) for attention, each in passes.items()}
    seconds = dict.fromkeys(passes, float("inf"))
    for attention in [*passes] * 6:
        model.zero_grad()
        start = time.perf_counter()
        passes[attention].backward(batches[attention])
        seconds[attention] = min(seconds[attention], time.perf_counter() - start)
    ratio = seconds["auto"] / seconds["padded"]
    sys.stdout.write(f"{name}: a step with trees takes {ratio:.2f} of one with padded rows\n")
    assert ratio <= 0.7
