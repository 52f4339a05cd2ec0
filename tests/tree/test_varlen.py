"""Attention by one sequence per segment, against float64 attention with the whole mask and against `tree_attention`."""

import re
import sys
import types
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo import lookup_backend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.library import opcheck
from torch.utils.checkpoint import checkpoint

from nextquill.errors import ArgumentError, ArgumentTypeError, BackendUnavailableError
from nextquill.tree import TreeLayout, build_prefix_tree, varlen, visibility_mask
from nextquill.tree import varlen_kernels as kernels
from nextquill.tree.kernels import AttentionKernel, ScoreRule
from nextquill.tree.varlen import varlen_tree_attention
from nextquill.tree.varlen_kernels import EMULATED, why_not
from nextquill.tree.varlen_plan import sum_copies, varlen_plan
from tests.helpers import FLOAT32_RELATIVE, FLOAT64_RELATIVE, assert_close, relative_error
from tests.tree.strategies import branch_lists
from tests.tree.trees import (
    NAMES,
    SMALL,
    dense_attention,
    dense_results,
    grown_tree,
    inputs,
    options,
    run,
    varlen_results,
)

few = settings(max_examples=40, deadline=None, derandomize=True, database=None)
CPU = torch.device("cpu")
TREE = build_prefix_tree(SMALL)
GROWN = grown_tree(150)


def assert_all_close(actual, expected, relative=FLOAT32_RELATIVE):
    for name, a, e in zip(NAMES, actual, expected, strict=True):
        # A gradient that is zero but for rounding has no scale of its own.
        assert_close(a, e, relative, name) if e.abs().max() > 1e-3 else assert_close(a + 1, e + 1, relative, name)


# ---- values --------------------------------------------------------------------------------------------


@options
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("heads", [(1, 1), (4, 2), (3, 1)], ids=lambda h: f"H{h[0]}-KV{h[1]}")
@pytest.mark.parametrize("tree", [TREE, GROWN], ids=["small", "grown"])
def test_output_and_gradients(tree, heads, dtype, options):
    tensors = inputs(len(tree), *heads, dtype=dtype)
    grad = torch.randn(tensors[0].shape, dtype=dtype)
    actual = varlen_results(tree, tensors, grad, **options)
    for tensor, result in zip((tensors[0], *tensors), actual, strict=True):
        assert result.dtype == tensor.dtype
        assert result.shape == tensor.shape
    relative = FLOAT64_RELATIVE if dtype == torch.float64 else FLOAT32_RELATIVE
    assert_all_close(actual, dense_results(tree, tensors, grad, **options), relative)


@few
@given(branches=branch_lists(), window=st.none() | st.integers(1, 6), softcap=st.none() | st.just(2.0))
def test_any_tree(branches, window, softcap):
    torch.manual_seed(0)
    tree = build_prefix_tree(branches)
    tensors, grad = inputs(len(tree)), torch.randn(1, 4, len(tree), 8)
    actual = varlen_results(tree, tensors, grad, window=window, softcap=softcap)
    assert_all_close(actual, dense_results(tree, tensors, grad, window=window, softcap=softcap))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_errs_at_most_twice_as_much_as_dense_attention(dtype):
    tensors = inputs(len(GROWN), size=32, dtype=dtype)
    grad = torch.randn(tensors[0].shape).to(dtype)
    visible = visibility_mask(GROWN.position_ids, GROWN.subtree_end)
    truth = dense_results(GROWN, tensors, grad)
    plain = run(lambda *qkv: dense_attention(*qkv, visible), tensors, grad)
    for name, a, t, p in zip(NAMES, varlen_results(GROWN, tensors, grad), truth, plain, strict=True):
        ours, theirs = (float((each.double() - t).norm() / t.norm()) for each in (a, p))
        assert ours <= 2 * theirs, f"{name}: {ours:.2e} where dense attention has {theirs:.2e}"


def test_autocast_does_not_reach_inside():
    tensors, grad = inputs(len(GROWN)), torch.randn(1, 4, len(GROWN), 8)
    expected = varlen_results(GROWN, tensors, grad)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = varlen_results(GROWN, tensors, grad)
    for a, e in zip(actual, expected, strict=True):
        assert torch.equal(a, e)


