"""Processes share the runs of a comparison: each run is held by one of them, and by none once that has ended."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from nextquill.comparison.arms import ARMS, BASE
from nextquill.comparison.claiming import check_shared, next_run
from nextquill.comparison.folder import RunRecord, held_run, opened, run_folder, write_record
from nextquill.comparison.running import planned_runs
from nextquill.errors import OutputExistsError


@pytest.fixture
def setup(tmp_path: Path) -> Any:
    """What claiming reads of a comparison's settings."""
    arms = [ARMS[name] for name in ("sft", "sft_time", "perce")]
    return SimpleNamespace(folder=tmp_path, arms=arms, seeds=(0,), shares_start=True, time_reference="perce")


def finish(setup: Any, name: str) -> None:
    folder = run_folder(setup.folder, name, 0)
    (folder / "evaluation").mkdir(parents=True)
    (folder / "evaluation" / "evaluation.json").write_text("{}")
    write_record(folder, RunRecord(name, 0, "s", seconds=1.0, steps=1))


def test_each_process_gets_a_run_of_its_own_until_none_can_begin(setup: Any) -> None:
    runs = planned_runs(setup)
    with next_run(setup, runs) as first, next_run(setup, runs) as second, next_run(setup, runs) as third:
        assert first is not None
        assert second is not None
        assert third is not None
        assert [first.name, second.name, third.name] == [BASE, "sft", "perce"]
        with next_run(setup, runs) as fourth:
            assert fourth is None  # the time that sft_time takes is not known
    with next_run(setup, runs) as again:
        assert again == first
    assert not list(setup.folder.rglob("*.lock"))


def test_a_run_of_equal_time_begins_when_both_others_are_finished(setup: Any) -> None:
    runs = planned_runs(setup)[-1:]
    for name in ("perce", "sft"):
        with next_run(setup, runs) as planned:
            assert planned is None
        finish(setup, name)
    with next_run(setup, runs) as planned:
        assert planned is not None
        assert planned.name == "sft_time"


def test_a_run_that_another_process_has_just_finished_is_not_repeated(setup: Any) -> None:
    runs = planned_runs(setup)
    finish(setup, BASE)
    with next_run(setup, runs) as planned:
        assert planned is not None
        assert planned.name == "sft"
        with held_run(setup.folder, BASE, 0):  # it was let go
            pass


def test_a_folder_that_the_first_process_is_not_seen_to_hold_is_refused(setup: Any) -> None:
    for folder in (setup.folder, setup.folder / "nowhere"):
        setup.folder = folder
        with pytest.raises(OutputExistsError, match="folder: expected a folder that all processes see"):
            check_shared(setup)
    with opened(setup.folder, {}, overwrite=False):
        check_shared(setup)
    for planned in planned_runs(setup):
        finish(setup, planned.name)
    check_shared(setup)  # the first process has ended, as nothing was left


def test_a_folder_of_a_process_that_outlived_its_launcher_is_refused(tmp_path: Path) -> None:
    with (
        held_run(tmp_path, "sft", 0),
        pytest.raises(OutputExistsError, match=r"another process.* is writing .*sft"),
        opened(tmp_path, {}, overwrite=True),
    ):
        pass
    with opened(tmp_path, {}, overwrite=False):
        pass
