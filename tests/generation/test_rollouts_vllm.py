"""Rollouts by vLLM. As vLLM needs a GPU, a module that records calls replaces it.

It replaces vLLM's `LLM(...)`, its `generate`, `sleep`, `wake_up`, `reset_prefix_cache` and `collective_rpc`,
`SamplingParams`, and `LoRARequest(name, id, path)`, whose folder is read when its number is first used. It responds
with the weights that it gets as files.
"""

from __future__ import annotations

import gc
import sys
import weakref
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

from nextquill.errors import ArgumentError, BackendUnavailableError, BudgetError
from nextquill.generation import Prompt
from nextquill.generation.rollouts import ModelRollouts, Sample, VLLMRollouts

# peft 0.21.2 asks models for names that transformers 5.23 has deprecated.
pytestmark = pytest.mark.filterwarnings(
    r"ignore:`(is_gradient_checkpointing|gradient_checkpointing_enable)` is deprecated:FutureWarning"
)
STOPS = {1}
PROMPTS = [Prompt(index, ids, 100 + index) for index, ids in enumerate(([10, 11, 12], [40], [7, 8, 90, 200], [9]))]


class FakeLLM:
    """Gives greedy responses with the weights that it got, and knows whether it is awake."""

    made: ClassVar[list[Any]] = []
    rpc_error: ClassVar[Exception | None] = None

    def __init__(self, **options: Any) -> None:
        self.options, self.calls, self.asked, self.awake = options, [], [], True
        self.base = AutoModelForCausalLM.from_pretrained(options["model"])
        self.adapters: dict[int, Any] = {}
        FakeLLM.made.append(weakref.ref(self))

    def sleep(self, level: int) -> None:
        assert self.awake
        assert self.options["enable_sleep_mode"]
        self.awake = False
        self.calls.append(f"sleep {level}")

    def wake_up(self) -> None:
        assert not self.awake
        self.awake = True
        self.calls.append("wake")

    def reset_prefix_cache(self) -> None:
        assert self.awake
        self.calls.append("reset")

    def collective_rpc(self, method: str, *, kwargs: dict[str, str]) -> None:
        assert self.awake
        self.calls.append(method)
        if self.rpc_error is not None:
            raise type(self.rpc_error)(*self.rpc_error.args)  # without a traceback, which would hold the LLM
        self.base = AutoModelForCausalLM.from_pretrained(kwargs["weights_path"])

    def generate(self, prompts: Any, sampling_params: Any, *, use_tqdm: bool, lora_request: Any) -> list[Any]:
        assert self.awake
        self.calls.append("generate")
        self.asked.append((prompts, sampling_params, use_tqdm, lora_request))
        model = self.base if lora_request is None else self._adapted(*lora_request)
        return [self._respond(model, p["prompt_token_ids"], s) for p, s in zip(prompts, sampling_params, strict=True)]

    def _adapted(self, name: str, number: int, folder: str) -> Any:
        if number not in self.adapters:
            base = AutoModelForCausalLM.from_pretrained(self.options["model"])
            assert (Path(folder) / "adapter_model.safetensors").is_file()
            self.adapters[number] = PeftModel.from_pretrained(base, folder)
        return self.adapters[number]

    @torch.no_grad()
    def _respond(self, model: Any, ids: list[int], parameters: Any) -> Any:
        new: list[int] = []
        while len(new) < parameters.max_tokens:
            new.append(int(model(torch.tensor([list(ids) + new])).logits[0, -1].argmax()))
            if new[-1] in parameters.stop_token_ids:
                break
        return SimpleNamespace(outputs=[SimpleNamespace(token_ids=tuple(new))])


@pytest.fixture
def vllm(install_vllm, monkeypatch):
    install_vllm(FakeLLM)
    monkeypatch.setattr(FakeLLM, "made", [])
    monkeypatch.setattr(FakeLLM, "rpc_error", None)
    return FakeLLM


@pytest.fixture
def base(tmp_path, vllm):
    """A tiny model loaded from a folder."""
    config = AutoConfig.for_model(
        "llama", vocab_size=260, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, max_position_embeddings=64, initializer_range=0.4, eos_token_id=1,
        bos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "base")
    return AutoModelForCausalLM.from_pretrained(tmp_path / "base")


def adapted(base: Any, **options: Any) -> Any:
    config = LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM", init_lora_weights=False, **options)
    model = get_peft_model(base, config, adapter_name="inference")
    model.add_adapter("generator", config)
    return model


@torch.no_grad()
def train(model: Any, name: str) -> None:
    """Change every parameter whose name contains `name`."""
    for own, parameter in model.named_parameters():
        if name in own:
            parameter.add_(torch.randn_like(parameter))


def greedy(model: Any, tokenizer: Any) -> list[Sample]:
    return ModelRollouts(model, tokenizer, STOPS, max_new_tokens=4, temperature=0).sample(PROMPTS)