@pytest.mark.parametrize("needs", [(True, False, False), (False, True, False), (False, False, True)], ids=str)
def test_one_gradient_at_a_time(needs):
    tensors, grad = inputs(len(TREE)), torch.randn(1, 4, len(TREE), 8)
    whole, some = varlen_results(TREE, tensors, grad), varlen_results(TREE, tensors, grad, needs)
    assert torch.equal(some[1], whole[1 + needs.index(True)])


def heads_last(tensor):
    return tensor.transpose(1, 2).contiguous().transpose(1, 2)


def fused_projection(tensor):
    return torch.cat([tensor, torch.full_like(tensor, torch.nan)], -1)[..., : tensor.shape[-1]]


def size_first(tensor):
    return tensor.mT.contiguous().mT


@pytest.mark.parametrize("which", range(4), ids=["query", "key", "value", "grad"])
@pytest.mark.parametrize("strided", [heads_last, fused_projection, size_first], ids=lambda f: f.__name__)
def test_strides_do_not_matter(strided, which):
    *tensors, grad = *inputs(len(TREE)), torch.randn(1, 4, len(TREE), 8)
    expected = varlen_results(TREE, tensors, grad)
    both = [*tensors, grad]
    both[which] = strided(both[which])
    assert not both[which].is_contiguous()
    assert_all_close(varlen_results(TREE, both[:3], both[3]), expected, 1e-6)


def test_the_gradient_of_a_sum_and_shared_rows():
    """Upstream gradient and inputs have strides of 0."""
    key = torch.randn(1, 2, 1, 8).expand(1, 2, len(TREE), 8)
    query, _, value = inputs(len(TREE))
    leaves = [tensor.detach().requires_grad_() for tensor in (query, key, value)]
    varlen_tree_attention(*leaves, TreeLayout.of_tree(TREE), kernel="emulated").sum().backward()
    expected = dense_results(TREE, (query, key, value), torch.ones(1, 4, len(TREE), 8))
    assert_close(leaves[2].grad, expected[3])


def test_output_is_laid_out_as_models_reshape_it():
    out = varlen_tree_attention(*inputs(len(TREE)), TreeLayout.of_tree(TREE), kernel="emulated")
    assert out.transpose(1, 2).is_contiguous()


