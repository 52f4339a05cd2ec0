"""Byte-level tokenizers, those of POPI's tests, and a module in vLLM's place."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from types import SimpleNamespace
from typing import Any

import pytest

from tests.popi.conftest import chat_tokenizer, tokenizer  # noqa: F401 - fixtures


@pytest.fixture
def install_vllm(monkeypatch) -> Callable[[Any], None]:
    """Installs modules in vLLM's place, with the class given as its `LLM`."""

    def install(engine: Any) -> None:
        modules = {name: types.ModuleType(name) for name in ("vllm", "vllm.lora", "vllm.lora.request")}
        for name, module in modules.items():
            module.__spec__ = ModuleSpec(name, None)
            monkeypatch.setitem(sys.modules, name, module)
        modules["vllm"].LLM, modules["vllm"].SamplingParams = engine, lambda **named: SimpleNamespace(**named)
        modules["vllm.lora.request"].LoRARequest = lambda *given: given

    return install
