"""A tiny model folder with records, commands that run on it, and their results."""

from __future__ import annotations

import json
import math
import random
import re
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from tests.processes import run_to_end

ROOT = Path(__file__).parents[2]
ENGINES_ON_CPU = str(Path(__file__).parent / "engines_on_cpu.py")
WATCHES_DDP = str(Path(__file__).parent / "watches_ddp.py")
TIMEOUT = 200


def save_model_and_records(folder: Path) -> None:
    words = ["<pad>", "</s>", "<unk>", *(f"w{i}" for i in range(60))]
    words += "Past reviews : Write a review None #".split()
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    named = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>", "clean_up_tokenization_spaces": False}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **named).save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(words), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=2048, tie_word_embeddings=True, initializer_range=0.1,
        pad_token_id=0, bos_token_id=1, eos_token_id=1,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    rng = random.Random(0)

    def text(user: int, longest: int) -> str:
        return " ".join(f"w{10 * user + rng.randrange(10)}" for _ in range(rng.randint(1, longest)))

    records = [
        {"user_id": f"u{i % 4}", "query": text(5, 3), "history": [text(i % 4, 5)], "response": text(i % 4, 8)}
        for i in range(24)
    ]
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, records)))
    (folder / "eval.jsonl").write_text("\n".join(map(json.dumps, records[:7])))


def run(words: list[str], **environment: str) -> str:
    """Run a command in the repository's root, and return its output."""
    told = {
        "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "NEXTQUILL_TEST_TIMEOUT": str(TIMEOUT),
    }  # fmt: skip
    return run_to_end(words, timeout=TIMEOUT + 30, cwd=ROOT, **told, **environment)


def losses(printed: str) -> list[float]:
    """Return the losses of the steps, which must be finite."""
    found = [float(value) for value in re.findall(r"\bloss'?:? +'?(-?\d[\d.e+-]*|nan|-?inf)", printed)]
    assert all(map(math.isfinite, found)), f"losses of {found}"
    return found


def parameters(folder: Path) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in AutoModelForCausalLM.from_pretrained(folder).named_parameters()}


def distance(first: Path, second: Path) -> float:
    """The largest difference of a parameter between two saved models."""
    one, two = parameters(first), parameters(second)
    assert one.keys() == two.keys()
    return max(float((one[name] - two[name]).abs().max()) for name in one)
