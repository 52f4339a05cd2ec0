"""Greedy responses: plain, stopped where they should, the same in any batch; and ROUGE-L over words of any script."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from integration_helpers import tiny_model
from rouge_score.tokenizers import DefaultTokenizer
from tokenizers import AddedToken

from nextquill.data import Branch, EncodedExample
from nextquill.errors import ArgumentError
from nextquill.integrations.generation import RougeWords, greedy_responses, rouge_l, stop_tokens
from nextquill.integrations.scratch import build_tokenizer


@pytest.fixture
def tokenizer():
    return build_tokenizer(["the salty soup"], 280)


@pytest.fixture
def model(tokenizer):
    return tiny_model(vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id, pad_token_id=None)


def example(prompt, other=None, response=(5, 0)):
    response = list(response)
    return EncodedExample("u", 0, Branch(prompt, response), Branch(other or prompt[:1], response), None, 1, 1)


EXAMPLES = [example([10, 11, 12, 13]), example([40]), example([7, 8, 90, 200, 31, 77]), example([9, 9])]


def argmax_responses(model, tokenizer, examples, count, branch="factual"):
    """One token at a time, without a cache, a batch or `generate`."""
    texts = []
    for each in examples:
        ids = list(getattr(each, branch).prompt_ids)
        new = []
        while len(new) < count:
            with torch.no_grad():
                token = int(model(torch.tensor([ids + new])).logits[0, -1].argmax())
            if token == tokenizer.eos_token_id:
                break
            new.append(token)
        texts.append(tokenizer.decode(new, skip_special_tokens=True))
    return texts


@pytest.mark.parametrize("batch_size", [1, 3, 8])
@pytest.mark.parametrize("branch", ["factual", "counterfactual"])
def test_responses_are_the_most_likely_tokens(model, tokenizer, branch, batch_size):
    texts = list(greedy_responses(model, tokenizer, EXAMPLES, branch=branch, max_new_tokens=6, batch_size=batch_size))
    assert texts == argmax_responses(model, tokenizer, EXAMPLES, 6, branch)
    assert any(texts)


def test_the_models_own_generation_config_is_left_out_and_left_alone(model, tokenizer):
    plain = list(greedy_responses(model, tokenizer, EXAMPLES, max_new_tokens=6))
    model.generation_config.update(do_sample=True, temperature=9.0, repetition_penalty=3.0, max_length=3, num_beams=2)
    own = model.generation_config
    assert list(greedy_responses(model, tokenizer, EXAMPLES, max_new_tokens=6)) == plain
    assert model.generation_config is own
    assert own.repetition_penalty == 3.0


def test_a_response_stops_at_an_end_and_has_nothing_behind_it(model, tokenizer):
    first = int(model(torch.tensor([[40]])).logits[0, -1].argmax())
    model.generation_config.eos_token_id = [first, 3]
    texts = list(greedy_responses(model, tokenizer, EXAMPLES, max_new_tokens=6))
    assert texts[1] == ""
    assert any(texts)


def test_stops(model, tokenizer):
    tokenizer.add_tokens([AddedToken("<|turn|>", special=True)])
    turn = tokenizer.convert_tokens_to_ids("<|turn|>")
    end = tokenizer.eos_token_id
    model.generation_config.eos_token_id = None
    assert stop_tokens(model, tokenizer, [example([1], response=(5, turn))]) == {end, turn}
    assert stop_tokens(model, tokenizer, [example([1], response=(5, 6))]) == {end}, "a word ends nothing"
    model.generation_config.eos_token_id = [7, 8]
    assert stop_tokens(model, tokenizer, []) == {end, 7, 8}


def test_a_tokenizer_without_padding_or_end(model, tokenizer):
    expected = list(greedy_responses(model, tokenizer, EXAMPLES, max_new_tokens=3))
    tokenizer.pad_token = None
    assert list(greedy_responses(model, tokenizer, EXAMPLES, max_new_tokens=3)) == expected
    tokenizer.eos_token, model.generation_config.eos_token_id = None, None
    assert len(list(greedy_responses(model, tokenizer, EXAMPLES, max_new_tokens=3))) == 4


@pytest.mark.parametrize(("length", "tokens"), [(60, 4), (63, 1), (64, 0)])
def test_a_response_ends_with_the_context(model, tokenizer, monkeypatch, length, tokens):
    prompts = [example(list(range(2, 2 + length)))]
    made = []
    monkeypatch.setattr(tokenizer, "decode", lambda ids, **_: made.append(len(ids)) or "", raising=False)
    model.generation_config.eos_token_id = None
    list(greedy_responses(model, tokenizer, prompts, max_new_tokens=10))
    assert made[0] <= tokens


def test_training_mode_is_given_back(model, tokenizer):
    model.train()
    list(greedy_responses(model, tokenizer, EXAMPLES[:1], max_new_tokens=1))
    assert model.training


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"branch": "placebo"}, "branch: "),
        ({"max_new_tokens": 0}, "max_new_tokens: "),
        ({"batch_size": 0}, "batch_size: "),
    ],
)
def test_arguments_are_checked(model, tokenizer, options, message):
    with pytest.raises(ArgumentError, match=message):
        list(greedy_responses(model, tokenizer, EXAMPLES, **options))


def test_without_examples_nothing_is_generated(model, tokenizer):
    assert list(greedy_responses(model, tokenizer, [])) == []


def test_examples_are_not_changed(model, tokenizer):
    before = [dataclasses.replace(each) for each in EXAMPLES]
    list(greedy_responses(model, tokenizer, EXAMPLES, max_new_tokens=2))
    assert before == EXAMPLES


# ---- ROUGE-L -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text", ["The soups were running cold, quickly!", "snake_case and 3.14's", "", "don't -- stop", "A\tB\nC", "!?"]
)
def test_words_of_ascii_text_are_rouge_scores_own(text):
    assert RougeWords().tokenize(text) == DefaultTokenizer(use_stemmer=True).tokenize(text)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Naïve CAFÉ", ["naïve", "café"]),
        ("東京ラーメン ok", ["東", "京", "ラ", "ー", "メ", "ン", "ok"]),
        ("Привет, мир", ["привет", "мир"]),
        ("구름 위", ["구름", "위"]),
    ],
)
def test_words_of_other_scripts(text, words):
    assert RougeWords().tokenize(text) == words


def test_rouge_l_by_hand():
    # The longest common subsequence of the first pair is "a c": precision 2/2, recall 2/3.
    assert rouge_l(["a b c"], ["a c"]) == pytest.approx(0.8)
    assert rouge_l(["a b c", "x"], ["a c", "y"]) == pytest.approx(0.4)
    assert rouge_l(["東京"], ["東京"]) == 1.0
