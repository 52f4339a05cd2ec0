"""Files and folders that exist completely or not at all."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from nextquill.storage.checkpoints import RUN_FILE, STAGING, rotate, staged_files, trained_users, user_digest


def test_staged_files_appear_together(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "old").touch()
    with staged_files(tmp_path) as staging:
        (staging / "a.txt").write_text("a")
        (staging / "model").mkdir()
        (staging / "model" / "new").touch()
        assert not (tmp_path / "a.txt").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.txt", "model"]
    assert [path.name for path in (tmp_path / "model").iterdir()] == ["new"], "the old folder was not replaced"


def test_an_interrupt_leaves_no_staged_file(tmp_path: Path) -> None:
    def interrupted() -> None:
        with staged_files(tmp_path) as staging:
            (staging / "a.txt").write_text("a")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert list(tmp_path.iterdir()) == []


def test_leftovers_of_a_killed_save_are_not_moved(tmp_path: Path) -> None:
    leftover = tmp_path / STAGING / "files" / "half.txt"
    leftover.parent.mkdir(parents=True)
    leftover.touch()
    with staged_files(tmp_path) as staging:
        (staging / "a.txt").touch()
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


@pytest.mark.parametrize(
    ("limit", "best", "left"),
    [
        (None, None, ["1", "2", "3", "4"]),
        (0, None, ["1", "2", "3", "4"]),
        (2, None, ["3", "4"]),
        (2, "checkpoint-1", ["1", "4"]),
        (1, "checkpoint-1", ["1", "4"]),
        (1, "checkpoint-4", ["4"]),
        (3, "checkpoint-1", ["1", "3", "4"]),
        (9, None, ["1", "2", "3", "4"]),
    ],
)
def test_rotation(tmp_path: Path, limit: int | None, best: str | None, left: list[str]) -> None:
    for step in range(1, 5):
        (tmp_path / f"checkpoint-{step}").mkdir()
    (tmp_path / "checkpoint-mine").mkdir()
    rotate(tmp_path, limit, "checkpoint-4", None if best is None else str(tmp_path / best))
    got = sorted(path.name.removeprefix("checkpoint-") for path in tmp_path.iterdir())
    assert got == [*left, "mine"]


def test_rotation_goes_by_age_and_spares_the_newest(tmp_path: Path) -> None:
    """In an old folder, a new run's first checkpoint has a smaller number than those of the old run."""
    for age, step in enumerate((3, 100, 200)):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        os.utime(folder, (1000 - age, 1000 - age))
    rotate(tmp_path, 2, "checkpoint-3", None)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-100", "checkpoint-3"]


def test_the_users_of_a_run_are_known_only_where_it_says_so(tmp_path: Path) -> None:
    assert trained_users(tmp_path) is None
    (tmp_path / RUN_FILE).write_text("{}")
    assert trained_users(tmp_path) is None
    (tmp_path / RUN_FILE).write_text(json.dumps({"trained_users": [user_digest("ann")]}))
    assert trained_users(tmp_path) == {user_digest("ann")}
    assert user_digest("ann") != user_digest("bob")
