"""From records of users' writing to padded batches with a factual and a counterfactual branch.

    records = load_records("train.jsonl")
    encoder = ExampleEncoder(tokenizer, PromptTemplate(), max_length=2048)
    examples = encoder.encode_all(records)
    batch = PairCollator(pad_token_id=tokenizer.pad_token_id)(examples[:8])

Nothing here imports Hugging Face packages: tokenizers and data sets are used by their shape alone.
"""

from __future__ import annotations

from nextquill.data.collator import PairCollator, stack_branches
from nextquill.data.encoding import Branch, EncodedExample, EncodingStats, ExampleEncoder
from nextquill.data.placebo import assign_placebo_histories
from nextquill.data.records import HistoryItem, Record, load_records, parse_record, read_jsonl
from nextquill.data.rendering import PromptRenderer
from nextquill.data.templates import PromptTemplate

__all__ = [
    "Branch",
    "EncodedExample",
    "EncodingStats",
    "ExampleEncoder",
    "HistoryItem",
    "PairCollator",
    "PromptRenderer",
    "PromptTemplate",
    "Record",
    "assign_placebo_histories",
    "load_records",
    "parse_record",
    "read_jsonl",
    "stack_branches",
]
