"""vLLM behind the engine's interface. As vLLM needs a GPU, a module that records calls replaces it.

It replaces vLLM's `LLM(...)`, `LLM.generate(prompts, params, use_tqdm=, lora_request=)`, `SamplingParams`
and `LoRARequest(name, id, path)`; responses carry the stop token, as vLLM's do.
"""

from __future__ import annotations

import gc
import sys
import weakref
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
from peft import LoraConfig, get_peft_model

from nextquill.data import Branch, EncodedExample
from nextquill.errors import ArgumentError, BackendUnavailableError
from nextquill.generation import GenerationOptions, check_engine, generation_engine, make_prompts
from nextquill.models.tiny_models import build_tokenizer
from tests.models.model_helpers import tiny_model


class RecordedLLM:
    """Gives greedy responses of a model in memory, and records all calls."""

    model = options = calls = None
    made: ClassVar[list] = []

    def __init__(self, **options):
        self.options, self.calls = options, []
        RecordedLLM.made.append(weakref.ref(self))
        RecordedLLM.options = options

    def generate(self, prompts, sampling_params, *, use_tqdm, lora_request):
        self.calls.append((prompts, sampling_params, use_tqdm, lora_request))
        RecordedLLM.calls = self.calls
        return [self._respond(p["prompt_token_ids"], s) for p, s in zip(prompts, sampling_params, strict=True)]

    def _respond(self, ids, parameters):
        new = []
        while len(new) < parameters.max_tokens:
            with torch.no_grad():
                new.append(int(RecordedLLM.model(torch.tensor([list(ids) + new])).logits[0, -1].argmax()))
            if new[-1] in parameters.stop_token_ids:
                break
        return SimpleNamespace(outputs=[SimpleNamespace(token_ids=tuple(new))])


@pytest.fixture
def vllm(install_vllm):
    install_vllm(RecordedLLM)
    RecordedLLM.made = []
    return RecordedLLM


@pytest.fixture
def tokenizer():
    return build_tokenizer(["the salty soup"], 280)


@pytest.fixture
def model(tokenizer, vllm):
    vllm.model = tiny_model(vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id, pad_token_id=None)
    return vllm.model


def examples(*prompts):
    return [
        EncodedExample("u", i, Branch(list(ids), [5, 0]), Branch([3], [5, 0]), None, 1, 1)
        for i, ids in enumerate(prompts)
    ]


EXAMPLES = examples([10, 11, 12, 13], [40], [7, 8, 90, 200, 31, 77], [9, 9])


def respond(model, tokenizer, given=EXAMPLES, done=(), name="folder", **options):
    chosen = GenerationOptions(**options)
    with generation_engine(model, tokenizer, given, chosen, name) as engine:
        return dict(engine.generate(make_prompts(given, ("factual",), chosen.seed), done))


def test_texts_are_those_of_transformers(model, tokenizer):
    texts = respond(model, tokenizer, max_new_tokens=6, engine="vllm")
    assert texts == respond(model, tokenizer, max_new_tokens=6)
    assert any(texts.values())


def test_the_arguments_of_vllm(model, tokenizer, vllm):
    respond(model, tokenizer, done={1}, engine="vllm", max_new_tokens=6, temperature=0.5, top_p=0.9, seed=7)
    assert vllm.options == {
        "model": "folder",
        "dtype": "float32",
        "max_model_len": 6 + 6,
        "generation_config": "vllm",
        "skip_tokenizer_init": True,
        "enable_prefix_caching": True,
    }
    ((prompts, parameters, bar, lora),) = vllm.calls
    assert [prompt["prompt_token_ids"] for prompt in prompts] == [EXAMPLES[i].factual.prompt_ids for i in (0, 2, 3)]
    seeds = [prompt.seed for prompt in make_prompts(EXAMPLES, ("factual",), 7)]
    assert [each.seed for each in parameters] == [seeds[i] for i in (0, 2, 3)]
    first = parameters[0]
    assert (first.temperature, first.top_p, first.max_tokens, first.detokenize) == (0.5, 0.9, 6, False)
    assert first.stop_token_ids == [tokenizer.eos_token_id]
    assert (bar, lora) == (False, None)


def test_a_full_context_is_not_asked_about(model, tokenizer, vllm):
    given = examples(range(2, 66), range(2, 63), [5])
    texts = respond(model, tokenizer, given, engine="vllm", max_new_tokens=6)
    assert texts[0] == ""
    assert [each.max_tokens for each in vllm.calls[0][1]] == [3, 6]
    assert vllm.options["max_model_len"] == 64


def test_a_lora_adapter_is_run_over_its_base(model, tokenizer, vllm):
    model.name_or_path = "base"
    config = LoraConfig(r=12, target_modules=["q_proj"], task_type="CAUSAL_LM")
    respond(get_peft_model(model, config), tokenizer, engine="vllm", max_new_tokens=1, name="adapter-folder")
    assert {name: vllm.options[name] for name in ("model", "enable_lora", "max_lora_rank")} == {
        "model": "base",
        "enable_lora": True,
        "max_lora_rank": 16,
    }
    assert vllm.calls[0][3] == ("evaluated", 1, "adapter-folder")


def test_it_is_gone_when_the_block_is_left_however_it_is(model, tokenizer, vllm):
    options = GenerationOptions(engine="vllm", max_new_tokens=1)

    def fail():
        with generation_engine(model, tokenizer, EXAMPLES, options, "folder") as engine:
            engines.append(engine)
            next(engine.generate(make_prompts(EXAMPLES, ("factual",), 0)))
            raise KeyError

    engines = []
    with pytest.raises(KeyError):
        fail()
    gc.collect()
    assert [each() for each in vllm.made] == [None]
    assert engines[0].llm is None


def test_many_prompts_go_in_shares(model, tokenizer, vllm, monkeypatch):
    monkeypatch.setattr("nextquill.generation.vllm_engine._AT_ONCE", 3)
    assert list(respond(model, tokenizer, engine="vllm", max_new_tokens=1)) == [0, 1, 2, 3]
    assert [len(prompts) for prompts, *_ in vllm.calls] == [3, 1]


def test_unsupported_models_are_refused_before_the_model_is_moved(model, tokenizer, vllm):
    options = GenerationOptions(engine="vllm")
    with pytest.raises(ArgumentError, match="engine: 'vllm' loads the model by its name, and there is none"):
        check_engine(options, model, None)
    # vLLM gives every module of an adapter the same scale, whatever these two say.
    for extra in ({"use_dora": True}, {"rank_pattern": {"q_proj": 8}}, {"alpha_pattern": {"q_proj": 2}}):
        config = LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM", **extra)
        message = f"engine: 'vllm' runs plain LoRA adapters, not one with {next(iter(extra))}"
        with pytest.raises(ArgumentError, match=message):
            check_engine(options, get_peft_model(tiny_model(), config), "folder")
    nameless = get_peft_model(tiny_model(), LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    with pytest.raises(ArgumentError, match="engine: 'vllm' needs the name of the adapter's base model"):
        check_engine(options, nameless, "folder")
    assert vllm.made == []


def test_it_is_named_where_it_is_missing(model, tokenizer, monkeypatch):
    monkeypatch.delitem(sys.modules, "vllm")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(BackendUnavailableError, match="engine: 'vllm' needs vLLM, which is not installed"):
        respond(model, tokenizer, engine="vllm")
