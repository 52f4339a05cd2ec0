"""Describes what a GPU's figures depend on besides the code, for the head of a log."""

from __future__ import annotations

from pathlib import Path

import torch

from benchmarks.measure import device_name, triton_version

_DRIVER = Path("/proc/driver/nvidia/version")


def describe(device: torch.device) -> list[str]:
    """Versions, the device, and the abilities of its half-precision products, one line each."""
    return [
        f"torch {torch.__version__}, CUDA {torch.version.cuda}, triton {triton_version() or 'not installed'}",
        f"device: {device_name(device.type)}, driver: {_driver()}",
        f"allow_tf32: {torch.backends.cuda.matmul.allow_tf32}",
        *(_wide(device, dtype) for dtype in (torch.bfloat16, torch.float16)),
    ]


def _driver() -> str:
    try:
        return " ".join(_DRIVER.read_text(encoding="utf-8").splitlines()[0].split())
    except (OSError, IndexError):
        return "unknown"


def _wide(device: torch.device, dtype: torch.dtype) -> str:
    """Whether products have float32 results, and can be accumulated in place.

    Without the first, a product is widened afterwards. Without the second, dW is added slice by slice.
    """
    from nextquill.ops import mixed_precision_mm as wide

    try:
        there = wide.has_wide_mm(device, dtype)
        in_place = there and wide._works(wide._probe_addmm, device, dtype)
    except Exception as error:  # noqa: BLE001 - an error in a log line must not end the run
        return f"{dtype} products into float32: cannot be asked ({type(error).__name__}: {error})"
    return f"{dtype} products into float32: {there}, accumulated in place: {in_place}"
