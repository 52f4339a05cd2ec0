"""A list of texts gives the same ids as its texts one by one, with any cuts and any cache."""

from __future__ import annotations

from array import array
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from nextquill.data import tokenizing
from nextquill.data.tokenizing import BatchTokenizer, cut_pattern

CORPUS = [
    "[Request]:\na tale\n\n[Text]: I loved the plot, and 123 slow endings.\n\n[Response]:\n",
    "Ünïcode 東京ラーメン was   fine.\r\n\r\n \n- a list\n/path\n\n\n# heading",
] * 4
WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"
LLAMA3 = rf"(?i:'s|'t|'re|'ve|'m|'ll|'d)|{WORD}|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
CASED = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
O200K = (
    rf"{CASED}*{LOWER}+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|{CASED}+{LOWER}*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
    r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
DEEPSEEK = (
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def split(pattern: str, behavior: str = "isolated") -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Split(Regex(pattern), behavior)


def byte_level(*stages: pre_tokenizers.PreTokenizer, use_regex: bool = False) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence([*stages, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)])


#: Of each kind of published tokenizer: its splitting, its normaliser, and whether texts may be cut.
KINDS: dict[str, tuple[Any, Any, bool]] = {
    "gpt2": (pre_tokenizers.ByteLevel(add_prefix_space=False), None, True),
    "smollm": (byte_level(pre_tokenizers.Digits(individual_digits=True), use_regex=True), None, True),
    "llama3": (byte_level(split(LLAMA3)), None, True),
    "qwen": (byte_level(split(LLAMA3.replace("{1,3}", ""))), normalizers.NFC(), True),
    "o200k": (byte_level(split(O200K)), None, True),
    "deepseek": (byte_level(split(r"\p{N}{1,3}"), split("[一-龥぀-ゟ゠-ヿ]+"), split(DEEPSEEK)), None, True),  # noqa: RUF001
    "gemma": (pre_tokenizers.Split(" ", "merged_with_previous"), normalizers.Replace(" ", "▁"), True),
    "prefix": (pre_tokenizers.ByteLevel(add_prefix_space=True), None, False),
    "lines": (byte_level(split(r"\s+\S+|\S+|\s+")), None, False),
    "lowercase": (pre_tokenizers.ByteLevel(add_prefix_space=False), normalizers.Lowercase(), False),
    "metaspace": (pre_tokenizers.Metaspace(), None, False),
}
SPECIAL = ["</s>", "<|im_start|>", "<|im_end|>"]


def make(name: str) -> PreTrainedTokenizerFast:
    splitting, normalizer, _ = KINDS[name]
    tokenizer = Tokenizer(models.BPE(byte_fallback=name == "gemma"))
    tokenizer.pre_tokenizer = splitting
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    alphabet = sorted(set("".join(CORPUS)) | {"▁"}) if name == "gemma" else pre_tokenizers.ByteLevel.alphabet()
    texts = [line + "\n\n" for text in CORPUS for line in text.split("\n")] if name == "gemma" else CORPUS
    trainer = trainers.BpeTrainer(
        vocab_size=420, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", clean_up_tokenization_spaces=False)


@pytest.fixture(scope="session")
def of_kind() -> dict[str, PreTrainedTokenizerFast]:
    return {name: make(name) for name in KINDS}


def one_by_one(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    return [tokenizer.encode(text, add_special_tokens=False) for text in texts]


def batch(tokenizer: Any) -> BatchTokenizer:
    return BatchTokenizer(tokenizer, lambda text: list(tokenizer.encode(text, add_special_tokens=False)))


@pytest.mark.parametrize("name", KINDS)
def test_texts_are_cut_where_that_is_proven_and_nowhere_else(of_kind: Any, name: str) -> None:
    assert (cut_pattern(of_kind[name].backend_tokenizer) is not None) is KINDS[name][2]


@pytest.mark.parametrize("pattern", [LLAMA3, LLAMA3 + "|", LLAMA3.replace(r"|\s+(", r"||\s+("), rf"(?:{LLAMA3})"])
def test_only_a_list_of_known_alternatives_is_a_known_pattern(of_kind: Any, pattern: str) -> None:
    tokenizer = Tokenizer.from_str(of_kind["llama3"].backend_tokenizer.to_str())
    tokenizer.pre_tokenizer = byte_level(split(pattern))
    assert (cut_pattern(tokenizer) is not None) is (pattern == LLAMA3)


# What joins and splits in the patterns: letters, digits, marks, space of several kinds, breaks, markers, "/".
FRAGMENTS = st.sampled_from(
    ["a", "The plot", "I'll", "12345", " ", "  ", "\t", "\n", "\n\n", "\r\n", "\u00a0", "\u2028", "\x85", "\x1c", "\v",
     "/", ".", "...", "[Text]: ", "[", "- ", "#", "é", "e\u0301", "\u0301", "東京", "🍜", "</s>", "<|im_end|>", "<|im",
     "<", "a\n"]
)  # fmt: skip
TEXTS = st.lists(FRAGMENTS | st.text(max_size=3), max_size=12).map("".join)


@settings(max_examples=400, deadline=None)
@given(name=st.sampled_from(list(KINDS)), texts=st.lists(TEXTS, max_size=6))
def test_a_list_gives_what_its_texts_give(of_kind: Any, name: str, texts: list[str]) -> None:
    tokenizer, together = of_kind[name], batch(of_kind[name])
    for _ in range(2):  # the second time from the cache
        assert [ids.tolist() for ids in together.ids(texts)] == one_by_one(tokenizer, texts)


@settings(max_examples=60, deadline=None)
@given(texts=st.lists(st.lists(TEXTS, min_size=1, max_size=5), min_size=1, max_size=6))
def test_a_cache_that_overflows_changes_nothing(of_kind: Any, texts: list[list[str]]) -> None:
    together = batch(of_kind["llama3"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenizing, "_CACHED_TOKENS", 5)
        for each in texts:
            assert [ids.tolist() for ids in together.ids(each)] == one_by_one(of_kind["llama3"], each)
            assert together._cached_tokens <= 5


def test_a_piece_is_tokenised_once(of_kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    together, asked, own = batch(of_kind["llama3"]), list[str](), BatchTokenizer._encode

    def counting(self: BatchTokenizer, texts: list[str]) -> Any:
        asked.extend(texts)
        return own(self, texts)

    monkeypatch.setattr(BatchTokenizer, "_encode", counting)
    item = "[Text]: a long tale\n\n"
    together.ids([f"[One]:\n{item}{item}[Response]:\n", f"[Two]:\n{item}[Response]:\n"])
    assert sum("long tale" in text for text in asked) == 1
    asked.clear()
    together.ids([f"[Two]:\n{item}[Response]:\n"])
    assert asked == []


def test_added_tokens_that_reach_over_a_line_forbid_cuts(of_kind: Any) -> None:
    for content in ("x\n[", "apple"):  # the second would swallow the guard
        tokenizer = Tokenizer.from_str(of_kind["llama3"].backend_tokenizer.to_str())
        assert cut_pattern(tokenizer) is not None
        tokenizer.add_tokens([AddedToken(content, normalized=False)])
        assert cut_pattern(tokenizer) is None


def test_an_added_token_that_takes_white_space_is_exact(of_kind: Any) -> None:
    backend = Tokenizer.from_str(of_kind["gpt2"].backend_tokenizer.to_str())
    backend.add_tokens(
        [AddedToken("<mask>", lstrip=True), AddedToken("[end]", rstrip=True), AddedToken("- no", single_word=True)]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", clean_up_tokenization_spaces=False)
    texts = ["a \n\n<mask> b\n\n[end]\n\n[x", "[end] \n\nb", "a\n- no\n- no\nb", "a\n- now\n\n\n- no"]
    together = batch(tokenizer)
    assert cut_pattern(backend) is not None
    assert [ids.tolist() for ids in together.ids(texts)] == one_by_one(tokenizer, texts)


def test_what_other_calls_left_in_the_tokenizer_does_not_matter() -> None:
    tokenizer = make("qwen")
    together = batch(tokenizer)
    texts = ["a long tale of the sea", "</s> the end"]
    whole = one_by_one(tokenizer, texts)
    tokenizer.backend_tokenizer.enable_truncation(2)
    tokenizer.backend_tokenizer.enable_padding(length=9)
    tokenizer.backend_tokenizer.encode_special_tokens = True
    assert [ids.tolist() for ids in together.ids(texts)] == whole


class Slow:
    """A tokenizer without a backend."""

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        return list(text.encode())


def test_a_slow_tokenizer_is_asked_for_each_text_once() -> None:
    calls: list[str] = []
    together = BatchTokenizer(Slow(), lambda text: calls.append(text) or list(text.encode()))
    assert together.ids(["ab", "c", "ab"]) == [array("i", [97, 98]), array("i", [99]), array("i", [97, 98])]
    assert calls == ["ab", "c"]
    assert not together.is_parallel


def test_a_wrapper_that_changes_what_the_backend_gives_is_believed(of_kind: Any) -> None:
    tokenizer = of_kind["llama3"]
    together = BatchTokenizer(tokenizer, lambda text: [1, *tokenizer.encode(text, add_special_tokens=False)])
    assert not together.is_parallel
    assert [ids.tolist()[0] for ids in together.ids(["a", "b"])] == [1, 1]
