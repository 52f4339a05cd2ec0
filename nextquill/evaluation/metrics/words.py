"""Words of any script, and phrases of three of them."""

from __future__ import annotations

import re

#: Thai and Lao, kana, CJK ideographs: scripts without spaces between words.
UNSPACED = "\u0e00-\u0eff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"
#: The number of words of a phrase.
PHRASE = 3
_WORD = re.compile(rf"[{UNSPACED}]|[^\W{UNSPACED}]+")

#: Where something stands in a text: its first character, and the one after its last.
Span = tuple[int, int]
Phrase = tuple[str, ...]


def word_spans(text: str) -> list[tuple[str, Span]]:
    """The words of a text in lower case, and where each stands in it.

    A word is a run of letters, digits and underscores; of scripts without spaces between words, a character.
    """
    return [(found[0].lower(), found.span()) for found in _WORD.finditer(text)]


def phrases(text: str) -> list[Phrase]:
    """The word 3-grams of a text, in order; none of a text under three words."""
    words = [word for word, _ in word_spans(text)]
    return [tuple(words[start : start + PHRASE]) for start in range(len(words) - PHRASE + 1)]
