"""Reads public data sets, logs and tables as records of one schema.

    for record in load("lamp", "train_questions.json", outputs="train_outputs.json"):
        ...

Each family of data sets has a file that converts its fields; `registry` lists them. A loader gets a `Source`, which
yields rows from files or the hub one at a time, and makes a record from each row. A bad row is a `RecordError` that
names file, line and field; with a `SkippedRecords` it is counted there instead.
"""

from __future__ import annotations

from nextquill.data.loaders.registry import FORMATS, Format, load

__all__ = ["FORMATS", "Format", "load"]
