"""Parts import only what `MAY_IMPORT` allows, as read from the syntax of every module. It is sorted bottom first."""

from __future__ import annotations

import ast
import graphlib
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LIBRARY = ("nextquill", "kernels/nextquill_kernels", "demos")

# The package's parts, bottom first, and what each may import of the others. "nextquill" is `nextquill/__init__.py`.
_VALUES = frozenset({"defaults", "devices", "errors", "outputs", "vocabulary_shard", "weighting"})
_LOSSES = _VALUES | {"functional", "losses"}
_BELOW_MODELS = _LOSSES | {"data", "ranks", "storage", "tree"}
_MODELS = _BELOW_MODELS | {"models"}
MAY_IMPORT: dict[str, frozenset[str]] = {
    "nextquill_kernels": frozenset(),
    "errors": frozenset(),
    "defaults": frozenset(),
    "devices": frozenset(),
    "lazy": frozenset(),
    "integrations": frozenset(),  # says where its modules are now
    "storage": frozenset({"errors"}),
    "ranks": frozenset({"errors", "storage"}),
    "outputs": frozenset({"errors"}),
    "vocabulary_shard": frozenset({"errors"}),
    "weighting": frozenset({"errors", "outputs"}),
    "reference": frozenset({"errors", "outputs"}),
    "ops": _VALUES | {"nextquill_kernels"},
    "functional": _VALUES | {"ops"},
    "losses": _VALUES | {"ops", "functional"},
    "tree": frozenset({"devices", "errors", "lazy"}),
    "nextquill": _VALUES | {"functional", "lazy", "losses", "tree"},
    "data": frozenset({"devices", "errors", "storage", "lazy", "tree"}),
    "models": _BELOW_MODELS,
    "generation": _MODELS,
    "evaluation": _MODELS | {"generation"},
    "training": _MODELS | {"evaluation"},
    "popi": _MODELS | {"generation", "evaluation", "training", "lazy"},
    "mirror": _MODELS | {"generation", "training", "lazy"},
    "demo": frozenset(),  # says where its modules are now
    "comparison": _MODELS | {"evaluation", "training"},
    "report": frozenset({"errors", "storage", "evaluation", "comparison"}),
    "cli": _MODELS | {"generation", "evaluation", "training", "popi", "mirror", "comparison", "report", "nextquill"},
    # Beside the package, which never imports them but by `nextquill.cli.checkout`.
    "demos": _MODELS | {"generation", "evaluation", "training", "popi", "report"},
}
# For type checkers only: these names are imported on first use.
MAY_NAME_AS_TYPE = {"nextquill": frozenset({"generation", "mirror", "models", "training"})}

HUGGING_FACE = frozenset(
    "accelerate datasets evaluate huggingface_hub peft safetensors tokenizers transformers trl".split()
)
_TORCH = frozenset({"torch"})
_TOOLS = frozenset({"matplotlib", "nltk", "rich", "rouge_score", "sacrebleu", "tqdm", "yaml"})
_RETRIEVAL = frozenset({"bm25s", "sentence_transformers"})
MAY_USE: dict[str, frozenset[str]] = {
    **dict.fromkeys(MAY_IMPORT, _TORCH),
    "defaults": frozenset(),
    "lazy": frozenset(),
    "storage": _TORCH | {"xxhash"},
    "nextquill_kernels": _TORCH | {"triton"},
    "ops": _TORCH | {"nextquill_ext"},
    "tree": _TORCH | {"flash_attn"},
    **dict.fromkeys(("errors", "demo"), frozenset()),
    "data": _TORCH | {"jinja2", "numpy", "pyarrow"} | _RETRIEVAL | HUGGING_FACE,
    "report": frozenset({"matplotlib", "rich", "tqdm"}),
    **dict.fromkeys(("popi", "mirror", "demos", "comparison", "cli"), _TORCH | {"numpy"} | _TOOLS | HUGGING_FACE),
    "generation": _TORCH | {"vllm"} | HUGGING_FACE,
    "evaluation": _TORCH | {"numpy"} | _TOOLS | HUGGING_FACE,
    "training": _TORCH | {"numpy", "tqdm"} | HUGGING_FACE,
    # ZeRO-3 partitions weights, which are gathered to be probed.
    "models": _TORCH | {"deepspeed", "gguf"} | HUGGING_FACE,
}
# These import Hugging Face packages inside functions only.
HUGGING_FACE_ON_USE = frozenset({"data"})


