"""Generation in one row: equal to separate forwards in every architecture, with shared prefixes computed once."""

from __future__ import annotations

import inspect
import os

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.integrations import sdpa_attention

from nextquill.errors import UnsupportedModelError
from nextquill.generation import GenerationOptions, Prompt, local_engine
from nextquill.generation.few_rows import _SHARED_KEYS
from nextquill.models.tiny_models import build_tokenizer
from tests.models.model_helpers import shares_states, tiny_model

HISTORY = [5, 9, 31, 8, 70, 22, 64, 11, 90, 3, 41, 17]
PROMPTS = [
    Prompt(0, [*HISTORY, 20, 30], 1),
    Prompt(1, [*HISTORY, 20, 40, 50], 2),
    Prompt(2, [60], 3),
    Prompt(3, HISTORY, 4),
]
AGAINST = [[20, 30], [20, 40, 50], [61, 62], HISTORY[:4]]
GUIDED = [Prompt(p.index, p.ids, p.seed, other) for p, other in zip(PROMPTS, AGAINST, strict=True)]
ARCHITECTURES = {
    "llama": {},
    "gpt2": {"n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 4},
    "qwen3": {},
    "gemma2": {"sliding_window": 6},
    "gemma3_text": {"sliding_window": 6, "sliding_window_pattern": 2},
    "mistral": {"sliding_window": 6},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2, "output_router_logits": True},
}


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer(["the salty soup"], 280)


def tokens(model, tokenizer, prompts, stops=frozenset(), **options):
    with local_engine(model, tokenizer, set(stops), GenerationOptions(**options)) as engine:
        return dict(engine.generate_ids(prompts))


@torch.no_grad()
def separate(model, prompt, count, guidance=0.0, plausibility=0.1):
    """Greedy tokens in float64 arithmetic on logits of whole forwards, one row at a time, without a cache."""

    def log_p(ids):
        return model(torch.tensor([ids]), use_cache=False).logits[0, -1].double().log_softmax(-1)

    new = []
    for _ in range(count):
        own = scores = log_p(prompt.ids + new)
        if prompt.against is not None:
            scores = own + guidance * (own - log_p(prompt.against + new))
            scores[own.exp() < plausibility * own.exp().max()] = -torch.inf
        new.append(int(scores.argmax()))
    return new


@pytest.mark.parametrize("engine", ["tree", "hf"])
@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_tokens_are_those_of_separate_forwards(kind, engine, tokenizer):
    model = tiny_model(kind, eos_token_id=None, **ARCHITECTURES[kind])
    found = tokens(model, tokenizer, PROMPTS, engine=engine, max_new_tokens=9)
    assert found == {p.index: separate(model, p, 9) for p in PROMPTS}


@pytest.mark.parametrize("engine", ["tree", "hf"])
@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_guided_tokens_are_those_of_separate_forwards(kind, engine, tokenizer):
    model = tiny_model(kind, eos_token_id=None, **ARCHITECTURES[kind])
    options = {"guidance": 1.5, "plausibility": 0.05, "max_new_tokens": 9}
    found = tokens(model, tokenizer, GUIDED, engine=engine, **options)
    assert found == {p.index: separate(model, p, 9, 1.5, 0.05) for p in GUIDED}
    assert found != tokens(model, tokenizer, PROMPTS, engine=engine, max_new_tokens=9)


@pytest.mark.parametrize("batch_size", [1, 2, 3])
@pytest.mark.parametrize("prompts", [PROMPTS, GUIDED], ids=["plain", "guided"])
def test_a_response_that_ends_leaves_the_others_as_they_were(prompts, batch_size, tokenizer):
    model = tiny_model(eos_token_id=None)
    options = {"engine": "tree", "temperature": 1.0, "guidance": 0.7, "max_new_tokens": 12}
    whole = tokens(model, tokenizer, prompts, **options, batch_size=4)
    stop = whole[0][2]
    cut = {index: ids[: ids.index(stop) + 1] if stop in ids else ids for index, ids in whole.items()}
    assert len({len(ids) for ids in cut.values()}) > 1
    assert tokens(model, tokenizer, prompts, {stop}, **options, batch_size=batch_size) == cut


