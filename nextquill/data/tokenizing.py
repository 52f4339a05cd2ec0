"""Encodes many texts at once, on all cores, and each piece of text only once.

A fast tokenizer encodes a list of texts on all cores while Python runs on. Texts are first cut into pieces, and a piece
that was seen before is taken from a cache. This saves work because a user's history stands in many prompts, and because
the search for what fits a budget tries several prompts that differ in one item.

Tokens may form across a cut, so a text is cut only where this tokenizer provably forms none: after a line break and
before a visible ASCII character, where `ids(left + right) == ids(left + GUARD)[:-1] + ids(right)`. The proof examines
the parts of the tokenizer. It holds for byte-level BPE with the published splitting patterns (GPT-2, Llama 3, Qwen,
o200k, DeepSeek). It also holds for BPE without splitting, such as Gemma's, if no token of the vocabulary spans a cut.
Every other tokenizer encodes whole texts.
"""

from __future__ import annotations

import json
import re
import struct
from array import array
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

from nextquill.storage.fingerprints import fingerprint

#: Token ids, four bytes each; a list takes forty.
Ids: TypeAlias = "array[int]"

#: Stands after a piece in place of the following text, because some patterns split trailing white space differently.
_GUARD = "a"
# Digits are left out, as some tokenizers split before them, and "/", which o200k's pattern takes with line breaks.
_BREAK = r"\n"
_CUT_BEFORE = "!-.:-~"
_SPANNING = re.compile(rf"\n[{_CUT_BEFORE}]")
#: Characters. A piece costs as much as some ten tokens, so texts are cut only where past texts begin and end: at blank
#: lines and headings. A longer paragraph, as a custom prompt may have, is cut at every line.
_LONG_PARAGRAPH = 8_000
_PROBE = "[Text]: a tale\n\n[Text]: slow, \n \n- and good.\n"
#: Tokens of cached pieces, after which a cache is emptied: some 100 MB with the texts.
_CACHED_TOKENS = 4_000_000

