"""The hint for huge pages reaches the kernel for large CPU buffers, and changes nothing else."""

import re
import sys
from pathlib import Path

import pytest
import torch

from nextquill.ops import huge_pages

SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def flags_at(address):
    """The flags of the mapping that holds `address`, from the process's table of mappings."""
    inside = False
    for line in Path("/proc/self/smaps").read_text(encoding="utf-8").splitlines():
        if bounds := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(bounds[1], 16) <= address < int(bounds[2], 16)
        elif inside and line.startswith("VmFlags:"):
            return line.split()[1:]
    return []


@pytest.mark.skipif(sys.platform != "linux" or not SETTING.exists(), reason="no huge pages to ask for")
def test_a_large_buffer_is_advised_and_holds_what_is_written():
    buffer = torch.empty(6 * 2**20)
    huge_pages.advise(buffer)
    assert "hg" in flags_at(buffer.data_ptr() + 4 * 2**20)
    buffer.fill_(3.0)
    assert bool((buffer == 3.0).all())


@pytest.mark.parametrize("size", [0, 1, 1000])
def test_a_small_buffer_is_left_alone(size, monkeypatch):
    monkeypatch.setattr(huge_pages, "_madvise", lambda: pytest.fail("asked"))
    huge_pages.advise(torch.empty(size))


def test_where_there_is_no_such_call_nothing_happens(monkeypatch):
    monkeypatch.setattr(huge_pages, "_madvise", lambda: None)
    huge_pages.advise(torch.empty(4 * 2**20))
