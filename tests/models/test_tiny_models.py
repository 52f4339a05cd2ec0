"""New models and tokenizers are deterministic, and tokenizers decode every text to itself."""

from __future__ import annotations

import pytest
import torch

from nextquill.data import HistoryItem, Record
from nextquill.errors import ArgumentError
from nextquill.models.loading import load_model
from nextquill.models.tiny_models import (
    SCRATCH_SIZES,
    ScratchSize,
    build_model,
    build_tokenizer,
    is_new,
    training_texts,
)

RECORDS = [
    Record(
        "u", "how was the soup", "salty, but warm 東京", (HistoryItem("a café", title="naïve"), HistoryItem("no title"))
    ),
    Record("v", "", "🍜 quick", ()),
]


def load(seed: int = 0, name: str = "tiny"):
    return load_model(name, records=lambda: RECORDS, seed=seed)


def test_training_texts_are_all_of_them():
    expected = ["how was the soup", "salty, but warm 東京", "a café", "naïve", "no title", "", "🍜 quick"]
    assert list(training_texts(RECORDS)) == expected


@pytest.mark.parametrize("text", ["seen: salty soup", "unseen: Ελληνικά 🎉 \t\n  spaces", "", "\ufffd\u200d"])
def test_every_text_reads_back(text):
    tokenizer = build_tokenizer(training_texts(RECORDS), 300)
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_the_vocabulary_is_bounded_and_has_its_special_tokens():
    tokenizer = build_tokenizer(["the same words again and again"] * 50, 270)
    assert len(tokenizer) <= 270
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|endoftext|>", "<|pad|>")
    assert tokenizer.eos_token_id != tokenizer.pad_token_id


def test_the_same_seed_gives_the_same_model():
    (one, tokenizer), (two, other_tokenizer), (three, _) = load(), load(), load(seed=1)
    assert tokenizer.get_vocab() == other_tokenizer.get_vocab()
    pairs = list(zip(one.state_dict().values(), two.state_dict().values(), strict=True))
    assert all(torch.equal(a, b) for a, b in pairs)
    assert not torch.equal(one.get_input_embeddings().weight, three.get_input_embeddings().weight)


def test_building_leaves_the_random_state_alone():
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    load()
    assert torch.equal(torch.rand(2), expected)


@pytest.mark.parametrize("file", ["config.json", "adapter_config.json"])
def test_a_models_folder_with_the_name_of_a_new_model_is_not_passed_over(tmp_path, monkeypatch, file):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny").mkdir()
    assert is_new("tiny")
    (tmp_path / "tiny" / file).touch()
    with pytest.raises(ArgumentError, match=r"^model_name_or_path: 'tiny' means a new .* write ./tiny for the folder"):
        load_model("tiny", records=lambda: [Record("u", "q", "r")])
    assert is_new("small")
    assert not is_new("./tiny")
    assert not is_new("other")


@pytest.mark.parametrize("name", SCRATCH_SIZES)
def test_sizes_have_whole_heads(name):
    size = SCRATCH_SIZES[name]
    assert size.hidden_size // size.heads in (32, 64)
    assert size.hidden_size % size.heads == 0


def test_a_model_fits_its_tokenizer():
    tokenizer = build_tokenizer(["a"], 300)
    size = ScratchSize(vocabulary=300, hidden_size=32, layers=1, heads=1, intermediate_size=48, positions=128)
    model = build_model(size, 0, vocabulary=len(tokenizer), eos_token_id=tokenizer.eos_token_id)
    assert model.get_output_embeddings().weight.shape == (len(tokenizer), 32)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert model.config.max_position_embeddings == 128
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
