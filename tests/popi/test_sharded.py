"""POPI under FSDP2: two processes sample and score with sharded weights, and learn what one process does."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from nextquill.popi import Roles
from tests.popi.popi_helpers import logs_of, summaries_of
from tests.popi.sharded_worker import CASES, make, models
from tests.sharding import TIMEOUT, found, run_two, trained

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(TIMEOUT + 60),
    pytest.mark.filterwarnings(  # PEFT still uses the old names
        r"ignore:`(is_gradient_checkpointing|gradient_checkpointing_enable)` is deprecated:FutureWarning"
    ),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of runs on two processes."""
    folder = tmp_path_factory.mktemp("two")
    run_two(Path(__file__).parent / "sharded_worker.py", folder)
    return folder


@pytest.mark.parametrize("case", CASES)
def test_two_processes_learn_what_one_does(case: str, folder: Path, tmp_path: Path) -> None:
    one = make(tmp_path, case, 1)
    start = trained(one.roles)
    one.train()
    metrics = one.evaluate()
    for rank in range(2):
        got = found(folder, rank)[case]
        for name, want in trained(one.roles).items():
            moved = (want - start[name]).abs().max()
            assert (got["weights"][name] - want).abs().max() <= 1e-9 * moved, name
        assert got["metrics"] == pytest.approx(metrics, rel=1e-4, abs=1e-5)
    logged = [entry for entry in found(folder, 0)[case]["logs"] if "preference_loss" in entry]
    for theirs, ours in zip(logged, logs_of(one), strict=True):
        for name in ("loss", "preference_loss", "reward", "kl", "summary_tokens"):
            if name in ours:  # there is no KL in a step of the generator alone
                assert theirs[name] == pytest.approx(ours[name], rel=1e-4, abs=1e-6), name
    name = "sampled_summaries"
    lines = [line for path in (folder / case).glob(f"{name}*.jsonl") for line in path.read_text().splitlines()]
    assert len(lines) == len(summaries_of(tmp_path))
    texts = (tmp_path / f"{name}.jsonl").read_text().splitlines()
    assert {line.split('"reward"')[0] for line in lines} == {line.split('"reward"')[0] for line in texts}


@pytest.mark.parametrize("case", [CASES[2], CASES[3]])
def test_a_resumed_run_ends_with_the_same_bits(case: str, folder: Path) -> None:
    assert all(found(folder, rank)["resumed"][case] for rank in range(2))


@pytest.mark.parametrize("case", [CASES[0], CASES[3]])
def test_the_saved_roles_are_the_trained_ones(case: str, folder: Path) -> None:
    base = {} if "separate" in case else {"base_model": models(case)["model"]}
    saved = dict(Roles.load(folder / case, **base).named_parameters())
    for name, want in found(folder, 0)[case]["weights"].items():
        assert torch.equal(saved[name].to(want.dtype), want.to(saved[name].dtype).to(want.dtype)), name