@pytest.fixture
def rollouts(tokenizer):
    """A function that makes rollouts, which are closed after the test."""
    with ExitStack() as stack:

        def make(model: Any, stops: set[int] = STOPS, **options: Any) -> VLLMRollouts:
            found = VLLMRollouts(model, tokenizer, stops, **{"max_new_tokens": 4, "temperature": 0.7, **options})
            stack.callback(found.close)
            return found

        yield make


def folders(found: VLLMRollouts) -> list[str]:
    return sorted(each.name for each in Path(found._folder.name).iterdir())


# ---- the weights of training -------------------------------------------------------------------


def test_an_adapters_samples_follow_its_training(base, tokenizer, rollouts, vllm):
    model = adapted(base)
    model.set_adapter("generator")  # active while the rollouts are made, but summaries come from the other
    found = rollouts(model, adapter="inference")
    llm, seen = vllm.made[0](), []
    model.set_adapter("inference")
    for _ in range(3):
        assert found.sample(PROMPTS) == greedy(model, tokenizer), "the weights of now"
        seen.append(found.sample(PROMPTS))
        train(model, ".inference.")
        assert found.sample(PROMPTS) == seen[-1], "no change before sync"
        found.sync()
    found.sample(PROMPTS)
    assert seen[0] != seen[1]
    requests = [request for *_, request in llm.asked]
    assert [number for _, number, _ in requests] == [1, 1, 1, 2, 2, 2, 3, 3, 3, 4]
    assert len({(name, path) for name, _, path in requests}) == 4
    assert folders(found) == ["4"]
    assert [each.name for each in (Path(found._folder.name) / "4").iterdir() if each.is_dir()] == ["inference"]
    assert "reload_weights" not in llm.calls
    assert model.active_adapter == "inference"


def test_the_adapter_that_is_active_at_the_start_is_the_default(base, tokenizer, rollouts):
    model = adapted(base)
    model.set_adapter("generator")
    found = rollouts(model)
    expected = greedy(model, tokenizer)
    model.set_adapter("inference")
    assert found.sample(PROMPTS) == expected != greedy(model, tokenizer)


def test_one_adapter_of_peft_s_own_name(base, tokenizer, rollouts):
    config = LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    model = get_peft_model(base, config)
    assert rollouts(model).sample(PROMPTS) == greedy(model, tokenizer)


def test_whole_weights_follow_their_training(base, tokenizer, rollouts, vllm):
    train(base, "q_proj")  # the weights now differ from those in the folder
    found = rollouts(base)
    llm = vllm.made[0]()
    before = found.sample(PROMPTS)
    assert before == greedy(base, tokenizer)
    train(base, "proj")
    assert found.sample(PROMPTS) == before
    found.sync()
    assert found.sample(PROMPTS) == greedy(base, tokenizer) != before
    assert llm.calls == ["reload_weights", "reset", "generate", "generate", "reload_weights", "reset", "generate"]
    assert folders(found) == []
    assert llm.asked[0][-1] is None


# ---- options -----------------------------------------------------------------------------------


def test_the_options_of_vllm_and_of_sampling(base, rollouts, vllm):
    found = rollouts(adapted(base), max_prompt_tokens=20, enforce_eager=True)
    llm = vllm.made[0]()
    assert llm.options == {
        "model": base.name_or_path,
        "dtype": "float32",
        "max_model_len": 24,
        "generation_config": "vllm",
        "skip_tokenizer_init": True,
        "enable_prefix_caching": True,
        "enable_lora": True,
        "max_lora_rank": 8,
        "gpu_memory_utilization": 0.3,
        "enable_sleep_mode": False,
        "enforce_eager": True,
    }
    found.sample(PROMPTS)
    ((prompts, parameters, bar, _),) = llm.asked
    assert [prompt["prompt_token_ids"] for prompt in prompts] == [prompt.ids for prompt in PROMPTS]
    assert [each.seed for each in parameters] == [prompt.seed for prompt in PROMPTS]
    assert {(each.temperature, each.top_p, each.max_tokens) for each in parameters} == {(0.7, 1.0, 4)}
    assert (parameters[0].stop_token_ids, parameters[0].detokenize, bar) == ([1], False, False)


@pytest.mark.parametrize("whole", [False, True])
def test_it_sleeps_between_samples(base, rollouts, vllm, whole):
    found = rollouts(base if whole else adapted(base), sleep=True)
    llm = vllm.made[0]()
    hand_over = ["reload_weights", "reset"] if whole else ["reset"]
    assert llm.calls == [*hand_over, "sleep 1"]
    llm.calls.clear()
    found.sync()
    found.sync()
    assert llm.calls == [], "nothing while it sleeps"
    found.sample(PROMPTS)
    found.sample(PROMPTS)
    found.sample([])
    assert llm.calls == ["wake", *hand_over, "generate", "sleep 1", "wake", "generate", "sleep 1"]


