"""MIRROR under FSDP2: two processes sample with sharded weights and learn what one process does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from tests.mirror.sharded_worker import CASES, build, make
from tests.models.model_helpers import logs_of, tiny_model
from tests.sharding import TIMEOUT, found, run_two, trained

pytestmark = [pytest.mark.slow, pytest.mark.timeout(TIMEOUT + 60)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of runs on two processes."""
    folder = tmp_path_factory.mktemp("two")
    run_two(Path(__file__).parent / "sharded_worker.py", folder)
    return folder


@pytest.mark.parametrize("case", CASES)
def test_two_processes_learn_what_one_does(case: str, folder: Path, tmp_path: Path) -> None:
    one = make(tmp_path, case, 1)
    one.train()
    start = dict(build(case).named_parameters())
    for rank in range(2):
        got = found(folder, rank)[case]
        for name, want in trained(one.model).items():
            moved = (want - start[name].detach()).abs().max()
            assert (got["weights"][name] - want).abs().max() <= 1e-9 * moved, name
    logged = ([log for log in logs if "loss_factual" in log] for logs in (found(folder, 0)[case]["logs"], logs_of(one)))
    for theirs, ours in zip(*logged, strict=True):
        for name in ("loss", "loss_factual", "loss_effect", "response_tokens", "responses_unfinished"):
            assert theirs[name] == pytest.approx(ours[name], rel=1e-5, abs=1e-9), name
    name = "sampled_responses"
    both = [line for path in (folder / case).glob(f"{name}*.jsonl") for line in path.read_text().splitlines()]
    assert sorted(both) == sorted((tmp_path / f"{name}.jsonl").read_text().splitlines())


def test_a_resumed_run_ends_with_the_same_bits(folder: Path) -> None:
    assert all(found(folder, rank)["resumed"] for rank in range(2))


@pytest.mark.parametrize("case", [CASES[0], CASES[2]])
def test_the_saved_model_is_the_trained_one(case: str, folder: Path) -> None:
    base = tiny_model(dtype=torch.float64)
    loaded: Any = PeftModel.from_pretrained(base, folder / case) if "lora" in case else None
    if loaded is None:
        loaded = AutoModelForCausalLM.from_pretrained(folder / case, dtype=torch.float64)
    saved = dict(loaded.named_parameters())
    for name, want in found(folder, 0)[case]["weights"].items():
        assert torch.equal(saved[name], want), name
