"""Docstrings say what a caller must know: what each public thing does, and of every tensor its shape and dtype."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]
#: Commands are exempt: their flags say what they do.
EXCEPT = ("nextquill/cli/",)
MODULES = sorted(
    path.relative_to(ROOT).as_posix()
    for room in ("nextquill", "kernels")
    for path in (ROOT / room).rglob("*.py")
    if not any(part.startswith("_") and part != "__init__.py" for part in path.relative_to(ROOT).parts)
    and not path.relative_to(ROOT).as_posix().startswith(EXCEPT)
)
#: `[N, D]`, "scalar", "labels' shape", "as `x`": what tells a shape.
SHAPE = re.compile(r"\[[^\[\]]*[A-Za-z0-9][^\[\]]*\]|\bscalars?\b|\bshapes?\b|\bas (?:in |for )?`")
DTYPE = re.compile(
    r"\b(?:float|int|bfloat)\d+\b|\bbool\b|\bdtypes?\b|\bfloating\b|\bintegers?\b|\bas (?:in |for )?`", re.IGNORECASE
)
#: "As `forward`, with …": what is not described is as it is there.
DELEGATES = re.compile(r"\b[Aa]s (?:in |for )?`")
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
Function = ast.FunctionDef | ast.AsyncFunctionDef


class Public(NamedTuple):
    """A public function, method or class of the source."""

    name: str
    node: Function | ast.ClassDef
    owner: ast.ClassDef | None

    @property
    def text(self) -> str:
        return ast.get_docstring(self.node) or ""


def public_of(module: str) -> list[Public]:
    return list(_public(ast.parse((ROOT / module).read_text(encoding="utf-8")), None))


def _public(parent: ast.Module | ast.ClassDef, owner: ast.ClassDef | None) -> Iterator[Public]:
    for node in parent.body:
        if not isinstance(node, (*FUNCTIONS, ast.ClassDef)) or node.name.startswith("_") or _is_setter(node):
            continue
        yield Public(f"{owner.name}.{node.name}" if owner else node.name, node, owner)
        if isinstance(node, ast.ClassDef):
            yield from _public(node, node)


def _is_setter(node: ast.AST) -> bool:
    """Its property has the docstring."""
    return any(
        isinstance(each, ast.Attribute) and each.attr == "setter" for each in getattr(node, "decorator_list", ())
    )


class Wanted(NamedTuple):
    """A tensor that a docstring has to describe."""

    where: str
    name: str  # empty for what is returned
    text: str  # of the docstring in charge
    around: str  # of the class about it


def tensors_of(module: str) -> Iterator[Wanted]:
    for each in public_of(module):
        if isinstance(each.node, ast.ClassDef):
            for field in each.node.body:
                if not (isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)):
                    continue
                if _holds(field.annotation) and not field.target.id.startswith("_"):
                    yield Wanted(each.name, field.target.id, each.text, "")
            for method in each.node.body:
                if isinstance(method, FUNCTIONS) and method.name in ("__init__", "__call__"):
                    text = f"{each.text}\n\n{ast.get_docstring(method) or ''}"
                    yield from _of_function(f"{each.name}.{method.name}", method, text, "")
        else:
            around = (ast.get_docstring(each.owner) or "") if each.owner else ""
            yield from _of_function(each.name, each.node, each.text, around)


def _of_function(where: str, node: Function, text: str, around: str) -> Iterator[Wanted]:
    arguments = node.args
    for each in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs):
        if _holds(each.annotation):
            yield Wanted(where, each.arg, text, around)
    if _holds(node.returns):
        yield Wanted(where, "", text, around)


def _holds(annotation: ast.expr | None) -> bool:
    """Whether there is a tensor in it, those of callables left out."""
    if annotation is None:
        return False
    if isinstance(annotation, ast.Subscript) and ast.unparse(annotation.value).endswith("Callable"):
        return False
    if isinstance(annotation, ast.Name):
        return annotation.id == "Tensor"
    if isinstance(annotation, ast.Attribute):
        return annotation.attr == "Tensor"
    return any(_holds(child) for child in ast.iter_child_nodes(annotation) if isinstance(child, ast.expr))


def entries(text: str) -> tuple[dict[str, str], str]:
    """The entries of a docstring's arguments and attributes by name, and what is left of it."""
    found, prose, names, inside = dict[str, str](), list[str](), tuple[str, ...](), False
    for line in text.splitlines():
        if re.match(r"(?:Args|Attributes):$", line):
            inside, names = True, ()
        elif inside and line and not line.startswith(" "):
            inside = False
        if not inside:
            prose.append(line)
        elif head := re.match(r"    ((?:\*{0,2}\w+, )*\*{0,2}\w+):\s*(.*)", line):
            names = tuple(name.strip(" *") for name in head[1].split(","))
            found.update(dict.fromkeys(names, head[2]))
        else:
            found.update({name: f"{found[name]} {line.strip()}" for name in names})
    return found, "\n".join(prose)


