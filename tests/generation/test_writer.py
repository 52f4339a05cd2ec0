"""Texts for a user: prompts like those of training, the same responses in any grouping, pieces that join."""

from __future__ import annotations

import pytest
import torch

import nextquill as nq
from nextquill.data import ExampleEncoder, HistoryItem, PromptTemplate, Record
from nextquill.models.loading import PROMPT_FILE, PromptSettings
from nextquill.models.tiny_models import build_tokenizer
from tests.models.model_helpers import tiny_model

TEXTS = ["the salty soup", {"text": "warm and quick", "title": "café"}, HistoryItem("friendly ramen 🍜")]
QUERIES = ["soup", "the quick service", "ramen"]
SETTINGS = PromptSettings(PromptTemplate(order="history_first", system="Be brief."), 220)


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer(["the salty soup is warm and quick, friendly ramen 🍜 café service"], 300)


@pytest.fixture(scope="module")
def model(tokenizer):
    # transformers' cache would cut a llama's keys to a window that its attention does not have.
    size = {"max_position_embeddings": 256, "sliding_window": None}
    return tiny_model(vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id, **size)


@pytest.fixture
def writer(model, tokenizer):
    return nq.Writer(model, tokenizer, SETTINGS)


@pytest.fixture(scope="module")
def folder(model, tokenizer, tmp_path_factory):
    place = tmp_path_factory.mktemp("run")
    model.save_pretrained(place)
    tokenizer.save_pretrained(place)
    (place / PROMPT_FILE).write_text(SETTINGS.to_json())
    return str(place)


def test_a_prompt_is_that_of_training(folder, tokenizer):
    prompt = nq.prompt_for(folder, "soup", TEXTS, max_new_tokens=20)
    items = (HistoryItem("the salty soup"), HistoryItem("warm and quick", "café"), HistoryItem("friendly ramen 🍜"))
    encoder = ExampleEncoder(tokenizer, SETTINGS.template, SETTINGS.max_length)
    assert prompt.ids == encoder.encode(Record("u", "soup", "x", items)).factual.prompt_ids
    assert tokenizer.encode(prompt.text, add_special_tokens=False) == prompt.ids
    assert (prompt.history_kept, prompt.history_total) == (3, 3)
    assert "Be brief." in prompt.text


def test_the_oldest_texts_give_way_to_the_response(folder):
    whole = nq.prompt_for(folder, "soup", TEXTS, max_new_tokens=1)
    room = SETTINGS.max_length - len(whole.ids)
    assert nq.prompt_for(folder, "soup", TEXTS, max_new_tokens=room).ids == whole.ids
    cut = nq.prompt_for(folder, "soup", TEXTS, max_new_tokens=room + 1)
    assert (cut.history_kept, cut.history_total) == (2, 3)
    assert "the salty soup" not in cut.text
    with pytest.raises(nq.BudgetError, match="query: the prompt without any history takes"):
        nq.prompt_for(folder, "soup", TEXTS, max_new_tokens=SETTINGS.max_length)


def test_responses_are_greedy_and_do_not_depend_on_the_grouping(writer, model, tokenizer):
    together = writer.write(QUERIES, TEXTS, max_new_tokens=8)
    assert together == [writer.write(query, TEXTS, max_new_tokens=8)[0] for query in QUERIES]
    assert together == writer.write(QUERIES, TEXTS, max_new_tokens=8, batch_size=1, engine="hf")
    for query, text in zip(QUERIES, together, strict=True):
        ids = writer.encoder.encode_prompt(query, [HistoryItem("the salty soup")], 8)[0]
        assert ids != writer.encoder.encode_prompt(query, [], 8)[0]
        assert isinstance(text, str)
    assert together != writer.write(QUERIES, max_new_tokens=8)


def test_samples_differ_by_query_and_by_seed(writer):
    options = {"temperature": 1.0, "max_new_tokens": 8}
    same = writer.write(["soup"] * 3, TEXTS, **options)
    assert len(set(same)) > 1
    assert same == writer.write(["soup"] * 3, TEXTS, **options)
    assert same != writer.write(["soup"] * 3, TEXTS, seed=1, **options)


def test_guidance_moves_away_from_no_history_or_from_anothers(writer):
    options = {"guidance": 3.0, "plausibility": 0.01, "max_new_tokens": 8}
    plain = writer.write(QUERIES, TEXTS, max_new_tokens=8)
    guided = writer.write(QUERIES, TEXTS, **options)
    away = writer.write(QUERIES, TEXTS, against=["quick quick quick"], **options)
    assert len({tuple(plain), tuple(guided), tuple(away)}) == 3
    assert writer.write(QUERIES, TEXTS, against=TEXTS, **options) == plain, "nothing to move away from"


def test_pieces_join_to_the_text_even_inside_a_character(writer, monkeypatch):
    """A model that writes the bytes of an emoji, one token each."""
    ids = writer.tokenizer.encode("a 🍜🍜", add_special_tokens=False)
    assert len(ids) > 4
    steps = iter([*ids, *ids[:-1]])

    def one_hot(input_ids, scores):
        return torch.full_like(scores, -9.0).index_fill_(1, torch.tensor([next(steps)]), 0.0)

    monkeypatch.setattr("nextquill.generation.tree_engine.warpers", lambda *_: one_hot)
    pieces = [piece for _, piece in writer.stream("soup", max_new_tokens=len(ids))]
    assert "".join(pieces) == "a 🍜🍜"
    assert len(pieces) > 1
    assert not any("\ufffd" in piece for piece in pieces)
    cut = writer.write("soup", max_new_tokens=len(ids) - 1)[0]
    assert cut.startswith("a 🍜"), "a response that ends inside a character shows what there is of it"
    assert cut.endswith("\ufffd")


def test_a_kept_history_gives_the_same_texts(model, tokenizer):
    keeping, plain = (nq.Writer(model, tokenizer, SETTINGS, keep_history=keep) for keep in (True, False))
    counted = []
    handle = model.get_input_embeddings().register_forward_hook(lambda _, ids, __: counted.append(ids[0].numel()))
    for query in QUERIES:
        counted.clear()
        text = keeping.write(query, TEXTS, max_new_tokens=6)
        kept = sum(counted)
        counted.clear()
        assert text == plain.write(query, TEXTS, max_new_tokens=6)
        assert kept == sum(counted) if query == QUERIES[0] else kept < sum(counted)
    handle.remove()


def test_a_run_is_loaded_with_its_prompts(folder, writer):
    loaded = nq.Writer.load(folder, device="cpu")
    assert loaded.settings == SETTINGS
    assert loaded.write(QUERIES, TEXTS, max_new_tokens=5) == writer.write(QUERIES, TEXTS, max_new_tokens=5)


def test_bad_input_is_named(writer):
    with pytest.raises(nq.ArgumentError, match=r"options: expected some of max_new_tokens, .*, got beams"):
        writer.write("soup", beams=2)
    with pytest.raises(nq.ArgumentError, match="engine: expected 'auto', 'tree' or 'hf', got 'vllm'"):
        writer.write("soup", engine="vllm")
    with pytest.raises(nq.RecordError, match=r"history: field 'history\[1\].text': required, but missing"):
        writer.write("soup", ["a", {"title": "b"}])
    with pytest.raises(nq.BudgetError, match="query: the prompt without any history takes"):
        writer.write("soup " * 300, max_new_tokens=5)
    assert writer.write([], TEXTS) == []
