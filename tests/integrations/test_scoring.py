"""Scores without gradient, and the text of each token."""

from __future__ import annotations

import dataclasses
import time

import pytest
import torch
from integration_helpers import random_examples, tiny_model

from nextquill.errors import ArgumentError
from nextquill.integrations.scoring import score_examples, token_texts
from nextquill.integrations.scratch import build_tokenizer

TEXT = "naïve café 東京 🍜👩‍👩‍👧 \ufffd ok\n  salty \u200d soup"


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer(["the salty soup was ok and salty"] * 5, 280)


# ---- scores ------------------------------------------------------------------------------------


def nll(model, branch):
    with torch.no_grad():
        logits = model(torch.tensor([branch.input_ids])).logits[0].double()
    start = len(branch.prompt_ids)
    return torch.nn.functional.cross_entropy(
        logits[start - 1 : -1], torch.tensor(branch.response_ids), reduction="none"
    )


@pytest.mark.parametrize("kind", ["llama", "gemma2"])
@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_scores_are_the_models_own(kind, batch_size):
    model, examples = tiny_model(kind), random_examples(3)
    for scores, example in zip(score_examples(model, examples, 0, batch_size), examples, strict=True):
        assert scores.example is example
        assert scores.token_ids == example.factual.response_ids
        for name in ("factual", "counterfactual", "placebo"):
            expected = nll(model, getattr(example, name))
            torch.testing.assert_close(getattr(scores, f"nll_{name}").double(), expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(scores.effect_logprob, scores.nll_counterfactual - scores.nll_factual)
        assert not scores.nll_factual.requires_grad


def test_one_example_without_a_placebo_leaves_it_out_for_all():
    examples = random_examples(2)
    examples[1] = dataclasses.replace(examples[1], placebo=None)
    assert [scores.nll_placebo for scores in score_examples(tiny_model(), examples, 0)] == [None, None]


def test_the_model_is_left_as_it_was():
    model = tiny_model().train()
    scores = score_examples(model, random_examples(3), 0, 1)
    next(scores)
    scores.close()
    assert model.training


def test_nothing_to_score():
    assert list(score_examples(tiny_model(), [], 0)) == []


def test_batch_size_is_checked():
    with pytest.raises(ArgumentError, match="batch_size: expected a positive number, got 0"):
        list(score_examples(tiny_model(), random_examples(1), 0, 0))


# ---- texts -------------------------------------------------------------------------------------


def test_token_texts_join_to_the_text(tokenizer):
    ids = tokenizer.encode(TEXT)
    pieces = token_texts(tokenizer, ids)
    assert len(pieces) == len(ids)
    assert "".join(pieces) == TEXT
    assert pieces.count("") > 10, "most bytes of these characters complete nothing"


def test_a_character_belongs_to_the_token_that_completes_it(tokenizer):
    ids = tokenizer.encode("é")
    assert len(ids) == 2
    assert token_texts(tokenizer, ids) == ["", "é"]


def test_a_text_that_ends_inside_a_character(tokenizer):
    ids = tokenizer.encode("ok 東")[:-1]
    pieces = token_texts(tokenizer, ids)
    assert "".join(pieces) == tokenizer.decode(ids)
    assert pieces[-1].endswith("\ufffd")


def test_random_bytes_join_too(tokenizer):
    generator = torch.Generator().manual_seed(0)
    for _ in range(30):
        ids = torch.randint(2, len(tokenizer), (40,), generator=generator).tolist()
        assert "".join(token_texts(tokenizer, ids)) == tokenizer.decode(ids)


def test_no_tokens(tokenizer):
    assert token_texts(tokenizer, []) == []


class Spelling:
    """A tokenizer of words whose decoding reaches back: "n't" takes the space before it away."""

    words = ("do", "n't", "panic", ".")

    def __init__(self):
        self.decoded = 0

    def decode(self, ids):
        self.decoded += len(ids)
        return " ".join(self.words[i] for i in ids).replace(" n't", "n't").replace(" .", ".")


def test_decoding_that_cleans_up_spaces():
    assert token_texts(Spelling(), [0, 1, 2, 3]) == ["do", "n't", " panic", "."]


class Swallowing(Spelling):
    """Its last token changes the first, so pieces cannot be found from a window."""

    def decode(self, ids):
        text = super().decode(ids)
        return text.upper() if 3 in ids else text


def test_decoding_that_reaches_back_to_the_start():
    pieces = token_texts(Swallowing(), [0, 1, 2, 3])
    assert "".join(pieces) == "DON'T PANIC."
    assert len(pieces) == 4


def test_cost_is_linear():
    tokenizer = Spelling()
    token_texts(tokenizer, [0, 2] * 500)
    assert tokenizer.decoded < 10 * 1000


@pytest.mark.slow
def test_a_long_response_takes_no_time(tokenizer):
    ids = tokenizer.encode(TEXT * 400)
    assert len(ids) > 10_000
    start = time.perf_counter()
    token_texts(tokenizer, ids)
    assert time.perf_counter() - start < 10
