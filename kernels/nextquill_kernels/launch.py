"""Helpers of every launcher: where kernels can run, the tuned target of a device, checks of arguments.

The kernels are compiled for CUDA and ROCm devices. With TRITON_INTERPRET=1 set before Triton is imported, Triton's
interpreter runs them instead, on CPU tensors too; that is for tests, at about 250 tiles per second.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.jit import JITFunction

# TRITON_INTERPRET decides when Triton is imported whether Triton's own functions, such as this one, are compiled or
# interpreted. The two kinds cannot call each other, so this package ignores later changes of the variable.
INTERPRETED = not isinstance(tl.sum, JITFunction)
# The target whose instructions and sizes of tiles suit a major compute capability. 11 and 12 have neither the tensor
# memory of 10 nor the wgmma of 9.
_NVIDIA_TARGETS = {8: "sm_80", 9: "sm_90", 10: "sm_100", 11: "sm_80", 12: "sm_80"}
# The target of GPUs that nobody has tuned or compiled for.
PORTABLE_TARGET = "portable"


class RowTile(NamedTuple):
    """Columns per step, threads per program and steps in flight of a kernel that walks along rows of logits."""

    block_v: int
    threads: int
    stages: int = 3

    @property
    def num_warps(self) -> int:
        """Warps per program: a warp of an AMD GPU has 64 threads."""
        return self.threads // (32 if torch.version.hip is None else 64)

    @property
    def constants(self) -> dict[str, int]:
        """The kernel's compile-time arguments; a launch's own `num_stages` would not reach loads without a product."""
        return {"BLOCK_V": self.block_v, "STAGES": self.stages}


def jit(
    *, do_not_specialize: Sequence[str] = (), do_not_specialize_on_alignment: Sequence[str] = ()
) -> Callable[[Callable[..., Any]], Any]:
    """Decorate as `triton.jit` does, interpreted exactly if Triton itself is, whatever TRITON_INTERPRET says now.

    Triton compiles a kernel again for each combination of arguments that are, or are not, multiples of 16 or equal to
    1. A chunk may start at any row of a buffer, so its labels, statistics and upstream gradients would be aligned at
    one step and not at the next.

    Args:
        do_not_specialize: integers that must not cause another compilation.
        do_not_specialize_on_alignment: pointers whose alignment must not cause another compilation.
    """

    def decorate(function: Callable[..., Any]) -> Any:
        with triton.knobs.runtime.scope():
            triton.knobs.runtime.interpret = INTERPRETED
            return triton.jit(
                do_not_specialize=list(do_not_specialize),
                do_not_specialize_on_alignment=list(do_not_specialize_on_alignment),
            )(function)

    return decorate


def check_together(**tensors: Tensor | None) -> None:
    """Raise unless all tensors (None is skipped) are on one device, and the kernels can run there."""
    given = [(name, tensor) for name, tensor in tensors.items() if tensor is not None]
    first_name, first = given[0]
    if first.device.type not in (("cuda", "cpu") if INTERPRETED else ("cuda",)):
        raise RuntimeError(
            f"{first_name}: got a tensor on {first.device}, expected a CUDA or ROCm device (or the CPU with "
            "TRITON_INTERPRET=1 set before triton is imported)"
        )
    for name, tensor in given[1:]:
        if tensor.device != first.device:
            raise ValueError(f"{name}: expected a tensor on {first.device} as {first_name}, got {tensor.device}")


def check_tensor(name: str, tensor: Tensor, dtype: torch.dtype, *shape: int, dense: bool = True) -> None:
    """Raise TypeError if `tensor` has another dtype, ValueError on another shape or (if `dense`) last stride than 1."""
    if tensor.dtype != dtype:
        raise TypeError(f"{name}: expected dtype {dtype}, got {tensor.dtype}")
    if tensor.shape != shape:
        raise ValueError(f"{name}: expected shape {list(shape)}, got {list(tensor.shape)}")
    if dense and tensor.ndim and tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
        raise ValueError(f"{name}: expected a last stride of 1, got {tensor.stride(-1)}")


def check_rows(n: int, dtype: torch.dtype, **rows: Tensor | None) -> None:
    """Raise unless each tensor given by keyword (None is skipped) holds one number of `dtype` per row; any stride."""
    for name, tensor in rows.items():
        if tensor is not None:
            check_tensor(name, tensor, dtype, n, dense=False)


def check_logits(name: str, logits: Tensor) -> tuple[int, int]:
    """Return n and V of [n, V] float32 logits with V > 0, or raise."""
    if logits.ndim != 2 or logits.shape[1] == 0:
        raise ValueError(f"{name}: expected shape [n, V] with V > 0, got {list(logits.shape)}")
    check_tensor(name, logits, torch.float32, *logits.shape)
    return logits.shape[0], logits.shape[1]


def check_bias(bias: Tensor | None, vocabulary: int) -> None:
    """Raise unless `bias` is None or [V] in float32."""
    if bias is not None:
        check_tensor("bias", bias, torch.float32, vocabulary)


@contextmanager
def on_device(tensor: Tensor) -> Iterator[None]:
    """Make the device of `tensor` the current one, because Triton launches there, whatever its arguments' device is.

    The shape and dtype of `tensor` do not matter. Under the interpreter this also silences two warnings of NumPy: about
    arithmetic with infinities, which a GPU does not report, and about a deprecated conversion in triton 3.6.
    """
    if INTERPRETED:
        with warnings.catch_warnings(), triton.knobs.runtime.scope():
            triton.knobs.runtime.interpret = True  # the variable may have been unset since
            warnings.simplefilter("ignore", RuntimeWarning)
            warnings.simplefilter("ignore", DeprecationWarning)
            yield
    else:
        with torch.cuda.device(tensor.device):
            yield


def target_of(device: torch.device) -> str:
    """Name the target whose tiles suit `device`: "sm_80", "sm_90", "sm_100", "gfx942", or "interpreter" on CPU.

    A GPU that the table does not know by name gets a target whose instructions it has: "sm_80" for "sm_89" and
    "sm_120", "gfx942" for "gfx950". It may have less shared memory than that target; see `shared_memory_of`. Any other
    GPU gets "portable", with one warning.
    """
    if device.type != "cuda":
        return "interpreter"
    if torch.version.hip is not None:
        arch = str(getattr(torch.cuda.get_device_properties(device), "gcnArchName", "")).partition(":")[0]
        if arch.startswith(("gfx94", "gfx95")):
            return "gfx942"
    else:
        major, minor = torch.cuda.get_device_capability(device)
        arch = f"sm_{major}{minor}"
        if major < 13:
            return _NVIDIA_TARGETS.get(major, "sm_80")
    warn_portable(device, f"its architecture, {arch or 'without a name'}, is not known")
    return PORTABLE_TARGET


@functools.cache
def warn_portable(device: torch.device, reason: str) -> None:
    """Say once for a device and a reason that its tiles are the portable ones."""
    warnings.warn(
        f"{torch.cuda.get_device_name(device)}: {reason}; the streaming kernels use small tiles that run anywhere. "
        "`python -m nextquill_kernels.tune` measures better ones where it can compile for the device",
        RuntimeWarning,
        stacklevel=2,
    )


def shared_memory_of(device: torch.device) -> int:
    """Return how many bytes of shared memory a program may use on `device`; a large number under the interpreter."""
    if device.type != "cuda":
        return 2**30
    properties = torch.cuda.get_device_properties(device)
    return int(getattr(properties, "shared_memory_per_block_optin", properties.shared_memory_per_block))


def cdiv(value: int, divisor: int) -> int:
    """Return value / divisor, rounded up; `triton.cdiv` takes 5 us on the host."""
    return -(-value // divisor)
