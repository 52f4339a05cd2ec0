"""Every example runs as its docstring says, on a tiny model, and trains it."""

from __future__ import annotations

import ast
import importlib.util
import json
import math
import os
import random
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
ENGINES = Path(__file__).parent / "engines_on_cpu.py"
TIMEOUT = 200


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random two-layer model with tied embeddings, its tokenizer, and 24 records of four users."""
    folder = tmp_path_factory.mktemp("model")
    words = ["<pad>", "</s>", "<unk>", *(f"w{i}" for i in range(60))]
    words += "Past reviews : Write a review None #".split()
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    named = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>", "clean_up_tokenization_spaces": False}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **named).save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(words), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=2048, tie_word_embeddings=True, initializer_range=0.1,
        pad_token_id=0, bos_token_id=1, eos_token_id=1,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    rng = random.Random(0)

    def text(user: int, longest: int) -> str:
        return " ".join(f"w{10 * user + rng.randrange(10)}" for _ in range(rng.randint(1, longest)))

    records = [
        {"user_id": f"u{i % 4}", "query": text(5, 3), "history": [text(i % 4, 5)], "response": text(i % 4, 8)}
        for i in range(24)
    ]
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, records)))
    return folder


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


def run(words: list[str], **environment: str) -> str:
    """What the command printed."""
    told = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "WANDB_DISABLED": "true", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        words, cwd=ROOT, env={**os.environ, **told, **environment}, capture_output=True, text=True, check=False,
        timeout=TIMEOUT + 30,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-9000:]
    return done.stdout + done.stderr


def losses(printed: str) -> list[float]:
    found = [float(value) for value in re.findall(r"\bloss'?:? '?(\S+?)'?[,\s}]", printed)]
    assert all(map(math.isfinite, found)), f"losses of {found}"
    return found


def parameters(folder: Path) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in AutoModelForCausalLM.from_pretrained(folder).named_parameters()}


def distance(first: Path, second: Path) -> float:
    """The largest difference of a parameter between two saved models."""
    one, two = parameters(first), parameters(second)
    assert one.keys() == two.keys()
    return max(float((one[name] - two[name]).abs().max()) for name in one)


@pytest.mark.parametrize("example", sorted(path.name for path in EXAMPLES.glob("*.py")))
def test_an_example_fits_on_a_page(example: str) -> None:
    assert len((EXAMPLES / example).read_text().splitlines()) <= 60


def test_plain_loop(model_folder: Path, tmp_path: Path) -> None:
    printed = run([*command("plain_loop.py", model_folder, tmp_path / "out"), "--learning_rate", "1e-3"])
    assert len(losses(printed)) == 3, "24 examples are three batches"
    assert distance(model_folder, tmp_path / "out") > 1e-4


def test_trl(model_folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("trl")
    words = command("trl_sft.py", model_folder, tmp_path / "out")
    extra = ["--logging_steps", "1", "--max_steps", "2", "--learning_rate", "1e-2", "--report_to", "none"]
    printed = run([*words, *extra, "--use_cpu"])
    assert len(losses(printed)) >= 2
    adapted = {name: p for name, p in parameters(tmp_path / "out").items() if "lora_B" in name}
    assert adapted, "no adapter was saved"
    assert all(float(p.abs().max()) > 0 for p in adapted.values()), "B starts at zero"


# ---- Accelerate: the same global batches on one process and on two -----------------------------------


@pytest.fixture(scope="module")
def one_process(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[float]]:
    """The model that three batches of 8 on one process make, and their losses."""
    output = tmp_path_factory.mktemp("one") / "out"
    words = command("accelerate_loop.py", model_folder, output)
    script = words.index("examples/accelerate_loop.py")
    printed = run([sys.executable, *words[script:], "--learning_rate", "1e-3"], ACCELERATE_USE_CPU="true")
    assert distance(model_folder, output) > 1e-4
    return output, losses(printed)


def two_processes(model: Path, output: Path, configuration: str, *, shim: bool, **environment: str) -> list[float]:
    """Losses of `accelerate launch` with batches of 4 on each of two processes, in float32."""
    words = command("accelerate_loop.py", model, output)
    words[words.index("--config_file") + 1] = f"examples/configs/{configuration}.yaml"
    script = words.index("examples/accelerate_loop.py")
    # DeepSpeed's precision is in its own file, whose "auto" the launcher's default fills.
    options = ["--num_processes", "2", *([] if configuration == "zero3" else ["--mixed_precision", "no"])]
    words[script:script] = [*options, *([str(ENGINES)] if shim else [])]
    printed = run([*words, "--learning_rate", "1e-3", "--batch_size", "4"], **environment)
    return losses(printed)


def check_equal(alone: tuple[Path, list[float]], output: Path, seen: list[float]) -> None:
    assert seen == pytest.approx(alone[1], abs=2e-4), "losses are printed with four digits"
    assert distance(alone[0], output) <= 1e-5


def test_accelerate_under_ddp(model_folder: Path, one_process: tuple[Path, list[float]], tmp_path: Path) -> None:
    seen = two_processes(model_folder, tmp_path / "out", "ddp", shim=False, ACCELERATE_USE_CPU="true")
    check_equal(one_process, tmp_path / "out", seen)


@pytest.mark.slow
def test_accelerate_under_fsdp2(model_folder: Path, one_process: tuple[Path, list[float]], tmp_path: Path) -> None:
    seen = two_processes(
        model_folder, tmp_path / "out", "fsdp2", shim=True, NEXTQUILL_TEST_TIMEOUT=str(TIMEOUT)
    )  # fmt: skip
    check_equal(one_process, tmp_path / "out", seen)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="needs deepspeed")
def test_accelerate_under_zero3(model_folder: Path, one_process: tuple[Path, list[float]], tmp_path: Path) -> None:
    seen = two_processes(
        model_folder, tmp_path / "out", "zero3", shim=True, DS_ACCELERATOR="cpu", NEXTQUILL_TEST_TIMEOUT=str(TIMEOUT)
    )
    check_equal(one_process, tmp_path / "out", seen)
