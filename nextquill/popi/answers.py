"""Whether a text holds an answer, but for case, white space and how characters are composed."""

from __future__ import annotations

import functools
import re

from nextquill.data.leaks import normalised

#: Characters from which an answer is searched inside texts: shorter ones recur by chance.
LONG = 24
_LABEL = re.compile(r"^(?:(?:not )?preferred:\s?)+")


def holds(text: str, answer: str) -> bool:
    """Whether the answer is the text, or stands in it as lines of its own, or anywhere if it has `LONG` characters.

    A line counts as the answer's with the label of a rendered pair before it and without. A blank answer is nowhere.
    """
    wanted = normalised(answer)
    if not wanted:
        return False
    whole = normalised(text)
    if whole == wanted or (len(wanted) >= LONG and wanted in whole):
        return True
    lines = _folded_lines(answer)
    return bool(lines.strip()) and lines in _folded_lines(text)


@functools.lru_cache(maxsize=16_384)
def _folded_lines(text: str) -> str:
    """The lines of a text that hold something, without the labels of a rendered pair, each between two line breaks."""
    lines = (_LABEL.sub("", normalised(line)) for line in text.splitlines())
    return "\n".join(["", *(line for line in lines if line), ""])
