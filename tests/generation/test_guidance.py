"""The equation of guided decoding, and its processor inside transformers' own generate."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nextquill.errors import ArgumentError
from nextquill.generation.guidance import HistoryGuidance, guide
from tests.generation.test_tree_engine import GUIDED, separate
from tests.models.model_helpers import tiny_model


@given(st.integers(0, 2**31), st.floats(0, 4), st.floats(0.01, 1), st.sampled_from([torch.float32, torch.bfloat16]))
def test_guided_scores_follow_the_equation(seed, gamma, beta, dtype):
    generator = torch.Generator().manual_seed(seed)
    own, against = (
        (5 * torch.randn(3, 7, generator=generator)).to(dtype),
        torch.randn(3, 7, generator=generator).to(dtype),
    )
    p1, p0 = own.double().softmax(-1), against.double().softmax(-1)
    share = p1 / p1.amax(-1, keepdim=True)
    expected = p1.log() + gamma * (p1.log() - p0.log())
    scores = guide(own, against, gamma, beta)
    assert scores.dtype == torch.float32
    clear = (share - beta).abs() > 1e-5 * beta
    assert (scores.isinf() == (share < beta))[clear].all()
    kept = clear & (share >= beta)
    assert torch.allclose(scores[kept].double(), expected[kept], rtol=1e-5, atol=1e-4)
    shifted = guide(own.float() + 3, against.float() - 2, gamma, beta)
    assert torch.allclose(shifted[kept], scores[kept], rtol=1e-4, atol=1e-4), "a constant changes nothing"


def test_without_guidance_impossible_tokens_stay_impossible():
    logits = torch.tensor([[0.0, -math.inf, 1.0]])
    assert guide(logits, logits, 0.0, 1e-9).tolist()[0][1] == -math.inf
    assert not guide(logits, logits, 0.0, 1e-9).isnan().any()


def left_padded(prompts):
    longest = max(len(p.ids) for p in prompts)
    rows = [[0] * (longest - len(p.ids)) + p.ids for p in prompts]
    mask = [[0] * (longest - len(p.ids)) + [1] * len(p.ids) for p in prompts]
    return {"input_ids": torch.tensor(rows), "attention_mask": torch.tensor(mask)}


def test_one_processor_serves_several_calls_of_generate():
    model = tiny_model(eos_token_id=None)
    processor = HistoryGuidance(model, [p.against for p in GUIDED], guidance=1.0, plausibility=0.05)
    inputs = left_padded(GUIDED)
    expected = [separate(model, p, 6, 1.0, 0.05) for p in GUIDED]
    for _ in range(2):
        out = model.generate(**inputs, max_new_tokens=6, do_sample=False, logits_processor=[processor], pad_token_id=0)
        assert out[:, inputs["input_ids"].shape[1] :].tolist() == expected


def test_zero_guidance_runs_no_other_prompts():
    model = tiny_model(eos_token_id=None)
    processor = HistoryGuidance(model, [p.against for p in GUIDED], guidance=0.0)
    calls = []
    model.get_input_embeddings().register_forward_hook(lambda *_: calls.append(1))
    model.generate(
        **left_padded(GUIDED), max_new_tokens=3, logits_processor=[processor], pad_token_id=0, do_sample=False
    )
    assert len(calls) == 3


def test_beams_and_bad_values_are_refused():
    model = tiny_model(eos_token_id=None)
    processor = HistoryGuidance(model, [[5]])
    with pytest.raises(ArgumentError, match=r"against: expected a prompt for each of the 2 rows of generate, got 1"):
        model.generate(
            torch.tensor([[5, 6]]),
            max_new_tokens=2,
            num_beams=2,
            do_sample=False,
            logits_processor=[processor],
            pad_token_id=0,
        )
    with pytest.raises(ArgumentError, match="guidance: expected a finite number of at least 0, got -1"):
        HistoryGuidance(model, [[5]], guidance=-1)
    with pytest.raises(ArgumentError, match="plausibility: expected a share"):
        HistoryGuidance(model, [[5]], plausibility=1.5)
    with pytest.raises(ArgumentError, match="against: expected a prompt of at least one token"):
        HistoryGuidance(model, [[5], []])
