"""Tests of a package are in the folder of its name. Each file is named after a module there, or a listed behaviour."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# Behaviours that cross the modules of a folder: the files `test_<behaviour>.py`.
BEHAVIOURS = {
    "cli": {"effects_file", "killed_anywhere", "shared_runs", "start"},
    "data/histories": {"selectors"},
    "generation": {"best_of", "engine"},
    "mirror": {"distributed", "sharded"},
    "models": {"compile", "peft"},
    "ops": {"chunk_kernels", "cost", "operators"},
    "popi": {"distributed", "policy_gradient", "sharded"},
    "report": {"browser"},
    "training": {"distributed", "published_code", "tensor_parallel"},
    "tree": {"on_gpu", "sinks"},
}


def _modules(folder: Path) -> set[str]:
    """The names of a package, its modules and its packages."""
    packages = {path.parent.name for path in folder.glob("*/__init__.py")}
    return packages | {path.stem for path in folder.glob("*.py")} | {folder.name}


def test_each_test_file_is_named_after_a_module_or_a_listed_behaviour() -> None:
    nameless, listed = [], set()
    for file in sorted((ROOT / "tests").glob("*/**/test_*.py")):
        folder = file.parent.relative_to(ROOT / "tests")
        package, name = ROOT / "nextquill" / folder, file.stem.removeprefix("test_")
        if not (ROOT / "nextquill" / folder.parts[0]).is_dir():
            continue  # tests of what is beside the package
        if name in BEHAVIOURS.get(folder.as_posix(), ()):
            listed.add((folder.as_posix(), name))
        elif not any(name == module or name.startswith(f"{module}_") for module in _modules(package)):
            nameless.append(file.relative_to(ROOT).as_posix())
    assert not nameless, "rename them test_MODULE.py or test_MODULE_SUBJECT.py, or list their behaviour"
    assert listed == {(folder, name) for folder, names in BEHAVIOURS.items() for name in names}, "a listed file is gone"


@pytest.mark.parametrize("package", sorted(ROOT.glob("nextquill/**/__init__.py")), ids=lambda path: path.parent.name)
def test_a_list_of_a_packages_modules_is_complete(package: Path) -> None:
    said = ast.get_docstring(ast.parse(package.read_text(encoding="utf-8"))) or ""
    modules = {path.name for path in package.parent.glob("*.py")} - {"__init__.py"}
    if re.search(r"^ *\w+\.py ", said, re.MULTILINE):
        assert set(re.findall(r"\w+\.py\b", said)) == modules
