"""Processes that share work, or work apart; `test_shared_runs.py` and `test_compare_processes.py` start several."""

from __future__ import annotations

import os
import sys
from typing import Any

import pytest
import torch

from nextquill import ranks
from nextquill.errors import ArgumentError


def test_without_a_launcher_this_process_does_all_the_work() -> None:
    assert ranks.is_first()
    assert list(ranks.deal(range(3), lambda unit: [unit] * unit)) == [1, 2, 2]
    assert ranks.on_first(lambda: "here") == "here"


@pytest.mark.parametrize("others", [[{"seed": 7}], [{}]])
def test_processes_with_other_settings_are_refused(others: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    import torch.distributed as dist

    def gather(everyone: list[Any], own: Any) -> None:
        everyone[:] = [own, *others]

    monkeypatch.setenv("WORLD_SIZE", "2")
    for name, value in (("is_initialized", True), ("get_world_size", 2)):
        monkeypatch.setattr(dist, name, lambda value=value: value)
    monkeypatch.setattr(dist, "all_gather_object", gather)
    with pytest.raises(ArgumentError, match=r"^seed: expected the same in all processes, got 3 and, on rank 1, "):
        ranks.check_agreement({"seed": 3})


# ---- processes that work apart ---------------------------------------------------------------------


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The store of two processes; this one is rank 1, by what torchrun tells it."""
    told = {"RANK": 1, "WORLD_SIZE": 2, "LOCAL_RANK": 1, "LOCAL_WORLD_SIZE": 2, "TORCHELASTIC_RUN_ID": "x"}
    for name, value in told.items():
        monkeypatch.setenv(name, str(value))
    shared = torch.distributed.HashStore()
    monkeypatch.setattr(ranks, "_store", lambda timeout: shared)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    return shared


@pytest.fixture
def first(store: Any) -> ranks.Launch:
    return ranks.Launch(0, 2, 1.0, store)


def test_a_process_that_works_apart_seems_alone_and_writes_when_the_first_has_begun(
    store: Any, first: ranks.Launch, capsys: pytest.CaptureFixture[str]
) -> None:
    with ranks.apart(1.0):
        assert not {"RANK", "WORLD_SIZE", "LOCAL_RANK", "TORCHELASTIC_RUN_ID"} & os.environ.keys()
        assert (ranks.started(), ranks.launch().size, ranks.launch().label) == (1, 2, "rank 1: ")
        sys.stdout.write("before")
        sys.stderr.write("before")
        first.begin({"seed": 3, "names": ("a",)})
        ranks.launch().begin({"seed": 3, "names": ["a"]})
        sys.stdout.write("after")
    assert (os.environ["RANK"], ranks.started(), ranks.launch().size) == ("1", 2, 1)
    printed = capsys.readouterr()
    assert (printed.out, printed.err) == ("after", "")


def test_a_shell_of_a_cluster_starts_no_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with ranks.apart(1.0):
        assert (ranks.launch().size, ranks.launch().label, ranks.started()) == (1, "", 1)
        ranks.launch().begin({})


def test_other_settings_than_the_first_ones_are_refused(store: Any, first: ranks.Launch) -> None:
    with ranks.apart(1.0):
        first.begin({"prompt": {"order": "official"}})
        with pytest.raises(ArgumentError, match=r"^prompt order: .* got 'official' and, on rank 1, 'x'"):
            ranks.launch().begin({"prompt": {"order": "x"}})


def test_an_error_waits_for_the_first_process_which_may_fail_as_well(store: Any) -> None:
    class Watched:
        asked = 0

        def check(self, keys: list[str]) -> bool:
            Watched.asked += 1
            return Watched.asked > 2

    def fail() -> None:
        with ranks.apart(30.0):
            ranks.launch().store = Watched()
            raise ArgumentError("x: mine")

    with pytest.raises(ArgumentError, match="mine"):
        fail()
    assert Watched.asked == 3


def test_a_first_process_that_never_begins_is_given_up(store: Any) -> None:
    with ranks.apart(0.2), pytest.raises(TimeoutError, match="rank 0 did not begin"):
        ranks.launch().begin({})


@pytest.mark.parametrize("rank", [0, 1])
def test_only_the_first_process_says_that_it_was_interrupted(
    rank: int, store: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", str(rank))
    with pytest.raises(SystemExit if rank else KeyboardInterrupt), ranks.apart(1.0):
        raise KeyboardInterrupt


@pytest.fixture
def devices(store: Any, monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    return monkeypatch


@pytest.mark.parametrize(("visible", "own"), [("", "1"), ("5,7,8,9", "7"), ("GPU-a,GPU-b,GPU-c,GPU-d", "GPU-b")])
def test_each_process_sees_the_device_of_its_own(visible: str, own: str, devices: pytest.MonkeyPatch) -> None:
    devices.setenv("CUDA_VISIBLE_DEVICES", visible)
    with ranks.apart(1.0):
        assert os.environ["CUDA_VISIBLE_DEVICES"] == own


def test_more_processes_than_devices_are_refused(devices: pytest.MonkeyPatch) -> None:
    devices.setenv("LOCAL_WORLD_SIZE", "5")
    with (
        pytest.raises(ArgumentError, match=r"processes: expected at most 4 .* got 5"),
        ranks.apart(0.1),
    ):
        pass
