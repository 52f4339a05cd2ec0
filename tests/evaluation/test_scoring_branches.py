"""Branches scored together, effects of single history items, and preference margins, against separate forwards."""

from __future__ import annotations

import dataclasses
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nextquill.data import Branch, ExampleEncoder, load_records
from nextquill.errors import ArgumentError, BudgetError, RecordError
from nextquill.evaluation.item_effects import item_effects, leave_one_out
from nextquill.evaluation.preferences import encode_pairs, has_pair, preference_scores
from nextquill.evaluation.scoring import BranchScorer
from tests.helpers import assert_rounds_like
from tests.models.model_helpers import TEMPLATE, VOCABULARY, branch_nll, make_records, tiny_model, word_tokenizer

DTYPES = {torch.float32: {"rtol": 1e-4, "atol": 2e-5}, torch.float64: {"rtol": 1e-10, "atol": 1e-11}}

GEMMA = {"rtol": 1e-6, "atol": 1e-6}


def branches(seed=0, count=6):
    """Prompts that share their beginnings, with responses of their own lengths."""
    rng = random.Random(seed)

    def ids(low, high):
        return [rng.randrange(2, VOCABULARY) for _ in range(rng.randint(low, high))]

    prefix = ids(6, 6)
    made = [Branch(prefix[: rng.randint(1, 6)] + ids(0, 5), ids(1, 5)) for _ in range(count)]
    return [*made, made[0]]


# ---- branches ----------------------------------------------------------------------------------


def score_branches(model, branches, **options):
    with BranchScorer(model, **options) as scorer:
        return scorer(branches)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["llama", "gemma2"])
@pytest.mark.parametrize("options", [{}, {"attention": "padded"}, {"attention": "mask"}, {"max_tokens": 20}], ids=str)
def test_nll_is_that_of_each_branch_alone(kind, dtype, options, forwards):
    model, made = tiny_model(kind, dtype), branches()
    found = score_branches(model, made, **options)
    for nll, branch in zip(found, made, strict=True):
        with torch.no_grad():
            expected = branch_nll(model, branch)
        assert nll.dtype == dtype
        # Gemma's own eager attention takes its softmax in float32, whatever the model's dtype is.
        through_float32 = kind == "gemma2" and dtype == torch.float64
        torch.testing.assert_close(nll, expected, **(GEMMA if through_float32 else DTYPES[dtype]))
        assert not nll.requires_grad
    assert (len(forwards) > 1) is ("max_tokens" in options)


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10**6), count=st.integers(1, 12))
def test_the_order_of_branches_changes_nothing_but_the_order(seed, count):
    """Another order changes the rows of the products, so values are equal up to rounding."""
    made = branches(seed, count)
    order = random.Random(seed).sample(range(len(made)), len(made))
    shuffled = [made[i] for i in order]
    with BranchScorer(MODEL) as scorer:
        found = scorer(shuffled)
    with torch.no_grad():
        plain, truth = ([branch_nll(model, branch) for branch in shuffled] for model in (MODEL, EXACT))
    assert [len(nll) for nll in found] == [len(nll) for nll in plain]
    assert_rounds_like(torch.cat(found), torch.cat(plain), torch.cat(truth), VOCABULARY)


MODEL, EXACT = tiny_model(), tiny_model().double()


def test_the_model_is_left_as_it_was():
    model = tiny_model().train()
    before = model.config._attn_implementation
    score_branches(model, branches())
    assert model.training
    assert model.config._attn_implementation == before


def test_a_branch_beyond_the_budget_is_refused():
    with pytest.raises(BudgetError, match="max_tokens: expected at least the 12 tokens"):
        score_branches(MODEL, [Branch([5] * 10, [7, 8])], max_tokens=11)


def test_a_budget_of_padded_rows_changes_nothing():
    branches = [Branch([5] * length, [7, 8]) for length in (3, 10, 4)]
    whole, divided = (score_branches(MODEL, branches, attention="padded", max_tokens=most) for most in (None, 12))
    for one, other in zip(whole, divided, strict=True):
        assert torch.allclose(one, other, rtol=1e-5, atol=1e-6)
    with pytest.raises(BudgetError, match="max_tokens: expected at least the 12 tokens"):
        score_branches(MODEL, branches, attention="padded", max_tokens=11)


# ---- history items -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def records():
    return load_records(make_records(8, users=3))


def encoder(max_length=64, **template):
    return ExampleEncoder(word_tokenizer(), dataclasses.replace(TEMPLATE, **template), max_length)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("order", ["official", "history_first"])
def test_an_items_effect_is_the_difference_of_two_separate_forwards(records, dtype, order, forwards):
    model, encode = tiny_model(dtype=dtype), encoder(order=order)
    largest = 0.0
    with BranchScorer(model) as scorer:
        for index, record in enumerate(records[:4]):
            forwards.clear()
            example = encode.encode(record, index)
            effects = leave_one_out(scorer, encode.renderer, record, example)
            assert len(forwards) == 1
            assert effects.shape == (len(record.history), len(example.factual.response_ids))
            for left, row in enumerate(effects):
                rest = tuple(item for place, item in enumerate(record.history) if place != left)
                without = encode.encode(dataclasses.replace(record, history=rest)).factual
                with torch.no_grad():
                    expected = branch_nll(model, without) - branch_nll(model, example.factual)
                torch.testing.assert_close(row, expected, **DTYPES[dtype])
            largest = max(largest, float(effects.abs().max()))
    assert largest > 0.1, "a model that does not read its history would pass"