@options
def test_results_repeat_bit_for_bit_whatever_memory_held(options):
    """In its deterministic mode, PyTorch fills new memory with NaN, and refuses operations that may not repeat."""
    tensors, grad = inputs(len(GROWN)), torch.randn(1, 4, len(GROWN), 8)
    first = varlen_results(GROWN, tensors, grad, **options)
    torch.use_deterministic_algorithms(True)
    try:
        again = varlen_results(GROWN, tensors, grad, **options)
    finally:
        torch.use_deterministic_algorithms(False)
    for a, b in zip(first, again, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("window", [None, 2])
def test_nan_in_a_branch_stays_out_of_its_siblings(window):
    tree = build_prefix_tree([[1, 2, 3, 4, 5, 6], [1, 2, 3, 7, 8], [1, 2, 3, 9, 9, 9], [5, 5]])
    bad, shared = tree.branch_rows[0][3:], tree.branch_rows[0][:3]
    clean = torch.ones(len(tree), dtype=torch.bool)
    clean[bad] = False
    tensors, grad = inputs(len(tree)), torch.randn(1, 4, len(tree), 8)
    expected = varlen_results(tree, tensors, grad, window=window)
    for tensor in tensors:
        tensor[:, :, bad] = torch.nan
    actual = varlen_results(tree, tensors, grad, window=window)
    unshared = clean.clone()
    unshared[shared] = False
    for a, e, rows in zip(actual, expected, (clean, clean, unshared, unshared), strict=True):
        assert torch.equal(a[:, :, rows], e[:, :, rows])


# ---- plans ---------------------------------------------------------------------------------------------


@few
@given(branches=branch_lists(), window=st.none() | st.integers(1, 6))
def test_plans(branches, window):
    tree = build_prefix_tree(branches)
    layout = TreeLayout.of_tree(tree)
    plan = varlen_plan(layout.segments, window, CPU)
    seen = visibility_mask(tree.position_ids, tree.subtree_end, window)
    for q0, q1, k0, k1 in plan.spans:
        # The keys are all that any of the queries sees, once each, by depth.
        assert plan.rows[k0:k1].tolist() == seen[q0:q1].any(0).nonzero().squeeze(1).tolist()
    assert plan.cu_queries.tolist() == [0, *layout.segments[:, 1].tolist()]
    assert plan.cu_keys.tolist() == [0, *(k1 for *_, k1 in plan.spans)]
    assert plan.cu_queries.dtype == plan.cu_keys.dtype == torch.int32
    assert plan.max_queries == max(2, *(q1 - q0 for q0, q1, *_ in plan.spans))
    assert plan.max_keys == max(k1 - k0 for *_, k0, k1 in plan.spans)
    bounds = [*plan.first_copy.tolist(), len(plan.rows)]
    for row, (first, last) in enumerate(pairwise(bounds)):
        places = plan.copies[first:last]
        assert places.tolist() == (plan.rows == row).nonzero().squeeze(1).tolist()


def test_plans_are_made_once_per_layout_window_and_device():
    def plan(tree, window=None):
        return varlen_plan(TreeLayout.of_tree(tree).segments, window, CPU)

    assert plan(TREE) is plan(TREE)
    assert plan(TREE) is not plan(GROWN)
    assert plan(TREE, 3) is not plan(TREE)
    assert len(plan(TREE, 1).rows) == len(TREE)


def test_copies_are_summed():
    """In bfloat16 too, on a GPU: see `test_on_gpu.py`."""
    tree = build_prefix_tree([[0, n] for n in range(1, 500)])
    plan = varlen_plan(TreeLayout.of_tree(tree).segments, None, CPU)
    grads = 1 + torch.randn(len(plan.rows), 2, 4) / 10
    exact = torch.zeros(len(tree), 2, 4, dtype=torch.float64)
    exact.index_add_(0, plan.rows, grads.double())
    total = sum_copies(grads, plan)
    assert total.dtype == grads.dtype
    assert relative_error(total, exact) <= 1e-6
    assert torch.equal(total, sum_copies(grads, plan))


# ---- as an operator ------------------------------------------------------------------------------------


@pytest.mark.covering(1)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("window", "softcap"), [(None, None), (3, 2.0)], ids=["plain", "window-softcap"])
def test_opcheck(dtype, window, softcap):
    rest = (0.3, window, softcap, "emulated")
    segments = TreeLayout.of_tree(TREE).segments
    tensors = [tensor.requires_grad_() for tensor in inputs(len(TREE), dtype=dtype)]
    opcheck(varlen._forward, (*tensors, segments, None, *rest))
    plain = [tensor.detach() for tensor in tensors]
    out, logsumexp = varlen._forward(*plain, segments, None, *rest)
    opcheck(varlen._backward, (torch.randn_like(out), [*plain, out, logsumexp, segments], *rest))


def test_gradcheck():
    layout = TreeLayout.of_tree(TREE)
    leaves = [tensor.requires_grad_() for tensor in inputs(len(TREE), 2, 1, 3, torch.float64)]
    for opts in ({}, {"window": 2, "softcap": 2.0, "scale": 0.9}):
        function = lambda *qkv: varlen_tree_attention(*qkv, layout, kernel="emulated", **opts)  # noqa: B023, E731
        assert torch.autograd.gradcheck(function, leaves, fast_mode=True)