@pytest.mark.parametrize("engine", ["tree", "hf"])
def test_a_response_ends_with_the_context_of_the_prompt_to_move_away_from(engine, tokenizer):
    model = tiny_model("gpt2", eos_token_id=None, **ARCHITECTURES["gpt2"])  # it has no embedding beyond its context
    prompt = Prompt(0, [20, 30], 1, [2 + i % 90 for i in range(60)])
    found = tokens(model, tokenizer, [prompt], engine=engine, guidance=1.0, max_new_tokens=9)
    assert found == {0: separate(model, prompt, 4, 1.0)}


@pytest.mark.skipif(_SHARED_KEYS not in inspect.getsource(sdpa_attention), reason="before transformers 5.23 it does")
def test_a_step_does_not_repeat_keys_that_heads_share(tokenizer, monkeypatch):
    """transformers would copy them for every head, for all tokens at every step."""
    model, heads, sdpa = tiny_model(eos_token_id=None), [], torch.nn.functional.scaled_dot_product_attention
    assert model.config.num_key_value_heads < model.config.num_attention_heads

    def attend(query, key, value, **options):
        heads.append((key.shape[1], value.shape[1]))
        return sdpa(query, key, value, **options)

    before = dict(os.environ)
    with local_engine(
        model, tokenizer, set(), GenerationOptions(engine="tree", max_new_tokens=4, guidance=1.0)
    ) as engine:
        monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", attend)
        for _ in engine.stream(GUIDED[:1]):
            assert os.environ == before
    assert {*heads[-3 * model.config.num_hidden_layers :]} == {(model.config.num_key_value_heads,) * 2}


