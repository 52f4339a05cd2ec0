"""Packages whose names are imported on first use import nothing before, and behave like ordinary packages."""

import ast
import importlib
import sys
from pathlib import Path

import pytest

import nextquill

ROOT = Path(nextquill.__file__).resolve().parent
LAZY = sorted(
    ".".join(path.parent.relative_to(ROOT.parent).parts)
    for path in ROOT.rglob("__init__.py")
    if "on_first_use(" in path.read_text(encoding="utf-8")
)


def typed_names(package):
    """Each name of a lazy package that type checkers see, with its module."""
    tree = ast.parse(Path(package.__file__).read_text(encoding="utf-8"))
    blocks = (node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
    imports = (node for block in blocks for node in block.body if isinstance(node, ast.ImportFrom))
    return {alias.name: node.module for node in imports for alias in node.names}


def test_the_lazy_packages_are_found():
    assert {"nextquill", "nextquill.data", "nextquill.popi", "nextquill.tree"} <= set(LAZY)


@pytest.mark.parametrize("name", LAZY)
def test_what_type_checkers_see_is_what_there_is(name):
    package = importlib.import_module(name)
    for each, home in typed_names(package).items():
        expected = getattr(importlib.import_module(home), each)
        assert getattr(package, each) is expected, each
    assert set(typed_names(package)) <= set(package.__all__) <= set(dir(package))


@pytest.fixture
def lazy_package(tmp_path, monkeypatch):
    """A package with a small module, and one that imports a missing module."""
    folder = tmp_path / "lazily"
    folder.mkdir()
    (folder / "light.py").write_text("class Light: pass\nhidden = 1\n")
    (folder / "heavy.py").write_text("from lazily.light import Light\nweight = 2\n")
    (folder / "broken.py").write_text("import nowhere_to_be_found\n")
    (folder / "__init__.py").write_text(
        "from nextquill.lazy import on_first_use\n"
        "__all__ = ['Light', 'late', 'weight']\n"
        "needs = {'late': 'nowhere_to_be_found', 'weight': 'json'}\n"
        "__getattr__, __dir__ = on_first_use(__name__, ('light', 'heavy', 'broken'), needs)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    yield importlib.import_module("lazily")
    for name in [name for name in sys.modules if name.partition(".")[0] == "lazily"]:
        del sys.modules[name]


def loaded():
    return {name.removeprefix("lazily.") for name in sys.modules if name.startswith("lazily.")}


def test_a_module_is_imported_when_a_name_is_first_used(lazy_package):
    assert loaded() == set()
    assert {"Light", "weight"} <= set(dir(lazy_package))
    assert loaded() == set()
    assert lazy_package.Light.__module__ == "lazily.light"
    assert loaded() == {"light"}
    assert "Light" in vars(lazy_package), "kept, so that the search is made once"
    assert lazy_package.weight == 2
    assert loaded() == {"light", "heavy"}


def test_modules_are_attributes(lazy_package):
    assert lazy_package.light.hidden == 1
    assert loaded() == {"light"}


def test_other_names_are_refused_without_an_import(lazy_package):
    for name in ("hidden", "nothing", "__wrapped__"):
        assert not hasattr(lazy_package, name)
    with pytest.raises(AttributeError, match="module 'lazily' has no attribute 'nothing'"):
        _ = lazy_package.nothing
    assert loaded() == set()


def test_a_missing_package_is_named(lazy_package):
    assert "late" not in dir(lazy_package), "help() asks for all that dir() lists"
    with pytest.raises(ModuleNotFoundError, match="nowhere_to_be_found"):
        _ = lazy_package.late
