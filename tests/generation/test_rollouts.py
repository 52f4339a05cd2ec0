"""Rollouts: samples from exactly the model's distribution, which do not change the model, recorded and replayed."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

from nextquill.errors import ArgumentError, BudgetError, CheckpointError, OutputExistsError
from nextquill.generation import Prompt
from nextquill.generation.rollouts import ModelRollouts, RecordedRollouts, RecordingRollouts, Sample
from nextquill.tree import build_prefix_tree

# peft 0.21.2 asks models for names that transformers 5.23 has deprecated.
pytestmark = pytest.mark.filterwarnings(
    r"ignore:`(is_gradient_checkpointing|gradient_checkpointing_enable)` is deprecated:FutureWarning"
)
STOP = 1
PROMPTS = [Prompt(index, ids, 100 + index) for index, ids in enumerate(([10, 11, 12], [40], [7, 8, 90, 200], [9]))]


def tiny_model(vocabulary: int = 260, kind: str = "llama", **options: Any) -> Any:
    size = {
        "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 1, "head_dim": 8, "max_position_embeddings": 64, "initializer_range": 0.4,
    }  # fmt: skip
    ids = {"pad_token_id": None, "bos_token_id": None, "eos_token_id": STOP}
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, vocab_size=vocabulary, **{**size, **ids, **options})
    return AutoModelForCausalLM.from_config(config, attn_implementation="sdpa", dtype=torch.float32).eval()


def two_adapters(**options: Any) -> Any:
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    model = get_peft_model(tiny_model(**options), config, adapter_name="inference")
    model.add_adapter("generator", config)
    return model


def ids_of(samples: list[Sample]) -> list[list[int]]:
    return [sample.ids for sample in samples]


@torch.no_grad()
def log_probs(model: Any, prompt: list[int], ids: list[int], temperature: float) -> list[float]:
    """The log-probability of each sampled token, from one plain forward without a cache, in double precision."""
    logits = model(input_ids=torch.tensor([prompt + ids]), use_cache=False).logits[0, len(prompt) - 1 : -1]
    return (logits.double() / temperature).log_softmax(1)[range(len(ids)), ids].tolist()


# ---- the distribution --------------------------------------------------------------------------


def outcomes(vocabulary: int, length: int) -> list[list[int]]:
    """All possible samples: up to the first stop, or of full length."""
    words = [token for token in range(vocabulary) if token != STOP]
    ended = [[*start, STOP] for n in range(length) for start in itertools.product(words, repeat=n)]
    return ended + [list(each) for each in itertools.product(words, repeat=length)]


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_sequences_have_the_models_probabilities(tokenizer, temperature):
    """Chi-square over all sequences of up to three tokens, for two prompts of different lengths in one batch."""
    model, draws, length = tiny_model(5), 1500, 3
    prompts = [Prompt(2 * i + j, ids, 31 * (2 * i + j)) for i in range(draws) for j, ids in enumerate(([2, 3, 4], [0]))]
    rollouts = ModelRollouts(model, tokenizer, {STOP}, max_new_tokens=length, temperature=temperature, batch_size=750)
    samples = rollouts.sample(prompts)
    possible = outcomes(5, length)
    for start in range(2):
        prompt, own = prompts[start].ids, [tuple(sample.ids) for sample in samples[start::2]]
        p = torch.tensor([sum(log_probs(model, prompt, ids, temperature)) for ids in possible]).double().exp()
        assert float(p.sum()) == pytest.approx(1)
        counts = torch.tensor([float(own.count(tuple(ids))) for ids in possible]).double()
        assert int(counts.sum()) == draws
        common = p * draws >= 5
        observed, expected = (torch.cat([x[common], x[~common].sum()[None]]) for x in (counts, p * draws))
        chi2, freedom = float(((observed - expected) ** 2 / expected).sum()), len(observed) - 1
        assert freedom > 10
        assert chi2 < freedom + 4 * (2 * freedom) ** 0.5


def test_log_probs_of_samples_average_to_the_entropy(tokenizer):
    """A plain forward, as in the policy gradient, gives the distribution that the ids were drawn from."""
    model, temperature, draws = tiny_model(5), 0.8, 1000
    rollouts = ModelRollouts(model, tokenizer, {STOP}, max_new_tokens=3, temperature=temperature, batch_size=500)
    samples = rollouts.sample([Prompt(i, [2, 3], 7 * i) for i in range(draws)])
    exact = {tuple(ids): sum(log_probs(model, [2, 3], ids, temperature)) for ids in outcomes(5, 3)}
    found = torch.tensor([exact[tuple(sample.ids)] for sample in samples])
    logs = torch.tensor(list(exact.values()))
    expected = float((logs.exp() * logs).sum())
    assert float(found.mean()) == pytest.approx(expected, abs=4 * float(found.std()) / draws**0.5)


def test_a_sample_depends_on_its_ids_and_seed_alone(tokenizer):
    model = tiny_model()
    many = [replace(each, seed=each.seed + 10 * k) for k in range(3) for each in PROMPTS]
    whole = ids_of(ModelRollouts(model, tokenizer, {STOP}, max_new_tokens=6, batch_size=1).sample(many))
    for size in (2, 5, 16):
        assert ids_of(ModelRollouts(model, tokenizer, {STOP}, max_new_tokens=6, batch_size=size).sample(many)) == whole
    backwards = ModelRollouts(model, tokenizer, {STOP}, max_new_tokens=6, batch_size=3).sample(many[::-1])
    assert ids_of(backwards[::-1]) == whole
    assert len({tuple(ids) for ids in whole}) == len(many), "seeds tell samples of one prompt apart"


def test_the_global_random_numbers_are_left_alone(tokenizer):
    model, before = tiny_model(), torch.get_rng_state()
    ModelRollouts(model, tokenizer, {STOP}, max_new_tokens=3).sample(PROMPTS)
    assert torch.equal(torch.get_rng_state(), before)


def test_indices_need_not_be_positions(tokenizer):
    rollouts = ModelRollouts(tiny_model(), tokenizer, {STOP}, max_new_tokens=4)
    assert rollouts.sample([replace(each, index=7) for each in PROMPTS]) == rollouts.sample(PROMPTS)
    assert rollouts.sample([]) == []


# ---- ends --------------------------------------------------------------------------------------


def test_a_sample_holds_its_stop_and_a_runaway_has_none(tokenizer):
    stops = set(range(4, 120))
    prompts = [Prompt(i, [10, 11 + i % 5], i) for i in range(40)]
    samples = ModelRollouts(tiny_model(), tokenizer, stops, max_new_tokens=3).sample(prompts)
    ended = [sample for sample in samples if sample.ended]
    assert 5 < len(ended) < 40
    for sample in samples:
        body = sample.ids[:-1] if sample.ended else sample.ids
        assert (sample.ids[-1] in stops) == sample.ended
        assert not stops & set(body)
        assert sample.text == tokenizer.decode(body, skip_special_tokens=True)
        assert sample.ended or len(sample.ids) == 3
    assert {len(sample.ids) for sample in ended} == {1, 2, 3}


def test_an_empty_summary_is_a_stop_alone(tokenizer):
    samples = ModelRollouts(tiny_model(), tokenizer, set(range(260)), max_new_tokens=3).sample(PROMPTS)
    assert all(len(sample.ids) == 1 and sample.ended and sample.text == "" for sample in samples)


def test_temperature_0_gives_the_most_likely_tokens(tokenizer):
    model, ids = tiny_model(), []
    (sample,) = ModelRollouts(model, tokenizer, set(), max_new_tokens=5, temperature=0).sample(PROMPTS[:1])
    while len(ids) < 5:
        ids.append(int(model(torch.tensor([PROMPTS[0].ids + ids])).logits[0, -1].argmax()))
    assert sample == Sample(ids, tokenizer.decode(ids, skip_special_tokens=True), ended=False)


# ---- adapters, and the model's state -----------------------------------------------------------


def state_of(model: Any) -> Any:
    return (
        {name: module.training for name, module in model.named_modules()},
        {name: (p.requires_grad, p.grad) for name, p in model.named_parameters()},
        id(model.generation_config), model.generation_config.to_dict(), model.config.to_dict(),
        getattr(model, "active_adapter", None),
    )  # fmt: skip


def test_the_active_adapter_is_sampled_from(tokenizer):
    model = two_adapters()
    rollouts = ModelRollouts(model, tokenizer, set(), max_new_tokens=6, temperature=0)
    found = {}
    for name in ("inference", "generator"):
        model.set_adapter(name)
        found[name] = ids_of(rollouts.sample(PROMPTS))
    with model.disable_adapter():
        found["base"] = ids_of(rollouts.sample(PROMPTS))
    assert found["base"] == ids_of(
        ModelRollouts(tiny_model(), tokenizer, set(), max_new_tokens=6, temperature=0).sample(PROMPTS)
    )
    assert len({str(ids) for ids in found.values()}) == 3


class BrokenError(Exception):
    pass


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("adapters", [False, True])
def test_the_model_is_left_as_it_was(tokenizer, monkeypatch, adapters, fails):
    model = two_adapters() if adapters else tiny_model()
    if adapters:
        model.set_adapter("generator")
    model.train()
    inner = next(module for name, module in model.named_modules() if name.endswith("layers.0.self_attn"))
    inner.training = False  # one module in another mode, such as a frozen encoder
    model.generation_config.update(temperature=9.0, do_sample=True, repetition_penalty=2.0)
    before, calls = state_of(model), []
    if fails:
        monkeypatch.setattr(inner, "forward", lambda *a, **k: (_ for _ in ()).throw(BrokenError))
        with pytest.raises(BrokenError):
            ModelRollouts(model, tokenizer, {STOP}, max_new_tokens=3).sample(PROMPTS)
    else:
        handle = inner.register_forward_pre_hook(
            lambda module, _: calls.append((model.training, torch.is_grad_enabled()))
        )
        ModelRollouts(model, tokenizer, {STOP}, max_new_tokens=3).sample(PROMPTS)
        handle.remove()
        assert set(calls) == {(adapters, False)}  # a PEFT model's own flag does not show those of the layers inside
    assert state_of(model) == before


def test_gradient_checkpointing_keeps_neither_the_cache_away_nor_anything_changed(tokenizer):
    expected = ModelRollouts(tiny_model(), tokenizer, {STOP}, max_new_tokens=5).sample(PROMPTS)
    model = tiny_model()
    model.gradient_checkpointing_enable()
    model.config.use_cache = False
    model.generation_config.use_cache = False
    model.enable_input_require_grads()
    model.train()
    before, lengths = state_of(model), []
    model.model.embed_tokens.register_forward_pre_hook(lambda _, given: lengths.append(given[0].shape[1]))
    assert ModelRollouts(model, tokenizer, {STOP}, max_new_tokens=5).sample(PROMPTS) == expected
    row = len(build_prefix_tree([prompt.ids for prompt in PROMPTS]))
    assert lengths[-5:] == [row] + [len(PROMPTS)] * 4, "the prompts once, then a token of each at a time"
    assert state_of(model) == before
    assert model.is_gradient_checkpointing


def test_training_continues_after_sampling(tokenizer):
    model = two_adapters().train()
    ModelRollouts(model, tokenizer, {STOP}, max_new_tokens=2).sample(PROMPTS)
    model(input_ids=torch.tensor([[3, 4, 5]]), labels=torch.tensor([[3, 4, 5]])).loss.backward()
    assert any(p.grad is not None for p in model.parameters())


# ---- refusals ----------------------------------------------------------------------------------


def test_prompts_are_checked(tokenizer):
    rollouts = ModelRollouts(tiny_model(), tokenizer, {STOP}, max_new_tokens=4)
    with pytest.raises(ArgumentError, match="prompts: expected tokens, prompt 3 has none"):
        rollouts.sample([*PROMPTS, Prompt(3, [], 0)])
    assert len(rollouts.sample([Prompt(0, [5] * 60, 0)])) == 1
    message = "prompts: prompt 5 has 61 tokens, which with max_new_tokens=4 are more than the 64 there is room for"
    with pytest.raises(BudgetError, match=message):
        rollouts.sample([Prompt(5, [5] * 61, 0)])


@pytest.mark.parametrize("name", ["max_new_tokens", "batch_size"])
def test_options_are_checked(tokenizer, name):
    with pytest.raises(ArgumentError, match=f"{name}: expected a positive number, got 0"):
        ModelRollouts(tiny_model(), tokenizer, {STOP}, **{name: 0})
    with pytest.raises(ArgumentError, match="temperature: expected 0"):
        ModelRollouts(tiny_model(), tokenizer, {STOP}, temperature=-1.0)


# ---- recordings --------------------------------------------------------------------------------


class Listed:
    """Rollouts with given samples."""

    def __init__(self, *samples: Sample) -> None:
        self.samples, self.synced, self.closed = list(samples), 0, False

    def sample(self, prompts):
        return [self.samples.pop(0) for _ in prompts]

    def sync(self):
        self.synced += 1

    def close(self):
        self.closed = True


def test_a_recording_is_replayed(tokenizer, tmp_path):
    path = tmp_path / "new" / "rollouts.jsonl"
    inner = ModelRollouts(tiny_model(), tokenizer, set(range(4, 60)), max_new_tokens=2)
    recording = RecordingRollouts(inner, path)
    first = recording.sample(PROMPTS)
    assert len(path.read_text().splitlines()) == 1 + 4, "written before it is closed"
    second = recording.sample([replace(each, seed=each.seed + 50) for each in PROMPTS])
    recording.close()
    assert json.loads(path.read_text().splitlines()[0]) == {"format": "nextquill rollouts", "version": 1}
    assert {sample.ended for sample in first + second} == {True, False}
    assert first != second

    recorded = RecordedRollouts(path, tokenizer)
    again = [replace(each, seed=each.seed + 50, index=9) for each in PROMPTS]
    assert recorded.sample(again) == second, "in any order of steps, with any index"
    assert recorded.sample(PROMPTS[::-1]) == first[::-1]
    recorded.sync()
    recorded.close()


def test_the_same_prompt_and_seed_again_gives_the_next_sample(tokenizer, tmp_path):
    """An evaluation asks for the same prompts at every step, and gets the samples of that step."""
    path, samples = tmp_path / "rollouts.jsonl", [Sample([5, STOP], "", True), Sample([6, 7], "", False)]
    recording = RecordingRollouts(Listed(*samples), path)
    for _ in samples:
        recording.sample(PROMPTS[:1])
    recording.close()
    recorded = RecordedRollouts(path, tokenizer)
    assert [ids_of(recorded.sample(PROMPTS[:1])) for _ in samples] == [[[5, STOP]], [[6, 7]]]
    with pytest.raises(CheckpointError, match="no further sample was recorded for prompt 0"):
        recorded.sample(PROMPTS[:1])


def test_a_prompt_that_was_not_recorded_is_named(tokenizer, tmp_path):
    path = tmp_path / "rollouts.jsonl"
    recording = RecordingRollouts(Listed(Sample([5], "x", False), Sample([6], "y", False)), path)
    recording.sample(PROMPTS[:2])
    recorded = RecordedRollouts(path, tokenizer)
    for other in (replace(PROMPTS[1], seed=8), replace(PROMPTS[1], ids=[40, 41])):
        message = rf"{path}: no sample was recorded for prompt 1 \({len(other.ids)} tokens, seed {other.seed}\)"
        with pytest.raises(CheckpointError, match=message):
            recorded.sample([PROMPTS[0], other])
    with pytest.raises(CheckpointError, match="no further sample was recorded for prompt 0"):
        recorded.sample([PROMPTS[0], PROMPTS[0]])
    assert ids_of(recorded.sample(PROMPTS[:2])) == [[5], [6]], "a refusal uses nothing up"


def test_a_recording_passes_on_sync_and_close(tmp_path):
    inner = Listed()
    recording = RecordingRollouts(inner, tmp_path / "rollouts.jsonl")
    recording.sync()
    recording.close()
    recording.close()
    assert (inner.synced, inner.closed) == (1, True)


def test_a_recording_does_not_replace_another(tmp_path):
    path = tmp_path / "rollouts.jsonl"
    path.write_text("mine")
    with pytest.raises(OutputExistsError, match=r"path: .*rollouts.jsonl exists"):
        RecordingRollouts(Listed(), path)
    assert path.read_text() == "mine"


GOOD = '{"key": "k", "seed": 1, "ids": [5], "ended": false}'


@pytest.mark.parametrize(
    "line",
    [
        GOOD[:30], "", "7", "[" * 100_000, "\ufffd", GOOD.replace('"k"', "1"), GOOD.replace("[5]", "[true]"),
        GOOD.replace("[5]", "[-1]"), GOOD.replace("[5]", "5"), GOOD.replace("false", "0"),
        '{"key": "k", "seed": 1, "ids": [], "ended": true}',
    ],
    ids=range(11),
)  # fmt: skip
@pytest.mark.parametrize("end", [f"\n{GOOD}\n", ""])
def test_a_damaged_line_is_named(tokenizer, tmp_path, line, end):
    path = tmp_path / "rollouts.jsonl"
    header = json.dumps({"format": "nextquill rollouts", "version": 1})
    path.write_text(f"{header}\n{GOOD}\n{line}{end}", encoding="utf-8")
    if not line and not end:
        RecordedRollouts(path, tokenizer)  # the end of a whole file
        return
    with pytest.raises(CheckpointError, match=rf"{path}, line 3: expected a sample with key, ids and ended"):
        RecordedRollouts(path, tokenizer)


@pytest.mark.parametrize("header", ["", GOOD, '{"format": "nextquill rollouts", "version": 2}'])
def test_another_file_is_refused(tokenizer, tmp_path, header):
    path = tmp_path / "rollouts.jsonl"
    path.write_text(header + "\n")
    with pytest.raises(CheckpointError, match=rf"{path}, line 1: expected .*\"version\": 1"):
        RecordedRollouts(path, tokenizer)


def test_a_missing_file_is_named(tokenizer, tmp_path):
    with pytest.raises(CheckpointError, match=r"path: cannot read the recording .*none.jsonl: No such file"):
        RecordedRollouts(tmp_path / "none.jsonl", tokenizer)
