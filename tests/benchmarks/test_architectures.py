"""The table of architectures: tiny configurations, what a check finds, and a failure that costs one row."""

import csv
import os
from dataclasses import replace

import pytest

from benchmarks import architectures
from benchmarks.architectures import FILE, Result, check, check_apart
from benchmarks.tiny_configs import VOCABULARY, WINDOW, tiny_config

# One for each way, and for kernels one each with sinks, latent attention, and several kinds of layers.
LIVE = ["llama", "gpt_oss", "deepseek_v3", "gemma3_text", "stablelm", "gpt_neox_japanese", "bart", "cpmant", "reformer"]


def stored() -> dict[str, Result]:
    with FILE.open(newline="", encoding="utf-8") as stream:
        return {row["architecture"]: Result(**row) for row in csv.DictReader(stream)}


@pytest.mark.parametrize("kind", LIVE)
def test_an_architecture_is_found_as_the_file_says(kind):
    expected = stored()[kind]
    assert replace(check(kind), transformers=expected.transformers) == expected


def test_nothing_in_the_file_is_wrong():
    assert [result for result in stored().values() if result.result == "wrong"] == []


def test_a_crash_costs_one_row(monkeypatch):
    monkeypatch.setattr(architectures, "check", lambda kind: os._exit(3))
    found = check_apart("llama")
    assert (found.result, found.reason) == ("not built", "the process ended without an answer")


def test_a_hang_costs_one_row(monkeypatch):
    monkeypatch.setattr(architectures, "check", lambda kind: os.read(os.pipe()[0], 1))
    monkeypatch.setattr(architectures, "_SECONDS", 0.5)
    assert check_apart("llama").reason == "no answer in 0.5 seconds"


def test_a_wrong_gradient_is_found(monkeypatch):
    """The gradient of the model that is compared is doubled."""
    factors, original = iter([2.0, 1.0]), architectures._gradients
    monkeypatch.setattr(architectures, "_gradients", lambda model, loss: original(model, loss * next(factors)))
    found = check("llama")
    assert found.result == "wrong"
    assert "of a gradient 1.0e+00" in found.reason


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma3_text", "deepseek_v3", "mixtral"])
def test_configurations_are_tiny_and_keep_every_kind_of_layer(kind):
    config = tiny_config(kind)
    assert (config.vocab_size, config.hidden_size) == (VOCABULARY, 32)
    assert config.num_hidden_layers <= 3
    if kind == "gemma3_text":
        assert set(config.layer_types) == {"sliding_attention", "full_attention"}
        assert config.sliding_window == WINDOW


def test_options_come_last():
    assert tiny_config("llama", hidden_size=16, num_attention_heads=2).hidden_size == 16
