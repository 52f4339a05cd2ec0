"""Attention over trees, against float64 softmax attention with the whole mask."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounterWithBackend
from torch.library import opcheck
from torch.nn import functional as F  # noqa: N812

from nextquill.errors import ArgumentError, ArgumentTypeError
from nextquill.tree import TreeLayout, attention, build_prefix_tree, kernels, tree_attention, visibility_mask
from nextquill.tree import dense_blocks as pieces
from tests.helpers import FLOAT32_RELATIVE, FLOAT64_RELATIVE, assert_close
from tests.tree.strategies import branch_lists
from tests.tree.trees import SMALL, dense_attention, grown_tree

few = settings(max_examples=40, deadline=None, derandomize=True, database=None)
NAMES = "query", "key", "value"
TREE = build_prefix_tree(SMALL)
GROWN = grown_tree(150)
COMB = build_prefix_tree([[*range(n), 1000] for n in range(60)])  # a fork at every token: sixty pieces to a query
OPTIONS = [
    {},
    {"window": 1},
    {"window": 3},
    {"window": 7},  # the longest branch but one token
    {"scale": 0.7},
    {"softcap": 1.5},
    {"window": 3, "softcap": 2.0, "scale": 1.3},
]
options = pytest.mark.parametrize(
    "options", OPTIONS, ids=lambda o: "-".join(f"{k}={v}" for k, v in o.items()) or "plain"
)
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)


@pytest.fixture(params=["flash", "math"])
def kernel(request, monkeypatch):
    """Run with one chosen kernel."""
    chosen = {"flash": kernels.FLASH, "math": kernels.MATH}[request.param]
    if chosen is kernels.FLASH and not kernels._HAS_FLASH:
        pytest.skip("this PyTorch has no fused kernel for CPUs")
    monkeypatch.setattr(attention, "choose_kernel", lambda *_: chosen)
    return chosen


def inputs(rows, heads=4, kv_heads=2, size=8, dtype=torch.float32):
    return [torch.randn(1, h, rows, size, dtype=torch.float64).to(dtype) for h in (heads, kv_heads, kv_heads)]


def run(function, tensors, grad, needs=(True, True, True)):
    """The output, and the gradients of the inputs that need one."""
    leaves = [tensor.detach().requires_grad_(need) for tensor, need in zip(tensors, needs, strict=True)]
    out = function(*leaves)
    wanted = [leaf for leaf in leaves if leaf.requires_grad]
    return [out.detach(), *torch.autograd.grad(out, wanted, grad.to(out.dtype))]


def tree_results(tree, tensors, grad, **options):
    return run(lambda *qkv: tree_attention(*qkv, TreeLayout.of_tree(tree), **options), tensors, grad)


def dense_results(tree, tensors, grad, *, window=None, **options):
    """The true results, in float64."""
    visible = visibility_mask(tree.position_ids, tree.subtree_end, window)
    exact = [tensor.double() for tensor in tensors]
    return run(lambda *qkv: dense_attention(*qkv, visible, **options), exact, grad.double())


def assert_all_close(actual, expected, relative=FLOAT32_RELATIVE):
    for name, a, e in zip(("output", *NAMES), actual, expected, strict=True):
        # A gradient that is zero but for rounding has no scale of its own.
        assert_close(a, e, relative, name) if e.abs().max() > 1e-3 else assert_close(a + 1, e + 1, relative, name)


def assert_is_attention(tree, tensors, grad=None, relative=FLOAT32_RELATIVE, **options):
    grad = torch.randn(tensors[0].shape, dtype=tensors[0].dtype) if grad is None else grad
    actual = tree_results(tree, tensors, grad, **options)
    for tensor, result in zip((tensors[0], *tensors), actual, strict=True):
        assert result.dtype == tensor.dtype
        assert result.shape == tensor.shape
    assert_all_close(actual, dense_results(tree, tensors, grad, **options), relative)


# ---- values --------------------------------------------------------------------------------------------


@options
@dtypes
@pytest.mark.parametrize("heads", [(1, 1), (4, 4), (4, 2), (6, 2), (3, 1)], ids=lambda h: f"H{h[0]}-KV{h[1]}")
def test_output_and_gradients(heads, dtype, options):
    relative = FLOAT64_RELATIVE if dtype == torch.float64 else FLOAT32_RELATIVE
    assert_is_attention(TREE, inputs(len(TREE), *heads, dtype=dtype), relative=relative, **options)


@few
@given(
    branches=branch_lists(),
    options=st.fixed_dictionaries(
        {}, optional={"window": st.integers(1, 6), "softcap": st.just(2.0), "scale": st.floats(0.1, 2)}
    ),
    heads=st.sampled_from([(2, 2), (4, 2), (3, 1)]),
    size=st.integers(1, 9),
)
def test_any_tree(branches, options, heads, size):
    torch.manual_seed(0)
    tree = build_prefix_tree(branches)
    assert_is_attention(tree, inputs(len(tree), *heads, size=size), **options)


@options
def test_either_kernel(kernel, options):
    if kernel is kernels.FLASH and "softcap" in options:
        pytest.skip("the fused kernel has no soft cap")
    assert_is_attention(GROWN, inputs(len(GROWN)), **options)


@pytest.mark.parametrize("window", [None, 1, 100, 600, 1099])
def test_segments_longer_than_the_tiles_of_the_fused_kernel(window):
    trunk = list(range(700))
    tree = build_prefix_tree([trunk + [1000] * 400, trunk + [1001] * 3, trunk[:600] + [1002] * 600, [9]])
    assert_is_attention(tree, inputs(len(tree), 2, 1, 4), window=window)


@pytest.mark.parametrize("size", [1, 7, 64, 200])
def test_head_sizes(size):
    assert_is_attention(TREE, inputs(len(TREE), size=size))
    assert_is_attention(TREE, inputs(len(TREE), size=size), window=3)


@pytest.mark.parametrize("window", [None, 1])
def test_a_single_token_attends_itself(window):
    tensors = inputs(1)
    results = tree_results(build_prefix_tree([[5]]), tensors, torch.ones(1, 4, 1, 8), window=window)
    assert_close(results[0], tensors[2].repeat_interleave(2, 1))
    for gradient, expected in zip(results[1:], (0.0, 0.0, 2.0), strict=True):
        assert_close(gradient, torch.full_like(gradient, expected), 1e-6)


def test_a_tree_is_its_branches_each_alone():
    layout, tensors = TreeLayout.of_tree(TREE), inputs(len(TREE), 4, 4)
    out = tree_attention(*tensors, layout)
    for rows in TREE.branch_rows:
        alone = F.scaled_dot_product_attention(*(tensor[:, :, rows] for tensor in tensors), is_causal=True)
        assert_close(out[:, :, rows], alone)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("tree", [TREE, GROWN, COMB], ids=["small", "grown", "comb"])
def test_half_precision_errs_at_most_twice_as_much_as_dense_attention(tree, softcap, dtype):
    tensors = inputs(len(tree), size=32, dtype=dtype)
    grad = torch.randn(tensors[0].shape).to(dtype)
    visible = visibility_mask(tree.position_ids, tree.subtree_end)
    truth = dense_results(tree, tensors, grad, softcap=softcap)

    def fused(q, k, v):
        k, v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=visible)

    plain = run(fused if softcap is None else lambda *t: dense_attention(*t, visible, softcap=softcap), tensors, grad)

    def error(results):
        return [float((r.double() - t).norm() / t.norm()) for r, t in zip(results, truth, strict=True)]

    pairs = zip(
        ("output", *NAMES), error(tree_results(tree, tensors, grad, softcap=softcap)), error(plain), strict=True
    )
    for name, ours, theirs in pairs:
        assert ours <= 2 * theirs, f"{name}: {ours:.2e} where dense attention has {theirs:.2e}"


@pytest.mark.parametrize("size", [1e2, 1e4])
def test_large_scores_do_not_overflow(kernel, size):
    """A logsumexp is rounded in proportion to its size, and so is every weight.

    The error is the share `rounding` of the terms of a gradient, whose sums cancel.
    """
    tensors, grad = inputs(len(GROWN)), torch.randn(1, 4, len(GROWN), 8)
    ordinary = tree_results(GROWN, tensors, grad)
    terms = [result.abs().max() * factor for result, factor in zip(ordinary, (1, 1, size, 1), strict=True)]
    tensors[0] *= size
    largest = (tensors[0] @ tensors[1].repeat_interleave(2, 1).mT).abs().max() / 8**0.5
    rounding = FLOAT32_RELATIVE + torch.finfo(torch.float32).eps * largest
    assert largest > 5 * size
    actual, truth = tree_results(GROWN, tensors, grad), dense_results(GROWN, tensors, grad)
    for a, t, term in zip(actual, truth, terms, strict=True):
        assert (a - t).abs().max() <= 4 * rounding * term


@pytest.mark.parametrize("size", [0.0, 50.0, -50.0, 2e4, -2e4])
@pytest.mark.parametrize("shared", [0.0, 1.0])
@pytest.mark.parametrize("window", [None, 2])
def test_pieces_of_very_different_scores_merge(kernel, size, shared, window):
    """Scores on the shared prefix are far above, far below or as large as those on a branch's own tokens."""
    tree = build_prefix_tree([[1, 2, 3, 4, 5], [1, 2, 6]])
    query, key, value = inputs(len(tree), 1, 1)
    query, key = torch.ones_like(query), torch.full_like(key, shared * size / 8**0.5)
    key[:, :, :2] = size / 8**0.5
    out = tree_attention(query, key, value, TreeLayout.of_tree(tree), window=window)
    visible = visibility_mask(tree.position_ids, tree.subtree_end, window)
    rounding = FLOAT32_RELATIVE + torch.finfo(torch.float32).eps * abs(size)
    assert_close(out, dense_attention(query.double(), key.double(), value.double(), visible), rounding)


