"""The cache goes in and comes out under the name that the model has for it."""

import pytest
import torch
from peft import LoraConfig, TaskType, get_peft_model
from transformers import DynamicCache
from transformers.modeling_outputs import CausalLMOutputWithPast

from nextquill.models.cache_names import cache_argument, cache_of, for_forward, for_generate
from tests.models.model_helpers import tiny_model

IDS = torch.tensor([[5, 6, 7, 8]])


class Remote:
    """Code of a model that transformers does not hold."""

    def forward(self, input_ids, past_key_values=None, use_cache=None):
        return input_ids, past_key_values


@pytest.mark.parametrize("adapted", [False, True])
def test_a_model_continues_from_its_cache(adapted):
    model = whole = tiny_model()
    if adapted:
        model = get_peft_model(model, LoraConfig(r=2, task_type=TaskType.CAUSAL_LM, target_modules=["q_proj"]))
    with torch.no_grad():
        cache = cache_of(model(IDS[:, :3], use_cache=True))
        assert isinstance(cache, DynamicCache)
        rest = model(IDS[:, 3:], use_cache=True, **for_forward(model, cache))
        assert cache_of(rest).get_seq_length() == 4
        torch.testing.assert_close(rest.logits, whole(IDS).logits[:, 3:])


def test_generate_continues_from_a_cache():
    model = tiny_model(eos_token_id=None)
    given = cache_of(model.generate(IDS[:, :3], max_new_tokens=1, return_dict_in_generate=True, pad_token_id=0))
    seen = []
    model.get_input_embeddings().register_forward_hook(lambda _, ids, __: seen.append(ids[0].shape[1]))
    found = model.generate(IDS, max_new_tokens=2, pad_token_id=0, **for_generate(given))
    assert seen == [1, 1]
    assert torch.equal(found, model.generate(IDS, max_new_tokens=2, pad_token_id=0))


def test_other_code_keeps_its_own_name():
    cache = object()
    assert for_forward(Remote(), cache) == {"past_key_values": cache}
    assert cache_argument(lambda hidden_states, cache_params=None: None) == "cache_params"
    assert cache_argument(lambda hidden_states: None) is None


def test_outputs_without_a_cache_have_none():
    for outputs in (CausalLMOutputWithPast(logits=IDS), (IDS,), IDS):
        assert cache_of(outputs) is None
