"""Two and four gloo processes that divide a head's vocabulary, against one with the whole head in float64.

All cases share one launch, because a launch takes seconds.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import multiprocessing

import nextquill as nq
from nextquill.errors import ArgumentError
from tests.shard_worker import CASES, REFUSED, work

#: Bounds of a value's error and of a gradient's, relative to the largest of their kind.
VALUE, GRADIENT = 1e-6, 1e-5


def launch(folder: Path, processes: int) -> Path:
    multiprocessing.start_processes(work, (processes, str(folder)), nprocs=processes, start_method="spawn")
    return folder


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return launch(tmp_path_factory.mktemp("two"), 2)


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return launch(tmp_path_factory.mktemp("four"), 4)


def check(folder: Path, processes: int, name: str) -> None:
    for rank in range(processes):
        found: dict[str, Any] = json.loads((folder / f"found-{rank}.json").read_text())[name]
        for what, error in found["errors"].items():
            assert error <= (GRADIENT if what.startswith("d") else VALUE), (
                f"{what} on rank {rank} is off by {error:.1e}"
            )
        if CASES[name].weight == "replicated":
            assert (found["gathers"], found["sums"]) == (0, 0)
            continue
        if name != "no-label-at-all":
            assert found["columns"] == found["own"] < sum(CASES[name].sizes[processes]), "logits of the own part only"
        assert found["sums"] <= 1, "dh is summed once"
        once = 4 if name.startswith(("jsd", "mirror")) else 2  # forward and backward; a divergence has two exchanges
        assert (found["gathers"] > once) is ("chunks" in name), "one exchange for each group"


@pytest.mark.parametrize("name", CASES)
def test_two_processes_equal_one(name: str, two: Path) -> None:
    check(two, 2, name)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_four_processes_equal_one(name: str, four: Path) -> None:
    check(four, 4, name)


def test_the_size_of_chunks_does_not_change_what_is_exchanged(two: Path) -> None:
    assert [json.loads((two / f"pieces-{rank}.json").read_text()) for rank in range(2)] == [True, True]


NAMED = {
    "total": "lm_head_weight.vocabulary: expected the same number on all processes, got 21 and, on rank 1",
    "more-than-total": "lm_head_weight.vocabulary: expected 21, as in all parts, got 20",
    "gap": "lm_head_weight.start: expected 10, where the previous part ends, on rank 1 of its group, got 11",
    "empty": "lm_head_weight: expected at least one token on each process, got none on rank 1",
    "rows": "hidden_states: expected the same 1 x [23, 19] on the processes",
    "labels": "labels: expected the same on the processes",
    "hidden": "hidden_states: expected the same on the processes",
    "alone": "lm_head_weight.group: expected at least 2 processes, got 1",
    "whole-bias": "bias: expected shape [1",
    "start": "lm_head_weight.start: expected an int, got float",
    "columns": "lm_head_weight: expected a DTensor that is replicated, or sharded on dimension 0",
    "later-labels": "later labels: NaN",
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_fit_together_is_refused_on_every_process(name: str, two: Path) -> None:
    for rank in range(2):
        message = json.loads((two / f"refused-{rank}.json").read_text())[name]
        assert message.split(": ", 1)[1].startswith(NAMED[name]), message


def test_a_part_without_processes_is_refused() -> None:
    part = nq.VocabularyShard(torch.randn(5, 3), 0, 10)
    with pytest.raises(ArgumentError, match=r"^lm_head_weight\.group: expected initialised processes, got none"):
        nq.SFTLoss()(torch.randn(4, 3), None, part, torch.zeros(4, dtype=torch.long))
