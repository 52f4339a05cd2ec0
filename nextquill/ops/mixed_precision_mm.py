"""Half-precision matrix products with float32 results, where the device has them.

torch multiplies float16 and bfloat16 matrices into a float32 result on accelerators only (`out_dtype`, torch >= 2.8).
A small product tests once whether the installed torch and the device can do it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache

import torch
from torch import Tensor

_HALF = (torch.float16, torch.bfloat16)
# If no product can add to its result, dW is added slice by slice; a slice of this size stays in the L2 cache.
_SLICE_BYTES = 32 * 2**20


def has_wide_mm(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether `mm_into` can write float32 products of `dtype` matrices on `device`."""
    return device.type == "cuda" and dtype in _HALF and _works(_probe_mm, device, dtype)


def mm_into(out: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """Write left @ right into `out` and return it: [n, k] @ [k, m] in a half dtype, `out` [n, m] float32."""
    return torch.mm(left, right, out_dtype=out.dtype, out=out)


def addmm_into(accumulator: Tensor, left: Tensor, right: Tensor) -> None:
    """Add left @ right to `accumulator`: [n, k] @ [k, m] in a half dtype, `accumulator` [n, m] float32.

    In one product if the device can; otherwise in float32 slices, which read and write the accumulator once more.
    """
    if _works(_probe_addmm, accumulator.device, left.dtype):
        torch.addmm(accumulator, left, right, out_dtype=accumulator.dtype, out=accumulator)
        return
    rows = max(1, _SLICE_BYTES // (accumulator.shape[1] * accumulator.element_size()))
    for start in range(0, accumulator.shape[0], rows):
        piece = slice(start, start + rows)
        accumulator[piece] += torch.mm(left[piece], right, out_dtype=accumulator.dtype)


@contextmanager
def tf32_products() -> Iterator[None]:
    """Let float32 products on CUDA devices use TF32.

    TF32 has float16's 11 bits of precision and float32's range, so it holds float16 factors exactly. Without it a GPU
    multiplies float32 matrices outside its tensor cores, more than ten times slower.
    """
    matmul = torch.backends.cuda.matmul
    # torch 2.9 replaces the flag by a name; reading one after setting the other is an error.
    name, value = ("fp32_precision", "tf32") if hasattr(matmul, "fp32_precision") else ("allow_tf32", True)
    before = getattr(matmul, name)
    setattr(matmul, name, value)
    try:
        yield
    finally:
        setattr(matmul, name, before)


@cache
def _works(probe: Callable[[Tensor, Tensor], None], device: torch.device, dtype: torch.dtype) -> bool:
    factor = torch.full((16, 16), 0.5, dtype=dtype, device=device)
    result = torch.ones(16, 16, device=device)
    try:
        probe(result, factor)
    except (RuntimeError, TypeError):
        return False
    return float(result[0, 0]) == _EXPECTED[probe]


def _probe_mm(result: Tensor, factor: Tensor) -> None:
    mm_into(result, factor, factor)


def _probe_addmm(result: Tensor, factor: Tensor) -> None:
    torch.addmm(result, factor, factor, out_dtype=result.dtype, out=result)


_EXPECTED: dict[Callable[[Tensor, Tensor], None], float] = {_probe_mm: 4.0, _probe_addmm: 5.0}
