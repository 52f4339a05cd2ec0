"""An evaluation that is stopped, repeated, or finds another one in its folder."""

from __future__ import annotations

import contextlib
import random

import pytest

from nextquill.errors import CheckpointError, OutputExistsError, RecordError
from nextquill.evaluation.compare import compare_evaluations
from nextquill.evaluation.results import Evaluation, EvaluationFolder, read_evaluation
from nextquill.models.loading import PromptSettings
from tests.evaluation.evaluation_helpers import ALL, FILES, RECORDS, contents, evaluate, without_manifest
from tests.models.model_helpers import TEMPLATE, tiny_model


@pytest.fixture(scope="module")
def whole_in_fours(model, tmp_path_factory):
    """The bytes of an evaluation without interruption."""
    folder = tmp_path_factory.mktemp("evaluation")
    evaluate(model, folder, **ALL, batch_size=4)
    return contents(folder)


class Killed(BaseException):
    """An exception that nothing catches."""


def killed_after(lines):
    """A progress bar that ends the process after this many lines of all stages."""
    left = [lines]

    def progress(things, *, total, desc, initial=0):
        for thing in things:
            if desc != "Encoding":
                if not left[0]:
                    raise Killed
                left[0] -= 1
            yield thing

    return progress


NUM_LINES = 6 + 6 + 2 + 18


@pytest.mark.parametrize("lines", [0, 1, 6, 8, 12, 13, 15, 21, NUM_LINES - 1])
def test_a_killed_evaluation_resumes_to_the_same_bytes(model, whole_in_fours, tmp_path, lines, monkeypatch):
    with pytest.raises(Killed):
        evaluate(model, tmp_path, **ALL, batch_size=4, progress=killed_after(lines))
    assert not (tmp_path / "evaluation.json").exists()
    assert bool(list(tmp_path.iterdir())) is (lines > 0), "nothing written, nothing left"
    made = []
    own = EvaluationFolder.stage

    def stage(self, name, indices, make, desc):
        def counted(partial):
            for line in make(partial):
                made.append(name)
                yield line

        return own(self, name, indices, counted, desc)

    monkeypatch.setattr(EvaluationFolder, "stage", stage)
    evaluate(model, tmp_path, **ALL, batch_size=4)
    assert len(made) == NUM_LINES - lines, "nothing is computed twice"
    assert contents(tmp_path) == whole_in_fours


def test_killed_between_its_last_files(model, tmp_path, monkeypatch):
    def kill(*_):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(Evaluation, "to_json", kill)
        with pytest.raises(Killed):
            evaluate(model, tmp_path, **ALL)
    assert (tmp_path / "examples.jsonl").exists()
    assert not (tmp_path / "evaluation.json").exists()
    evaluate(model, tmp_path, **ALL)
    assert set(contents(tmp_path)) == FILES


OTHERS = {
    "seed": ({"seed": 1}, "seed: there 42, here 1"),
    "task": ({"task": "lamp_5"}, "task: there 'lamp_4', here 'lamp_5'"),
    "branches": (
        {"generate_branches": ("factual",)},
        r"generate_branches: there \['factual', 'counterfactual', 'place",
    ),
    "length": ({"settings": PromptSettings(TEMPLATE, 60)}, "max_length: there 64, here 60"),
    "records": ({"records": RECORDS[:5]}, "content of the records: there '"),
    "model": ({"model": tiny_model(seed=1, initializer_range=0.6)}, "model: there '"),
}


@pytest.mark.parametrize("what", OTHERS)
def test_another_evaluation_is_refused_by_name(model, tmp_path, what):
    changed, message = OTHERS[what]
    with pytest.raises(Killed):
        evaluate(model, tmp_path, **ALL, progress=killed_after(8))
    before = contents(tmp_path)
    given = {"model": model, "records": RECORDS, **ALL, **changed}
    with pytest.raises(CheckpointError, match=f"folder: .* was started with another {message}"):
        evaluate(given.pop("model"), tmp_path, given.pop("records"), **given)
    assert contents(tmp_path) == before