@pytest.mark.parametrize(
    "options", [{}, {"temperature": 1.0, "top_p": 0.9, "draft_tokens": 2}], ids=["greedy", "drafts"]
)
def test_a_step_reads_the_device_once_for_all_responses(options, tokenizer, monkeypatch):
    """On a GPU every read waits for all work before it."""
    model, read, tolist = tiny_model(eos_token_id=None), [], torch.Tensor.tolist

    class Reads(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            read.append(func is torch.ops.aten._local_scalar_dense.default)
            return func(*args, **(kwargs or {}))

    def read_list(tensor):
        read.append(True)
        return tolist(tensor)

    monkeypatch.setattr(torch.Tensor, "tolist", read_list)
    steps, others = [], []
    model.get_input_embeddings().register_forward_hook(lambda *_: steps.append(True))
    for prompts in (GUIDED[:1], GUIDED):
        settings = GenerationOptions(engine="tree", max_new_tokens=6, guidance=1.0, **options)
        with local_engine(model, tokenizer, set(), settings) as engine:
            read.clear()
            steps.clear()
            with Reads():
                list(engine.generate_ids(prompts))
            others.append(sum(read) - len(steps))
    assert others[0] == others[1], "reads beside one for each step"


def test_a_shared_history_is_computed_once(tokenizer):
    model = tiny_model(eos_token_id=None)
    with local_engine(model, tokenizer, set(), GenerationOptions(engine="tree", max_new_tokens=3)) as engine:
        counted = []
        model.get_input_embeddings().register_forward_hook(lambda _, ids, __: counted.append(ids[0].numel()))
        streamed = list(engine.stream(GUIDED))
    distinct = {tuple(ids[: n + 1]) for p in GUIDED for ids in (p.ids, p.against) for n in range(len(ids))}
    assert counted == [len(distinct), 8, 8], "the tree of all prompts, and a token for each of them and of its opposite"
    assert [index for index, _ in streamed] == [3, 0, 1, 2] * 3, "in the order of the prompts' tokens"
    assert tokens(model, tokenizer, GUIDED, max_new_tokens=3) == {
        i: [token for index, token in streamed if index == i] for i in range(4)
    }


@pytest.mark.parametrize("kind", ["llama", "gemma2", "gpt2"])
@pytest.mark.parametrize("prompts", [PROMPTS, GUIDED], ids=["plain", "guided"])
def test_a_stream_does_not_compute_a_known_beginning_again(kind, prompts, tokenizer):
    model = tiny_model(kind, eos_token_id=None, **ARCHITECTURES[kind])
    counted = []
    options = GenerationOptions(engine="tree", max_new_tokens=5, batch_size=1, guidance=1.5, plausibility=0.05)
    with local_engine(model, tokenizer, set(), options) as engine:
        model.get_input_embeddings().register_forward_hook(lambda _, ids, __: counted.append(ids[0].numel()))
        for chosen in ([prompts[0]], [prompts[1]], [prompts[1]], [prompts[2]], prompts):
            counted.clear()
            found = {p.index: [] for p in chosen}
            for index, token in engine.stream(chosen):
                found[index].append(token)
            assert found == {p.index: separate(model, p, 5, 1.5, 0.05) for p in chosen}
            own = len(chosen[0].ids) + len(chosen[0].against or ())
            if chosen == [prompts[1]] and prompts is PROMPTS:
                assert counted[0] in (own - len(HISTORY) - 1, 1), "what is not known yet, or the last token"


def test_a_model_that_cannot_share_prefixes_is_refused_or_run_by_transformers(tokenizer):
    model = tiny_model("mamba", state_size=4, eos_token_id=None, attn_implementation="eager")
    with pytest.raises(UnsupportedModelError, match="Mamba"):
        tokens(model, tokenizer, PROMPTS, engine="tree", max_new_tokens=2)
    assert tokens(model, tokenizer, PROMPTS[:1], engine="auto", max_new_tokens=4) == {0: separate(model, PROMPTS[0], 4)}


HYBRID = {
    "qwen3_5_text": {
        "layer_types": ["linear_attention", "full_attention"], "linear_num_key_heads": 2, "linear_num_value_heads": 4,
        "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    },
    "lfm2": {"layer_types": ["conv", "full_attention"]},
}  # fmt: skip


@shares_states
@pytest.mark.parametrize("kind", sorted(HYBRID))
def test_a_model_with_states_is_run_by_transformers(kind, tokenizer):
    """Prompts of different lengths side by side, with and without guidance; its states are in no cache of keys."""
    model = tiny_model(kind, **HYBRID[kind], eos_token_id=None)
    with pytest.raises(UnsupportedModelError, match=r"layers with a state .* use engine='hf'"):
        tokens(model, tokenizer, PROMPTS, engine="tree", max_new_tokens=2)
    assert tokens(model, tokenizer, PROMPTS, engine="auto", max_new_tokens=4) == {
        prompt.index: separate(model, prompt, 4) for prompt in PROMPTS
    }
    guided = tokens(model, tokenizer, GUIDED, engine="auto", max_new_tokens=3, guidance=1.5, plausibility=0.05)
    assert guided == {prompt.index: separate(model, prompt, 3, 1.5, 0.05) for prompt in GUIDED}


def test_the_model_is_left_as_it_was(tokenizer):
    model = tiny_model(eos_token_id=None).train()
    before = model.config._attn_implementation
    tokens(model, tokenizer, PROMPTS, engine="tree", max_new_tokens=2)
    assert model.training
    assert model.config._attn_implementation == before


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_follows_its_own_rounding(dtype, tokenizer):
    """The first token of each response is one whose logit is within rounding of the largest."""
    model = tiny_model(eos_token_id=None, dtype=dtype)
    found = tokens(model, tokenizer, PROMPTS, engine="tree", max_new_tokens=1)
    for prompt in PROMPTS:
        with torch.no_grad():
            logits = model(torch.tensor([prompt.ids])).logits[0, -1].float()
        assert logits.max() - logits[found[prompt.index][0]] < 8 * torch.finfo(dtype).eps * logits.abs().max()
