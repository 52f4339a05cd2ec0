"""Copies to a GPU do not stop the host, and operators that read labels on the host stay out of CUDA graphs."""

from __future__ import annotations

import pytest
import torch

from nextquill import devices
from nextquill.data import collator
from nextquill.devices import reads_on_host, send
from nextquill.ops import loss_operator, nll_operators  # noqa: F401 - defines the operators
from nextquill.tree import TreeLayout, attention, build_prefix_tree, varlen, varlen_plan  # noqa: F401 - as above
from tests.helpers import make_case

CUDA = torch.device("cuda", 0)


@pytest.fixture
def copies(monkeypatch):
    """What is pinned, and what is copied where and how, as (kind, device, non_blocking)."""
    seen = []

    def pin_memory(tensor, *_):
        seen.append("pinned")
        return tensor

    def to(tensor, *arguments, **options):
        target = arguments[0] if arguments else None
        if isinstance(target, (str, torch.device)) and torch.device(target).type == "cuda":
            seen.append((torch.device(target), options.get("non_blocking", False)))
            return tensor
        return original(tensor, *arguments, **options)

    original = torch.Tensor.to
    monkeypatch.setattr(torch.Tensor, "pin_memory", pin_memory)
    monkeypatch.setattr(torch.Tensor, "to", to)
    return seen


def test_a_copy_to_a_gpu_is_pinned_and_queued(copies):
    send(torch.arange(3), CUDA)
    send(torch.arange(3), "cuda")
    assert copies == ["pinned", (CUDA, True), "pinned", (torch.device("cuda"), True)]


def test_nothing_is_pinned_on_a_machine_without_gpu(copies):
    indices = torch.arange(3)
    assert send(indices, "cpu") is indices
    assert send(indices, torch.device("meta")).device.type == "meta"
    assert copies == []


def test_a_tensor_on_a_device_is_not_pinned(copies):
    """Only memory of the host can be."""
    send(torch.empty(3, device="meta"), CUDA)
    assert copies == [(CUDA, False)]


def test_batches_and_plans_of_trees_are_sent(copies, monkeypatch):
    tree = build_prefix_tree([[1, 2, 3], [1, 2, 4, 5]])
    batch = {"parts": [{"labels": torch.arange(3), "layout": TreeLayout.of_tree(tree)}], "users": torch.arange(2)}
    collator.to_device(batch, CUDA)
    assert copies == ["pinned", (CUDA, True)] * 2
    copies.clear()
    varlen_plan._plan_of.cache_clear()
    varlen_plan.varlen_plan(TreeLayout.of_tree(tree).segments, None, CUDA)
    assert copies == ["pinned", (CUDA, True)] * 5
    varlen_plan._plan_of.cache_clear()


READERS = (
    "token_nll", "token_nll_backward", "pair_nll", "pair_nll_backward", "pair_stats", "pair_loss",
    "tree_attention", "tree_attention_backward", "varlen_tree_attention", "varlen_tree_attention_backward",
)  # fmt: skip


@pytest.mark.skipif(not hasattr(torch.Tag, "cudagraph_unsafe"), reason="this torch has no such tag")
@pytest.mark.parametrize("name", READERS)
def test_operators_that_read_on_the_host_stay_out_of_cuda_graphs(name):
    assert torch.Tag.cudagraph_unsafe in getattr(torch.ops.nextquill, name).default.tags


def test_older_versions_of_torch_have_no_tag(monkeypatch):
    monkeypatch.setattr(devices.torch, "Tag", object)
    assert reads_on_host() == {}


def test_a_tagged_operator_compiles():
    import nextquill as nq

    case = make_case(9, 8, 17)
    loss = nq.NextQuillLoss(impl="torch")
    compiled = torch.compile(lambda *tensors: loss(*tensors), backend="aot_eager", fullgraph=True)
    assert torch.allclose(compiled(*case.pair_args), loss(*case.pair_args))
