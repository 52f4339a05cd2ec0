"""Drafts of the next tokens, looked up in the prompt and in the text so far (prompt lookup decoding).

A model that writes as a user repeats phrases of the history, so what followed the latest tokens where they occurred
before is a cheap guess. One forward computes the scores after every token of the guess. Tokens are then chosen one by
one, as without a draft, for as long as each is the one that the draft proposed. So a draft changes how many forwards a
text takes, and no token of it. A draft that another model writes and that is accepted by chance (Leviathan et al. 2023,
arXiv 2211.17192) keeps only the distribution.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

#: The most tokens that are looked up.
_LONGEST = 6


class PromptLookup:
    """The tokens of a prompt and its response, and where each short run of them occurred last."""

    def __init__(self, ids: Sequence[int]) -> None:
        self._ids = list[int]()
        self._after = dict[tuple[int, ...], int]()  # where the token after the last occurrence stands
        self.extend(ids)

    def extend(self, tokens: Iterable[int]) -> None:
        """Append tokens of the response."""
        for token in tokens:
            for length in range(1, min(_LONGEST, len(self._ids)) + 1):
                self._after[tuple(self._ids[-length:])] = len(self._ids)
            self._ids.append(token)

    def propose(self, most: int) -> list[int]:
        """The tokens that followed the last occurrence of the longest run, of up to six, that the text ends with.

        As many as the run has, and at most `most`. Empty where the last token is new.
        """
        for length in range(min(_LONGEST, len(self._ids)), 0, -1):
            start = self._after.get(tuple(self._ids[-length:]))
            if start is not None:
                return self._ids[start : start + min(most, length)]
        return []
