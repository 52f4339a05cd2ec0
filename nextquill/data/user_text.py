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
        self._literals = _literal_pattern(set(literals) - {""})
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
        result = text if self._literals is None else self._literals.sub(_with_space, text)
        return self._counted(text, result)

    def quoted(self, text: str) -> str:
        """Return `text` with its literals broken and its markers quoted."""
        known = self._kept.get(text)
        if known is not None:
            return known
        result = self.plain(text)
        if self._markers is not None:
            result = self._markers.sub(r"\g<0>> ", f"\n{result}")[1:]
        self._keep(text, result)
        return self._counted(text, result)

    def _keep(self, text: str, result: str) -> None:
        if self._kept_characters > _KEPT_CHARACTERS:
            self._kept, self._kept_characters = {}, 0
        self._kept[text] = text if result == text else result
        self._kept_characters += len(text)

    def _counted(self, text: str, result: str) -> str:
        if result != text:
            self._changed.add(hash(text))
        return result


def _with_space(found: re.Match[str]) -> str:
    """The first character of a literal and a space; only the space if the literal is a single character."""
    return " " if found.lastindex else f"{found[0]} "


def _literal_pattern(literals: set[str]) -> re.Pattern[str] | None:
    """A pattern of the first character of every literal. A look-ahead matches the rest, so that overlaps are found.

    Alternatives begin with plain characters, so that text without any of them is scanned fast. Literals share common
    beginnings, because one public tokenizer has 6,000 literals.
    """
    if not literals:
        return None
    single = {literal for literal in literals if len(literal) == 1}
    branches = [f"({re.escape(literal)})" for literal in sorted(single)]
    for head in sorted({literal[0] for literal in literals} - single):
        rest = _any_of({literal[1:] for literal in literals if literal[0] == head})
        branches.append(f"{re.escape(head)}(?={rest})")
    return re.compile("|".join(branches))


def _any_of(words: set[str]) -> str:
    """A pattern of the shortest of `words` that follows in a text."""
    if "" in words:
        return ""
    branches = [
        re.escape(head) + _any_of({word[1:] for word in words if word[0] == head})
        for head in sorted({word[0] for word in words})
    ]
    return branches[0] if len(branches) == 1 else f"(?:{'|'.join(branches)})"


def _marker_pattern(markers: set[str]) -> re.Pattern[str] | None:
    """A pattern of a line break and white space before a marker."""
    if not markers:
        return None
    whole = (re.escape(marker) + (r"(?!\w)" if marker[-1].isalnum() else "") for marker in sorted(markers))
    return re.compile(rf"[{_BREAKS}][^\S{_BREAKS}]*(?={'|'.join(whole)})")
