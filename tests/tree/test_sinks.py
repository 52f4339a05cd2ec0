"""Attention sinks: one more key of every query, with a score of its own and a value of zero, in every kernel."""

from functools import partial

import pytest
import torch
from torch.library import opcheck

from nextquill.tree import (
    TreeLayout,
    attend,
    attention,
    build_prefix_tree,
    flex,
    tree_attention,
    varlen,
    visibility_mask,
)
from nextquill.tree.flex import flex_tree_attention, tree_block_mask
from nextquill.tree.varlen import varlen_tree_attention
from tests.helpers import FLOAT32_RELATIVE, FLOAT64_RELATIVE, assert_close, relative_error
from tests.tree.trees import SMALL, dense_attention, grown_tree, inputs

NAMES = "output", "query", "key", "value", "sinks"
TREES = {"small": build_prefix_tree(SMALL), "grown": grown_tree(150)}
KERNELS = {"pieces": tree_attention, "varlen": partial(varlen_tree_attention, kernel="emulated")}
OPTIONS = [{}, {"window": 3}, {"softcap": 1.5, "scale": 0.7}]

kernels = pytest.mark.parametrize("kernel", sorted(KERNELS))
options = pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(o) or "plain")


def sinks_of(heads=4, dtype=torch.float32):
    return torch.linspace(-1.5, 2.0, heads, dtype=torch.float64).to(dtype)


def results(function, tensors, grad):
    """The output, and the gradients of query, key, value and sinks."""
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    out = function(*leaves[:3], sinks=leaves[3])
    return [out.detach(), *torch.autograd.grad(out, leaves, grad.to(out.dtype))]


def dense(tree, window=None, **rest):
    visible = visibility_mask(tree.position_ids, tree.subtree_end, window)
    return partial(dense_attention, visible=visible, **rest)


@options
@kernels
@pytest.mark.parametrize("tree", TREES.values(), ids=TREES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_output_and_gradients(tree, kernel, options, dtype):
    tensors = [*inputs(len(tree), 4, 2, 8, dtype), sinks_of(dtype=dtype)]
    grad = torch.randn_like(tensors[0])
    actual = results(partial(KERNELS[kernel], layout=TreeLayout.of_tree(tree), **options), tensors, grad)
    expected = results(dense(tree, **options), [tensor.double() for tensor in tensors], grad.double())
    for name, a, e in zip(NAMES, actual, expected, strict=True):
        assert a.dtype == dtype
        assert_close(a, e, FLOAT64_RELATIVE if dtype == torch.float64 else 2 * FLOAT32_RELATIVE, name)


@kernels
def test_half_precision_errs_at_most_twice_as_much_as_dense_attention(kernel):
    tree, sums = TREES["grown"], {name: [0.0, 0.0] for name in NAMES}
    for _ in range(8):  # the gradient of the sinks has four numbers: one draw of them is a matter of luck
        tensors = [*inputs(len(tree), 4, 2, 16, torch.bfloat16), sinks_of(dtype=torch.bfloat16)]
        grad = torch.randn_like(tensors[0])
        truth = results(dense(tree), [tensor.double() for tensor in tensors], grad.double())
        for row, function in enumerate([partial(KERNELS[kernel], layout=TreeLayout.of_tree(tree)), dense(tree)]):
            for name, found, exact in zip(NAMES, results(function, tensors, grad), truth, strict=True):
                sums[name][row] += relative_error(found, exact)
    assert all(own <= 2 * plain for own, plain in sums.values()), sums


@kernels
def test_a_sink_far_below_every_score_counts_for_nothing_and_one_far_above_for_all(kernel):
    tree, tensors = TREES["small"], inputs(len(TREES["small"]))
    function = partial(KERNELS[kernel], *tensors, TreeLayout.of_tree(tree))
    assert_close(function(sinks=torch.full((4,), -1e4)), function(), 1e-6)
    assert_close(function(sinks=torch.full((4,), -torch.inf)), function(), 1e-6)
    assert not function(sinks=torch.full((4,), 1e4)).any()


@kernels
def test_sinks_alone_may_need_a_gradient(kernel):
    tree, sinks = TREES["small"], sinks_of().requires_grad_()
    tensors = inputs(len(tree))
    out = KERNELS[kernel](*tensors, TreeLayout.of_tree(tree), sinks=sinks)
    (actual,) = torch.autograd.grad(out.square().sum(), [sinks])
    exact = sinks.detach().double().requires_grad_()
    out = dense(tree)(*[tensor.double() for tensor in tensors], sinks=exact)
    assert_close(actual, torch.autograd.grad(out.square().sum(), [exact])[0], 2 * FLOAT32_RELATIVE)


@pytest.mark.parametrize("operator", [attention._forward, varlen._forward], ids=["pieces", "varlen"])
def test_opcheck(operator):
    tree = TREES["small"]
    tensors = [tensor.requires_grad_() for tensor in (*inputs(len(tree)), sinks_of())]
    *qkv, sinks = tensors
    rest = (0.3, None, None, *(["emulated"] if operator is varlen._forward else []))
    opcheck(operator, (*qkv, TreeLayout.of_tree(tree).segments, sinks, *rest))


# Without torch.compile, flex_attention writes the scores out, which is what tests on a CPU want, and says so.
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@options
def test_flex(options, monkeypatch):
    monkeypatch.setattr(flex, "_compiled", lambda _: flex._flex)
    tree, tensors = TREES["grown"], inputs(len(TREES["grown"]), 4, 2, 16)
    options = {"scale": 0.25, **options}
    rest = {name: value for name, value in options.items() if name != "window"}
    mask = tree_block_mask(tree.position_ids, tree.subtree_end, "cpu", window=options.get("window"))
    actual = flex_tree_attention(*tensors, mask, **rest, sinks=sinks_of())
    exact = [tensor.double() for tensor in tensors]
    assert_close(actual, dense(tree, **options)(*exact, sinks=sinks_of().double()), FLOAT32_RELATIVE)


@pytest.mark.parametrize("kernel", ["auto", "pieces"])
def test_attend_passes_sinks_on(kernel):
    tree, tensors = TREES["small"], inputs(len(TREES["small"]))
    layout = TreeLayout.of_tree(tree)
    assert torch.equal(
        attend(*tensors, layout, sinks=sinks_of(), kernel=kernel), tree_attention(*tensors, layout, sinks=sinks_of())
    )
