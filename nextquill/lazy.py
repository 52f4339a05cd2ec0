"""Packages whose public names are imported on first use (PEP 562), so that importing the package costs next to nothing.

    if TYPE_CHECKING:
        from nextquill.data.records import Record
    else:
        __getattr__, __dir__ = on_first_use(__name__, ("records", ...))

    __all__ = ["Record", ...]

Type checkers and editors read the first branch, which only they enter; the names are those of `__all__`.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from typing import Any


def on_first_use(
    package: str, modules: Sequence[str], needs: Mapping[str, str] | None = None
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Return the `__getattr__` and the `__dir__` of a package whose names are imported on first use.

    Args:
        package: its `__name__`.
        modules: its modules that hold the names of its `__all__`, in the order of search: those that import quickly
            first. Each of them is an attribute too, as if it had been imported.
        needs: by name, a distribution that may be missing; without it `dir` leaves the name out.
    """

    def module_getattr(name: str) -> Any:
        if name in modules:
            return importlib.import_module(f"{package}.{name}")
        namespace = vars(sys.modules[package])
        if name in namespace.get("__all__", ()):
            for module in modules:
                found = vars(importlib.import_module(f"{package}.{module}"))
                if name in found:
                    namespace[name] = found[name]  # from now on without this function
                    return found[name]
        raise AttributeError(f"module {package!r} has no attribute {name!r}")

    def module_dir() -> list[str]:
        namespace = vars(sys.modules[package])
        missing = {name for name, needed in (needs or {}).items() if find_spec(needed) is None}
        return sorted({*namespace, *namespace["__all__"]} - missing)

    return module_getattr, module_dir
