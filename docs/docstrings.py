"""Keeps in docstrings, which are prose for a terminal, what Markdown would read as a link between pages."""

from __future__ import annotations

import re
from typing import Any

import griffe

#: Shapes such as [items][tokens], which Markdown reads as a link, but not in code.
_SHAPES = re.compile(r"(`[^`]*`)|\]\[")


class PlainShapes(griffe.Extension):
    """Escapes brackets after brackets in every docstring."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Griffe calls this for each object it has read."""
        if obj.docstring is not None:
            obj.docstring.value = _SHAPES.sub(_kept, obj.docstring.value)


def _kept(found: re.Match[str]) -> str:
    return found[1] or "]\\["
