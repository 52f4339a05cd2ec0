"""Code in a model folder never runs, and nothing asks whether it may."""

from __future__ import annotations

import ast
import io
import json
import sys
from pathlib import Path

import pytest
from transformers import AutoConfig

from nextquill.data import Record
from nextquill.errors import UnsupportedModelError
from nextquill.models.loading import find_tokenizer, load_model
from nextquill.models.pretrained import from_pretrained

ROOT = Path(__file__).resolve().parents[2]
CODE = """\
import pathlib
pathlib.Path({mark!r}).touch()
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
class Config(LlamaConfig):
    model_type = "coded"
class Model(LlamaForCausalLM):
    config_class = Config
class Tokenizer(PreTrainedTokenizerFast):
    pass
"""
CODED = {
    "config": ("config.json", {"model_type": "coded", "auto_map": {"AutoConfig": "coded.Config"}}),
    "model": (
        "config.json",
        {"model_type": "coded", "auto_map": {"AutoConfig": "coded.Config", "AutoModelForCausalLM": "coded.Model"}},
    ),
    "tokenizer": (
        "tokenizer_config.json",
        {"tokenizer_class": "Coded", "auto_map": {"AutoTokenizer": [None, "coded.Tokenizer"]}},
    ),
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A tiny model whose folder has code, and a standard input full of `y`."""
    model, tokenizer = load_model("tiny", records=lambda: [Record("u", "query", "response")])
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "coded.py").write_text(CODE.format(mark=str(tmp_path / "ran")))
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 100))
    yield tmp_path / "model"
    assert not (tmp_path / "ran").exists(), "the code ran"
    assert sys.stdin.tell() == 0, "standard input was read"


@pytest.mark.parametrize(("file", "change"), CODED.values(), ids=CODED.keys())
def test_a_folder_that_needs_its_code_is_refused(folder, file, change):
    path = folder / file
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    refused = rf"^model_name_or_path: {folder} .*code in a model folder is not run$"
    with pytest.raises(UnsupportedModelError, match=refused):
        load_model(str(folder))
    with pytest.raises(UnsupportedModelError, match=refused):
        from_pretrained(AutoConfig, str(folder)) if file == "config.json" else find_tokenizer(str(folder))


def test_code_beside_a_known_model_is_left_alone(folder):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"auto_map": {"AutoModelForCausalLM": "coded.Model"}}))
    (folder / "custom_generate").mkdir()
    (folder / "coded.py").rename(folder / "custom_generate" / "generate.py")
    assert type(load_model(str(folder))[0]).__module__.startswith("transformers.models.")


def test_transformers_loads_through_one_function():
    """PEFT's classes, which run no code of a folder, are named where they are used."""
    found = set()
    for path in (each for part in ("nextquill", "demos") for each in sorted((ROOT / part).rglob("*.py"))):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            named = isinstance(node, ast.Attribute) and node.attr == "from_pretrained"
            if named and ast.unparse(node.value) not in ("PeftModel", "PeftConfig"):
                found.add(path.relative_to(ROOT).as_posix())
            if isinstance(node, ast.Constant) and node.value in ("from_pretrained", "trust_remote_code"):
                found.add(path.relative_to(ROOT).as_posix())
    assert found == {"nextquill/models/pretrained.py"}
