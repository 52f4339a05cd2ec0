"""Words of any script, and phrases of three of them."""

from __future__ import annotations

import re
from collections.abc import Container

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


def copied(text: str, known: Container[Phrase]) -> tuple[int, int, list[Span]]:
    """How many of a text's phrases are known, how many it has, and where the words of known ones stand.

    Words of known phrases that follow each other are one place; the places are in order and apart.
    """
    words, hits = word_spans(text), [phrase in known for phrase in phrases(text)]
    is_known = [any(hits[max(0, at - PHRASE + 1) : at + 1]) for at in range(len(words))]
    spans: list[Span] = []
    for at, (_, (start, end)) in enumerate(words):
        if is_known[at] and at and is_known[at - 1]:
            spans[-1] = (spans[-1][0], end)
        elif is_known[at]:
            spans.append((start, end))
    return sum(hits), len(hits), spans