def test_keys_outside_the_window_count_for_nothing_however_large_their_scores(kernel):
    tree = build_prefix_tree([[1, 2, 3, 4, 5], [1, 2, 6]])
    query, key, value = inputs(len(tree), 1, 1)
    query, key = torch.ones_like(query), torch.zeros_like(key)
    key[:, :, ::2] = 1e4
    out = tree_attention(query, key, value, TreeLayout.of_tree(tree), window=2)
    visible = visibility_mask(tree.position_ids, tree.subtree_end, 2)
    assert_close(out, dense_attention(query.double(), key.double(), value.double(), visible))


# ---- memory and gradients ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "needs", list(itertools.product([False, True], repeat=3))[1:], ids=lambda n: "".join("-+"[x] for x in n)
)
@pytest.mark.parametrize("options", [{}, {"window": 3, "softcap": 2.0}], ids=["plain", "window-softcap"])
def test_every_subset_of_gradients(needs, options):
    tensors, grad = inputs(len(TREE)), torch.randn(1, 4, len(TREE), 8)
    layout = TreeLayout.of_tree(TREE)
    whole = tree_results(TREE, tensors, grad, **options)
    some = run(lambda *qkv: tree_attention(*qkv, layout, **options), tensors, grad, needs)
    expected = [whole[0], *(g for g, need in zip(whole[1:], needs, strict=True) if need)]
    for a, e in zip(some, expected, strict=True):
        assert torch.equal(a, e)