def missing(module: str) -> list[str]:
    """What the docstrings of a module leave out."""
    found = list[str]()
    for tensor in tensors_of(module):
        by_name, prose = entries(tensor.text)
        what = f"{tensor.where}: {tensor.name or 'what is returned'}"
        if tensor.name in by_name:
            said = by_name[tensor.name]
        elif not tensor.name or re.search(rf"\b{tensor.name}\b", prose) or DELEGATES.search(prose):
            said = prose
        else:
            said = ""
        if not SHAPE.search(said):
            found.append(f"{what}: no shape")
        if not DTYPE.search(tensor.text + tensor.around):
            found.append(f"{tensor.where}: no dtype")
    return list(dict.fromkeys(found))


@pytest.mark.parametrize("module", [module for module in MODULES if any(tensors_of(module))])
def test_every_tensor_has_a_shape_and_a_dtype(module: str) -> None:
    """As `[N, D]`, "scalar", "labels' shape" or "as in `x`": in the argument's entry or, without one, in the text."""
    assert missing(module) == []


@pytest.mark.parametrize("module", MODULES)
def test_every_public_thing_is_documented_and_annotated(module: str) -> None:
    found = list[str]()
    for each in public_of(module):
        if not each.text:
            found.append(f"{each.name}: no docstring")
        if not isinstance(each.node, ast.ClassDef) and not _is_kernel(each.node):
            arguments = each.node.args
            every = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, arguments.vararg, arguments.kwarg]
            own = every[1:] if each.owner and not _is_static(each.node) else every
            found += [
                f"{each.name}: {one.arg} has no type" for one in own if one is not None and one.annotation is None
            ]
            found += [] if each.node.returns else [f"{each.name}: no type of what is returned"]
    assert found == []


def _is_kernel(node: Function) -> bool:
    """Triton knows the types of a kernel's arguments when it is called."""
    return any(isinstance(each, ast.Call) and ast.unparse(each.func) == "jit" for each in node.decorator_list)


def _is_static(node: Function) -> bool:
    return any(isinstance(each, ast.Name) and each.id == "staticmethod" for each in node.decorator_list)


ENTRIES = "\n\n    Args:\n        x: [N], int64.\n    "


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ('def f(x: Tensor) -> int:\n    """Counts."""', ["f: x: no shape", "f: no dtype"]),
        (f'def f(x: Tensor) -> int:\n    """Counts.{ENTRIES}"""', []),
        (f'def f(x: Tensor) -> Tensor:\n    """Counts.{ENTRIES}"""', ["f: what is returned: no shape"]),
        (f'def f(x: Tensor, y: Tensor) -> int:\n    """Of [N] `x`.{ENTRIES}"""', ["f: y: no shape"]),
        ('class A:\n    """One.\n\n    Attributes:\n        x: int64.\n    """\n    x: Tensor', ["A: x: no shape"]),
        ('class A:\n    """One."""\n    def f(self) -> Tensor:\n        """bool [N]."""', []),
        ('def f(x: Callable[[Tensor], Tensor]) -> None:\n    """Calls."""', []),
    ],
    ids=["nothing", "both", "result", "other", "field", "method", "callable"],
)
def test_what_is_left_out_is_noticed(
    source: str, expected: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    (tmp_path / "module.py").write_text(source, encoding="utf-8")
    assert missing("module.py") == expected
