"""The informative tokens of a user's own response, which MIRROR-F's second term counts.

The paper publishes no rule. Ours: a token of the response counts if it

    1. is also a token of the query, or of a history item in the prompt;
    2. is no special token, and its text has a letter or a digit;
    3. is rare: no more than a tenth of the data set's responses hold it, or only this one does.

The first makes it a token that the context gives away. The second leaves out white space and punctuation, the third
words such as "the", in any language, and what all texts of a data set share.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from nextquill.data.collator import IGNORE_INDEX

#: The largest share of the responses that hold a token which counts.
COMMON = 0.1


class InformativeTokens:
    """Marks the informative tokens of responses.

    Args:
        tokenizer: the model's.
        responses: the token ids of all responses of the data set.
    """

    def __init__(self, tokenizer: Any, responses: Iterable[Sequence[int]]) -> None:
        self._tokenizer, self._special = tokenizer, set(tokenizer.all_special_ids)
        each = [set(response) for response in responses]
        most = max(1.0, COMMON * len(each))
        counts = Counter(token for response in each for token in response)
        self._rare = {token for token, count in counts.items() if count <= most}
        self._words: dict[int, bool] = {}

    def labels(self, response: Sequence[int], texts: Sequence[str]) -> array[int]:
        """The response's tokens, int32, with `IGNORE_INDEX` in place of each that does not count.

        Args:
            response: the token ids of a response of the data set.
            texts: the query and the history items of its prompt.
        """
        # A tokenizer may encode a word after a space in another way than at the beginning of a text.
        encoded = self._tokenizer([start + text for text in texts for start in ("", " ")], add_special_tokens=False)
        given = {token for ids in encoded["input_ids"] for token in ids} & self._rare
        return array("i", [t if t in given and self._is_word(t) else IGNORE_INDEX for t in response])

    def _is_word(self, token: int) -> bool:
        if token not in self._words:
            text = "" if token in self._special else self._tokenizer.decode([token])
            self._words[token] = any(character.isalnum() for character in text)
        return self._words[token]
