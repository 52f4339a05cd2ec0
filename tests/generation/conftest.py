"""The byte-level tokenizers of the tests of POPI, whose samples the rollouts draw."""

from __future__ import annotations

from tests.popi.conftest import chat_tokenizer, tokenizer  # noqa: F401 - fixtures
