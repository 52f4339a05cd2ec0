"""Every example runs with the command in its docstring, and trains a tiny model."""

from __future__ import annotations

import ast
import importlib.util
import json
import re
import shlex
import sys
from pathlib import Path

import pytest
from example_helpers import ENGINES_ON_CPU, ROOT, WATCHES_DDP, distance, losses, parameters, run

EXAMPLES = ROOT / "examples"


def command(example: str, model: Path, output: Path) -> list[str]:
    """The command in an example's docstring, with this model, its records and this output folder."""
    docstring = ast.get_docstring(ast.parse((EXAMPLES / example).read_text())) or ""
    line = re.search(r"^(python|accelerate launch) (.*\\\n)*.*$", docstring, re.MULTILINE)
    assert line is not None, f"{example}: no command in its docstring"
    words = shlex.split(line.group().replace("\\\n", " "))
    for flag, value in (("--model", model), ("--train_file", model / "train.jsonl"), ("--output_dir", output)):
        words[words.index(flag) + 1] = str(value)
    programs = {"python": [sys.executable], "accelerate": [sys.executable, "-m", "accelerate.commands.accelerate_cli"]}
    return [*programs[words[0]], *words[1:]]


@pytest.mark.parametrize("example", sorted(path.name for path in EXAMPLES.glob("*.py")))
def test_an_example_fits_on_a_page(example: str) -> None:
    assert len((EXAMPLES / example).read_text().splitlines()) <= 60


@pytest.mark.slow
def test_plain_loop(model_folder: Path, tmp_path: Path) -> None:
    printed = run([*command("plain_loop.py", model_folder, tmp_path / "out"), "--learning_rate", "1e-3"])
    assert len(losses(printed)) == 3, "24 examples are three batches"
    assert distance(model_folder, tmp_path / "out") > 1e-4


@pytest.mark.slow
def test_trl(model_folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("trl")
    words = command("trl_sft.py", model_folder, tmp_path / "out")
    extra = ["--logging_steps", "1", "--max_steps", "2", "--learning_rate", "1e-2", "--report_to", "none"]
    printed = run([*words, *extra])
    assert len(losses(printed)) >= 2
    adapted = {name: p for name, p in parameters(tmp_path / "out").items() if "lora_B" in name}
    assert adapted, "no adapter was saved"
    assert all(float(p.abs().max()) > 0 for p in adapted.values()), "B starts at zero"


# ---- Accelerate: the same global batches on one process and on two -----------------------------------


@pytest.fixture(scope="module")
def one_process(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[float]]:
    """The model and the losses after three batches of 8 on one process."""
    output = tmp_path_factory.mktemp("one") / "out"
    words = command("accelerate_loop.py", model_folder, output)
    script = words.index("examples/accelerate_loop.py")
    printed = run([sys.executable, *words[script:], "--learning_rate", "1e-3"], ACCELERATE_USE_CPU="true")
    assert distance(model_folder, output) > 1e-4
    return output, losses(printed)


def two_processes(model: Path, output: Path, configuration: str, *, shim: str, **environment: str) -> list[float]:
    """Losses of `accelerate launch` with batches of 4 on each of two processes, in float32."""
    words = command("accelerate_loop.py", model, output)
    words[words.index("--config_file") + 1] = f"examples/configs/{configuration}.yaml"
    script = words.index("examples/accelerate_loop.py")
    # DeepSpeed's precision is in its own file, whose "auto" the launcher's default fills.
    options = ["--num_processes", "2", *([] if configuration == "zero3" else ["--mixed_precision", "no"])]
    words[script:script] = [*options, shim]
    printed = run([*words, "--learning_rate", "1e-3", "--batch_size", "4"], **environment)
    return losses(printed)


def check_equal(alone: tuple[Path, list[float]], output: Path, seen: list[float]) -> None:
    assert seen == pytest.approx(alone[1], abs=2e-4), "losses are printed with four digits"
    assert distance(alone[0], output) <= 1e-5


@pytest.mark.slow
def test_accelerate_under_ddp(model_folder: Path, one_process: tuple[Path, list[float]], tmp_path: Path) -> None:
    seen = two_processes(model_folder, tmp_path / "out", "ddp", shim=WATCHES_DDP, ACCELERATE_USE_CPU="true")
    check_equal(one_process, tmp_path / "out", seen)


@pytest.mark.slow
def test_accelerate_under_fsdp2(model_folder: Path, one_process: tuple[Path, list[float]], tmp_path: Path) -> None:
    seen = two_processes(model_folder, tmp_path / "out", "fsdp2", shim=ENGINES_ON_CPU)
    check_equal(one_process, tmp_path / "out", seen)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="needs deepspeed")
def test_accelerate_under_zero3(model_folder: Path, one_process: tuple[Path, list[float]], tmp_path: Path) -> None:
    seen = two_processes(model_folder, tmp_path / "out", "zero3", shim=ENGINES_ON_CPU, DS_ACCELERATOR="cpu")
    check_equal(one_process, tmp_path / "out", seen)
