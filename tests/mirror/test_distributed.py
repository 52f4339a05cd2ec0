"""Two processes learn what one learns: DDP in the trainer, with sampling, and FSDP2 around the loss."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.distributed.fsdp import CPUOffloadPolicy
from transformers import Trainer

from nextquill.errors import ArgumentError
from nextquill.training import checks
from tests.mirror.distributed_worker import train
from tests.mirror.mirror_helpers import Fixed, make_trainer
from tests.models.model_helpers import logs_of, parameters, tiny_model
from tests.processes import run_to_end

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT = 150


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run on two processes."""
    folder = tmp_path_factory.mktemp("two")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    told = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "NEXTQUILL_TEST_TIMEOUT": str(TIMEOUT)}
    words = [*launch, str(Path(__file__).parent / "distributed_worker.py"), str(folder)]
    run_to_end(words, timeout=TIMEOUT + 30, **told)
    return folder


@pytest.fixture(scope="module")
def results(folder: Path) -> list[dict[str, Any]]:
    return [torch.load(folder / f"result_{rank}.pt") for rank in range(2)]


@pytest.mark.slow
def test_two_processes_train_what_one_does(
    folder: Path, results: list[dict[str, Any]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    """The same samples, weights, logs and running means; each process logs its own users' samples."""
    alone = tmp_path_factory.mktemp("one")
    one, start = train(alone, processes=1), tiny_model().double().state_dict()
    for result in results:
        for name, want in parameters(one).items():
            moved = (want - start[name]).abs().max()
            assert (result["weights"][name] - want).abs().max() <= 1e-5 * moved, name
        assert result["means"] == pytest.approx(one.term_means.sums, rel=1e-6)
    assert results[0]["means"] == results[1]["means"]
    logged = [log for log in results[0]["logs"] if "loss_factual" in log]
    for ours, theirs in zip(logs_of(one), logged, strict=False):
        for name in ("loss", "loss_factual", "loss_effect", "nll_factual", "response_tokens", "responses_unfinished"):
            assert theirs[name] == pytest.approx(ours[name], rel=1e-5, abs=1e-9), name
    name = "sampled_responses"
    both = [line for path in folder.glob(f"{name}*.jsonl") for line in path.read_text().splitlines()]
    assert len(list(folder.glob(f"{name}*.jsonl"))) == 2
    assert sorted(both) == sorted((alone / f"{name}.jsonl").read_text().splitlines())


@pytest.mark.slow
def test_sharded_gradients_equal_those_of_one_process(results: list[dict[str, Any]]) -> None:
    for result in results:
        largest = max(float(each.norm()) for each in result["expected"].values())
        for name, want in result["expected"].items():
            assert float((result["sharded"][name] - want).norm()) <= 1e-6 * largest, name


OFFLOADED = SimpleNamespace(fsdp_version=2, cpu_offload=CPUOffloadPolicy())


@pytest.mark.parametrize(
    ("engine", "plugin", "why"),
    [
        ("deepspeed", None, "under DeepSpeed processes with different numbers of forwards would wait"),
        ("fsdp", SimpleNamespace(fsdp_version=1), "FSDP1 gathers weights only in the forward of its own wrapper"),
        ("fsdp", OFFLOADED, "with cpu_offload the weights are on another device"),
    ],
    ids=["deepspeed", "fsdp1", "offload"],
)
def test_engines_under_which_a_model_cannot_sample_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, engine: str, plugin: Any, why: str
) -> None:
    original = Trainer.create_accelerator_and_postprocess

    def sharded(self: Any) -> None:
        original(self)
        setattr(self, f"is_{engine}_enabled", True)

    monkeypatch.setattr(Trainer, "create_accelerator_and_postprocess", sharded)
    monkeypatch.setattr(checks, "fsdp_plugin", lambda _: plugin)
    with pytest.raises(ArgumentError, match=f"rollouts: expected some that do not run the model, .*{why}"):
        make_trainer(tmp_path)
    make_trainer(tmp_path, rollouts=Fixed())
