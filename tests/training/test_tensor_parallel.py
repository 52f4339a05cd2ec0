"""Two gloo processes that share a model by transformers' `tp_plan` against one: the plain loop and the trainer.

All cases share one launch, because a launch takes ten seconds.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import multiprocessing

from tests.training.tensor_parallel_worker import (
    CASES,
    PROCESSES,
    TRAINED,
    train,
    train_mirror,
    work,
    work_with_fsdp,
)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("divided")
    multiprocessing.start_processes(work, (str(folder),), nprocs=PROCESSES, start_method="spawn")
    return folder


def found(folder: Path, rank: int) -> dict[str, Any]:
    result: dict[str, Any] = json.loads((folder / f"found_{rank}.json").read_text())
    return result


@pytest.mark.parametrize("name", CASES)
def test_loss_and_gradients_of_two_processes_equal_one(name: str, folder: Path) -> None:
    bound = 1e-5 if CASES[name].options["dtype"] == torch.float32 else 1e-9
    for rank in range(PROCESSES):
        measured = found(folder, rank)[name]
        assert measured["loss"] <= bound
        assert measured["error"] <= bound, f"gradient on rank {rank} is off by {measured['error']:.1e} of the largest"
        assert measured["norm"] > 0


def test_loss_and_gradients_under_fsdp_too(tmp_path: Path) -> None:
    """Four processes equal one: two pairs with other examples, of which each shares a model."""
    multiprocessing.start_processes(work_with_fsdp, (str(tmp_path),), nprocs=2 * PROCESSES, start_method="spawn")
    for rank in range(2 * PROCESSES):
        for name, measured in found(tmp_path, rank).items():
            assert measured["loss"] <= 1e-6, name
            assert measured["error"] <= 1e-6, f"{name}: rank {rank} is off by {measured['error']:.1e} of the largest"


REFUSED = {
    "refusal": "UnsupportedModelError: output embedding: expected LoRA for 96 tokens, got 48: PEFT does not adapt a",
    "best": "ArgumentError: args.load_best_model_at_end: True is not supported for a model that was loaded in parts",
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_work_is_refused_on_every_process(name: str, folder: Path) -> None:
    for rank in range(PROCESSES):
        assert found(folder, rank)[name].startswith(REFUSED[name])


# What depends on the clock.
_OTHERWISE = ("runtime", "per_second")


@pytest.mark.parametrize("name", TRAINED)
def test_trainer_on_two_processes_equals_one(name: str, folder: Path, tmp_path: Path) -> None:
    """Parameters after two steps, logs with their counts, evaluation, scores and the saved model."""
    train(tmp_path, name)
    expected = torch.load(tmp_path / "parameters_0.pt")
    alone = json.loads((tmp_path / "log_0.json").read_text())
    for rank in range(PROCESSES):
        got = torch.load(folder / name / f"parameters_{rank}.pt")
        assert got.keys() == expected.keys()
        for key, parameter in expected.items():
            assert float((got[key] - parameter).abs().max()) <= 1e-5, key
        both = json.loads((folder / name / f"log_{rank}.json").read_text())
        assert both["scores"] == pytest.approx(alone["scores"], rel=1e-4)
        for own, wanted in zip(both["log"], alone["log"], strict=True):
            kept = {key: value for key, value in wanted.items() if not key.endswith(_OTHERWISE)}
            assert {key: own[key] for key in kept} == pytest.approx(kept, rel=1e-4, abs=1e-6)
    assert (folder / name / "checkpoint-2" / "model.safetensors").stat().st_size > 0


def test_mirror_on_two_processes_equals_one(folder: Path, tmp_path: Path) -> None:
    """Parameters after two steps, and the same responses, which each process samples."""
    train_mirror(tmp_path)
    expected, alone = torch.load(tmp_path / "parameters_0.pt"), json.loads((tmp_path / "log_0.json").read_text())
    for rank in range(PROCESSES):
        got = torch.load(folder / "mirror" / f"parameters_{rank}.pt")
        assert got.keys() == expected.keys()
        assert max(float((got[key] - parameter).abs().max()) for key, parameter in expected.items()) <= 1e-5
        both = json.loads((folder / "mirror" / f"log_{rank}.json").read_text())
        for ours, theirs in zip(both[:2], alone[:2], strict=True):
            for name in ("loss_factual", "loss_effect", "response_variety"):
                assert ours[name] == pytest.approx(theirs[name], rel=1e-5)