def test_without_gradients_nothing_is_kept():
    tensors, layout = inputs(len(TREE)), TreeLayout.of_tree(TREE)
    assert tree_attention(*tensors, layout).grad_fn is None
    with torch.inference_mode():
        expected = dense_attention(*tensors, visibility_mask(TREE.position_ids, TREE.subtree_end))
        assert_close(tree_attention(*tensors, layout), expected)


def heads_last(tensor):
    """The layout of a model's projections: [1, T, H, D] with heads moved forward."""
    return tensor.transpose(1, 2).contiguous().transpose(1, 2)


def fused_projection(tensor):
    return torch.cat([tensor, torch.full_like(tensor, torch.nan)], -1)[..., : tensor.shape[-1]]


def size_first(tensor):
    return tensor.mT.contiguous().mT


def every_other(tensor):
    return tensor.repeat_interleave(2, -1)[..., ::2]


LAYOUTS = [heads_last, fused_projection, size_first, every_other]


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("which", range(4), ids=[*NAMES, "grad"])
@pytest.mark.parametrize("strided", LAYOUTS, ids=lambda f: f.__name__)
def test_strides_do_not_matter(kernel, strided, which, window):
    *tensors, grad = *inputs(len(TREE)), torch.randn(1, 4, len(TREE), 8)
    expected = tree_results(TREE, tensors, grad, window=window)
    tensors = [*tensors, grad]
    tensors[which] = strided(tensors[which])
    assert not tensors[which].is_contiguous()
    *tensors, grad = tensors
    assert_all_close(tree_results(TREE, tensors, grad, window=window), expected, 1e-6)


