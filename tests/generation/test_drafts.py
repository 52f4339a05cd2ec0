"""Drafts from the prompt: what is proposed, and that texts are those of decoding without drafts."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nextquill.errors import ArgumentError, ArgumentTypeError
from nextquill.generation import GenerationOptions, Prompt, local_engine
from nextquill.generation.drafts import PromptLookup
from nextquill.models.tiny_models import build_tokenizer
from tests.generation.test_tree_engine import ARCHITECTURES, GUIDED, HISTORY, PROMPTS, separate, tokens
from tests.models.model_helpers import tiny_model

IDS = st.lists(st.integers(0, 2), max_size=20)
LENGTH = 10
OPTIONS = {"engine": "tree", "max_new_tokens": LENGTH, "guidance": 1.5, "plausibility": 0.05}


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer(["the salty soup"], 280)


def last_occurrence(ids, most):
    """As many tokens as have occurred before, from after their last occurrence."""
    for length in (6, 5, 4, 3, 2, 1):
        for start in range(len(ids) - length - 1, -1, -1):
            if ids[start : start + length] == ids[-length:]:
                return ids[start + length :][: min(most, length)]
    return []


@given(IDS, IDS, st.integers(0, 5))
def test_a_draft_is_what_followed_the_longest_run_where_it_last_occurred(prompt, response, most):
    lookup = PromptLookup(prompt)
    for token in response:
        lookup.extend([token])
    assert lookup.propose(most) == last_occurrence(prompt + response, most)


def foreknowing(responses):
    """A lookup that knows the response to each prompt, and proposes it with every third token changed."""

    class Foreknowing:
        def __init__(self, ids):
            self.response, self.made = responses[tuple(ids)], 0

        def extend(self, tokens):
            self.made += len(tokens)

        def propose(self, most):
            wrong = [token + (place % 3 == 2) for place, token in enumerate(self.response)]
            return wrong[self.made :][:most]

    return Foreknowing


def draft_with(monkeypatch, responses, prompts):
    known = {tuple(prompt.ids): responses[prompt.index] for prompt in prompts}
    monkeypatch.setattr("nextquill.generation.tree_engine.PromptLookup", foreknowing(known))


def counted(model, tokenizer, prompts, draft_tokens):
    """The responses, and the number of forwards."""
    forwards = []
    with local_engine(model, tokenizer, set(), GenerationOptions(**OPTIONS, draft_tokens=draft_tokens)) as engine:
        model.get_input_embeddings().register_forward_hook(lambda *_: forwards.append(1))
        return dict(engine.generate_ids(prompts)), len(forwards)


@pytest.mark.parametrize("draft_tokens", [1, 4])
@pytest.mark.parametrize("prompts", [PROMPTS, GUIDED], ids=["plain", "guided"])
@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_tokens_are_those_of_separate_forwards(kind, prompts, draft_tokens, tokenizer, monkeypatch):
    model = tiny_model(kind, eos_token_id=None, **ARCHITECTURES[kind])
    expected = {p.index: separate(model, p, LENGTH, 1.5, 0.05) for p in prompts}
    draft_with(monkeypatch, expected, prompts)
    found, forwards = counted(model, tokenizer, prompts, draft_tokens)
    assert found == expected
    # The prompts give token 0. With drafts of 4 a forward gives tokens 1-2, 3-5, 6-8 and 9, as 2, 5 and 8 are wrong;
    # with drafts of 1 it gives 1-2, 3-4, 5, 6-7, 8 and 9.
    assert forwards == {1: 7, 4: 5}[draft_tokens]


@pytest.mark.parametrize("batch_size", [1, 4])
@pytest.mark.parametrize("prompts", [PROMPTS, GUIDED], ids=["plain", "guided"])
def test_samples_and_ends_are_those_without_drafts(prompts, batch_size, tokenizer, monkeypatch):
    model = tiny_model(eos_token_id=None)
    options = {**OPTIONS, "temperature": 1.0, "top_p": 0.9, "guidance": 0.7}
    whole = tokens(model, tokenizer, prompts, **options)
    stop = whole[0][4]  # inside a draft
    cut = {index: ids[: ids.index(stop) + 1] if stop in ids else ids for index, ids in whole.items()}
    draft_with(monkeypatch, whole, prompts)
    assert tokens(model, tokenizer, prompts, {stop}, **options, batch_size=batch_size, draft_tokens=4) == cut


def test_drafts_end_with_the_context(tokenizer):
    """This model has no embedding beyond its context of 64 tokens."""
    model = tiny_model("gpt2", eos_token_id=None, **ARCHITECTURES["gpt2"])
    prompt = Prompt(0, [2, 3] * 30, 1)
    found = tokens(model, tokenizer, [prompt], **OPTIONS, draft_tokens=8)
    assert found == {0: separate(model, prompt, 4)}


def test_a_phrase_of_the_history_takes_fewer_forwards(tokenizer, monkeypatch):
    model, phrase = tiny_model(eos_token_id=None), HISTORY[1:9]
    written = []

    def one_hot(input_ids, scores):
        chosen = phrase[len(written) : len(written) + len(scores)]
        return torch.zeros_like(scores).scatter_(1, torch.tensor(chosen)[:, None], 1.0)

    monkeypatch.setattr("nextquill.generation.tree_engine.warpers", lambda *_: one_hot)
    options = GenerationOptions(engine="tree", max_new_tokens=len(phrase), draft_tokens=3)
    with local_engine(model, tokenizer, set(), options) as engine:
        computed = []
        model.get_input_embeddings().register_forward_hook(lambda _, ids, __: computed.append(ids[0].numel()))
        for _, token in engine.stream([Prompt(0, [*HISTORY, HISTORY[0]], 1)]):
            written += [token]
    assert written == phrase
    # Two tokens have occurred before, so two are proposed; then five, but only three of the draft are allowed, and the
    # last token of the response needs none.
    assert computed == [len(HISTORY) + 1, 3, 4]


def test_bad_values_are_refused():
    with pytest.raises(ArgumentError, match="draft_tokens: expected at least 0, got -1"):
        GenerationOptions(draft_tokens=-1)
    with pytest.raises(ArgumentTypeError, match=r"draft_tokens: expected an integer, got 1\.5"):
        GenerationOptions(draft_tokens=1.5)
    for engine in ("hf", "vllm"):
        with pytest.raises(ArgumentError, match=f"draft_tokens: expected 0 with engine '{engine}', .* got 2"):
            GenerationOptions(draft_tokens=2, engine=engine)
