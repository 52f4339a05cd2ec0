"""Kernels run on the right devices, and take their tiles for them."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from nextquill_kernels.launch import INTERPRETED, cdiv, check_together, on_device, target_of


def test_interpreted_where_there_is_no_gpu(device):
    assert (device.type == "cpu") == INTERPRETED


IMPORT = """
import os
os.environ.pop("TRITON_INTERPRET", None)
{steps}
import torch
from nextquill_kernels import chunk, chunk_stats, launch
print(launch.INTERPRETED, type(chunk_stats._token_stats_kernel).__name__)
out = torch.full((3, 3), torch.nan)
try:
    chunk.token_stats(torch.zeros(3, 4), torch.zeros(3, dtype=torch.long), out)
    print((out[2] - torch.tensor(4.0).log()).abs().max().item() < 1e-6)
except RuntimeError as error:
    print(error)
"""
SET, UNSET = 'os.environ["TRITON_INTERPRET"] = "1"', 'del os.environ["TRITON_INTERPRET"]'
REFUSED = "logits: got a tensor on cpu, expected a CUDA or ROCm device (or the CPU with TRITON_INTERPRET=1 set before"


@pytest.mark.parametrize(
    ("steps", "is_interpreted"),
    [
        pytest.param([], False, marks=pytest.mark.slow),
        pytest.param([SET], True, marks=pytest.mark.slow),
        (["import triton", SET], False),
        pytest.param(["import nextquill_kernels.launch", SET], False, marks=pytest.mark.slow),
        ([SET, "import triton", UNSET], True),
        pytest.param([SET, "import nextquill_kernels.launch", UNSET], True, marks=pytest.mark.slow),
    ],
    ids=["never", "before", "after_triton", "after_launch", "until_triton", "until_launch"],
)
def test_interpreted_says_what_the_kernels_are(steps, is_interpreted):
    """Whenever TRITON_INTERPRET is set, all kernels are of one kind, and run or are refused."""
    command = [sys.executable, "-W", "ignore", "-c", IMPORT.format(steps="\n".join(steps))]
    done = subprocess.run(command, env=dict(os.environ), capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    kind, outcome = done.stdout.splitlines()
    assert kind == f"{is_interpreted} {'InterpretedFunction' if is_interpreted else 'JITFunction'}"
    assert outcome == "True" if is_interpreted else outcome.startswith(REFUSED)


@pytest.mark.parametrize(
    ("capability", "target"),
    [
        ((7, 5), "sm_80"),
        ((8, 0), "sm_80"),
        ((8, 6), "sm_80"),
        ((8, 9), "sm_80"),
        ((9, 0), "sm_90"),
        ((10, 0), "sm_100"),
        ((10, 3), "sm_100"),
        ((12, 0), "sm_100"),
    ],
)
def test_target_is_the_nearest_lower_one(capability, target, monkeypatch):
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert target_of(torch.device("cuda")) == target


def test_target_of_other_devices(monkeypatch):
    assert target_of(torch.device("cpu")) == "interpreter"
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert target_of(torch.device("cuda")) == "gfx942"


def test_tensors_on_several_devices_are_refused(device):
    here, elsewhere = torch.empty(1, device=device), torch.empty(1, device="meta")
    check_together(a=here, b=None, c=here)
    with pytest.raises(ValueError, match=r"c: expected a tensor on .* as a, got meta"):
        check_together(a=here, b=None, c=elsewhere)
    with pytest.raises(RuntimeError, match="a: got a tensor on meta"):
        check_together(a=elsewhere, b=elsewhere)


def test_on_device_passes_errors_on(device):
    with pytest.raises(ZeroDivisionError), on_device(torch.empty(1, device=device)):
        _ = 1 / 0


def test_integers():
    assert [cdiv(value, 16) for value in (0, 1, 16, 17)] == [0, 1, 1, 2]
