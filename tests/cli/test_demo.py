"""`nextquill demo` and `nextquill popi demo`: their flags. The results are tested with the demos."""

import pytest

import nextquill as package
from nextquill.cli.main import FAILED, OK, USAGE

DEMOS = {"demo": ("demos.losses.run", "demo"), "popi demo": ("demos.popi.run", "popi-demo")}


@pytest.mark.parametrize("command", DEMOS)
def test_flags_reach_the_demo(nextquill, monkeypatch, command):
    module, folder = DEMOS[command]
    calls = []
    monkeypatch.setattr(f"{module}.run_demo", lambda output_dir, **given: calls.append((output_dir, given)))
    assert nextquill(*command.split()).code == OK
    assert nextquill(*command.split(), "--output_dir", "x", "--seed", "3", "--seeds", "2", "--quick").code == OK
    assert calls == [
        (folder, {"seed": 0, "seeds": None, "quick": False}),
        ("x", {"seed": 3, "seeds": 2, "quick": True}),
    ]


@pytest.mark.parametrize("command", DEMOS)
def test_an_output_folder_that_is_a_file(nextquill, tmp_path, command):
    (tmp_path / "file").write_text("")
    result = nextquill(*command.split(), "--quick", "--output_dir", tmp_path / "file")
    assert result.code == FAILED
    assert "is a file" in result.err


@pytest.mark.parametrize("words", ["demo --quick", "demo --help", "popi demo --quick"])
def test_an_installed_wheel_says_where_the_demos_are(nextquill, monkeypatch, tmp_path, words):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(package, "__file__", str(tmp_path / "site-packages" / "nextquill" / "__init__.py"))
    result = nextquill(*words.split())
    assert (result.code, result.out) == (USAGE, "")
    command = "popi demo" if words.startswith("popi") else "demo"
    assert result.err.startswith(f"nextquill: {command}: the demos are part of the source tree")
    assert f"clone nextquill and run `make {command.replace(' ', '-')}` there" in result.err
    assert result.err.count("\n") == 1


@pytest.mark.parametrize("command", DEMOS)
def test_a_wrong_number_is_named_by_its_flag(nextquill, tmp_path, command):
    result = nextquill(*command.split(), "--seeds", "0", "--output_dir", tmp_path)
    assert result.err == "nextquill: --seeds: expected at least 1, got 0\n"


def test_a_real_model_is_passed_on_and_takes_no_seeds(nextquill, monkeypatch):
    calls = []
    monkeypatch.setattr("demos.people.run.run_demo", lambda *given, **more: calls.append((given, more)))
    assert nextquill("demo", "--model", "m", "--output_dir", "x", "--quick").code == OK
    assert calls == [(("x", "m"), {"quick": True})]
    for flag in ("--seed", "--seeds"):
        result = nextquill("demo", "--model", "m", flag, "2")
        assert (result.code, result.err.count("\n")) == (USAGE, 1)
        assert result.err.startswith(f"nextquill: {flag}: expected none with --model")
    assert len(calls) == 1
    assert "--model" in nextquill("popi", "demo", "--model", "m").err


def test_a_folder_that_is_no_model(nextquill, tmp_path):
    (tmp_path / "empty").mkdir()
    result = nextquill("demo", "--model", tmp_path / "empty", "--output_dir", tmp_path / "out")
    assert (result.code, result.out) == (FAILED, "")
    assert "nextquill: --model: no model in" in result.err