def test_overwriting_starts_again(model, whole, tmp_path):
    with pytest.raises(Killed):
        evaluate(model, tmp_path, **ALL, seed=1, progress=killed_after(20))
    evaluate(model, tmp_path, **ALL, overwrite=True)
    assert contents(tmp_path) == contents(whole[1])
    evaluate(model, tmp_path, generate_branches=(), overwrite=True)
    assert set(contents(tmp_path)) == {"evaluation.json", "examples.jsonl", "effects.jsonl"}


def test_a_finished_evaluation_is_refused(model, whole):
    folder = whole[1]
    before = contents(folder)
    with pytest.raises(
        OutputExistsError, match=r"folder: .* holds a finished evaluation; give another, or overwrite=True"
    ):
        evaluate(model, folder, **ALL)
    assert contents(folder) == before


def test_two_at_once_are_refused(model, tmp_path):
    with EvaluationFolder(tmp_path, {}), pytest.raises(OutputExistsError, match=r"another process.* is writing"):
        evaluate(model, tmp_path, overwrite=True)
    assert list(tmp_path.iterdir()) == []


def test_files_of_somebody_else_are_left_alone(model, tmp_path):
    (tmp_path / "effects.jsonl").write_text("precious\n")
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(OutputExistsError, match=r"folder: .*effects.jsonl exists"):
        evaluate(model, tmp_path)
    assert contents(tmp_path) == {"effects.jsonl": b"precious\n", "notes.txt": b"mine"}
    evaluate(model, tmp_path, generate_branches=(), overwrite=True)
    assert (tmp_path / "notes.txt").read_text() == "mine"
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputExistsError, match=r"folder: expected a folder, .*file is a file"):
        evaluate(model, tmp_path / "file" / "below")


# ---- a finished folder that was changed ----------------------------------------------------------


@pytest.fixture
def finished(whole, tmp_path):
    """A copy of an evaluation's folder."""
    for name, content in contents(whole[1]).items():
        (tmp_path / name).write_bytes(content)
    return tmp_path


def flipped(content, place, bit=0):
    return content[:place] + bytes([content[place] ^ 1 << bit]) + content[place + 1 :]


SPOILT = {
    "flipped": (lambda path: path.write_bytes(flipped(path.read_bytes(), 40)), "is damaged or was changed: its digest"),
    "cut": (lambda path: path.write_bytes(path.read_bytes()[:-1]), "is damaged: expected "),
    "missing": (lambda path: path.unlink(), "is missing"),
}


@pytest.mark.parametrize("name", sorted(FILES - {"evaluation.json"}))
@pytest.mark.parametrize("how", SPOILT)
def test_a_changed_file_of_a_finished_evaluation_is_named(finished, whole, name, how):
    assert read_evaluation(finished) == whole[0]
    spoil, message = SPOILT[how]
    spoil(finished / name)
    with pytest.raises(RecordError, match=f"^{finished}: {name} {message}"):
        read_evaluation(finished)
    with pytest.raises(RecordError, match=f"{name} {message}"):
        compare_evaluations(whole[1], finished)


def test_a_flipped_bit_of_the_evaluation_is_found_or_changes_nothing(finished, whole):
    """White space between values may change."""
    path, draw, found = finished / "evaluation.json", random.Random(0), 0
    content = path.read_bytes()
    for place in range(0, len(content), 5):
        path.write_bytes(flipped(content, place, draw.randrange(8)))
        found += 1
        with contextlib.suppress(RecordError):
            assert read_evaluation(finished) == whole[0], place
            found -= 1
    assert found > len(content) / 5 / 2


def test_a_folder_of_an_earlier_version_is_read_as_it_is(finished, whole):
    (without_manifest(finished) / "predictions.json").unlink()
    assert read_evaluation(finished) == whole[0]
    (finished / "notes.txt").write_text("added later")
    assert read_evaluation(finished) == whole[0]
