"""The public API, as a table for readers and as signatures that a test compares with the stored ones.

    python -m tools.public_api    # after a deliberate change: writes both again

The table is docs/reference/api.md, the signatures are tests/golden/public_api.txt. Public is what `__all__` of the
packages below lists, the trainer that needs TRL, and the names of the commands.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import re
import textwrap
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "reference" / "api.md"
SIGNATURES = ROOT / "tests" / "golden" / "public_api.txt"
#: Each package, its heading on the page, and the pages that say more.
PACKAGES = {
    "nextquill": ("Losses, operators and the trainer", ("losses", "operators", "training", "errors")),
    "nextquill.tree": ("Prefix trees", ("tree",)),
    "nextquill.data": ("Data", ("data",)),
    "nextquill.popi": ("Summaries of users: POPI", ("popi",)),
    "nextquill.training.trl": ("Training with TRL", ("training",)),
}
_NO_BREAK = "\u00a0"  # within an argument, while lines are broken between arguments
_NAMES = {"nextquill.training.trl": ["CausalSFTTrainer"]}  # where a module has no `__all__`
_START, _END = "<!-- api -->\n", "<!-- end api -->\n"


def public_names(package: str) -> list[str]:
    """The public names of a package, sorted."""
    return sorted(_NAMES.get(package) or importlib.import_module(package).__all__, key=str.lower)


def page() -> str:
    """The page as it should be: the text around the marks is kept."""
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(_START)
    return f"{before}{_START}\n{_tables()}\n{_END}{rest.partition(_END)[2]}"


def signatures() -> str:
    """Every public name with its signature; under a class, its public members."""
    lines = list[str]()
    for package in PACKAGES:
        lines += ["", package]
        module = importlib.import_module(package)
        for name in public_names(package):
            lines += _described(name, getattr(module, name))
    lines += ["", "nextquill COMMAND", *(f"    {name}" for name in _commands())]
    return "\n".join(lines[1:]) + "\n"


def _tables() -> str:
    parts = list[str]()
    for package, (heading, pages) in PACKAGES.items():
        links = ", ".join(f"[{name}]({name}.md)" for name in pages)
        module = importlib.import_module(package)
        names = {name: _summary(module, name) for name in public_names(package)}
        parts.append(_table(heading, f"Import from `{package}`.\nMore: {links}.", "| name | what it is |", names))
    commands = {f"nextquill {name}": text for name, text in _commands().items()}
    parts.append(_table("Commands", "More: [command line](command-line.md).", "| command | what it does |", commands))
    return "\n".join(parts)


def _table(heading: str, lead: str, head: str, rows: dict[str, str]) -> str:
    lines = (f"| `{name}` | {text} |\n" for name, text in rows.items())
    return f"## {heading}\n\n{lead}\n\n{head}\n|---|---|\n{''.join(lines)}"


def _summary(module: ModuleType, name: str) -> str:
    """The first paragraph of a docstring; of a constant, the comment above it."""
    value = getattr(module, name)
    if callable(value) or isinstance(value, ModuleType):
        text = (inspect.getdoc(value) or "").partition("\n\n")[0]
    else:
        comment = re.search(rf"^#: (.*)\n{name}\b", inspect.getsource(module), re.MULTILINE)
        text = comment[1] if comment else ""
    return " ".join(text.split()).replace("|", "\\|")


def _commands() -> dict[str, str]:
    from nextquill.cli.main import COMMANDS
    from nextquill.cli.popi import SUBCOMMANDS

    own = {name: text for name, text in COMMANDS.items() if name != "popi"}
    return dict(sorted((own | {f"popi {name}": text for name, text in SUBCOMMANDS.items()}).items()))


def _described(name: str, value: Any) -> Iterator[str]:
    if isinstance(value, ModuleType):
        yield f"    module {name}"
    elif isinstance(value, type) and issubclass(value, Exception):
        yield f"    exception {name}({', '.join(base.__name__ for base in value.__bases__)})"
    elif isinstance(value, type):
        yield _line(f"class {name}{_signature(value)}", 4)
        for member, found in sorted(_members(value).items()):
            yield _line(f"{member}{found}", 8)
    elif callable(value):
        yield _line(f"{name}{_signature(value)}", 4)
    else:
        yield f"    {name} = {value!r}"


def _members(cls: type) -> dict[str, str]:
    """The public methods, properties and class attributes of a class, by name, with what follows the name.

    What overrides a method of transformers' or TRL's trainers is theirs to document.
    """
    trainers = [each for each in cls.__mro__ if each.__module__.partition(".")[0] in ("transformers", "trl")]
    found = dict[str, str]()
    fields = {field.name for field in dataclasses.fields(cls)} if dataclasses.is_dataclass(cls) else set()
    fields |= {*getattr(cls, "_fields", ())}
    for each in reversed(cls.__mro__):
        if not each.__module__.startswith("nextquill"):
            continue
        for name, value in vars(each).items():
            if name.startswith("_") or name in fields or any(name in vars(trainer) for trainer in trainers):
                continue
            if isinstance(value, (property, cached_property)):
                found[name] = ""
            elif inspect.isroutine(value):
                found[name] = _signature(
                    getattr(each, name), is_method=not isinstance(value, (staticmethod, classmethod))
                )
            elif name in inspect.get_annotations(each):
                found[name] = f" = {value!r}"
    return found


def _signature(value: Any, *, is_method: bool = False) -> str:
    """The signature as written, with the values of defaults; the same text under every version of Python."""
    parsed = inspect.signature(value)
    parameters = list(parsed.parameters.values())[is_method:]
    shown, kinds = list[str](), [each.kind for each in parameters]
    star = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}
    for index, each in enumerate(parameters):
        is_first_by_name = each.kind is inspect.Parameter.KEYWORD_ONLY and index == kinds.index(each.kind)
        if is_first_by_name and inspect.Parameter.VAR_POSITIONAL not in kinds:
            shown.append("*")
        text = star.get(each.kind, "") + each.name
        if each.annotation is not inspect.Parameter.empty:
            text += f": {_type(each.annotation)}"
        if each.default is not inspect.Parameter.empty:
            text += f" = {_default(each.default)}"
        shown.append(text.replace(" ", _NO_BREAK))
    returned = parsed.return_annotation
    is_shown = returned is not inspect.Signature.empty and not isinstance(value, type)
    return f"({', '.join(shown)})" + (f" -> {_type(returned)}".replace(" ", _NO_BREAK) if is_shown else "")


def _type(annotation: Any) -> str:
    if isinstance(annotation, str):
        return annotation
    return getattr(annotation, "__forward_arg__", None) or inspect.formatannotation(annotation)


def _default(value: Any) -> str:
    """Not the address of an object, nor the place of a default factory."""
    return "..." if re.search(r" at 0x|^<", repr(value)) else repr(value)


def _line(text: str, indent: int) -> str:
    spaces = {"initial_indent": " " * indent, "subsequent_indent": " " * (indent + 6)}
    wrapped = textwrap.fill(text, 120, break_long_words=False, break_on_hyphens=False, **spaces)
    return wrapped.replace(_NO_BREAK, " ")


def main() -> None:
    """Write the page and the stored signatures again."""
    PAGE.write_text(page(), encoding="utf-8")
    SIGNATURES.write_text(signatures(), encoding="utf-8")


if __name__ == "__main__":
    main()
