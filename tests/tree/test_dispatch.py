from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from nextquill.errors import ArgumentError, BackendUnavailableError
from nextquill.tree import TREE_KERNELS, TreeLayout, attend, build_prefix_tree, dispatch, tree_attention, varlen_kernels
from nextquill.tree.kernels import AttentionKernel


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


@pytest.fixture
def failing_varlen(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Make every varlen kernel one that runs on this GPU, and fails its check; return the names that were checked."""
    checked = list[str]()

    def verify(kernel: AttentionKernel, device: torch.device) -> None:
        checked.append(kernel.name)
        if kernel.name == "torch":
            raise RuntimeError("no kernel image is available\nfor this device")
        raise BackendUnavailableError(f"kernel {kernel.name!r} on {device}: its output is not that of")

    monkeypatch.setattr(varlen_kernels, "why_not", lambda *_, **__: None)
    monkeypatch.setattr(varlen_kernels, "_verify", verify)
    for cached in (varlen_kernels.failure, dispatch._on_cuda, dispatch._warn):
        cached.cache_clear()
    yield checked
    for cached in (varlen_kernels.failure, dispatch._on_cuda, dispatch._warn):
        cached.cache_clear()


CUDA = torch.device("cuda", 0)


def test_auto_takes_flex_with_one_warning_where_varlen_fails_its_check(failing_varlen: list[str]) -> None:
    asked = [(dtype, CUDA, size, None) for dtype in (torch.half, torch.bfloat16) for size in (64, 128, 8)]
    with pytest.warns(RuntimeWarning, match="varlen fails its check here, so 'auto' uses FlexAttention") as caught:
        chosen = [dispatch._on_cuda(*each) for each in asked]
    assert chosen == ["flex", "flex", "pieces"] * 2
    assert len(caught) == 1
    assert "kernel 'torch' on cuda:0: RuntimeError: no kernel image is available for this device" in str(caught[0])
    assert failing_varlen == ["torch", "flash_attn"], "each is checked once"


def test_varlen_asked_for_by_name_still_raises(failing_varlen: list[str]) -> None:
    layout, tensors = inputs()
    half = [tensor.half() for tensor in tensors]
    with pytest.raises(BackendUnavailableError, match=r"no kernel image .*; kernel 'flash_attn' on cpu: its output is"):
        attend(*half, layout, kernel="varlen")


def test_auto_takes_the_second_varlen_kernel_if_only_the_first_fails(
    failing_varlen: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    failing = varlen_kernels._verify

    def verify(kernel: AttentionKernel, device: torch.device) -> None:
        if kernel.name == "torch":
            failing(kernel, device)

    monkeypatch.setattr(varlen_kernels, "_verify", verify)
    assert dispatch._on_cuda(torch.half, CUDA, 64, None) == "varlen"
    assert varlen_kernels.choose_kernel("auto", torch.empty(1, 1, 1, 64).half(), None).name == "flash_attn"
