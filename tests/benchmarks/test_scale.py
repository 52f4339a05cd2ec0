"""The plan for a million users: its tokens against prefix trees, its sizes against transformers, its limits."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from benchmarks.scale import (
    HOURS_BETWEEN_FAILURES,
    METHODS,
    MODELS,
    USABLE,
    Lengths,
    Method,
    failing,
    longest_history,
    memory,
    operations,
    row,
    waiting,
)
from nextquill.tree import build_prefix_tree


def keys(tree):
    """The keys that all tokens of a tree attend to."""
    return int((tree.position_ids + 1).sum())


@pytest.mark.parametrize("shared", [1, 2, 5])
@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_tokens_and_keys_are_those_of_prefix_trees(method, shared):
    size = Lengths(system=3, history=7, none=2, query=4, response=5)
    system, history, none = [0] * 3, [1] * 7, [2] * 2
    answers = [[10 + each] * 9 for each in range(shared)]
    own = [system + history + answer for answer in answers]
    bare = [system + none + answer for answer in answers]
    found = row(method, shared, size)
    trained = build_prefix_tree([*own, *bare] if method.counterfactual == "joint" else own)
    assert (found.trained, found.trained_keys) == (len(trained), keys(trained))
    constant = build_prefix_tree(bare) if method.counterfactual == "constant" else None
    assert (found.constant, found.constant_keys) == ((len(constant), keys(constant)) if constant else (0, 0))


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.name)
def test_parameters_are_those_of_transformers(model):
    config = LlamaConfig(
        vocab_size=model.vocabulary, hidden_size=model.hidden, intermediate_size=model.intermediate,
        num_hidden_layers=model.layers, num_attention_heads=model.heads, num_key_value_heads=model.kv_heads,
        head_dim=model.head_dim, tie_word_embeddings=model.tied,
    )  # fmt: skip
    with torch.device("meta"):
        built = AutoModelForCausalLM.from_config(config)
    norms = (2 * model.layers + 1) * model.hidden
    assert sum(parameter.numel() for parameter in built.parameters()) - norms == model.parameters


def test_more_sharing_costs_less_and_more_training_costs_more():
    model = MODELS[1]
    for method in METHODS:
        costs = [operations(model, method, shared, whole=False) for shared in (1, 4, 20)]
        assert costs == sorted(costs, reverse=True)
        assert operations(model, method, 4, whole=True) > costs[1]
    one, constant, joint = (operations(model, method, 1, whole=True) for method in METHODS)
    assert one < constant < joint < 2 * one


def test_a_head_alone_costs_its_products():
    model = MODELS[0]
    whole, one = (Method("", "", products, 0) for products in (5, 1))
    unit = 2.0 * Lengths().response * model.hidden * model.vocabulary
    assert operations(model, whole, 1, whole=True) - operations(model, one, 1, whole=True) == pytest.approx(4 * unit)


def test_the_longest_row_is_the_last_that_fits():
    for model in MODELS:
        for whole in (True, False):
            longest = longest_history(model, whole=whole)
            assert memory(model, longest, whole=whole) <= USABLE < memory(model, longest + 1000, whole=whole)


def test_waiting_and_failing_have_their_limits():
    assert waiting(1, 4, 0.5) == pytest.approx(1.0, abs=0.05)
    assert waiting(64, 4, 0.0) == pytest.approx(1.0)
    assert waiting(64, 1, 0.5) > waiting(64, 16, 0.5) > waiting(8, 16, 0.5) > 1
    assert failing(8, 1.0) == pytest.approx(1.0, abs=0.01)
    often = failing(int(HOURS_BETWEEN_FAILURES), 20.0)  # a failure an hour, of which each costs half an hour
    assert 1.3 < often < 2.2