@dataclass(frozen=True)
class Import:
    """An import of `target`, a dotted name, on a line of a file of the part `importer`."""

    importer: str
    target: str
    place: str
    on_import: bool
    for_types: bool

    @property
    def part(self) -> str | None:
        """The part of nextquill that is imported, or None for another distribution."""
        top, *rest = self.target.split(".")
        if top == "nextquill":
            return rest[0] if rest and rest[0] in MAY_IMPORT else "nextquill"
        return top if top in ("nextquill_kernels", "demos") else None


class _Imports(ast.NodeVisitor):
    """Finds every import of a module: statements, and `import_module` or `__import__` with a literal name."""

    def __init__(self, package: str) -> None:
        self.package = package
        self.found: list[tuple[str, int, bool, bool]] = []
        self._in_function = False
        self._for_types = False

    def _add(self, target: str, node: ast.AST) -> None:
        self.found.append((target, node.lineno, not (self._in_function or self._for_types), self._for_types))  # type: ignore[attr-defined]

    def visit_Import(self, node: ast.Import) -> None:
        for alias in node.names:
            self._add(alias.name, node)

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        base = self.package.split(".")[: len(self.package.split(".")) - node.level + 1] if node.level else []
        module = ".".join([*base, *(node.module or "").split(".")]).rstrip(".")
        for alias in node.names:
            self._add(f"{module}.{alias.name}", node)

    def visit_Call(self, node: ast.Call) -> None:
        called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        if called in ("import_module", "__import__") and node.args and isinstance(node.args[0], ast.Constant):
            self._add(str(node.args[0].value), node)
        self.generic_visit(node)

    def visit_FunctionDef(self, node: ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) -> None:
        before, self._in_function = self._in_function, True
        self.generic_visit(node)
        self._in_function = before

    visit_AsyncFunctionDef = visit_Lambda = visit_FunctionDef  # noqa: N815

    def visit_If(self, node: ast.If) -> None:
        before = self._for_types
        self._for_types = before or ast.unparse(node.test).endswith("TYPE_CHECKING")
        for child in node.body:
            self.visit(child)
        self._for_types = before
        for child in node.orelse:
            self.visit(child)


def modules_below(root: Path, *folders: str) -> Iterator[tuple[Path, tuple[str, ...], _Imports]]:
    """Every module of the packages `root/folder`: its file, the parts of its name, and its imports."""
    for package in (root / folder for folder in folders):
        for path in sorted(package.rglob("*.py")):
            names = path.relative_to(package.parent).with_suffix("").parts
            imports = _Imports(".".join(names[:-1]))
            imports.visit(ast.parse(path.read_text(encoding="utf-8"), feature_version=(3, 10)))
            yield path, names, imports


def imports_below(root: Path) -> Iterator[Import]:
    """The imports of all modules of the library."""
    for path, names, imports in modules_below(root, *LIBRARY):
        inside = names[1] if names[0] == "nextquill" and names[1] != "__init__" else names[0]
        for target, line, on_import, for_types in imports.found:
            yield Import(inside, target, f"{path.relative_to(root)}:{line}", on_import, for_types)


def circle_below(root: Path) -> list[str]:
    """Modules that import each other when they are imported, in a circle; the last is the first. Empty without one."""
    targets = {
        ".".join(names[:-1] if names[-1] == "__init__" else names): [
            target for target, _, on_import, _ in imports.found if on_import
        ]
        for _, names, imports in modules_below(root, *LIBRARY, "benchmarks")
    }

    def module(target: str) -> str:
        """The module that holds `target`, which may be a name in it; empty for one of another distribution."""
        while target and target not in targets:
            target = target.rpartition(".")[0]
        return target

    graph = {name: {module(target) for target in found} - {name} for name, found in targets.items()}
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        circle: list[str] = error.args[1]
        return circle
    return []


def violation(found: Import) -> str | None:
    """The rule that an import breaks, or None."""
    here, part = found.importer, found.part
    if here not in MAY_IMPORT:
        return f"{found.place}: {here} has no entry in MAY_IMPORT"
    if part is not None:
        allowed = MAY_IMPORT[here] | (MAY_NAME_AS_TYPE.get(here, frozenset()) if found.for_types else frozenset())
        return None if part == here or part in allowed else f"{found.place}: {here} must not import {part}"
    top = found.target.split(".")[0]
    if top in sys.stdlib_module_names:
        return None
    if top not in MAY_USE[here]:
        return f"{found.place}: {here} must not use {top}"
    if here == "nextquill_kernels" and found.target.startswith("torch.nn"):
        return f"{found.place}: {here} must not use torch.nn"
    if found.on_import and top in HUGGING_FACE and here in HUGGING_FACE_ON_USE:
        return f"{found.place}: {here} must import {top} inside the function that uses it"
    return None


