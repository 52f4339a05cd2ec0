"""A comparison's folder belongs to its settings, and knows its finished runs."""

import pytest

from nextquill.comparison.folder import (
    RECORD_FILE,
    SETTINGS_FILE,
    RunRecord,
    check_settings,
    opened,
    read_record,
    run_folder,
    write_record,
)
from nextquill.errors import CheckpointError, OutputExistsError

SETTINGS = {"learning_rate": 1e-3, "prompt": {"order": "official"}, "metrics": ("a",)}


def begin(folder, settings=SETTINGS, overwrite=False):
    check_settings(folder, settings, overwrite=overwrite)
    with opened(folder, settings, overwrite=overwrite):
        pass


def test_the_same_settings_go_on_in_the_folder(tmp_path):
    begin(tmp_path / "new")
    (tmp_path / "new" / "sft").mkdir()
    begin(tmp_path / "new")
    assert (tmp_path / "new" / "sft").is_dir()


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({**SETTINGS, "learning_rate": 0.01}, "another learning_rate: there 0.001, here 0.01"),
        ({**SETTINGS, "prompt": {"order": "x"}}, "another prompt order: there 'official', here 'x'"),
        ({**SETTINGS, "added": 1}, "another added: there None, here 1"),
        ({"prompt": SETTINGS["prompt"], "metrics": ["a"]}, "another learning_rate: there 0.001, here None"),
    ],
)
def test_other_settings_are_refused_by_name_and_change_nothing(tmp_path, settings, named):
    begin(tmp_path)
    before = (tmp_path / SETTINGS_FILE).read_text()
    with pytest.raises(OutputExistsError) as error:
        begin(tmp_path, settings)
    assert named in str(error.value)
    assert (tmp_path / SETTINGS_FILE).read_text() == before


def test_overwriting_empties_the_folder(tmp_path):
    begin(tmp_path)
    (tmp_path / "sft" / "seed-0").mkdir(parents=True)
    begin(tmp_path, {"learning_rate": 2}, overwrite=True)
    assert not (tmp_path / "sft").exists()
    begin(tmp_path, {"learning_rate": 2})


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_of_anything_else_is_never_touched(tmp_path, overwrite):
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(OutputExistsError, match="holds files, but not a comparison"):
        begin(tmp_path, overwrite=overwrite)
    with pytest.raises(OutputExistsError, match="is a file"):
        begin(tmp_path / "thesis.tex", overwrite=overwrite)


def test_damaged_settings(tmp_path):
    begin(tmp_path)
    (tmp_path / SETTINGS_FILE).write_text("{")
    with pytest.raises(OutputExistsError, match=f"{SETTINGS_FILE} is damaged"):
        begin(tmp_path)


def test_a_process_killed_before_it_wrote_its_settings_leaves_a_free_folder(tmp_path):
    begin(tmp_path)
    (tmp_path / SETTINGS_FILE).unlink()
    begin(tmp_path, {"other": 1})


def test_a_second_process_is_kept_out(tmp_path):
    with (
        opened(tmp_path, SETTINGS, overwrite=False),
        pytest.raises(OutputExistsError, match=r"another process.* is writing"),
        opened(tmp_path, SETTINGS, overwrite=True),
    ):
        pass


def test_a_run_is_finished_when_both_its_record_and_its_evaluation_are_there(tmp_path):
    folder = run_folder(tmp_path, "sft", 3)
    assert folder == tmp_path / "sft" / "seed-3"
    record = RunRecord("sft", 3, "abc", steps=4, seconds=2.0, examples=8, matched={"ratio": 1.5})
    folder.mkdir(parents=True)
    write_record(folder, record)
    assert read_record(folder) is None
    (folder / "evaluation").mkdir()
    (folder / "evaluation" / "evaluation.json").write_text("{}")
    assert read_record(folder) == record


@pytest.mark.parametrize("text", ["{", "[]", '{"arm": "sft"}', '{"arm": "sft", "seed": 0, "start": "", "bogus": 1}'])
def test_a_damaged_record_says_what_to_do(tmp_path, text):
    (tmp_path / "evaluation").mkdir()
    (tmp_path / "evaluation" / "evaluation.json").write_text("{}")
    (tmp_path / RECORD_FILE).write_text(text)
    with pytest.raises(CheckpointError, match=r"not a run's record.*delete the folder to repeat the run"):
        read_record(tmp_path)


def test_a_setting_within_another_is_named_alone(tmp_path):
    settings = {"prompt": {"template": {"order": "official", "system": None}, "max_length": 512}, "loss": {}}
    with opened(tmp_path / "out", settings, overwrite=False):
        pass
    check_settings(tmp_path / "out", settings, overwrite=False)
    other = {**settings, "prompt": {**settings["prompt"], "max_length": 1024}}
    with pytest.raises(OutputExistsError, match="with another prompt max_length: there 512, here 1024; choose"):
        check_settings(tmp_path / "out", other, overwrite=False)
