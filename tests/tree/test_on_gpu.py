"""Kernels that need a GPU, against float64 attention with the whole mask. Needs only torch, triton and pytest."""

import pytest
import torch

from nextquill.tree import TreeLayout, build_prefix_tree, dispatch, tree_attention, visibility_mask
from nextquill.tree.flex import flex_tree_attention, tree_block_mask
from nextquill.tree.varlen import varlen_tree_attention
from nextquill.tree.varlen_kernels import why_not
from nextquill.tree.varlen_plan import sum_copies, varlen_plan
from tests.helpers import FLOAT32_RELATIVE, assert_close, relative_error
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

pytestmark = pytest.mark.gpu
TREE = build_prefix_tree(SMALL)


@options
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kernel", ["torch", "flash_attn"])
@pytest.mark.parametrize("heads", [(4, 4), (8, 2)], ids=lambda h: f"H{h[0]}-KV{h[1]}")
def test_kernels_err_at_most_twice_as_much_as_dense_attention(heads, kernel, dtype, options):
    if reason := why_not(dtype, "cuda", head_size=64, softcap=options.get("softcap"), kernel=kernel):
        pytest.skip(reason)
    trunk = list(range(700))
    chained = build_prefix_tree([trunk + [1000] * 400, [*trunk, 1001], trunk[:600] + [1002] * 300, [9]])
    for tree in (TREE, grown_tree(1500), chained, build_prefix_tree([[n] for n in range(9)])):
        tensors = [tensor.cuda() for tensor in inputs(len(tree), *heads, 64, dtype)]
        grad = torch.randn_like(tensors[0])
        window = options.get("window")
        visible = visibility_mask(tree.position_ids, tree.subtree_end, window).cuda()
        rest = {name: value for name, value in options.items() if name != "window"}
        truth = dense_results(tree, tensors, grad, **options)
        plain = run(lambda *qkv: dense_attention(*qkv, visible, **rest), tensors, grad)  # noqa: B023
        for name, a, t, p in zip(
            NAMES, varlen_results(tree, tensors, grad, kernel=kernel, **options), truth, plain, strict=True
        ):
            ours, theirs = (float((each.double() - t).norm() / t.norm().clamp_min(1e-3)) for each in (a, p))
            assert ours <= 2 * theirs + 1e-4, f"{name}: {ours:.2e} where dense attention has {theirs:.2e}"


def test_gpu_results_repeat_bit_for_bit():
    tree = grown_tree(1500)
    tensors = [tensor.cuda() for tensor in inputs(len(tree), 8, 2, 64, torch.bfloat16)]
    grad = torch.randn_like(tensors[0])
    first, again = (varlen_results(tree, tensors, grad, kernel="torch") for _ in range(2))
    for which in (0, 2, 3):  # the query's gradient in deterministic mode only
        assert torch.equal(first[which], again[which])
    torch.use_deterministic_algorithms(True)
    try:
        first, again = (varlen_results(tree, tensors, grad, kernel="torch") for _ in range(2))
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_gpu_agrees_with_pieces_in_a_compiled_model():
    tree = grown_tree(900)
    layout = TreeLayout.of_tree(tree)
    tensors = [tensor.cuda() for tensor in inputs(len(tree), 8, 2, 128, torch.bfloat16)]
    grad = torch.randn_like(tensors[0])
    compiled = torch.compile(lambda q, k, v: varlen_tree_attention(q * 2, k, v, layout), fullgraph=True)
    expected = run(lambda q, k, v: tree_attention(q * 2, k, v, layout), tensors, grad)
    for a, e in zip(run(compiled, tensors, grad), expected, strict=True):
        assert_close(a, e, 2e-2)


@options
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_output_and_gradients_on_a_gpu(dtype, options):
    """For three lengths, one a multiple of the tile, the error is at most twice that of dense attention."""
    torch._dynamo.reset()
    softcap, window = options.get("softcap"), options.get("window")
    for seed, rows in enumerate((150, 700, 1500)):
        tree = grown_tree(rows, seed)
        if rows == 700:  # 896 = 7 · 128 rows, by roots of one token
            tree = build_prefix_tree([*([n] for n in range(2000, 2896 - len(tree))), *map(list, _branches(tree))])
            assert len(tree) == 896
        mask = tree_block_mask(tree.position_ids, tree.subtree_end, "cuda", window=window)
        tensors = [t.cuda() for t in inputs(len(tree), size=64, dtype=dtype)]
        grad = torch.randn_like(tensors[0])
        visible = visibility_mask(tree.position_ids, tree.subtree_end, window).cuda()

        def results(function, tensors, grad):
            leaves = [tensor.detach().requires_grad_() for tensor in tensors]
            out = function(*leaves)
            return [out, *torch.autograd.grad(out, leaves, grad)]

        actual = results(lambda *qkv: flex_tree_attention(*qkv, mask, 0.125, softcap), tensors, grad)  # noqa: B023
        dense = lambda *qkv: dense_attention(*qkv, visible, 0.125, softcap)  # noqa: B023, E731
        truth = results(dense, [t.double() for t in tensors], grad.double())
        plain = results(dense, tensors, grad)
        for a, t, p in zip(actual, truth, plain, strict=True):
            assert relative_error(a, t) <= max(FLOAT32_RELATIVE, 2 * relative_error(p, t))


def _branches(tree):
    return [tree.input_ids[rows].tolist() for rows in tree.branch_rows]


def test_copies_are_summed_in_float32():
    """With 500 copies, a sum in bfloat16 would stop growing when a term is below half a unit in the last place."""
    tree, device = build_prefix_tree([[0, n] for n in range(1, 500)]), torch.device("cuda")
    plan = varlen_plan(TreeLayout.of_tree(tree).segments, None, device)
    grads = (1 + torch.randn(len(plan.rows), 2, 4) / 10).to(device).bfloat16()
    exact = torch.zeros(len(tree), 2, 4, dtype=torch.float64, device=device)
    exact.index_add_(0, plan.rows, grads.double())
    total = sum_copies(grads, plan)
    assert total.dtype == grads.dtype
    assert relative_error(total, exact) <= 2**-8
    assert torch.equal(total, sum_copies(grads, plan))


def test_auto_takes_varlen_in_half_precision_where_it_can_run():
    """It passes its check here; otherwise `auto` would warn and take FlexAttention."""
    if reason := why_not(torch.bfloat16, "cuda", head_size=64):
        pytest.skip(reason)
    assert dispatch._on_cuda(torch.bfloat16, torch.device("cuda", 0), 64, None) == "varlen"
