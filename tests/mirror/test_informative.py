"""Which tokens of a response count for MIRROR-F."""

from __future__ import annotations

from typing import Any

import pytest

from nextquill.data.collator import IGNORE_INDEX
from nextquill.mirror.informative import InformativeTokens
from tests.models.model_helpers import word_tokenizer

END = 1


class Spaced:
    """A tokenizer of words, in which a word after a space is another token; "." and the end are tokens too."""

    all_special_ids = (END,)
    words = ("", "</s>", "apple", " apple", ".", "pear", " pear", "the", " the", "7", " ")

    def __call__(self, texts: list[str], add_special_tokens: bool) -> dict[str, Any]:
        assert not add_special_tokens, "a beginning of the text would count as one of its tokens"
        return {"input_ids": [self.encode(text) for text in texts]}

    def encode(self, text: str) -> list[int]:
        ids = []
        while text:
            word = max((word for word in self.words if word and text.startswith(word)), key=len)
            ids.append(self.words.index(word))
            text = text.removeprefix(word)
        return ids

    def decode(self, ids: list[int]) -> str:
        return "".join(self.words[id] for id in ids)


def counted(response: list[int], texts: list[str], others: list[list[int]]) -> list[int]:
    marks = InformativeTokens(Spaced(), [response, *others]).labels(response, texts)
    assert [label in (token, IGNORE_INDEX) for label, token in zip(marks, response, strict=True)] == [True] * len(marks)
    return [label for label in marks if label != IGNORE_INDEX]


def test_only_tokens_of_the_context_count_whether_or_not_a_space_precedes_them() -> None:
    response = [2, 6, 9, END]  # "apple pear7"
    assert counted(response, ["apple"], []) == [2]
    assert counted(response, ["pear"], []) == [6], "the context's word begins it, and the response's follows a space"
    assert counted(response, [" pear", "7 apple"], []) == [6, 9]
    assert counted(response, ["the"], []) == []


def test_special_tokens_and_punctuation_do_not_count() -> None:
    assert counted([2, 4, END], ["apple.</s>"], []) == [2]


@pytest.mark.parametrize(("holding", "of", "counts"), [(2, 20, True), (3, 20, False), (1, 2, True), (2, 2, False)])
def test_tokens_of_more_than_a_tenth_of_the_responses_do_not_count(holding: int, of: int, counts: bool) -> None:
    others = [[2]] * (holding - 1) + [[5]] * (of - holding)
    assert counted([2, END], ["apple"], others) == ([2] if counts else [])


def test_a_real_tokenizer() -> None:
    tokenizer = word_tokenizer()
    response = tokenizer("w1 w2 w3").input_ids
    labels = InformativeTokens(tokenizer, [response]).labels(response, ["w3 w9", "w1"])
    assert labels.tolist() == [response[0], IGNORE_INDEX, response[2]]
