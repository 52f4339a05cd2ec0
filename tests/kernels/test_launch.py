"""Kernels run on the right devices, and take their tiles for them."""

from __future__ import annotations

import os
import subprocess
import sys
from types import SimpleNamespace

import numpy
import pytest
import torch
import triton
from nextquill_kernels import launch, stream
from nextquill_kernels.launch import INTERPRETED, cdiv, check_together, on_device, target_of
from nextquill_kernels.tiles import FAMILIES, PORTABLE, lookup


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
# Its interpreter gives `range` bounds that are arrays, which NumPy 2.4 no longer turns into integers.
NUMPY = [int(part) for part in numpy.__version__.split(".")[:2]]
BROKEN_INTERPRETER = triton.__version__.startswith("3.6.") and NUMPY >= [2, 4]
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
    if is_interpreted and BROKEN_INTERPRETER:
        pytest.skip("triton 3.6 interprets no loop with run-time bounds under NumPy 2.4 or newer")
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
        ((11, 0), "sm_80"),
        ((12, 0), "sm_80"),
        ((12, 1), "sm_80"),
    ],
)
def test_target_is_one_whose_instructions_the_gpu_has(capability, target, monkeypatch):
    fake_gpu(monkeypatch, capability=capability)
    assert target_of(torch.device("cuda")) == target


def fake_gpu(monkeypatch, capability=None, arch=None, memory=227 * 1024):
    properties = SimpleNamespace(gcnArchName=arch, shared_memory_per_block_optin=memory, shared_memory_per_block=49152)
    monkeypatch.setattr(torch.version, "hip", None if arch is None else "6.4")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A new GPU")
    launch.warn_portable.cache_clear()


def test_target_of_other_devices(monkeypatch):
    assert target_of(torch.device("cpu")) == "interpreter"
    for arch in ("gfx942:sramecc+:xnack-", "gfx950"):
        fake_gpu(monkeypatch, arch=arch)
        assert target_of(torch.device("cuda")) == "gfx942"


@pytest.mark.parametrize(
    ("gpu", "name"),
    [({"capability": (13, 0)}, "sm_130"), ({"arch": "gfx1100"}, "gfx1100"), ({"arch": "gfx90a:xnack-"}, "gfx90a")],
    ids=lambda value: str(value),
)
def test_an_unknown_gpu_gets_portable_tiles_and_one_warning(gpu, name, monkeypatch):
    fake_gpu(monkeypatch, **gpu)
    with pytest.warns(RuntimeWarning, match=f"A new GPU: its architecture, {name}, is not known") as caught:
        targets = {target_of(torch.device("cuda")) for _ in range(3)}
    assert targets == {"portable"}
    assert len(caught) == 1
    for family in FAMILIES:
        assert lookup(family, "portable", torch.float32, 4096) == PORTABLE


class FakeWeight(SimpleNamespace):
    """What the launcher reads of W to choose a tile."""

    dtype, shape, device = torch.bfloat16, (151936, 4096), torch.device("cuda")

    def __init__(self, row=4096):
        super().__init__(row=row)

    def stride(self, dimension):
        return (self.row, 1)[dimension]

    def data_ptr(self):
        return 0

    def element_size(self):
        return 2


@pytest.mark.parametrize("row", [4096, 4097], ids=["aligned", "unaligned"])
@pytest.mark.parametrize("streams", [1, 2])
@pytest.mark.parametrize("capability", [(8, 6), (8, 9), (12, 0), (12, 1)])
def test_a_gpu_with_99_kib_gets_a_tile_that_fits_it(capability, streams, row, monkeypatch):
    fake_gpu(monkeypatch, capability, memory=101376)
    tile = stream._tile_for(FakeWeight(row), streams)
    assert tile.num_stages >= 2
    assert tile.num_stages * (tile.block_n + tile.block_v) * tile.block_d * 2 <= 101376
    assert not tile.descriptors


def test_a_gpu_with_too_little_memory_gets_the_portable_tile_and_one_warning(monkeypatch):
    fake_gpu(monkeypatch, (8, 0), memory=40 * 1024)
    with pytest.warns(RuntimeWarning, match="A new GPU: a program may use only 40960 bytes") as caught:
        tiles = {stream._tile_for(FakeWeight(), streams) for streams in (1, 2, 1)}
    assert tiles == {PORTABLE}
    assert len(caught) == 1


@pytest.mark.parametrize(
    "gpu", [{"capability": (9, 0)}, {"arch": "gfx942", "memory": 64 * 1024}], ids=["sm_90", "gfx942"]
)
def test_a_gpu_of_the_table_gets_its_own_tile_unchanged(gpu, monkeypatch):
    fake_gpu(monkeypatch, **gpu)
    target = target_of(torch.device("cuda"))
    assert stream._tile_for(FakeWeight(), 2) == lookup("pair", target, torch.bfloat16, 4096)


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
