"""Scores without gradient, and the text of each token."""

from __future__ import annotations

import dataclasses
import time

import pytest
import torch

from nextquill.data import Branch, EncodedExample
from nextquill.errors import ArgumentError, BudgetError, NonFiniteError
from nextquill.evaluation import scoring
from nextquill.evaluation.scoring import score_examples, token_texts
from nextquill.models.tiny_models import build_tokenizer
from nextquill.tree import build_prefix_tree
from tests.models.model_helpers import random_examples, tiny_model

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


def score(examples, model=None, **options):
    return list(score_examples(tiny_model() if model is None else model, examples, 0, **options))


def by_index(scores):
    return sorted(scores, key=lambda one: one.example.index)


@pytest.mark.parametrize("kind", ["llama", "gemma2"])
@pytest.mark.parametrize(
    "options",
    [{}, {"batch_size": 1}, {"batch_size": 2}, {"max_tokens": 60}, {"attention": "padded"}, {"attention": "mask"}],
    ids=str,
)
def test_scores_are_the_models_own(kind, options):
    model, examples = tiny_model(kind), random_examples(5)
    for scores, example in zip(by_index(score(examples, model, **options)), examples, strict=True):
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
    assert [scores.nll_placebo for scores in score(examples)] == [None, None]


# ---- examples of one forward -----------------------------------------------------------------------


def shared_history(users, each):
    """Examples of users in turn, whose prompts begin with the user's history."""
    histories = [[2 + user] * 20 for user in range(users)]
    examples = []
    for index in range(users * each):
        user, query, response = index % users, [30 + index, 31], [50 + index, 1]
        own, other = (Branch(histories[(user + step) % users] + query, response) for step in (0, 1))
        examples.append(EncodedExample(f"u{user}", index, own, Branch(query, response), other, 1, 1))
    return examples


def test_a_users_examples_are_computed_together(forwards):
    examples = shared_history(3, 4)
    computed = [scores.example for scores in score(examples, batch_size=4)]
    assert [example.user_id for example in computed] == ["u0"] * 4 + ["u1"] * 4 + ["u2"] * 4
    alone = sum(len(b.input_ids) for e in examples for b in (e.factual, e.counterfactual, e.placebo))
    # Each forward holds two histories of 20 tokens, and per branch a query and all of the response but its last token.
    assert [tokens for _, tokens in forwards] == [2 * 20 + 3 * 4 * 4] * 3
    assert sum(tokens for _, tokens in forwards) < alone / 2


def test_a_budget_keeps_a_users_examples_in_one_forward(forwards):
    score(shared_history(3, 4), max_tokens=2 * 20 + 3 * 4 * 4 + 5)
    assert len(forwards) <= 4
    assert all(tokens <= 93 for _, tokens in forwards)


def test_the_usual_budget_grows_to_the_largest_example(monkeypatch, forwards):
    monkeypatch.setattr(scoring, "DEFAULT_MAX_TOKENS_SMALL", 30)
    examples = random_examples(4)
    assert [s.example.index for s in by_index(score(examples))] == [0, 1, 2, 3]
    largest = max(
        len(build_prefix_tree([b.input_ids for b in (e.factual, e.counterfactual, e.placebo)])) for e in examples
    )
    assert max(tokens for _, tokens in forwards) <= largest


def test_an_example_beyond_the_budget_is_named_before_anything_is_computed(forwards):
    examples = random_examples(4)
    with pytest.raises(
        BudgetError, match=r"max_tokens: expected at least the \d+ tokens .* of example \d \(user 'user"
    ):
        score(examples, max_tokens=25)
    assert forwards == []


@pytest.mark.covering(1)
@pytest.mark.parametrize("options", [{"batch_size": 3}, {"max_tokens": 80}, {"attention": "padded", "batch_size": 2}])
@pytest.mark.parametrize("skip", range(8))
def test_scores_after_a_skip_are_bitwise_equal(options, skip):
    examples, model = random_examples(7), tiny_model()
    whole, rest = score(examples, model, **options), score(examples, model, skip=skip, **options)
    assert [s.example.index for s in rest] == [s.example.index for s in whole[skip:]]
    for one, other in zip(rest, whole[skip:], strict=True):
        for name in ("nll_factual", "nll_counterfactual", "nll_placebo"):
            assert torch.equal(getattr(one, name), getattr(other, name))


def test_skipped_examples_are_not_computed(forwards):
    score(shared_history(3, 4), batch_size=4, skip=9)
    assert len(forwards) == 1


# ---- arguments -------------------------------------------------------------------------------------


def test_the_model_is_left_as_it_was():
    model = tiny_model().train()
    scores = score_examples(model, random_examples(3), 0, 1, attention="pieces")
    next(scores)
    scores.close()
    assert model.training
    assert model.config._attn_implementation == "sdpa"


def test_nothing_to_score():
    assert list(score_examples(tiny_model(), [], 0)) == []


def test_batch_size_is_checked():
    with pytest.raises(ArgumentError, match="batch_size: expected a positive number, got 0"):
        list(score_examples(tiny_model(), random_examples(1), 0, 0))


@pytest.mark.parametrize("attention", ["auto", "padded"])
def test_a_model_that_gives_nan_is_named(attention):
    model = tiny_model()
    model.name_or_path = "runs/broken"
    model.get_output_embeddings().weight.data[3] = float("nan")
    what = "example 0 .user 'user0'. a nll_factual of nan" if attention == "padded" else "logits that are not finite"
    with pytest.raises(NonFiniteError, match=f"^model: runs/broken gives {what}; its weights are damaged"):
        list(score_examples(model, random_examples(2), attention=attention))


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
    """A tokenizer of words whose decoding changes earlier text: "n't" removes the space before it."""

    words = ("do", "n't", "panic", ".")

    def __init__(self):
        self.decoded = 0

    def decode(self, ids):
        self.decoded += len(ids)
        return " ".join(self.words[i] for i in ids).replace(" n't", "n't").replace(" .", ".")


def test_decoding_that_cleans_up_spaces():
    assert token_texts(Spelling(), [0, 1, 2, 3]) == ["do", "n't", " panic", "."]


class Swallowing(Spelling):
    """A tokenizer whose last token changes the first, so that a window of tokens is not enough."""

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
