"""The best of several samples: the one that scoring all of them apart in float64 finds, whatever runs beside it."""

from __future__ import annotations

import pytest
import torch

from nextquill import Writer
from nextquill.errors import ArgumentError, ArgumentTypeError, UnsupportedModelError
from nextquill.evaluation.options import EvaluationOptions
from nextquill.generation import GenerationOptions, Prompt, check_engine, local_engine
from nextquill.generation.tree_engine import _samples
from nextquill.models.tiny_models import build_tokenizer
from tests.generation.test_tree_engine import ARCHITECTURES, GUIDED, PROMPTS, tokens
from tests.models.model_helpers import tiny_model

SAMPLES = 4
OPTIONS = {"engine": "tree", "max_new_tokens": 7, "temperature": 2.0, "top_p": 0.95}


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer(["the salty soup"], 280)


@torch.no_grad()
def effect(model, prompt, response):
    """The sum of log p1 - log p0 over a response, from two whole forwards of the float64 model."""

    def log_p(ids):
        logits = model(torch.tensor([[*ids, *response]]), use_cache=False).logits[0, len(ids) - 1 : -1]
        return logits.log_softmax(-1).gather(1, torch.tensor(response)[:, None]).sum()

    return float(log_p(prompt.ids) - log_p(prompt.against))


def best(model, tokenizer, prompts, stops, **options):
    """The best response to each prompt, of samples that are drawn and scored one by one."""
    found = {}
    for prompt in prompts:
        drawn = [tokens(model, tokenizer, [each], stops, **options)[prompt.index] for each in _samples(prompt, SAMPLES)]
        effects = [effect(model, prompt, response) for response in drawn]
        assert len({tuple(response) for response in drawn}) > 1
        found[prompt.index] = drawn[effects.index(max(effects))]
    return found


@pytest.mark.parametrize(
    "options", [{}, {"guidance": 0.7, "plausibility": 0.001}, {"draft_tokens": 3}], ids=["plain", "guided", "drafts"]
)
@pytest.mark.parametrize("kind", ["llama", "gemma2", "qwen3"])
def test_it_has_the_largest_effect_of_the_samples(kind, options, tokenizer):
    model = tiny_model(kind, eos_token_id=None, **ARCHITECTURES[kind]).double()
    stops = {tokens(model, tokenizer, [GUIDED[0]], **OPTIONS, **options)[0][3]}  # so that samples end apart
    expected = best(model, tokenizer, GUIDED, stops, **OPTIONS, **options)
    assert expected != tokens(model, tokenizer, GUIDED, stops, **OPTIONS, **options)
    for batch_size in (1, 8, 64):
        found = tokens(model, tokenizer, GUIDED, stops, **OPTIONS, **options, batch_size=batch_size, best_of=SAMPLES)
        assert found == expected


def test_a_prompt_with_nothing_to_compare_gets_its_only_sample(tokenizer):
    model = tiny_model(eos_token_id=None)
    assert tokens(model, tokenizer, PROMPTS, **OPTIONS, best_of=SAMPLES) == tokens(model, tokenizer, PROMPTS, **OPTIONS)


def test_samples_run_within_the_batch_size(tokenizer):
    model, computed = tiny_model(eos_token_id=None), []
    options = GenerationOptions(**{**OPTIONS, "max_new_tokens": 2}, batch_size=8, best_of=4)
    with local_engine(model, tokenizer, set(), options) as engine:
        model.get_input_embeddings().register_forward_hook(lambda _, ids, __: computed.append(ids[0].numel()))
        list(engine.generate_ids(GUIDED))
    assert computed[1::2] == [16, 16]  # two prompts with four samples under two histories, twice


def test_the_end_of_the_context_ends_all_samples(tokenizer):
    model = tiny_model("gpt2", eos_token_id=None, **ARCHITECTURES["gpt2"])
    full = Prompt(1, [2 + i % 90 for i in range(64)], 1, [5])
    found = tokens(model, tokenizer, [Prompt(0, [2, 3] * 30, 1, [5]), full], **OPTIONS, best_of=2)
    assert len(found[0]) == 4
    assert found[1] == []


def test_a_writer_streams_the_best_alone(tokenizer):
    writer = Writer(tiny_model(eos_token_id=None, vocab_size=280, max_position_embeddings=256), tokenizer)
    options = {"temperature": 1.0, "max_new_tokens": 6}
    found = writer.write(["salty", "soup"], ["the salty soup"], **options, best_of=8)
    assert found != writer.write(["salty", "soup"], ["the salty soup"], **options)
    assert writer.write("salty", ["the salty soup"], **options, best_of=8) == found[:1]
    assert writer.write("salty", (), **options, best_of=8) == writer.write("salty", (), **options)


def test_bad_values_are_refused():
    with pytest.raises(ArgumentError, match="best_of: expected at least 1, got 0"):
        GenerationOptions(best_of=0)
    with pytest.raises(ArgumentTypeError, match=r"best_of: expected an integer, got 1\.5"):
        GenerationOptions(best_of=1.5)
    with pytest.raises(ArgumentError, match="best_of: expected a temperature above 0 with it, got best_of=8 and"):
        GenerationOptions(best_of=8)
    for engine in ("hf", "vllm"):
        with pytest.raises(ArgumentError, match=f"best_of: expected 1 with engine '{engine}', .* got 8"):
            GenerationOptions(best_of=8, temperature=1.0, engine=engine)


def test_a_model_that_cannot_is_refused_before_any_work():
    options = GenerationOptions(best_of=2, temperature=1.0)
    check_engine(options, tiny_model())
    with pytest.raises(UnsupportedModelError, match=r"best_of: expected a model that .* runs, got another: Mamba"):
        check_engine(options, tiny_model("mamba", state_size=4, attn_implementation="eager"))


def test_evaluations_from_before_the_option_resume():
    assert "best_of" not in EvaluationOptions().identity()
    assert EvaluationOptions(best_of=4, temperature=1.0).identity()["best_of"] == 4