@pytest.mark.parametrize("which", range(4), ids=[*NAMES, "grad"])
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (1, 1, 1, 8), (1, 1, None, 8), (1, 2, 1, 1)], ids=str)
def test_expanded_inputs(kernel, which, shape):
    rows = len(TREE)
    *tensors, grad = *inputs(rows, 2, 2), torch.randn(1, 2, rows, 8)
    one = torch.randn([rows if n is None else n for n in shape])
    both = [*tensors, grad]
    both[which] = one.expand(1, 2, rows, 8)
    *tensors, grad = both
    assert_is_attention(TREE, tensors, grad)


def test_the_gradient_of_a_sum():
    """Its upstream gradient is one number with strides of 0."""
    tensors = [tensor.requires_grad_() for tensor in inputs(len(TREE))]
    tree_attention(*tensors, TreeLayout.of_tree(TREE)).sum().backward()
    expected = dense_results(TREE, tensors, torch.ones(1, 4, len(TREE), 8))[1:]
    for tensor, e in zip(tensors, expected, strict=True):
        assert_close(tensor.grad, e)


def test_inputs_and_upstream_gradients_are_left_alone(kernel):
    tensors, grad = inputs(len(TREE)), torch.randn(1, 4, len(TREE), 8)
    kept = [tensor.clone() for tensor in (*tensors, grad)]
    tree_results(TREE, tensors, grad, window=3)
    for tensor, before in zip((*tensors, grad), kept, strict=True):
        assert torch.equal(tensor, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_output_is_laid_out_as_models_reshape_it(dtype):
    out = tree_attention(*inputs(len(TREE), dtype=dtype), TreeLayout.of_tree(TREE))
    assert out.transpose(1, 2).is_contiguous()


@options
def test_results_repeat_bit_for_bit_whatever_memory_held(options):
    """In its deterministic mode, PyTorch fills new memory with NaN."""
    tensors, grad = inputs(len(GROWN)), torch.randn(1, 4, len(GROWN), 8)
    first = tree_results(GROWN, tensors, grad, **options)
    torch.use_deterministic_algorithms(True)
    try:
        again = tree_results(GROWN, tensors, grad, **options)
    finally:
        torch.use_deterministic_algorithms(False)
    for a, b in zip(first, again, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("window", [None, 2])
def test_nan_in_a_branch_stays_out_of_its_siblings(kernel, window):
    """In the forward, no row outside the branch sees it. In the backward, only shared rows get its gradient."""
    tree = build_prefix_tree([[1, 2, 3, 4, 5, 6], [1, 2, 3, 7, 8], [1, 2, 3, 9, 9, 9], [5, 5]])
    bad = tree.branch_rows[0][3:]
    shared = tree.branch_rows[0][:3]
    clean = torch.ones(len(tree), dtype=torch.bool)
    clean[bad] = False
    tensors, grad = inputs(len(tree)), torch.randn(1, 4, len(tree), 8)
    expected = tree_results(tree, tensors, grad, window=window)
    for tensor in tensors:
        tensor[:, :, bad] = torch.nan
    actual = tree_results(tree, tensors, grad, window=window)
    unshared = clean.clone()
    unshared[shared] = False
    for a, e, rows in zip(actual, expected, (clean, clean, unshared, unshared), strict=True):
        assert torch.equal(a[:, :, rows], e[:, :, rows])


def test_no_product_is_spent_on_what_is_masked(monkeypatch):
    """Without a window, only visible scores and the upper halves of the segments' triangles are computed."""
    layout = TreeLayout.of_tree(GROWN)
    scores = 0

    def counting(query, key, value, piece, rule):
        nonlocal scores
        scores += query.shape[2] * key.shape[2]
        return kernels.MATH.forward(query, key, value, piece, rule)

    monkeypatch.setattr(attention, "choose_kernel", lambda *_: kernels.AttentionKernel("count", counting, None))
    tree_attention(*inputs(len(GROWN)), layout)
    lengths = layout.segments[:, 1] - layout.segments[:, 0]
    visible = visibility_mask(GROWN.position_ids, GROWN.subtree_end).sum()
    assert scores == visible + (lengths * (lengths - 1) // 2).sum()


def test_kernels_are_chosen_by_device_and_soft_cap():
    query = torch.randn(1, 1, 1, 1)
    assert kernels.choose_kernel(query, None).name == ("flash" if kernels._HAS_FLASH else "math")
    assert kernels.choose_kernel(query, 3.0).name == "math"
    assert kernels.choose_kernel(query.to("meta"), None).name == "math"


def test_masks_are_cut_and_the_result_is_the_same(kernel, monkeypatch):
    tensors, grad = inputs(len(GROWN)), torch.randn(1, 4, len(GROWN), 8)
    whole = tree_results(GROWN, tensors, grad, window=5)
    monkeypatch.setattr(pieces, "_MASK_ENTRIES", 50)
    assert_all_close(tree_results(GROWN, tensors, grad, window=5), whole, 1e-6)


# ---- as an operator ------------------------------------------------------------------------------------


@pytest.mark.covering(1)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("window", "softcap"), [(None, None), (3, 2.0)], ids=["plain", "window-softcap"])
def test_opcheck(dtype, window, softcap):
    segments = TreeLayout.of_tree(TREE).segments
    tensors = [tensor.requires_grad_() for tensor in inputs(len(TREE), dtype=dtype)]
    opcheck(attention._forward, (*tensors, segments, None, 0.3, window, softcap))
    plain = [tensor.detach() for tensor in tensors]
    out, logsumexp = attention._forward(*plain, segments, None, 0.3, window, softcap)
    opcheck(
        attention._backward, (torch.randn_like(out), [*plain, out, logsumexp, segments], 0.3, window, softcap)
    )  # fmt: skip


def test_gradcheck():
    layout = TreeLayout.of_tree(TREE)
    leaves = [tensor.requires_grad_() for tensor in inputs(len(TREE), 2, 1, 3, torch.float64)]
    for options in ({}, {"window": 2, "softcap": 2.0, "scale": 0.9}):
        function = lambda *qkv: tree_attention(*qkv, layout, **options)  # noqa: B023, E731
        assert torch.autograd.gradcheck(function, leaves, fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_logsumexps_are_those_of_the_visible_scores(kernel, dtype):
    tensors = inputs(len(GROWN), 2, 2, dtype=dtype)
    _, logsumexp = attention._forward(*tensors, TreeLayout.of_tree(GROWN).segments, None, 0.3, None, None)
    scores = 0.3 * tensors[0].double() @ tensors[1].double().mT
    visible = visibility_mask(GROWN.position_ids, GROWN.subtree_end)
    assert logsumexp.dtype == torch.promote_types(dtype, torch.float32)
    truth = scores.masked_fill(~visible, -torch.inf).logsumexp(-1)
    if kernel is kernels.FLASH and dtype == torch.bfloat16:
        # For half precision PyTorch's fused kernel takes exponentials that are only as exact as the result's dtype
        # needs, and how exact that is depends on the processor. A piece's sum is off by that share, and joined pieces
        # by an average of their shares: by no more than the kernel's own sums, of as many keys. Twice that, because
        # the largest error of other sums is another one.
        _, theirs = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*tensors, 0.0, True, scale=0.3)
        causal = torch.ones_like(visible).tril()
        error = (theirs - scores.masked_fill(~causal, -torch.inf).logsumexp(-1)).abs().max()
        assert (logsumexp - truth).abs().max() <= 2 * error
    else:
        assert_close(logsumexp, truth, FLOAT32_RELATIVE)


@pytest.mark.parametrize(
    "backend",
    [
        "aot_eager",
        pytest.param("inductor", marks=[pytest.mark.slow, pytest.mark.filterwarnings("ignore")]),
    ],
)
@pytest.mark.parametrize("window", [None, 3])
def test_one_compiled_graph_serves_every_length_and_tree(window, backend):
    torch._dynamo.reset()
    compiles = CompileCounterWithBackend(backend)

    def model(q, k, v, layout):
        return tree_attention(q * 1.5, k, v, layout, window=window) * 2

    compiled = torch.compile(model, backend=compiles, fullgraph=True, dynamic=True)
    for seed, rows in enumerate((50, 33, 34, 90)):
        tree = grown_tree(rows, seed, spread=7 + seed)
        layout = TreeLayout.of_tree(tree)
        assert len(layout.segments) > 5, "equal sizes, such as five segments of five numbers, are traced as one"
        tensors, grad = inputs(len(tree)), torch.randn(1, 4, len(tree), 8)
        expected = run(lambda *qkv: model(*qkv, layout), tensors, grad)  # noqa: B023
        actual = run(lambda *qkv: compiled(*qkv, layout), tensors, grad)  # noqa: B023
        assert_all_close(actual, expected, 1e-6)
    assert compiles.frame_count == 1


# ---- bad input -----------------------------------------------------------------------------------------

Q, K = torch.randn(1, 4, 5, 8), torch.randn(1, 2, 5, 8)


@pytest.mark.parametrize(
    ("query", "key", "value", "options", "error", "message"),
    [
        (Q[0], K, K, {}, ArgumentError, r"query: expected \[1, H, 5, D\], got \[4, 5, 8\]"),
        (Q.expand(2, 4, 5, 8), K, K, {}, ArgumentError, r"query: .*got \[2, 4, 5, 8\]"),
        (Q[:, :, :4], K, K, {}, ArgumentError, r"query: .*got \[1, 4, 4, 8\]"),
        (Q, K[:, :, :4], K, {}, ArgumentError, r"key, value: expected \[1, H_kv, 5, 8\].* got \[1, 2, 4, 8\] and"),
        (Q, K, K[:, :1], {}, ArgumentError, r"key, value: .*\[1, 2, 5, 8\] and \[1, 1, 5, 8\]"),
        (Q, K, K[..., :7], {}, ArgumentError, r"key, value: .*and \[1, 2, 5, 7\]"),
        (Q, K.expand(2, 2, 5, 8), K, {}, ArgumentError, r"key, value: .*got \[2, 2, 5, 8\]"),
        (Q[:, :3], K, K, {}, ArgumentError, "H_kv dividing 3"),
        (Q, Q.repeat(1, 2, 1, 1), Q.repeat(1, 2, 1, 1), {}, ArgumentError, "H_kv dividing 4"),
        (
            Q,
            K.double(),
            K,
            {},
            ArgumentTypeError,
            "one floating dtype, got torch.float32, torch.float64, torch.float32",
        ),
        (Q, K, K.bfloat16(), {}, ArgumentTypeError, "one floating dtype"),
        (Q, K, K, {"window": 0}, ArgumentError, "window: expected a positive number or None, got 0"),
        (Q, K, K, {"window": -3}, ArgumentError, "window: .*got -3"),
        (
            Q,
            K,
            K,
            {"sinks": torch.ones(2)},
            ArgumentError,
            r"sinks: .*\[4\] or None, got torch.float32 \[2\]",
        ),
        (Q, K, K, {"sinks": torch.ones(4).long()}, ArgumentError, "sinks: .*got torch.int64"),
    ],
)
def test_bad_arguments_are_named(query, key, value, options, error, message):
    layout = TreeLayout.of_tree(build_prefix_tree([[1, 2, 3], [1, 2, 4, 5]]))
    with pytest.raises(error, match=message):
        tree_attention(query, key, value, layout, **options)


@pytest.mark.parametrize(
    ("query", "key", "options", "error", "message"),
    [
        (Q, K[0, 0, 0], {}, ArgumentError, "key, value"),
        (Q, K[:, :0], {}, ArgumentError, "key, value"),
        (Q[..., :0], K[..., :0], {}, ArgumentError, "query"),
        (Q.long(), K.long(), {}, ArgumentTypeError, "query"),
        (Q, K, {"scale": 0.0}, ArgumentError, "scale"),
        (Q, K, {"scale": -1.0}, ArgumentError, "scale"),
        (Q, K, {"softcap": 0.0}, ArgumentError, "softcap"),
    ],
    ids=["key-1d", "no-kv-head", "no-size", "integers", "scale-0", "scale-negative", "softcap-0"],
)
def test_bad_arguments_that_kernels_would_take_wrongly(query, key, options, error, message):
    """The fused kernel gives NaN for a scale of 0 or less. Other arguments fail deep inside, or give wrong results."""
    layout = TreeLayout.of_tree(build_prefix_tree([[1, 2, 3], [1, 2, 4, 5]]))
    with pytest.raises(error, match=message):
        tree_attention(query, key, key, layout, **options)
