"""`nextquill demo`: its flags. The results are tested with the demo."""

import pytest


@pytest.mark.parametrize(
    ("words", "folder", "options"),
    [
        ([], "demo", {"seed": 0, "seeds": None, "quick": False}),
        (["--output_dir", "x", "--seed", "3", "--seeds", "2", "--quick"], "x", {"seed": 3, "seeds": 2, "quick": True}),
    ],
)
def test_flags_reach_the_demo(nextquill, monkeypatch, words, folder, options):
    calls = []
    monkeypatch.setattr("nextquill.demo.run_demo", lambda output_dir, **given: calls.append((output_dir, given)))
    assert nextquill("demo", *words).code == 0
    assert calls == [(folder, options)]


def test_an_output_folder_that_is_a_file(nextquill, tmp_path):
    (tmp_path / "file").write_text("")
    result = nextquill("demo", "--quick", "--output_dir", tmp_path / "file")
    assert result.code == 1
    assert "is a file" in result.err
