"""A folder is whole or its damaged file is named."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from nextquill.storage.manifests import MANIFEST, damage, has_manifest, write_manifest


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "weights.bin").write_bytes(bytes(range(200)))
    (tmp_path / "empty.txt").touch()
    (tmp_path / "state.json").write_text(json.dumps({"step": 3, "log": [1, 2]}))
    torch.save({"m": torch.arange(30.0), "lr": 0.1}, tmp_path / "optimizer.pt")
    write_manifest(tmp_path, {"state.json": ["log"]})
    return tmp_path


def test_a_whole_folder(folder: Path) -> None:
    assert has_manifest(folder)
    assert damage(folder) is None
    (folder / "more.txt").write_text("added later")
    (folder / "state.json").write_text(json.dumps({"log": [9], "step": 3}, indent=1))
    assert damage(folder) is None, "other files and the log may change"


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


SPOILT: dict[str, tuple[Callable[[Path], Any], str]] = {
    "flipped": (lambda folder: flip(folder / "inner" / "weights.bin"), "inner/weights.bin is damaged or was changed"),
    "cut": (
        lambda folder: (folder / "inner" / "weights.bin").write_bytes(b"1"),
        "inner/weights.bin is damaged: expected 200 bytes, got 1",
    ),
    "missing": (lambda folder: (folder / "empty.txt").unlink(), "empty.txt is missing"),
    "edited": (
        lambda folder: (folder / "state.json").write_text(json.dumps({"step": 4, "log": [1, 2]})),
        "state.json is damaged or was changed",
    ),
    "no json": (lambda folder: (folder / "state.json").write_text("{"), "state.json: not valid JSON"),
    "manifest emptied": (lambda folder: (folder / MANIFEST).write_text("{}"), f"{MANIFEST} is damaged"),
    "manifest cut": (lambda folder: (folder / MANIFEST).write_text("{"), f"{MANIFEST}: not valid JSON"),
    "manifest of another form": (lambda folder: (folder / MANIFEST).write_text('{"files": {"a": 1}}'), "a is missing"),
}


@pytest.mark.parametrize("name", SPOILT)
def test_damage_is_named(folder: Path, name: str) -> None:
    spoil, message = SPOILT[name]
    spoil(folder)
    assert message in (damage(folder) or "")


def test_a_flipped_bit_of_a_torch_file_is_found_or_changes_nothing(folder: Path) -> None:
    """The padding between tensors, and headers that torch does not read, may change."""
    path, draw = folder / "optimizer.pt", random.Random(0)
    content, whole = path.read_bytes(), torch.load(path)
    places = [*range(len(content) - 300, len(content), 7), *draw.sample(range(len(content)), 60)]
    found = 0
    for place in places:
        path.write_bytes(content[:place] + bytes([content[place] ^ 1 << draw.randrange(8)]) + content[place + 1 :])
        if damage(folder) is not None:
            found += 1
            continue
        loaded = torch.load(path)
        assert torch.equal(loaded["m"], whole["m"])
        assert loaded["lr"] == whole["lr"]
    assert found > 50
    values = content.index(torch.arange(30.0).numpy().tobytes())
    path.write_bytes(content[: values + 9] + bytes([content[values + 9] ^ 1]) + content[values + 10 :])
    assert damage(folder) is not None


def test_a_torch_file_without_check_sums_is_read_whole(folder: Path) -> None:
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"m": torch.arange(30.0)}, folder / "optimizer.pt")
        write_manifest(folder)
        assert damage(folder) is None
        flip(folder / "optimizer.pt")
        assert damage(folder) is not None
    finally:
        torch.serialization.set_crc32_options(True)
