"""Small models and tokenizers built from the training text, so that a first run needs no download.

They show that a pipeline works, and how its figures change. Trained from scratch on little text, they write badly. A
causal loss measures little before a model can read a history.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nextquill.data import Record
from nextquill.errors import ArgumentError

END_OF_TEXT, PADDING = "<|endoftext|>", "<|pad|>"


@dataclass(frozen=True)
class ScratchSize:
    """The sizes of a Llama architecture; head dimension 32 or 64, tied embeddings."""

    vocabulary: int
    hidden_size: int
    layers: int
    heads: int
    intermediate_size: int
    positions: int = 4096


SCRATCH_SIZES = {
    "tiny": ScratchSize(vocabulary=1024, hidden_size=64, layers=2, heads=2, intermediate_size=192),
    "small": ScratchSize(vocabulary=8192, hidden_size=256, layers=4, heads=4, intermediate_size=704),
}


def is_new(name: str) -> bool:
    """Whether a name means a new model.

    Raises:
        ArgumentError: a model's folder in the current directory has the name too.
    """
    if name in SCRATCH_SIZES and any((Path(name) / file).is_file() for file in ("config.json", "adapter_config.json")):
        raise ArgumentError(
            f"model_name_or_path: {name!r} means a new model, and the folder {name} holds one; write ./{name} for the "
            "folder, or rename it"
        )
    return name in SCRATCH_SIZES


def build_tokenizer(texts: Iterable[str], vocabulary: int) -> Any:
    """A byte-level BPE tokenizer of at most `vocabulary` tokens; it decodes every text to itself."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END_OF_TEXT, PADDING],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END_OF_TEXT, pad_token=PADDING)


def build_model(size: ScratchSize, seed: int, *, vocabulary: int | None = None, **token_ids: int | None) -> Any:
    """A randomly initialised Llama of this size, the same for the same seed; the global random state does not change.

    `vocabulary` is by default `size.vocabulary`. `token_ids` are the tokenizer's `eos_token_id` and `pad_token_id`.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    ids: dict[str, Any] = {"eos_token_id": None, **token_ids}  # LlamaConfig would take token 2
    config = LlamaConfig(
        vocab_size=size.vocabulary if vocabulary is None else vocabulary,
        hidden_size=size.hidden_size,
        intermediate_size=size.intermediate_size,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.heads,
        max_position_embeddings=size.positions,
        tie_word_embeddings=True,
        bos_token_id=None,
        **ids,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)


def training_texts(records: Iterable[Record]) -> Iterator[str]:
    """Every text of the records: queries, responses, and history titles and texts."""
    for record in records:
        yield record.query
        yield record.response
        for item in record.history:
            yield item.text
            if item.title:
                yield item.title