@pytest.mark.parametrize("reentrant", [False, True])
def test_inside_gradient_checkpointing(reentrant):
    layout, tensors, grad = TreeLayout.of_tree(GROWN), inputs(len(GROWN)), torch.randn(1, 4, len(GROWN), 8)

    def block(q, k, v):
        return varlen_tree_attention(q * 2, k, v, layout, window=9, kernel="emulated") * 3

    def checkpointed(*qkv):
        return checkpoint(block, *qkv, use_reentrant=reentrant)

    def results(function):
        leaves = [tensor.detach().requires_grad_() for tensor in tensors]
        function(*leaves).backward(grad)
        return [leaf.grad for leaf in leaves]

    for a, b in zip(results(block), results(checkpointed), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("window", [None, 3])
def test_one_compiled_graph_serves_every_length_and_tree(window):
    torch._dynamo.reset()
    graphs = []

    def counting(graph, examples):
        graphs.append(graph)
        return lookup_backend("aot_eager")(graph, examples)

    def model(q, k, v, layout):
        return varlen_tree_attention(q * 1.5, k, v, layout, window=window, kernel="emulated") * 2

    compiled = torch.compile(model, backend=counting, fullgraph=True, dynamic=True)
    for seed, rows in enumerate((40, 33, 60, 90)):
        tree = grown_tree(rows, seed, spread=7 + seed)
        layout = TreeLayout.of_tree(tree)
        tensors, grad = inputs(len(tree)), torch.randn(1, 4, len(tree), 8)
        expected = run(lambda *qkv: model(*qkv, layout), tensors, grad)  # noqa: B023
        actual = run(lambda *qkv: compiled(*qkv, layout), tensors, grad)  # noqa: B023
        assert_all_close(actual, expected, 1e-6)
    assert len(graphs) == 1
    torch._dynamo.reset()


def test_plans_of_inference_mode_serve_training():
    tree = grown_tree(60, 5)
    tensors, grad = inputs(len(tree)), torch.randn(1, 4, len(tree), 8)
    with torch.inference_mode():
        varlen_tree_attention(*tensors, TreeLayout.of_tree(tree), kernel="emulated")
    assert_all_close(varlen_results(tree, tensors, grad), dense_results(tree, tensors, grad))


# ---- the kernels' check of alignment ---------------------------------------------------------------------


def kernel_with(aligned, monkeypatch):
    """The emulated kernel with another mask."""
    right = kernels._aligned

    def under(mask, function):
        def call(*args):
            with monkeypatch.context() as patch:
                patch.setattr(kernels, "_aligned", mask)
                return function(*args)

        return call

    wrong = lambda *args: aligned(right, *args)  # noqa: E731
    return AttentionKernel("wrong", under(wrong, EMULATED.forward), under(wrong, EMULATED.backward))


def top_left(right, queries, keys, window):
    piece = right(queries, keys, window)
    distance = torch.arange(queries)[:, None] - torch.arange(keys)
    return type(piece)(piece.queries, piece.keys, False, (distance >= 0) & (distance < (window or keys)))


WRONG = {
    "top-left": top_left,
    "window-one-more": lambda right, q, k, window: right(q, k, window and window + 1),
    "window-one-less": lambda right, q, k, window: right(q, k, window and window - 1),
    "window-ignored": lambda right, q, k, window: right(q, k, None),
}


@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG.keys())
def test_a_kernel_of_another_alignment_is_refused(wrong, monkeypatch):
    kernel = kernel_with(wrong, monkeypatch)
    for _ in range(2):  # a failure is not remembered as a success
        with pytest.raises(BackendUnavailableError, match=r"kernel 'wrong' on cpu: its output is not .* bottom-right"):
            kernels._verify(kernel, CPU)


@pytest.mark.parametrize("which", range(3), ids=["query", "key", "value"])
def test_a_kernel_of_a_wrong_gradient_is_refused(which):
    def backward(*args):
        grads = list(EMULATED.backward(*args))
        grads[which] = grads[which] * 1.1
        return grads

    with pytest.raises(BackendUnavailableError, match=f"its {('query', 'key', 'value')[which]} is not"):
        kernels._verify(AttentionKernel("wrong", EMULATED.forward, backward), CPU)


def test_the_right_alignment_is_accepted_and_random_numbers_left_alone(monkeypatch):
    state = torch.get_rng_state()
    kernels._verify(kernel_with(lambda right, *args: right(*args), monkeypatch), CPU)
    assert torch.equal(state, torch.get_rng_state())


# ---- what kernels are called with, where there is no GPU -------------------------------------------------


@pytest.mark.parametrize("window", [None, 1, 9])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_pytorch_accepts_the_call(window, kv_heads):
    """Names and shapes of arguments and results fit PyTorch's own description of its kernel."""
    plan = varlen_plan(TreeLayout.of_tree(GROWN).segments, window, CPU)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = plan._replace(cu_queries=mode.from_tensor(plan.cu_queries), cu_keys=mode.from_tensor(plan.cu_keys))
        query = torch.empty(len(GROWN), 4, 64, dtype=torch.bfloat16)
        key = torch.empty(len(plan.rows), kv_heads, 64, dtype=torch.bfloat16)
        out, lse = kernels._torch_forward(query, key, key, fake, ScoreRule(0.3, None))
        assert out.shape == query.shape
        assert lse.shape == (4, len(GROWN))
        assert lse.dtype == torch.float32
        grads = kernels._torch_backward(query, query, key, key, out, lse, fake, ScoreRule(0.3, None))
        assert [grad.shape for grad in grads] == [query.shape, key.shape, key.shape]


