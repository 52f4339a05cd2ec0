"""Tiny byte-level tokenizers, and users, for the tests of `nextquill.popi`."""

from __future__ import annotations

from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from nextquill.popi.users import Pair, User
from tests.data.conftest import (  # noqa: F401 - fixtures of the tokenizers that the tests of prompts share
    bos_byte_level,
    byte_level,
    chatml_tokenizer,
    gemma_tokenizer,
    normalising_tokenizer,
    plain_tokenizer,
    with_chat_template,
)

SPECIAL = ["<pad>", "</s>", "<|im_start|>", "<|im_end|>"]
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def _byte_level(**options: Any) -> PreTrainedTokenizerFast:
    """A tokenizer with one token per byte, 260 in all, and no merges, so that a text has as many tokens as bytes."""
    alphabet = [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE(vocab={token: place for place, token in enumerate(alphabet)}, merges=[]))
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    named = {"eos_token": "</s>", "pad_token": "<pad>", "clean_up_tokenization_spaces": False, **options}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **named)


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """A byte tokenizer without chat template; responses end with `</s>`."""
    return _byte_level()


@pytest.fixture(scope="session")
def chat_tokenizer() -> PreTrainedTokenizerFast:
    """A byte tokenizer with ChatML; responses end with `<|im_end|>`."""
    return _byte_level(chat_template=CHATML)


@pytest.fixture(scope="session")
def ann() -> User:
    """A user with six undated pairs that have nothing in common."""
    return User("ann", tuple(Pair(f"query {i}", f"ann likes {i}", f"ann dislikes {i}") for i in range(6)))
