"""Keeps users' texts from being read as parts of the template.

A prompt joins the template, which opens and closes turns and sections, with texts by users, who can write anything.
Two things in a user's text could pass for the template's own:

    a control token's literal, such as `<|im_end|>`   the tokenizer reads it as the token, which ends the turn
    a line that begins like one of the template's     `[Response]:` inside a past text ends the history early

Both are changed as little as possible. Any other text keeps every token:

    <|im_end|>       ->  < |im_end|>        a space after the first character, wherever the literal stands
    [Response]: ...  ->  > [Response]: ...  quoted as in e-mail, only at the beginning of a line

A space is used because every tokenizer knows it. Zero-width characters become bytes, unknown tokens or, with some
normalisers, nothing. After this change, every line that begins like the template's is the template's.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

#: Characters of texts whose results are cached, as a user's texts stand in many prompts, and twice in each record.
_KEPT_CHARACTERS = 16_000_000

# Characters that begin a new line for a reader, and so for a model, even where `re` does not count them.
_BREAKS = r"\n\r\v\f\x1c-\x1e\x85\u2028\u2029"


class UserText:
    """Breaks literals and quotes markers in texts, and counts the changed texts.

    Args:
        literals: strings that must not occur in a text.
        markers: strings that no line of a text may begin with, with or without white space before them.
    """

    def __init__(self, literals: Iterable[str] = (), markers: Iterable[str] = ()) -> None:
        self._literals = frozenset(literals) - {""}
        self._lengths = sorted(set(map(len, self._literals)))
        # A look-ahead takes no characters, so that overlapping literals are found.
        heads = [f"{re.escape(two[0])}(?={re.escape(two[1:])})" for two in {each[:2] for each in self._literals}]
        self._heads = re.compile("|".join(heads)) if heads else None
        self._markers = _marker_pattern(set(markers) - {""})
        self._changed: set[int] = set()
        self._kept: dict[str, str] = {}
        self._kept_characters = 0

    @property
    def changed(self) -> int:
        """The number of different texts changed so far in this process."""
        return len(self._changed)

    def plain(self, text: str) -> str:
        """Return `text` with its literals broken."""
        result = text if self._heads is None else self._heads.sub(self._broken, text)
        return self._counted(text, result)

    def quoted(self, text: str) -> str:
        """Return `text` with its literals broken and its markers quoted."""
        known = self._kept.get(text)
        if known is not None:
            return known
        result = self.plain(text)
        if self._markers is not None:
            result = self._markers.sub(r"\g<0>> ", f"\n{result}")[1:]
        if self._kept_characters > _KEPT_CHARACTERS:
            self._kept, self._kept_characters = {}, 0
        self._kept_characters += len(text)
        return self._kept.setdefault(text, self._counted(text, result))

    def _broken(self, head: re.Match[str]) -> str:
        """A character, with a space after it where a literal begins; only the space for a literal of one character."""
        text, start = head.string, head.start()
        if head[0] in self._literals:
            return " "
        # Literals are looked up by length, because one public tokenizer has 6,000 of them.
        found = any(text[start : start + length] in self._literals for length in self._lengths)
        return f"{head[0]} " if found else head[0]

    def _counted(self, text: str, result: str) -> str:
        if result == text:
            return text  # so that no second copy is kept
        self._changed.add(hash(text))
        return result


def _marker_pattern(markers: set[str]) -> re.Pattern[str] | None:
    """A pattern of a line break and white space before a marker."""
    if not markers:
        return None
    whole = (re.escape(marker) + (r"(?!\w)" if marker[-1].isalnum() else "") for marker in sorted(markers))
    return re.compile(rf"[{_BREAKS}][^\S{_BREAKS}]*(?={'|'.join(whole)})")
