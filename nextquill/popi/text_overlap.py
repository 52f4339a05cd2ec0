"""Whether a text holds an answer, or is cut from it, but for case, white space, quotation marks and composition."""

from __future__ import annotations

import functools
import re

from nextquill.data.leaks import normalised

#: Characters from which an answer is searched inside texts, and a text in answers: shorter ones recur by chance.
LONG = 24
# What stands before a line that is quoted, listed or of a rendered pair.
_LABEL = re.compile(r"^(?:(?:not )?preferred:\s?|[>*•-]+\s+|>)+")
_QUOTES = str.maketrans({**dict.fromkeys("‘’‚‛`´", "'"), **dict.fromkeys("“”„‟«»", '"')})  # noqa: RUF001
# Soft hyphens, zero-width spaces and joiners, marks of direction, byte-order marks.
_UNSEEN = re.compile("[\u00ad\u200b-\u200f\u202a-\u202e\u2060-\u2064\ufeff]")
_CUT = "….[] "


def holds(text: str, answer: str) -> bool:
    """Whether the answer is the text, or stands in it as lines of its own, or anywhere if it has `LONG` characters.

    A line counts as the answer's with the label of a rendered pair or the sign of a quotation or list before it and
    without. A blank answer is nowhere. A text of `LONG` characters that stands in the answer, perhaps with dots where
    it was cut, is one that holds it too.
    """
    wanted = folded(answer)
    if not wanted:
        return False
    whole = folded(text)
    if whole == wanted or (len(wanted) >= LONG and wanted in whole):
        return True
    if len(part := whole.strip(_CUT)) >= LONG and part in wanted:
        return True
    lines = _folded_lines(answer)
    return bool(lines.strip()) and lines in _folded_lines(text)


@functools.lru_cache(maxsize=16_384)
def folded(text: str) -> str:
    """The text without differences of case, white space, quotation marks, composition and of what is not seen."""
    return normalised(_UNSEEN.sub("", text).translate(_QUOTES))


@functools.lru_cache(maxsize=16_384)
def _folded_lines(text: str) -> str:
    """The lines of a text that hold something, without what labels them, each between two line breaks."""
    lines = (_LABEL.sub("", folded(line)) for line in text.splitlines())
    return "\n".join(["", *(line for line in lines if line), ""])
