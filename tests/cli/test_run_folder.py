"""Runs use only their own output folders, and resume from the right checkpoint."""

import os
from pathlib import Path

import pytest

from nextquill.cli.run_folder import check_output_dir, open_output_dir, resume_point
from nextquill.errors import CheckpointError, OutputExistsError
from nextquill.storage.atomic_files import temporary
from nextquill.storage.checkpoints import RUN_FILE
from nextquill.storage.locks import LOCK_FILE, held, release_claims
from tests.helpers import run_python


@pytest.fixture
def run_folder(tmp_path):
    """A folder like a run's, with two checkpoints."""
    folder = tmp_path / "run"
    for name in ("checkpoint-2", "checkpoint-10"):
        (folder / name).mkdir(parents=True)
        (folder / name / "trainer_state.json").write_text("{}")
    (folder / RUN_FILE).write_text("{}")
    return folder


@pytest.fixture(autouse=True)
def command_ends():
    """What `main` does at the end of a command."""
    yield
    release_claims()


OPEN = """
import sys
from pathlib import Path
from nextquill.cli.run_folder import open_output_dir
from nextquill.errors import OutputExistsError
try:
    open_output_dir(Path(sys.argv[1]), None)
except OutputExistsError as error:
    print(error)
"""


def check(folder, resume=None, overwrite=False, inputs=()):
    check_output_dir(Path(folder), resume, overwrite=overwrite, inputs=[str(path) for path in inputs])


def test_a_folder_that_another_process_writes_is_refused_before_any_change(run_folder):
    pytest.importorskip("fcntl")
    with held(run_folder / LOCK_FILE, run_folder):
        for resume in (None, run_folder / "checkpoint-10"):
            with pytest.raises(OutputExistsError, match=r"^output_dir: another process.* is writing .*run$"):
                check(run_folder, resume, overwrite=True)
            with pytest.raises(OutputExistsError, match=r"^output_dir: another process.* is writing .*run$"):
                open_output_dir(run_folder, resume)
    assert (run_folder / "checkpoint-10").is_dir()


def test_an_opened_folder_is_kept_from_other_processes_until_the_command_ends(run_folder):
    pytest.importorskip("fcntl")
    open_output_dir(run_folder, None)
    assert "another process" in run_python(OPEN, str(run_folder))
    release_claims()
    assert run_python(OPEN, str(run_folder)) == ""


def test_the_lock_of_a_killed_process_is_no_reason_to_refuse(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    for name in (LOCK_FILE, temporary(folder / RUN_FILE).name):  # what a run leaves that is killed at its start
        (folder / name).touch()
        check(folder)


@pytest.mark.parametrize("word", [None, "false", "False", "no", "0", ""])
def test_nothing_to_resume_from(run_folder, word):
    assert resume_point(run_folder, word) is None


@pytest.mark.parametrize("word", ["true", "True", "yes"])
def test_true_means_the_last_checkpoint(run_folder, word):
    assert resume_point(run_folder, word) == run_folder / "checkpoint-10"


def test_a_checkpoint_by_its_path(run_folder):
    path = run_folder / "checkpoint-2"
    assert resume_point(run_folder, str(path)) == path


def test_no_checkpoint_to_resume_from(run_folder, tmp_path):
    (run_folder / "checkpoint-2" / "trainer_state.json").unlink()
    with pytest.raises(CheckpointError, match=r"expected a checkpoint in .*absent, found none"):
        resume_point(tmp_path / "absent", "true")
    with pytest.raises(CheckpointError, match="expected a checkpoint in"):
        resume_point(tmp_path, "true")
    with pytest.raises(CheckpointError, match="is not a complete checkpoint"):
        resume_point(run_folder, str(run_folder / "checkpoint-2"))


def test_a_new_or_empty_folder_is_free(tmp_path):
    check(tmp_path / "a" / "b")
    check(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_another_run_is_refused(run_folder):
    with pytest.raises(OutputExistsError, match="holds another run; resume it with --resume_from_checkpoint true"):
        check(run_folder)


def test_a_run_goes_on_in_its_own_folder(run_folder):
    check(run_folder, run_folder / "checkpoint-2")
    open_output_dir(run_folder, run_folder / "checkpoint-2")
    assert (run_folder / "checkpoint-10").is_dir()


def test_resuming_elsewhere_does_not_open_another_runs_folder(run_folder, tmp_path):
    other = tmp_path / "other" / "checkpoint-2"
    with pytest.raises(OutputExistsError, match="holds another run"):
        check(run_folder, other)


def test_overwriting_empties_the_folder_and_keeps_it(run_folder):
    check(run_folder, overwrite=True)
    assert (run_folder / "checkpoint-10").is_dir(), "the check must change nothing"
    inode = run_folder.stat().st_ino
    open_output_dir(run_folder, None)
    assert sorted(path.name for path in run_folder.iterdir()) == [LOCK_FILE, RUN_FILE]
    assert run_folder.stat().st_ino == inode


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_that_is_no_run_is_never_touched(tmp_path, overwrite):
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(OutputExistsError, match="holds files, but not a nextquill run"):
        check(tmp_path, overwrite=overwrite)


@pytest.mark.parametrize("name", ["train.jsonl", "checkpoint-2", "."])
def test_overwriting_spares_what_the_run_reads(run_folder, name):
    (run_folder / "train.jsonl").write_text("")
    with pytest.raises(OutputExistsError, match=r"^overwrite: .*which this run reads"):
        check(run_folder, overwrite=True, inputs=["Qwen/Qwen3-0.6B", run_folder / name])


def test_overwriting_spares_the_checkpoint_resumed_from(run_folder):
    nested = run_folder / "sub" / "checkpoint-1"
    nested.mkdir(parents=True)
    with pytest.raises(OutputExistsError, match="which this run reads"):
        check(run_folder, nested, overwrite=True)


def test_a_file_in_the_way(tmp_path):
    (tmp_path / "file").write_text("")
    for place in ("file", "file/run"):
        with pytest.raises(OutputExistsError, match=r"^output_dir: .*file is a file"):
            check(tmp_path / place)


def test_a_folder_that_cannot_be_written(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root, whom CI may be, can write everywhere
    with pytest.raises(OutputExistsError, match="is not writable"):
        check(tmp_path / "run")
