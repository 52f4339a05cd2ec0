"""From records of users' writing to batches with a factual and a counterfactual branch.

    records = load_records("train.jsonl")
    encoder = ExampleEncoder(tokenizer, PromptTemplate(), max_length=2048)
    examples = encoder.encode_all(records)
    batch = TreeCollator()(examples[:8])

Nothing here imports Hugging Face packages: tokenizers and data sets are used by their shape alone.
"""

from __future__ import annotations

from nextquill.data.collator import PaddedCollator, TreeCollator, to_device
from nextquill.data.dataset import EncodedDataset
from nextquill.data.effects import load_effects
from nextquill.data.encoding import Branch, EncodedExample, EncodingStats, ExampleEncoder
from nextquill.data.placebo import assign_placebo_histories
from nextquill.data.records import HistoryItem, Record, load_records, parse_record, read_jsonl
from nextquill.data.rendering import PromptRenderer
from nextquill.data.sampling import UserGroupSampler
from nextquill.data.templates import PromptTemplate

__all__ = [
    "Branch",
    "EncodedDataset",
    "EncodedExample",
    "EncodingStats",
    "ExampleEncoder",
    "HistoryItem",
    "PaddedCollator",
    "PromptRenderer",
    "PromptTemplate",
    "Record",
    "TreeCollator",
    "UserGroupSampler",
    "assign_placebo_histories",
    "load_effects",
    "load_records",
    "parse_record",
    "read_jsonl",
    "to_device",
]
