"""Turns records of users' writing into batches with a factual and a counterfactual branch.

    records = load_records("train.jsonl")
    encoder = ExampleEncoder(tokenizer, PromptTemplate(), max_length=2048)
    examples = encoder.encode_all(records)
    batch = TreeCollator()(examples[:8])

No module here imports Hugging Face packages when it is imported; tokenizers and data sets are used by their interface.
`nextquill.data.loaders` reads public data sets, logs and tables as records.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from nextquill.lazy import on_first_use

if TYPE_CHECKING:
    from nextquill.data.collator import PaddedCollator, TreeCollator, to_device
    from nextquill.data.effects import load_effects
    from nextquill.data.encoding import ExampleEncoder
    from nextquill.data.examples import Branch, EncodedDataset, EncodedExample, EncodingStats
    from nextquill.data.histories import make_selector
    from nextquill.data.leaks import check_no_leaks
    from nextquill.data.placebo import assign_placebo_histories, stream_placebo_histories
    from nextquill.data.prepared import PreparedDataset
    from nextquill.data.preparing import prepare
    from nextquill.data.records import HistoryItem, Record, iter_jsonl, load_records, parse_record, read_jsonl
    from nextquill.data.rendering import PromptRenderer
    from nextquill.data.sampling import UserGroupSampler
    from nextquill.data.skipped import SkippedRecords
    from nextquill.data.splits import Splits, by_time, hold_out_users, leave_last_out
    from nextquill.data.templates import PromptTemplate
else:
    __getattr__, __dir__ = on_first_use(
        __name__,
        (
            *("records", "skipped", "splits", "templates", "placebo", "leaks", "rendering"),  # need no torch
            *("examples", "encoding", "collator", "effects", "histories", "prepared", "preparing", "sampling"),
        ),
    )

__all__ = [
    "Branch",
    "EncodedDataset",
    "EncodedExample",
    "EncodingStats",
    "ExampleEncoder",
    "HistoryItem",
    "PaddedCollator",
    "PreparedDataset",
    "PromptRenderer",
    "PromptTemplate",
    "Record",
    "SkippedRecords",
    "Splits",
    "TreeCollator",
    "UserGroupSampler",
    "assign_placebo_histories",
    "by_time",
    "check_no_leaks",
    "hold_out_users",
    "iter_jsonl",
    "leave_last_out",
    "load_effects",
    "load_records",
    "make_selector",
    "parse_record",
    "prepare",
    "read_jsonl",
    "stream_placebo_histories",
    "to_device",
]