_CASED_WORD = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
_CASED_TAIL = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_SUFFIX = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
# The alternatives of published splitting patterns. None of them matches a line break and then a visible character
# (except o200k's "/"), none looks behind, and only `(?!\S)` looks ahead. So a match ends at every cut, whether the
# guard or the text follows.
_KNOWN_ALTERNATIVES = "|".join(
    re.escape(alternative)
    for alternative in (
        *("'s", "'t", "'re", "'ve", "'m", "'ll", "'d", _SUFFIX, r"'(?i:[sdmt]|ll|ve|re)"),
        *(r" ?\p{L}+", r" ?\p{N}+", r" ?[^\s\p{L}\p{N}]+", r"\p{N}", r"\p{N}{1,3}"),
        *(r"[^\r\n\p{L}\p{N}]?\p{L}+", r"[^\r\n\p{L}\p{N}]?+\p{L}+", r"[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+"),
        *(r" ?[^\s\p{L}\p{N}]+[\r\n]*", r" ?[^\s\p{L}\p{N}]++[\r\n]*", r" ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*"),
        *(r" ?[^\s\p{L}\p{N}]+[\r\n/]*", r"\s*[\r\n]+", r"\s*[\r\n]", r"\s+(?!\S)", r"\s+"),
        *(f"{_CASED_WORD}*{_CASED_TAIL}+", f"{_CASED_WORD}+{_CASED_TAIL}*"),
        *(f"{_CASED_WORD}*{_CASED_TAIL}+{_SUFFIX}?", f"{_CASED_WORD}+{_CASED_TAIL}*{_SUFFIX}?"),
        *(r"[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+", r" ?[\p{P}\p{S}]+[\r\n]*", "[一-龥぀-ゟ゠-ヿ]+"),  # noqa: RUF001
        r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+""",
    )
)
_KNOWN_PATTERN = re.compile(rf"(?:{_KNOWN_ALTERNATIVES})(?:\|(?:{_KNOWN_ALTERNATIVES}))*")
#: In a known pattern, the alternative that takes any white space.
_ANY_SPACE = re.compile(r"(?:^|\|)\\s\+(?:$|\|)")
_SPLIT_AT_SPACES = {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False}


class BatchTokenizer:
    """Encodes lists of texts to the ids that `encode` gives for each text, with no token added.

    A fast tokenizer of Hugging Face works on all cores; any other encodes the texts one by one.
    """

    def __init__(self, tokenizer: Any, encode: Callable[[str], list[int]]) -> None:
        self._encode_one = encode
        self._tokenizer = tokenizer if self._agrees(tokenizer) else None
        self._cache, self._cached_tokens = dict[str, Ids](), 0
        self._cut = None if self._tokenizer is None else cut_pattern(self._tokenizer.backend_tokenizer)
        self._cut_items = self._cut and re.compile(rf"\n(?<=[\n:]\n){self._cut.pattern.removeprefix(_BREAK)}")
        if self._cut is not None and self.ids([_PROBE]) != [array("i", encode(_PROBE))]:
            self._cut = None

    @property
    def is_parallel(self) -> bool:
        """Whether encoding a list of texts is faster than encoding its texts one by one."""
        return self._tokenizer is not None

    def ids(self, texts: Sequence[str]) -> list[Ids]:
        """The token ids of each text. Equal texts may share one object, so do not change the result."""
        if self._cut is None:
            distinct = list(dict.fromkeys(texts))
            known = dict(zip(distinct, self._encode(distinct), strict=True))
            return [known[text] for text in texts]
        cut, known = [self._pieces(text) for text in texts], self._cache
        missing = list(dict.fromkeys(piece for pieces in cut for piece in pieces if piece not in known))
        known.update(zip(missing, self._encode(missing), strict=True))
        self._cached_tokens += sum(len(known[piece]) for piece in missing)
        if self._cached_tokens > _CACHED_TOKENS:
            self._cache, self._cached_tokens = {}, 0  # other threads keep the one that they started with
        return [_joined([known[piece] for piece in pieces]) for pieces in cut]

    def _pieces(self, text: str) -> list[str]:
        """The pieces to encode: each with its line break and the guard, except the last one."""
        assert self._cut is not None
        assert self._cut_items is not None
        pieces = list[str]()
        for paragraph in self._cut_items.split(text):
            pieces += [paragraph] if len(paragraph) <= _LONG_PARAGRAPH else self._cut.split(paragraph)
        *lines, last = pieces
        return [*(f"{line}\n{_GUARD}" for line in lines), last]

    def _encode(self, texts: list[str]) -> list[Ids]:
        if self._tokenizer is None:
            return [array("i", self._encode_one(text)) for text in texts]
        backend = reset_backend(self._tokenizer)
        found = (encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=False))
        # `array` takes three times as long to convert a list itself.
        return [array("i", struct.pack(f"{len(ids)}i", *ids)) for ids in found]

    def _agrees(self, tokenizer: Any) -> bool:
        """Whether there is a fast tokenizer that gives the same ids as its wrapper."""
        if not hasattr(getattr(tokenizer, "backend_tokenizer", None), "encode_batch_fast"):
            return False
        (found,) = reset_backend(tokenizer).encode_batch_fast([_PROBE], add_special_tokens=False)
        return list(found.ids) == list(self._encode_one(_PROBE))


def reset_backend(tokenizer: Any) -> Any:
    """The fast tokenizer, reset to the state in which `tokenizer.encode` uses it."""
    backend = tokenizer.backend_tokenizer
    if backend.truncation is not None:
        backend.no_truncation()
    if backend.padding is not None:
        backend.no_padding()
    split = bool(getattr(tokenizer, "split_special_tokens", False))
    if backend.encode_special_tokens != split:
        backend.encode_special_tokens = split
    return backend


def _joined(pieces: list[Ids]) -> Ids:
    """The ids of a text from those of its pieces, all of which end with the guard, except the last one."""
    ids: Ids = array("i")
    for piece in pieces[:-1]:
        ids += piece
        ids.pop()
    return ids + pieces[-1]


def cut_pattern(backend: Any) -> re.Pattern[str] | None:
    """The pattern of line breaks after which a text may be cut, or None if no cut is known to be safe."""
    model, added = backend.model, [token.content for token in backend.get_added_tokens_decoder().values()]
    is_bpe = type(model).__name__ == "BPE" and not model.dropout
    if not is_bpe or not (_splits_safely(backend) or _never_spans(backend)):
        return None
    # A special token ends the text before it, which a guard cannot imitate, and it may absorb white space.
    special = {re.escape(content[:3]) for content in added}
    before = f"(?!{'|'.join(sorted(special))})" if special else ""
    if any(_SPANNING.search(content) or content.startswith(_GUARD) for content in added):
        return None
    if len(backend.encode(_GUARD, add_special_tokens=False).ids) != 1:
        return None
    return re.compile(rf"{_BREAK}(?=[{_CUT_BEFORE}]){before}")


def _splits_safely(backend: Any) -> bool:
    """Whether known patterns split the text at every cut."""
    if _state(backend.normalizer).get("type") not in (None, "NFC"):  # NFC never joins an ASCII letter to its left
        return False
    kinds = [_split_kind(stage) for stage in _stages(_state(backend.pre_tokenizer))]
    return None not in kinds and "spaces" in kinds


def _split_kind(stage: dict[str, Any]) -> str | None:
    """The effect of a stage: "spaces" if it splits at every cut, "other" if it is harmless there, None if unknown."""
    kind = stage.get("type")
    if kind == "ByteLevel" and not stage.get("add_prefix_space", True):
        return "spaces" if stage.get("use_regex", True) else "other"
    if kind == "Digits":
        return "other"
    pattern = stage.get("pattern", {}).get("Regex") if kind == "Split" else None
    how = (stage.get("behavior"), stage.get("invert"))
    if pattern is None or how not in (("Isolated", False), ("Removed", True)):
        return None
    if not _KNOWN_PATTERN.fullmatch(pattern):
        return None
    return "spaces" if _ANY_SPACE.search(pattern) else "other" if how[0] == "Isolated" else None


def _never_spans(backend: Any) -> bool:
    """Whether the text is not split and no token spans a cut, so that no merge can cross it."""
    model, normalizer = backend.model, _state(backend.normalizer)
    if _stages(_state(backend.pre_tokenizer)) not in ([], [_SPLIT_AT_SPACES]):
        return False
    if normalizer and (normalizer.get("type") != "Replace" or normalizer.get("pattern") != {"String": " "}):
        return False
    if model.fuse_unk or model.ignore_merges or model.end_of_word_suffix or model.continuing_subword_prefix:
        return False
    return not any(_SPANNING.search(token) for token in backend.get_vocab())


def _stages(state: dict[str, Any]) -> list[dict[str, Any]]:
    if state.get("type") == "Sequence":
        return [inner for stage in state["pretokenizers"] for inner in _stages(stage)]
    return [state] if state else []


def _state(part: Any) -> dict[str, Any]:
    """The description of a tokenizer's part in its file; empty for None."""
    found: dict[str, Any] = {} if part is None else json.loads(part.__getstate__())
    return found


def tokenizer_digest(tokenizer: Any) -> str:
    """16 digits that differ between tokenizers with different pieces, rules or chat templates."""
    if hasattr(tokenizer, "backend_tokenizer"):
        text = reset_backend(tokenizer).to_str()
    else:
        text = json.dumps(sorted(tokenizer.get_vocab().items())) if hasattr(tokenizer, "get_vocab") else repr(tokenizer)
    return fingerprint([f"{text} {getattr(tokenizer, 'chat_template', None)}"])