def test_it_sleeps_after_a_failure_too(base, rollouts, vllm, monkeypatch):
    found = rollouts(base, sleep=True)
    monkeypatch.setattr(vllm, "generate", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        found.sample(PROMPTS)
    assert not vllm.made[0]().awake


def test_a_runaway_has_not_ended(base, tokenizer, rollouts):
    (first,) = greedy(base, tokenizer)[0].ids[:1]
    found = rollouts(base, {first})
    samples = found.sample(PROMPTS)
    assert samples[0] == Sample([first], "", ended=True)
    assert not all(sample.ended for sample in samples)


def test_closing_gives_everything_back(base, rollouts, vllm):
    found = rollouts(adapted(base), sleep=True)
    folder = Path(found._folder.name)
    assert folder.is_dir()
    found.close()
    found.close()
    gc.collect()
    assert vllm.made[0]() is None
    assert not folder.exists()
    with pytest.raises(ArgumentError, match="rollouts: expected open ones, these were closed"):
        found.sample(PROMPTS)


# ---- refusals ----------------------------------------------------------------------------------


def test_weights_it_cannot_load_are_named_at_the_start(base, rollouts, vllm, monkeypatch):
    monkeypatch.setattr(vllm, "rpc_error", TypeError("unexpected keyword argument 'weights_path'\nTraceback"))
    message = r"reload_weights\(weights_path=...\): unexpected keyword argument 'weights_path'; train a LoRA adapter"
    with pytest.raises(BackendUnavailableError, match=message):
        rollouts(base)
    gc.collect()
    assert [each() for each in vllm.made] == [None]
    monkeypatch.setattr(vllm, "rpc_error", RuntimeError())
    with pytest.raises(BackendUnavailableError, match=r"RuntimeError; train a LoRA adapter"):
        rollouts(base)
    monkeypatch.delattr(vllm, "collective_rpc")
    with pytest.raises(BackendUnavailableError, match="has no attribute 'collective_rpc'; train a LoRA adapter"):
        rollouts(base)


def test_models_it_cannot_run_are_refused_before_anything_is_loaded(base, rollouts, vllm):
    with pytest.raises(ArgumentError, match="adapter: expected None with a model that is not a PEFT model, got 'x'"):
        rollouts(base, adapter="x")
    with pytest.raises(ArgumentError, match="max_prompt_tokens: expected a positive number, got 0"):
        rollouts(base, max_prompt_tokens=0)
    with pytest.raises(ArgumentError, match=r"gpu_memory_utilization: expected a share in \(0, 1\], got 1.5"):
        rollouts(base, gpu_memory_utilization=1.5)
    base.name_or_path = ""
    with pytest.raises(ArgumentError, match="model_name: vLLM loads the base model by its name, and this one has none"):
        rollouts(base)
    model = adapted(base)
    with pytest.raises(ArgumentError, match="adapter: expected one of inference, generator, got 'x'"):
        rollouts(model, adapter="x")
    with pytest.raises(ArgumentError, match="needs the name of the adapter's base model"):
        rollouts(model)
    model.peft_config["generator"].use_dora = True
    with pytest.raises(ArgumentError, match="runs plain LoRA adapters, not one with use_dora"):
        rollouts(model, adapter="generator", model_name="base")
    assert vllm.made == []


def test_a_base_can_be_named(base, rollouts, vllm):
    name, base.name_or_path = base.name_or_path, ""
    found = rollouts(adapted(base), model_name=name)
    assert found.sample(PROMPTS[:1])
    assert vllm.made[0]().options["model"] == name


def test_prompts_are_checked(base, rollouts):
    found = rollouts(base, max_prompt_tokens=20)
    with pytest.raises(BudgetError, match="prompt 0 has 21 tokens, which with max_new_tokens=4 are more than the 24"):
        found.sample([Prompt(0, [5] * 21, 0)])
    with pytest.raises(ArgumentError, match="prompts: expected tokens, prompt 3 has none"):
        found.sample([Prompt(3, [], 0)])
    long = rollouts(base)
    with pytest.raises(BudgetError, match="more than the 64 there is room for"):
        long.sample([Prompt(0, [5] * 61, 0)])


def test_a_run_of_several_processes_is_refused(base, rollouts, vllm, monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    with pytest.raises(BackendUnavailableError, match="VLLMRollouts samples in a run of one process, got 2"):
        rollouts(base)
    assert vllm.made == []


def test_a_missing_vllm_is_named(base, rollouts, monkeypatch):
    monkeypatch.delitem(sys.modules, "vllm")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(BackendUnavailableError, match="VLLMRollouts needs vLLM, which is not installed"):
        rollouts(base)