def test_pytorch_gets_the_window_to_the_left_of_the_query(monkeypatch):
    assert kernels._torch_window(None) == {}
    assert kernels._torch_window(1) == {"window_size_left": 0, "window_size_right": 0}


@pytest.fixture
def flash_attn(monkeypatch):
    """Replace flash-attn by a package whose functions take the arguments of 2.7 and use the emulated kernel."""
    interface = types.ModuleType("flash_attn.flash_attn_interface")

    def options(cu_q, cu_k, softmax_scale, causal, left, right, softcap):
        assert causal
        assert right == (-1 if left < 0 else 0)
        spans = tuple(zip(cu_q.tolist(), cu_q[1:].tolist(), cu_k.tolist(), cu_k[1:].tolist(), strict=False))
        plan = types.SimpleNamespace(spans=spans, window=None if left < 0 else left + 1)
        return plan, ScoreRule(softmax_scale, softcap or None)

    def forward(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale, causal,
        window_size_left=-1, window_size_right=-1, softcap=0.0, alibi_slopes=None, return_softmax=False,
        block_table=None, leftpad_k=None, seqused_k=None, zero_tensors=False,
    ):  # fmt: skip
        assert dropout_p == 0
        assert alibi_slopes is None
        given = (cu_seqlens_q, cu_seqlens_k, softmax_scale, causal, window_size_left, window_size_right, softcap)
        return (*EMULATED.forward(q, k, v, *options(*given)), 0, 0)

    def backward(
        dout, q, k, v, out, softmax_lse, dq, dk, dv, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p,
        softmax_scale, causal, window_size_left, window_size_right, softcap, alibi_slopes, deterministic,
        rng_state=None, zero_tensors=False,
    ):  # fmt: skip
        assert dropout_p == 0
        assert deterministic == torch.are_deterministic_algorithms_enabled()
        given = (cu_seqlens_q, cu_seqlens_k, softmax_scale, causal, window_size_left, window_size_right, softcap)
        grads = EMULATED.backward(dout, q, k, v, out, softmax_lse, *options(*given))
        for target, grad in zip((dq, dk, dv), grads, strict=True):
            target.copy_(grad)

    interface._flash_attn_varlen_forward, interface._flash_attn_varlen_backward = forward, backward
    monkeypatch.setitem(sys.modules, "flash_attn.flash_attn_interface", interface)
    monkeypatch.setattr(kernels, "why_not", lambda *_, kernel, **__: None if kernel == "flash_attn" else "absent")
    kernels.failure.cache_clear()
    yield interface
    kernels.failure.cache_clear()


@options
@pytest.mark.parametrize("kernel", ["flash_attn", "auto"])
def test_flash_attn_is_called_with_its_own_arguments(flash_attn, kernel, options):
    tensors = inputs(len(GROWN), dtype=torch.bfloat16)
    grad = torch.randn(1, 4, len(GROWN), 8).bfloat16()
    actual = varlen_results(GROWN, tensors, grad, kernel=kernel, **options)
    for a, e in zip(actual, varlen_results(GROWN, tensors, grad, **options), strict=True):
        assert_close(a, e, 2**-7)


def test_the_check_runs_before_the_first_use(flash_attn, monkeypatch):
    monkeypatch.setattr(flash_attn, "_flash_attn_varlen_forward", lambda q, *_, **__: (q, q.new_zeros(4, len(q)), 0, 0))
    with pytest.raises(BackendUnavailableError, match="kernel 'flash_attn' on cpu: its output is not"):
        varlen_tree_attention(
            *inputs(len(TREE), dtype=torch.bfloat16), TreeLayout.of_tree(TREE), kernel="flash_attn"
        )  # fmt: skip


# ---- bad input -----------------------------------------------------------------------------------------

Q, K = torch.randn(1, 4, 5, 8), torch.randn(1, 2, 5, 8)


