"""The shipped configurations: Accelerate reads them, and the commands give the same as one process with each.

The tests use two processes, evaluation, runs of a user's examples, and a token budget that divides the second process's
first batch into more parts than the first's.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from example_helpers import ENGINES_ON_CPU, ROOT, WATCHES_DDP, distance, losses, run
from safetensors.torch import load_file

CONFIGS = ROOT / "examples" / "configs"
COMMAND = ["-m", "nextquill.cli.main", "train"]
ACCELERATE = [sys.executable, "-m", "accelerate.commands.launch", "--config_file"]
FLOAT32 = ["--mixed_precision", "no"]
LAUNCHES: dict[str, list[str]] = {
    "torchrun": [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", WATCHES_DDP],
    "ddp": [*ACCELERATE, "examples/configs/ddp.yaml", *FLOAT32, WATCHES_DDP],
    "fsdp2": [*ACCELERATE, "examples/configs/fsdp2.yaml", *FLOAT32, ENGINES_ON_CPU],
    "zero3": [*ACCELERATE, "examples/configs/zero3.yaml", ENGINES_ON_CPU],
}
NEEDS_DEEPSPEED = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="needs deepspeed")


@pytest.mark.parametrize("name", sorted(path.name for path in CONFIGS.glob("*.yaml")))
def test_accelerate_reads_a_configuration(name: str) -> None:
    raw = yaml.safe_load((CONFIGS / name).read_text())
    config = load_config_from_file(str(CONFIGS / name))
    assert config.distributed_type == raw["distributed_type"]
    assert config.num_processes == 2
    files = [value for value in (raw.get("deepspeed_config") or {}).values() if str(value).endswith(".json")]
    for file in files:
        assert json.loads((ROOT / file).read_text())["zero_optimization"]["stage"] == 3


def train(model: Path, output: Path, launch: list[str], batch_size: int, *more: str, **environment: str) -> list[float]:
    options = {
        "model_name_or_path": model, "train_file": model / "train.jsonl", "eval_file": model / "eval.jsonl",
        "output_dir": output, "max_steps": 2, "logging_steps": 1, "eval_strategy": "steps", "eval_steps": 1,
        "save_strategy": "steps", "save_steps": 1, "per_device_train_batch_size": batch_size,
        "per_device_eval_batch_size": 2, "learning_rate": 1e-3, "loss": "nextquill", "detach_counterfactual": "false",
        "max_tokens": 50, "examples_per_user": 2,
    }  # fmt: skip
    flags = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    return losses(run([*launch, *COMMAND, *flags, "--debug", *more], **environment))


@pytest.fixture(scope="module")
def one_process(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[float]]:
    output = tmp_path_factory.mktemp("one") / "out"
    seen = train(model_folder, output, [sys.executable], 8, "--use_cpu")
    assert distance(model_folder, output) > 1e-4
    return output, seen


def evaluation(folder: Path) -> dict[str, Any]:
    metrics = json.loads((folder / "metrics.json").read_text())["eval"]
    return {name: value for name, value in metrics.items() if not name.endswith(("runtime", "per_second"))}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["torchrun", "ddp", "fsdp2", pytest.param("zero3", marks=NEEDS_DEEPSPEED)])
def test_the_command_trains_as_one_process(
    name: str, model_folder: Path, one_process: tuple[Path, list[float]], tmp_path: Path
) -> None:
    on_cpu = ["--use_cpu"] if name in ("torchrun", "ddp") else []
    environment = {"DS_ACCELERATOR": "cpu"} if name == "zero3" else {"ACCELERATE_USE_CPU": str(bool(on_cpu)).lower()}
    seen = train(model_folder, tmp_path / "out", LAUNCHES[name], 4, *on_cpu, **environment)
    assert seen == pytest.approx(one_process[1], abs=2e-4), "losses are printed with four digits"
    assert distance(one_process[0], tmp_path / "out") <= 1e-5
    assert evaluation(tmp_path / "out") == pytest.approx(evaluation(one_process[0]), rel=1e-4, abs=1e-5)


@pytest.mark.slow
def test_fsdp2_resumes_exactly(model_folder: Path, one_process: tuple[Path, list[float]], tmp_path: Path) -> None:
    output = tmp_path / "out"
    train(model_folder, output, LAUNCHES["fsdp2"], 4)
    first = (output / "model.safetensors").read_bytes()
    for path in sorted((output / "checkpoint-2").iterdir()):
        path.unlink()
    (output / "checkpoint-2").rmdir()
    (output / "model.safetensors").unlink()
    train(model_folder, output, LAUNCHES["fsdp2"], 4, "--resume_from_checkpoint", "true")
    assert (output / "model.safetensors").read_bytes() == first


SYSTEMS = {
    "mirror": ("train", "--loss", "mirror_f", "--max_new_tokens", "5"),
    "popi": ("popi", "train", "--max_summary_tokens", "5", "--group_size", "2", "--lora_r", "2"),
}


def sample_and_train(system: str, model: Path, output: Path, launch: list[str], size: int, *more: str) -> Path:
    """Train two steps of a system that samples; the file of what is trained."""
    records = [json.loads(line) for line in (model / "train.jsonl").read_text().splitlines()]
    pairs = [{**each, "chosen": each["response"], "rejected": "w1 w2"} for each in records]
    (model / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    options = {
        "model_name_or_path": model, "train_file": model / "pairs.jsonl", "output_dir": output, "max_steps": 2,
        "logging_steps": 1, "per_device_train_batch_size": size, "learning_rate": 1e-3,
    }  # fmt: skip
    flags = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    words = [*launch, "-m", "nextquill.cli.main", *SYSTEMS[system], *flags, "--debug", *more]
    run(words, ACCELERATE_USE_CPU=str(bool(more)).lower())
    return output / ("model.safetensors" if system == "mirror" else "inference/adapter_model.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize("system", SYSTEMS)
def test_fsdp2_trains_the_systems_that_sample_as_one_process(system: str, model_folder: Path, tmp_path: Path) -> None:
    one = sample_and_train(system, model_folder, tmp_path / "one", [sys.executable], 4, "--use_cpu")
    two = sample_and_train(system, model_folder, tmp_path / "two", LAUNCHES["fsdp2"], 2)
    expected, got = load_file(one), load_file(two)
    assert all(float((got[key] - value).abs().max()) <= 1e-5 for key, value in expected.items())
