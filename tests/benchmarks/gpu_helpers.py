"""Files, variables and lines for the tests of the GPU verification."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from benchmarks import verify_gpu

CPU = torch.device("cpu")
no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def environment() -> dict[str, str]:
    root = str(verify_gpu.ROOT)
    return os.environ | {"PYTHONPATH": os.pathsep.join([root, f"{root}/kernels"]), "TRITON_INTERPRET": "1"}


def line_of(page, start):
    (line,) = (line for line in page.splitlines() if line.startswith(f"| {start}"))
    return line
