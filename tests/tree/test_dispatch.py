from __future__ import annotations

import pytest
import torch

from nextquill.errors import ArgumentError, BackendUnavailableError
from nextquill.tree import TREE_KERNELS, TreeLayout, attend, build_prefix_tree, tree_attention


def inputs(grad: bool = False) -> tuple[TreeLayout, list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    tree = build_prefix_tree([[1, 2, 3, 4], [1, 2, 5], [6, 7]])
    tensors = [torch.randn(1, heads, len(tree), 16, generator=generator) for heads in (4, 2, 2)]
    return TreeLayout.of_tree(tree), [tensor.requires_grad_(grad) for tensor in tensors]


@pytest.mark.parametrize("window", [None, 2])
def test_a_cpu_takes_pieces(window: int | None) -> None:
    layout, tensors = inputs()
    expected = tree_attention(*tensors, layout, window=window, scale=0.3)
    for kernel in ("auto", "pieces"):
        assert torch.equal(attend(*tensors, layout, window=window, scale=0.3, kernel=kernel), expected)


@pytest.mark.slow  # compiles
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of what inductor imports
@pytest.mark.parametrize("window", [None, 2])
def test_flex_is_the_same(window: int | None) -> None:
    layout, tensors = inputs()
    got = attend(*tensors, layout, window=window, kernel="flex")
    torch.testing.assert_close(got, tree_attention(*tensors, layout, window=window))
    assert len(layout.plans) == 1, "the block mask is made once"
    attend(*tensors, layout, window=window, kernel="flex")
    assert len(layout.plans) == 1


def test_a_kernel_that_cannot_run_says_so() -> None:
    layout, tensors = inputs(grad=True)
    with pytest.raises(BackendUnavailableError, match="needs a CUDA device, got cpu"):
        attend(*(tensor.half() for tensor in tensors), layout, kernel="varlen")
    with pytest.raises(BackendUnavailableError, match="flex"):
        attend(*tensors, layout, kernel="flex")


@pytest.mark.parametrize("kernel", TREE_KERNELS)
def test_every_kernel_names_a_bad_argument(kernel: str) -> None:
    layout, tensors = inputs()
    with pytest.raises(ArgumentError, match="window: expected a positive number or None, got 0"):
        attend(*tensors, layout, window=0, kernel=kernel)


def test_an_unknown_kernel_is_named() -> None:
    layout, tensors = inputs()
    with pytest.raises(ArgumentError, match=f"kernel: expected auto or one of {', '.join(TREE_KERNELS)}, got 'fast'"):
        attend(*tensors, layout, kernel="fast")
