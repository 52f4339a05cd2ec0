"""Responses by the model itself, greedy or sampled, behind one small interface.

    options.py               options, prompts with a seed each, and where a response ends
    engine.py                the interface, and the choice of an engine
    transformers_engine.py   `generate` of transformers, in batches of prompts of similar length
    vllm_engine.py           vLLM, which batches by itself

An engine takes prompts as token ids and yields `(index, text)`, or `(index, sampled ids)`, in any order.
"""

from __future__ import annotations

from nextquill.generation.engine import Engine, check_engine, generation_engine
from nextquill.generation.options import ENGINES, GenerationOptions, Prompt, make_prompts, stop_tokens

__all__ = [
    "ENGINES",
    "Engine",
    "GenerationOptions",
    "Prompt",
    "check_engine",
    "generation_engine",
    "make_prompts",
    "stop_tokens",
]
