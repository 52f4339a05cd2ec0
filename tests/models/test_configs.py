"""Limits of a model that its tokenizer and prompts have to keep."""

from __future__ import annotations

import pytest

from nextquill.errors import ArgumentError
from nextquill.models.configs import check_vocabulary
from tests.models.model_helpers import VOCABULARY, tiny_model, word_tokenizer


def test_every_token_id_needs_an_embedding() -> None:
    unused = VOCABULARY - len(word_tokenizer())
    check_vocabulary(tiny_model(), word_tokenizer(unused))
    with pytest.raises(ArgumentError, match=f"ids go up to {VOCABULARY}, the model has {VOCABULARY} embeddings"):
        check_vocabulary(tiny_model(), word_tokenizer(unused + 1))