def test_one_items_effect_is_that_of_the_history(records):
    """Leaving out the only item leaves the prompt without history."""
    record = dataclasses.replace(records[0], history=records[0].history[:1])
    encode = encoder()
    example = encode.encode(record)
    with BranchScorer(MODEL) as scorer:
        (row,) = leave_one_out(scorer, encode.renderer, record, example)
        without, whole = scorer([example.counterfactual, example.factual])
    torch.testing.assert_close(row, without - whole)


def test_items_that_did_not_fit_are_left_out_of_it(records):
    record = next(record for record in records if len(record.history) == 3)
    full = encoder().encode(record)
    encode = encoder(max_length=len(full.factual.input_ids) - 1)
    example = encode.encode(record, 5)
    assert example.history_kept == 2
    with BranchScorer(MODEL) as scorer:
        found = item_effects(scorer, encode.renderer, word_tokenizer(), record, example)
    assert [item["text"] for item in found.items] == [item.text for item in record.history[1:]]
    assert found.index == 5
    assert "".join(found.tokens).split() != []
    assert {len(row) for row in found.effects} == {len(found.tokens)}


def test_an_example_without_history_is_refused(records):
    record = dataclasses.replace(records[0], history=())
    encode = encoder()
    with BranchScorer(MODEL) as scorer, pytest.raises(ArgumentError, match="example: expected one with history"):
        leave_one_out(scorer, encode.renderer, record, encode.encode(record))


def test_an_example_of_another_record_is_refused(records):
    encode = encoder()
    with BranchScorer(MODEL) as scorer, pytest.raises(ArgumentError, match="example: expected the prompt of record 0"):
        leave_one_out(scorer, encode.renderer, records[1], encode.encode(records[0]))


# ---- preferences -------------------------------------------------------------------------------


def paired(records, *pairs):
    return [
        dataclasses.replace(record, extra={"chosen": chosen, "rejected": rejected})
        for record, (chosen, rejected) in zip(records, pairs, strict=False)
    ]


PAIRS = [("w1 w2", "w3 w4 w5 w6"), ("w30 w31 w32", "w7"), ("w8", "w8")]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_margins_are_those_of_separate_forwards(records, dtype, forwards):
    model, encode = tiny_model(dtype=dtype), encoder()
    chosen = paired(records, *PAIRS)
    found = encode_pairs(encode, chosen, 0)
    examples = encode.encode_all(chosen, True, 0)
    with BranchScorer(model) as scorer:
        for pair, example, texts in zip(found, examples, PAIRS, strict=True):
            forwards.clear()
            scores = preference_scores(scorer, pair)
            assert len(forwards) == 1
            for name, suffix in (("factual", ""), ("counterfactual", "_counterfactual"), ("placebo", "_placebo")):
                prompt = getattr(example, name).prompt_ids
                with torch.no_grad():
                    better, worse = (
                        -branch_nll(model, Branch(prompt, encode.renderer.response_ids(text))).double()
                        for text in texts
                    )
                margin, per_token = float(better.sum() - worse.sum()), float(better.mean() - worse.mean())
                assert scores[f"preference_margin{suffix}"] == pytest.approx(margin, abs=2e-4)
                assert scores[f"preference_margin_per_token{suffix}"] == pytest.approx(per_token, abs=1e-4)
                expected = 0.5 if texts[0] == texts[1] else float(margin > 0)
                assert scores[f"preference_accuracy{suffix}"] == expected
                tied = 0.5 if texts[0] == texts[1] else float(per_token > 0)
                assert scores[f"preference_accuracy_per_token{suffix}"] == tied


def test_both_responses_get_one_prompt_that_leaves_room_for_the_longer(records):
    long = " ".join(f"w{i}" for i in range(20))
    record = next(record for record in records if len(record.history) == 3)
    fits = len(encoder().encode(record).factual.input_ids)
    encode = encoder(max_length=fits + 8)
    for pair in (("w1", long), (long, "w1")):
        found = encode_pairs(encode, paired([record], pair), 0)[0]
        both = found.branches["factual"]
        assert both[0].prompt_ids == both[1].prompt_ids
        assert both[0].prompt_ids != encode.encode(record).factual.prompt_ids, "an item made room"
        assert max(len(branch.input_ids) for branch in both) <= encode.max_length
    with pytest.raises(BudgetError, match="record 0"):
        encode_pairs(encoder(max_length=22), paired([record], (long, "w1")), 0)


def test_records_without_a_pair_are_passed_over_and_still_lend_their_history(records):
    mixed = [*records[:2], *paired(records[2:3], PAIRS[0])]
    (pair,) = encode_pairs(encoder(), mixed, 0)
    assert pair.index == 2
    assert set(pair.branches) == {"factual", "counterfactual", "placebo"}
    (alone,) = encode_pairs(encoder(), paired(records[:1], PAIRS[0]), 0)
    assert "placebo" not in alone.branches


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"chosen": "a"}, "record 3: field 'rejected': expected it beside 'chosen', got none"),
        ({"rejected": "a", "chosen": None}, "record 3: field 'chosen': expected it beside 'rejected', got none"),
        ({"chosen": 5, "rejected": "a"}, "record 3: field 'chosen': expected some text, got int"),
        ({"chosen": "a", "rejected": " "}, "record 3: field 'rejected': expected some text, got a blank string"),
    ],
)
def test_half_a_pair_is_refused(records, extra, message):
    with pytest.raises(RecordError, match=message):
        has_pair(dataclasses.replace(records[0], extra=extra), 3)
