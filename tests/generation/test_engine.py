"""Responses of both engines in memory: they stop at the right tokens, and are equal in any batch."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from tokenizers import AddedToken

from nextquill.data import Branch, EncodedExample
from nextquill.errors import ArgumentError
from nextquill.generation import (
    GenerationOptions,
    Prompt,
    generation_engine,
    local_engine,
    make_prompts,
    stop_tokens,
)
from nextquill.models.tiny_models import build_tokenizer
from tests.models.model_helpers import tiny_model
from tests.models.test_attention_refusals import HYBRID, NO_MASK


@pytest.fixture
def tokenizer():
    return build_tokenizer(["the salty soup"], 280)


@pytest.fixture(params=["hf", "tree"])
def engine(request):
    return request.param


@pytest.fixture
def model(tokenizer):
    return tiny_model(vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id, pad_token_id=None)


def example(prompt, other=None, response=(5, 0), index=0):
    response = list(response)
    return EncodedExample("u", index, Branch(prompt, response), Branch(other or prompt[:1], response), None, 1, 1)


IDS = ([10, 11, 12, 13], [40], [7, 8, 90, 200, 31, 77], [9, 9])
EXAMPLES = [example(ids, index=index) for index, ids in enumerate(IDS)]


def respond(model, tokenizer, examples=EXAMPLES, branches=("factual",), done=(), **options):
    """The texts, by the index of the prompt."""
    chosen = GenerationOptions(**options)
    with generation_engine(model, tokenizer, examples, chosen) as engine:
        return dict(engine.generate(make_prompts(examples, branches, chosen.seed), done))


def argmax_responses(model, tokenizer, examples, count, branch="factual"):
    """Greedy responses, one token at a time, without cache, batch or `generate`."""
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


# ---- greedy ------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_responses_are_the_most_likely_tokens(model, tokenizer, batch_size, engine):
    branches = ("factual", "counterfactual")
    texts = respond(model, tokenizer, branches=branches, max_new_tokens=6, batch_size=batch_size, engine=engine)
    expected = [text for branch in branches for text in argmax_responses(model, tokenizer, EXAMPLES, 6, branch)]
    assert [texts[index] for index in range(8)] == expected
    assert len(set(expected)) > 3


def test_the_models_own_generation_config_is_left_out_and_left_alone(model, tokenizer, engine):
    plain = respond(model, tokenizer, max_new_tokens=6, engine=engine)
    model.generation_config.update(do_sample=True, temperature=9.0, repetition_penalty=3.0, max_length=3, num_beams=2)
    own = model.generation_config
    assert respond(model, tokenizer, max_new_tokens=6, engine=engine) == plain
    assert model.generation_config is own
    assert own.repetition_penalty == 3.0


def test_a_response_stops_at_an_end_and_has_nothing_behind_it(model, tokenizer, engine):
    first = int(model(torch.tensor([[40]])).logits[0, -1].argmax())
    model.generation_config.eos_token_id = [first, 3]
    texts = respond(model, tokenizer, max_new_tokens=6, engine=engine)
    assert texts[1] == ""
    assert any(texts.values())


def test_stops(model, tokenizer):
    tokenizer.add_tokens([AddedToken("<|turn|>", special=True)])
    turn = tokenizer.convert_tokens_to_ids("<|turn|>")
    end = tokenizer.eos_token_id
    model.generation_config.eos_token_id = None
    assert stop_tokens(model, tokenizer, [turn]) == {end, turn}
    assert stop_tokens(model, tokenizer, [6]) == {end}, "a word ends nothing"
    model.generation_config.eos_token_id = [7, 8]
    assert stop_tokens(model, tokenizer, []) == {end, 7, 8}


def test_a_tokenizer_without_padding_or_end(model, tokenizer, engine):
    expected = respond(model, tokenizer, max_new_tokens=3, engine=engine)
    tokenizer.pad_token = None
    assert respond(model, tokenizer, max_new_tokens=3, engine=engine) == expected
    tokenizer.eos_token, model.generation_config.eos_token_id = None, None
    assert len(respond(model, tokenizer, max_new_tokens=3, engine=engine)) == 4


@pytest.fixture
def lengths(tokenizer, monkeypatch):
    """The number of tokens of each response, in the order of decoding."""
    made = []
    monkeypatch.setattr(tokenizer, "decode", lambda ids, **_: made.append(len(ids)) or "", raising=False)
    return made


@pytest.mark.parametrize("kind", ["llama", "gpt2"])  # gpt2 has no embedding for a position beyond its context
def test_a_response_ends_with_the_context_and_no_other_does(tokenizer, lengths, kind, engine):
    size = {"n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 4} if kind == "gpt2" else {}
    model = tiny_model(kind, vocab_size=len(tokenizer), eos_token_id=None, **size)
    tokenizer.eos_token = None
    prompts = [example([2 + i % 90 for i in range(length)]) for length in (60, 3, 64, 63, 58, 57)]
    respond(model, tokenizer, prompts, max_new_tokens=6, engine=engine)
    assert sorted(lengths) == [0, 1, 4, 6, 6, 6]
    assert engine == "tree" or lengths == sorted(lengths), "longest prompts first"


def test_training_mode_is_given_back(model, tokenizer, engine):
    model.train()
    respond(model, tokenizer, EXAMPLES[:1], max_new_tokens=1, engine=engine)
    assert model.training


def test_finished_responses_are_left_out_and_batches_stay_the_same(model, tokenizer, monkeypatch):
    whole = respond(model, tokenizer, max_new_tokens=4, batch_size=2, engine="hf")
    shapes, own = [], model.generate
    monkeypatch.setattr(model, "generate", lambda **k: shapes.append(list(k["input_ids"].shape)) or own(**k))
    rest = respond(model, tokenizer, done={2, 3}, max_new_tokens=4, batch_size=2, engine="hf")
    assert rest == {index: whole[index] for index in (0, 1)}
    assert shapes == [[2, 6], [2, 2]], "both batches, each with a prompt that is needed"
    shapes.clear()
    rest = respond(model, tokenizer, done={0, 2}, max_new_tokens=4, batch_size=2, engine="hf")
    assert rest == {1: whole[1], 3: whole[3]}
    assert shapes == [[2, 2]]


def test_the_tree_engine_leaves_out_batches_that_are_finished(model, tokenizer):
    options = GenerationOptions(max_new_tokens=4, batch_size=2, engine="tree")
    whole, tokens = respond(model, tokenizer, **dataclasses.asdict(options)), []
    with generation_engine(model, tokenizer, EXAMPLES, options) as made:
        model.get_input_embeddings().register_forward_hook(lambda _, ids, __: tokens.append(ids[0].numel()))
        prompts = make_prompts(EXAMPLES, ("factual",), 0)  # in the order of their tokens: 2, 3 and then 0, 1
        assert dict(made.generate(prompts, {0, 2})) == {1: whole[1], 3: whole[3]}
        assert {len(IDS[0] + IDS[1]), len(IDS[2] + IDS[3])} <= set(tokens)
        tokens.clear()
        assert dict(made.generate(prompts, {0, 2, 3})) == {1: whole[1]}
        assert len(IDS[2] + IDS[3]) not in tokens


# ---- sampled -----------------------------------------------------------------------------------


def test_a_sample_depends_on_its_own_seed_and_not_on_its_batch(model, tokenizer, engine):
    sampled = {"temperature": 1.0, "max_new_tokens": 6}
    texts = respond(model, tokenizer, batch_size=1, seed=3, **sampled, engine=engine)
    for size in (2, 4):
        assert respond(model, tokenizer, batch_size=size, seed=3, **sampled, engine=engine) == texts
    last = respond(model, tokenizer, EXAMPLES[2:], batch_size=1, seed=3, **sampled, engine=engine)
    assert last == {0: texts[2], 1: texts[3]}
    assert respond(model, tokenizer, batch_size=1, seed=4, **sampled, engine=engine) != texts
    assert respond(model, tokenizer, max_new_tokens=6, engine=engine) != texts


def test_samples_have_the_models_probabilities(model, tokenizer, engine):
    """First tokens of many seeds against softmax(logits / temperature), by chi-square."""
    temperature, draws = 0.7, 3000
    with torch.no_grad():
        p = (model(torch.tensor([[40]])).logits[0, -1].double() / temperature).softmax(0)
    chosen = GenerationOptions(temperature=temperature, max_new_tokens=1, batch_size=1000, engine=engine)
    counts = torch.zeros_like(p)
    model.generation_config.eos_token_id = None
    with generation_engine(model, tokenizer, [], chosen) as made:
        for _, ids in made.generate_ids([Prompt(index, [40], 17 * index) for index in range(draws)]):
            counts[ids[0]] += 1
    common = p * draws >= 5
    observed, expected = (torch.cat([x[common], x[~common].sum()[None]]) for x in (counts, p * draws))
    chi2, freedom = float(((observed - expected) ** 2 / expected).sum()), len(observed) - 1
    assert freedom > 20
    assert chi2 < freedom + 4 * (2 * freedom) ** 0.5


def test_top_p_leaves_out_unlikely_tokens(model, tokenizer, engine):
    with torch.no_grad():
        p = model(torch.tensor([[40]])).logits[0, -1].softmax(0)
    ordered = p.sort(descending=True)
    nucleus = set(ordered.indices[: int((ordered.values.cumsum(0) < 0.5).sum()) + 1].tolist())
    model.generation_config.eos_token_id = None
    chosen = GenerationOptions(temperature=1.0, top_p=0.5, max_new_tokens=1, engine=engine)
    with generation_engine(model, tokenizer, [], chosen) as made:
        drawn = {ids[0] for _, ids in made.generate_ids([Prompt(i, [40], i) for i in range(300)])}
    assert drawn <= nucleus
    assert len(drawn) > 1


def test_seeds_differ_between_examples_and_branches():
    seeds = [prompt.seed for prompt in make_prompts(EXAMPLES, ("factual", "counterfactual"), 0)]
    assert len(set(seeds)) == 8
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert seeds[1:4] == [prompt.seed for prompt in make_prompts(EXAMPLES[1:], ("factual",), 0)]


# ---- refusals ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens: expected a positive number, got 0"),
        ({"batch_size": 0}, "batch_size: expected a positive number, got 0"),
        ({"temperature": -1.0}, "temperature: expected 0"),
        ({"temperature": float("nan")}, "temperature: expected 0"),
        ({"top_p": 0.0, "temperature": 1.0}, "top_p: expected a share"),
        ({"top_p": 0.5}, "top_p: expected a temperature above 0"),
        ({"engine": "tgi"}, "engine: expected one of auto, tree, hf, vllm, got 'tgi'"),
        ({"guidance": -0.5}, "guidance: expected a finite number of at least 0, got -0.5"),
        ({"guidance": float("inf")}, "guidance: expected a finite number"),
        ({"plausibility": 0.0}, r"plausibility: expected a share in \(0, 1\], got 0.0"),
        ({"guidance": 1.0, "engine": "vllm"}, "guidance: expected 0 with engine 'vllm'"),
    ],
)
def test_options_are_checked(options, message):
    with pytest.raises(ArgumentError, match=message):
        GenerationOptions(**options)


def test_a_branch_that_is_not_there_is_named():
    with pytest.raises(ArgumentError, match=r"branch: expected examples with a placebo branch, got none in example 0"):
        make_prompts(EXAMPLES, ("placebo",), 0)
    with pytest.raises(
        ArgumentError, match="branch: expected one of 'factual', 'counterfactual', 'placebo', got 'own'"
    ):
        make_prompts(EXAMPLES, ("own",), 0)


def test_without_prompts_nothing_is_generated(model, tokenizer, engine):
    assert respond(model, tokenizer, [], engine=engine) == {}


def test_examples_are_not_changed(model, tokenizer, engine):
    before = [dataclasses.replace(each) for each in EXAMPLES]
    respond(model, tokenizer, max_new_tokens=2, engine=engine)
    assert before == EXAMPLES


# ---- prompts that come several times ---------------------------------------------------------------

LONG = [5 + (7 * place) % 80 for place in range(40)]


def sampled(model, tokenizer, engine, batch_size):
    """Four samples of each of two prompts, and the number of tokens in each forward."""
    seen = []
    hook = model.register_forward_hook(
        lambda module, args, kwargs, output: seen.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    prompts = [Prompt(index, LONG[: 40 - 10 * (index % 2)], seed=index) for index in range(8)]
    options = GenerationOptions(6, batch_size, 1.0, engine=engine)
    with local_engine(model, tokenizer, stop_tokens(model, tokenizer, []), options) as made:
        checked = len(seen)
        found = dict(made.generate_ids(prompts))
    hook.remove()
    return found, seen[checked:]


def test_prompts_that_come_several_times_are_computed_once(model, tokenizer, engine):
    found, forwards = sampled(model, tokenizer, engine, 8)
    alone, _ = sampled(model, tokenizer, engine, 1)
    assert found == alone
    # All but the last tokens of two rows, padded; or one prompt, which begins with the other.
    assert max(forwards) == {"hf": 2 * 39, "tree": 40}[engine]


def test_they_are_computed_once_in_models_whose_cache_is_recurrent(tokenizer):
    kind, options, _ = HYBRID["linear attention"]
    model = tiny_model(kind, vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id, **options)
    found, forwards = sampled(model, tokenizer, "hf", 8)
    assert found == sampled(model, tokenizer, "hf", 1)[0]
    assert max(forwards) == 2 * 39


def test_a_model_that_keeps_no_cache_is_asked_once(tokenizer):
    kind, options, _ = NO_MASK["padding masks alone"]
    options = {**options, "attn_implementation": "eager", "vocab_size": len(tokenizer)}
    model = tiny_model(kind, eos_token_id=tokenizer.eos_token_id, **options)
    found, forwards = sampled(model, tokenizer, "hf", 4)
    assert found == sampled(model, tokenizer, "hf", 1)[0]
    assert forwards.count(39) + forwards.count(29) == 1
