"""Errors of transformers, peft, safetensors and torch become one typed error that names the damaged file."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from nextquill.data import Record
from nextquill.errors import ArgumentError, CheckpointError, UnsupportedModelError
from nextquill.models.border import check_config, first_line, reading
from nextquill.models.loading import find_tokenizer, load_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model, and an adapter of it."""
    path = tmp_path_factory.mktemp("models")
    model, tokenizer = load_model("tiny", records=lambda: [Record("u", "query", "response")])
    model.save_pretrained(path / "base")
    tokenizer.save_pretrained(path / "base")
    base, _ = load_model(str(path / "base"))
    get_peft_model(base, LoraConfig(r=2, task_type="CAUSAL_LM")).save_pretrained(path / "adapter")
    return path


def changed(path: Path, **fields: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@pytest.mark.parametrize("file", ["adapter_config.json", "adapter_model.safetensors"])
@pytest.mark.parametrize(
    "content", [b"", b"{", b"null", b"[]", bytes(300)], ids=["empty", "cut", "null", "list", "zero"]
)
def test_a_damaged_adapter_names_its_file(folder: Path, tmp_path: Path, file: str, content: bytes) -> None:
    copy = shutil.copytree(folder / "adapter", tmp_path / "copy")
    (copy / file).write_bytes(content)
    for load in (load_model, find_tokenizer) if file == "adapter_config.json" else (load_model,):
        with pytest.raises(UnsupportedModelError, match=f"copy/{file}: ") as caught:
            load(str(copy))
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("fields", [{"hidden_size": "x"}, {"num_attention_heads": -1}, {"rope_parameters": 3}])
def test_a_value_that_no_model_takes_names_the_config(folder: Path, tmp_path: Path, fields: dict[str, Any]) -> None:
    copy = shutil.copytree(folder / "base", tmp_path / "copy")
    changed(copy / "config.json", **fields)
    with pytest.raises(UnsupportedModelError, match=r"cannot load .*copy"):
        load_model(str(copy))


@pytest.mark.parametrize("count", [10**19, 1e300, 5000])
def test_layers_without_end_are_refused_before_they_are_made(folder: Path, tmp_path: Path, count: float) -> None:
    copy = shutil.copytree(folder / "base", tmp_path / "copy")
    changed(copy / "config.json", model_type="qwen2", text_config={"num_hidden_layers": count})
    for load in (load_model, find_tokenizer, check_config):
        with pytest.raises(UnsupportedModelError, match=r"config.json: num_hidden_layers: expected at most 4096, got"):
            load(str(copy))


@pytest.mark.parametrize("damage", ["empty", "cut", "flip", "text"])
def test_an_archive_of_torch_is_named(tmp_path: Path, damage: str) -> None:
    good, path = tmp_path / "a.pt", tmp_path / "optimizer.pt"
    for each in (good, path):
        torch.save({"x": torch.arange(999)}, each)
    data = path.read_bytes()
    middle = len(data) // 2
    flipped = data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]
    path.write_bytes({"empty": b"", "cut": data[:middle], "flip": flipped, "text": b"hello"}[damage])
    with (
        pytest.raises(CheckpointError, match=r"^cannot resume: .*/optimizer\.pt: "),
        reading(tmp_path, "cannot resume", CheckpointError),
    ):
        raise EOFError


def test_other_errors_keep_their_type(tmp_path: Path) -> None:
    for error in (ArgumentError("x"), MemoryError(), torch.OutOfMemoryError()):
        with pytest.raises(type(error)), reading(tmp_path, "what"):
            raise error
    with pytest.raises(UnsupportedModelError, match=r"^what: KeyError: 'x'$"), reading(tmp_path / "none", "what"):
        raise KeyError("x")
    assert first_line(RuntimeError("Error(s) in loading:\n\tsize mismatch\nmore")) == "size mismatch"
    assert first_line(EOFError()) == "EOFError"


def test_a_tokenizer_that_fails_on_use_is_not_loaded(folder: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(folder / "base", tmp_path / "copy")
    changed(copy / "tokenizer_config.json", model_max_length=["x"])
    with pytest.raises(UnsupportedModelError, match=r"cannot load the tokenizer of .*tokenizer_config.json: TypeError"):
        find_tokenizer(str(copy))