@pytest.mark.parametrize(
    ("query", "key", "value", "options", "error", "message"),
    [
        (Q[0], K, K, {}, ArgumentError, r"query: expected \[1, H, 5, D\], got \[4, 5, 8\]"),
        (Q[:, :, :4], K, K, {}, ArgumentError, r"query: .*got \[1, 4, 4, 8\]"),
        (Q[..., :0], K[..., :0], K[..., :0], {}, ArgumentError, r"query: .*got \[1, 4, 5, 0\]"),
        (Q, K[0, 0, 0], K, {}, ArgumentError, r"key, value: .*got \[8\] and"),
        (Q, K[:, :0], K[:, :0], {}, ArgumentError, r"key, value: .*got \[1, 0, 5, 8\]"),
        (Q, K[:, :, :4], K, {}, ArgumentError, r"key, value: expected \[1, H_kv, 5, 8\].* got \[1, 2, 4, 8\] and"),
        (Q, K, K[..., :7], {}, ArgumentError, r"key, value: .*and \[1, 2, 5, 7\]"),
        (Q[:, :3], K, K, {}, ArgumentError, "H_kv dividing 3"),
        (Q, K.double(), K, {}, ArgumentTypeError, "one floating dtype, got torch.float32, torch.float64"),
        (Q.long(), K.long(), K.long(), {}, ArgumentTypeError, "one floating dtype, got torch.int64"),
        (Q, K, K, {"window": 0}, ArgumentError, "window: expected a positive number or None, got 0"),
        (Q, K, K, {"scale": -1.0}, ArgumentError, "scale: .*got -1.0"),
        (Q, K, K, {"softcap": 0.0}, ArgumentError, "softcap: .*got 0.0"),
        (Q, K, K, {"kernel": "fast"}, ArgumentError, "kernel: expected one of auto, torch, .*, got 'fast'"),
        (Q, K, K, {"kernel": "torch"}, ArgumentTypeError, "'torch' expects float16 or bfloat16, got torch.float32"),
        (Q, K, K, {}, ArgumentTypeError, "kernel 'auto' expects float16 or bfloat16, got torch.float32"),
        (Q.half(), K.half(), K.half(), {"kernel": "torch"}, BackendUnavailableError, "'torch' needs a CUDA device"),
        (Q.half(), K.half(), K.half(), {}, BackendUnavailableError, "'torch' needs .*; kernel 'flash_attn' needs"),
    ],
)
def test_bad_arguments_are_named(query, key, value, options, error, message):
    layout = TreeLayout.of_tree(build_prefix_tree([[1, 2, 3], [1, 2, 4, 5]]))
    with pytest.raises(error, match=message):
        varlen_tree_attention(query, key, value, layout, **options)


HALF = torch.bfloat16


@pytest.mark.parametrize(
    ("dtype", "capability", "options", "reason"),
    [
        (HALF, (9, 0), {}, None),
        (HALF, (8, 6), {"head_size": 128}, None),
        (HALF, (9, 0), {"head_size": 256}, None),
        (HALF, (8, 6), {"head_size": 256}, "at most 192 on compute capability 8.6"),
        (HALF, (9, 0), {"head_size": 264}, "at most 256, got 264"),
        (HALF, (9, 0), {"head_size": 65}, "multiple of 8 .*got 65"),
        (HALF, (7, 5), {}, "compute capability 8.0, got 7.5"),
        (torch.float32, (9, 0), {}, "needs float16 or bfloat16, got torch.float32"),
        (HALF, (9, 0), {"softcap": 30.0}, "has no softcap"),
    ],
)
def test_why_not(dtype, capability, options, reason, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True, raising=False)
    monkeypatch.setattr(kernels, "_flash_attn_problem", lambda: "flash-attn is not installed")
    found, auto = why_not(dtype, "cuda", kernel="torch", **options), why_not(dtype, "cuda", **options)
    if reason is None:
        assert found is None
        assert auto is None
    else:
        assert re.search(reason, found)
        assert auto.startswith(f"torch: {found}; flash_attn: ")


def test_why_not_without_a_gpu():
    assert why_not(HALF, "cpu") == "torch: needs a CUDA device, got cpu; flash_attn: needs a CUDA device, got cpu"
    assert why_not(torch.float64, "cpu", kernel="emulated") is None


@pytest.mark.parametrize(("version", "problem"), [("2.6.3", "needs flash-attn 2.7, found 2.6.3"), ("2.10.1", None)])
def test_flash_attn_versions(version, problem, flash_attn, monkeypatch):
    monkeypatch.setattr(kernels.importlib.metadata, "version", lambda _: version)
    assert kernels._flash_attn_problem.__wrapped__() == problem


def test_flash_attn_that_does_not_load(monkeypatch):
    monkeypatch.setattr(kernels.importlib.metadata, "version", lambda _: "2.8.3")
    monkeypatch.setitem(sys.modules, "flash_attn.flash_attn_interface", None)
    assert "cannot be imported" in kernels._flash_attn_problem.__wrapped__()
