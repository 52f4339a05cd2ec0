"""Keeps users' texts from being read as parts of the template.

A prompt joins the template, which opens and closes turns and sections, with texts by users, who can write anything.
Three things in a user's text could pass for the template's own:

    a control token's literal, such as `<|im_end|>`   the tokenizer reads it as the token, which ends the turn
    a role word, such as `ASSISTANT:`                 to a model it opens a turn, also inside a line
    a line that begins like one of the template's     `Dear reader` inside a past text could end the history early

All are changed as little as possible. Any other text keeps every token:

    <|im_end|>       ->  < |im_end|>        a space after the first character, wherever the literal stands
    hi ASSISTANT: x  ->  hi > ASSISTANT: x  quoted as in e-mail, wherever it stands
    Dear reader ...  ->  > Dear reader ...  quoted, only at the beginning of a line

A space is used because every tokenizer knows it. Zero-width characters become bytes, unknown tokens or, with some
normalisers, nothing. After this change, every role word and every line that begins like the template's is the
template's. A template or a tokenizer can still change the texts afterwards; `PromptRenderer.check` finds that.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterable, Sequence

#: Characters of texts whose results are cached, as a user's texts stand in many prompts, and twice in each record.
_KEPT_CHARACTERS = 16_000_000

# Characters that begin a new line for a reader, and so for a model, even where `re` does not count them.
_BREAKS = r"\n\r\v\f\x1c-\x1e\x85\u2028\u2029"
# White space between the parts of a marker.
_BETWEEN = rf"[^\S{_BREAKS}]+"
# A space between two characters can hide one token and, rarely, show another.
_MOST_ROUNDS = 5


class UserText:
    """Breaks literals and quotes markers in texts, and counts the changed texts.

    Args:
        literals: strings that must not occur in a text.
        markers: strings that no line of a text may begin with, with or without white space before them.
        words: strings that are quoted wherever they stand, with any white space between their parts.
        find: the places in a text where the tokenizer reads a control token that is no literal, because it normalises
            texts; None if it reads no such.
    """

    def __init__(
        self,
        literals: Iterable[str] = (),
        markers: Iterable[str] = (),
        words: Iterable[str] = (),
        find: Callable[[str], Sequence[int]] | None = None,
    ) -> None:
        self._literals = frozenset(literals) - {""}
        self._lengths = sorted(set(map(len, self._literals)))
        # A look-ahead takes no characters, so that overlapping literals are found.
        heads = [f"{re.escape(two[0])}(?={re.escape(two[1:])})" for two in {each[:2] for each in self._literals}]
        self._heads = re.compile("|".join(heads)) if heads else None
        self._markers = _marker_pattern(set(markers) - {""})
        self._words = _word_pattern(set(words) - {""})
        self._find = find
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
        if self._find is not None:
            result = _apart(result, self._find)
        return self._counted(text, result)

    def quoted(self, text: str) -> str:
        """Return `text` with its literals broken and its markers quoted."""
        known = self._kept.get(text)
        if known is not None:
            return known
        result = self.plain(text)
        if self._markers is not None:
            result = self._markers.sub(r"\g<0>> ", f"\n{result}")[1:]
        if self._words is not None:
            result = self._words.sub(_quoted_word, result)
        if self._kept_characters > _KEPT_CHARACTERS:
            self._kept, self._kept_characters = {}, 0
        self._kept_characters += len(text)
        return self._kept.setdefault(text, self._counted(text, result))

    def borders(self, prompt: str) -> int:
        """Return the number of markers and role words that are not quoted in a prompt, which are the template's own."""
        lines = 0 if self._markers is None else len(self._markers.findall(f"\n{prompt}"))
        return lines + (0 if self._words is None else sum(map(_opens, self._words.finditer(prompt))))

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


def _apart(text: str, find: Callable[[str], Sequence[int]]) -> str:
    """The text with a space after the first character of every token that `find` sees, as far as that helps."""
    for _ in range(_MOST_ROUNDS):
        starts = find(text)
        if not starts:
            break
        edges = [0, *(start + 1 for start in starts), len(text)]
        text = " ".join(text[left:right] for left, right in itertools.pairwise(edges))
    return text


def _opens(word: re.Match[str]) -> bool:
    """Whether a role word is neither quoted nor the end of a longer word."""
    text, start = word.string, word.start()
    return not (text.endswith("> ", 0, start) or (word[0][0].isalnum() and text[start - 1 : start].isalnum()))


def _quoted_word(word: re.Match[str]) -> str:
    return f"> {word[0]}" if _opens(word) else word[0]


def _word_pattern(words: set[str]) -> re.Pattern[str] | None:
    """A pattern of the words, the longest first, with any white space but line breaks between their parts."""
    whole = [_BETWEEN.join(map(re.escape, word.split())) for word in sorted(words, key=len, reverse=True)]
    return re.compile("|".join(whole)) if whole else None


def _marker_pattern(markers: set[str]) -> re.Pattern[str] | None:
    """A pattern of a line break and white space before a marker."""
    if not markers:
        return None
    whole = (
        _BETWEEN.join(map(re.escape, marker.split())) + (r"(?!\w)" if marker[-1].isalnum() else "")
        for marker in sorted(markers)
    )
    return re.compile(rf"[{_BREAKS}][^\S{_BREAKS}]*(?={'|'.join(whole)})")