def violations_below(root: Path) -> list[str]:
    return [each for each in map(violation, imports_below(root)) if each is not None]


def test_imports_follow_the_graph() -> None:
    assert violations_below(ROOT) == []


def test_graph_was_read_from_the_real_package() -> None:
    edges = {(each.importer, each.part) for each in imports_below(ROOT)}
    assert {("losses", "ops"), ("functional", "ops"), ("ops", "nextquill_kernels"), ("ops", "ops")} <= edges
    assert [here for here, part in edges if part == "reference"] == ["reference"], "the oracle judges the others"


def test_graph_points_one_way() -> None:
    assert {part for targets in MAY_IMPORT.values() for part in targets} <= MAY_IMPORT.keys()
    order = list(graphlib.TopologicalSorter(MAY_IMPORT).static_order())
    for parts in (["losses", "models", "training", "popi", "cli"], ["training", "popi", "demos"]):
        assert sorted(parts, key=order.index) == parts


def test_kernels_folder_is_not_importable_under_that_name() -> None:
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert (ROOT / "kernels" / "nextquill_kernels" / "__init__.py").exists()


def classes_below(root: Path) -> dict[str, list[str]]:
    """Where each class name of the library is defined."""
    found: dict[str, list[str]] = {}
    for path, _, _ in modules_below(root, *LIBRARY):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), feature_version=(3, 10))):
            if isinstance(node, ast.ClassDef):
                found.setdefault(node.name, []).append(f"{path.relative_to(root)}:{node.lineno}")
    return found


def test_no_class_name_has_two_meanings() -> None:
    found = classes_below(ROOT)
    assert {"PerCELoss", "Evaluation", "Tile"} <= found.keys()
    assert {name: places for name, places in found.items() if len(places) > 1} == {}


def write_modules(root: Path, sources: dict[str, str]) -> None:
    for path, source in sources.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(source + "\n", encoding="utf-8")


PLANTED = {
    "losses-uses-transformers": ("nextquill/losses.py", "import transformers", "losses must not use transformers"),
    "ops-points-up": ("nextquill/ops/x.py", "from nextquill.losses import PerCELoss", "ops must not import losses"),
    "ops-points-up-by-name": (
        "nextquill/ops/x.py",
        "from nextquill import functional",
        "ops must not import functional",
    ),
    "ops-points-to-root": ("nextquill/ops/x.py", "from nextquill import PairNLL", "ops must not import nextquill"),
    "relative": ("nextquill/ops/x.py", "from ..losses import PerCELoss", "ops must not import losses"),
    "relative-package": ("nextquill/ops/__init__.py", "from .. import losses", "ops must not import losses"),
    "in-function": ("nextquill/ops/x.py", "def f():\n    import nextquill.cli.main", "ops must not import cli"),
    "by-string": (
        "nextquill/ops/x.py",
        "import importlib\nimportlib.import_module('nextquill.cli')",
        "ops must not import cli",
    ),
    "for-types": (
        "nextquill/reference/x.py",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import nextquill.ops.row_groups",
        "reference must not import ops",
    ),
    "root-points-up": (
        "nextquill/__init__.py",
        "import nextquill.training",
        "nextquill must not import training",
    ),
    "kernels-import-package": (
        "kernels/nextquill_kernels/x.py",
        "import nextquill.errors",
        "nextquill_kernels must not import errors",
    ),
    "kernels-use-nn": (
        "kernels/nextquill_kernels/x.py",
        "from torch import nn",
        "nextquill_kernels must not use torch.nn",
    ),
    "report-imports-losses": ("nextquill/report/x.py", "import nextquill.losses", "report must not import losses"),
    "report-uses-torch": ("nextquill/report/x.py", "import torch", "report must not use torch"),
    "data-loads-datasets": (
        "nextquill/data/x.py",
        "try:\n    import datasets\nexcept ImportError:\n    datasets = None",
        "data must import datasets inside the function that uses it",
    ),
    "package-imports-demos": ("nextquill/models/x.py", "import demos.losses", "models must not import demos"),
    "command-imports-demos": (
        "nextquill/cli/x.py",
        "def run():\n    from demos.kit import run",
        "cli must not import demos",
    ),
    "demos-import-cli": ("demos/kit/x.py", "import nextquill.cli.main", "demos must not import cli"),
    "undeclared-package": ("nextquill/cli/x.py", "import requests", "cli must not use requests"),
    "unknown-part": ("nextquill/extras/x.py", "import torch", "extras has no entry in MAY_IMPORT"),
}


