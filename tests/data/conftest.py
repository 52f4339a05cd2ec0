"""Small real tokenizers, and a function that makes records, for the tests of `nextquill.data`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

from nextquill.data import HistoryItem, Record

SPECIAL = ["<s>", "</s>", "<pad>", "<|im_start|>", "<|im_end|>", "<start_of_turn>", "<end_of_turn>"]
CORPUS = [
    "[Request]:\n[User's past texts]:\n[Title]: a tale\n[Text]: I loved the plot and the slow ending.\n\n[Response]:\n",
    "The plot was thin, the prose was not. None of it mattered to me, and nobody else minded either.",
    "Write a review of the record titled: songs of the sea\n\n\n\nNothing but waves,    and waves again.",
] * 3

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
GEMMA = (
    "<s>{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    "<start_of_turn>{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n{{ m['content'] | trim }}<end_of_turn>\n"
    "{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)


def _train(pre_tokenizer: pre_tokenizers.PreTokenizer | None, vocab_size: int) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    if pre_tokenizer is not None:
        tokenizer.pre_tokenizer = pre_tokenizer
        tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet() if pre_tokenizer is not None else []
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def _wrap(tokenizer: Tokenizer, **options: Any) -> PreTrainedTokenizerFast:
    copy = Tokenizer.from_str(tokenizer.to_str())
    named = {"eos_token": "</s>", "pad_token": "<pad>", "clean_up_tokenization_spaces": False, **options}
    return PreTrainedTokenizerFast(tokenizer_object=copy, **named)


@pytest.fixture(scope="session")
def byte_level() -> Tokenizer:
    return _train(pre_tokenizers.ByteLevel(add_prefix_space=False), vocab_size=400)


@pytest.fixture(scope="session")
def plain_tokenizer(byte_level: Tokenizer) -> PreTrainedTokenizerFast:
    """A tokenizer without chat template and beginning-of-sequence token."""
    return _wrap(byte_level)


@pytest.fixture(scope="session")
def bos_byte_level(byte_level: Tokenizer) -> Tokenizer:
    """A tokenizer that puts `<s>` before all texts encoded with special tokens."""
    copy = Tokenizer.from_str(byte_level.to_str())
    copy.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", copy.token_to_id("<s>"))]
    )
    return copy


@pytest.fixture(scope="session")
def bos_tokenizer(bos_byte_level: Tokenizer) -> PreTrainedTokenizerFast:
    return _wrap(bos_byte_level, bos_token="<s>")


@pytest.fixture(scope="session")
def crossing_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer that merges across words and lines, so that the token counts of parts do not add up."""
    return _wrap(_train(None, vocab_size=700))


@pytest.fixture(scope="session")
def chatml_tokenizer(byte_level: Tokenizer) -> PreTrainedTokenizerFast:
    return _wrap(byte_level, chat_template=CHATML)


@pytest.fixture(scope="session")
def gemma_tokenizer(bos_byte_level: Tokenizer) -> PreTrainedTokenizerFast:
    """A tokenizer whose template refuses system messages and trims messages; `<s>` is in template and tokenizer."""
    return _wrap(bos_byte_level, chat_template=GEMMA, bos_token="<s>")


@pytest.fixture(scope="session")
def normalising_tokenizer(byte_level: Tokenizer) -> PreTrainedTokenizerFast:
    """A tokenizer that looks for special tokens in lower case, without accents and zero-width characters."""
    copy = Tokenizer.from_str(byte_level.to_str())
    forms = [normalizers.NFKD(), normalizers.StripAccents(), normalizers.Lowercase()]
    copy.normalizer = normalizers.Sequence([*forms, normalizers.Replace(Regex("[\u200b-\u200d]"), "")])
    copy.add_special_tokens([AddedToken(token, normalized=True, special=True) for token in SPECIAL])
    return _wrap(copy)


@pytest.fixture(scope="session")
def with_chat_template(byte_level: Tokenizer) -> Callable[..., PreTrainedTokenizerFast]:
    def make(template: str, **options: Any) -> PreTrainedTokenizerFast:
        return _wrap(byte_level, chat_template=template, **options)

    return make


@pytest.fixture(scope="session")
def make_record() -> Callable[..., Record]:
    def make(
        *history: str, user_id: str = "ann", query: str = "a tale", response: str = "Slow, and good.", **fields: Any
    ) -> Record:
        items = tuple(HistoryItem(text) for text in history)
        return Record(user_id=user_id, query=query, response=response, history=items, **fields)

    return make