@pytest.mark.parametrize(("path", "source", "complaint"), PLANTED.values(), ids=PLANTED.keys())
def test_planted_import_is_caught(tmp_path: Path, path: str, source: str, complaint: str) -> None:
    write_modules(tmp_path, {path: source})
    found = violations_below(tmp_path)
    assert len(found) == 1
    assert re.fullmatch(rf"{re.escape(path)}:\d+: {re.escape(complaint)}", found[0])


def test_no_modules_import_each_other() -> None:
    assert circle_below(ROOT) == []


CIRCLES = {
    "two": {
        "nextquill/ops/a.py": "from nextquill.ops.b import name",
        "nextquill/ops/b.py": "import nextquill.ops.a",
    },
    "three-over-two-packages": {
        "nextquill/a.py": "from nextquill.ops import b",
        "nextquill/ops/b.py": "from nextquill.c import name",
        "nextquill/c.py": "from .a import name",
    },
    "a-package-and-its-module": {
        "nextquill/ops/__init__.py": "from nextquill.ops.a import name",
        "nextquill/ops/a.py": "from nextquill.ops import name",
    },
    "in-a-class": {
        "benchmarks/a.py": "class A:\n    from benchmarks.peers.b import name",
        "benchmarks/peers/b.py": "import benchmarks.a",
    },
    "demos": {"demos/a.py": "from demos import b", "demos/b.py": "from demos import a"},
}


@pytest.mark.parametrize("sources", CIRCLES.values(), ids=CIRCLES.keys())
def test_planted_circle_is_caught(tmp_path: Path, sources: dict[str, str]) -> None:
    write_modules(tmp_path, sources)
    planted = {path.removesuffix(".py").removesuffix("/__init__").replace("/", ".") for path in sources}
    assert set(circle_below(tmp_path)) == planted


NO_CIRCLES = {
    "in-a-function": "def f():\n    from nextquill.ops.b import name",
    "for-types": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from nextquill.ops.b import name",
    "of-the-package": "import nextquill.ops",
    "of-itself": "from nextquill.ops.a import name",
}


@pytest.mark.parametrize("source", NO_CIRCLES.values(), ids=NO_CIRCLES.keys())
def test_imports_one_way_are_not_a_circle(tmp_path: Path, source: str) -> None:
    back = "from nextquill.ops.a import name"
    write_modules(tmp_path, {"nextquill/ops/__init__.py": "", "nextquill/ops/a.py": source, "nextquill/ops/b.py": back})
    assert circle_below(tmp_path) == []


ALLOWED = {
    "lazy-hugging-face": ("nextquill/data/x.py", "def f():\n    import datasets"),
    "type-only-hugging-face": (
        "nextquill/data/x.py",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import transformers",
    ),
    "ops-on-kernels": ("nextquill/ops/x.py", "import nextquill_kernels.pair"),
    "standard-library": ("nextquill/errors.py", "import json.decoder"),
}


@pytest.mark.parametrize(("path", "source"), ALLOWED.values(), ids=ALLOWED.keys())
def test_allowed_import_passes(tmp_path: Path, path: str, source: str) -> None:
    write_modules(tmp_path, {path: source})
    assert violations_below(tmp_path) == []


_WITHOUT_OPTIONAL_PACKAGES = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {absent!r}:
            raise ModuleNotFoundError("absent here: " + name, name=name)

sys.meta_path.insert(0, Absent())
import nextquill, nextquill.data, nextquill.evaluation.results, nextquill.report.html, nextquill_kernels
for name in nextquill.data.__all__:
    getattr(nextquill.data, name)
assert nextquill.PerCELoss and not any(name.split(".")[0] in {absent!r} for name in sys.modules)
"""


def test_package_imports_with_torch_alone() -> None:
    source = _WITHOUT_OPTIONAL_PACKAGES.format(
        absent=sorted(HUGGING_FACE | _TOOLS | _RETRIEVAL | {"jinja2", "pyarrow", "triton", "vllm"})
    )
    subprocess.run([sys.executable, "-c", source], check=True, cwd=ROOT, timeout=120)
