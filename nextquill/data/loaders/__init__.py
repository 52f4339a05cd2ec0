"""Public data sets, logs and tables as records of the one schema.

    for record in load("lamp", "train_questions.json", outputs="train_outputs.json"):
        ...

One file per family of data sets says what becomes of its fields; `registry` lists them. A loader gets a `Source`, which
yields rows from files or the hub one at a time, and makes a record of each row. What is wrong with a row is a
`RecordError` that names file, line and field, or, where a `SkippedRecords` is given, a note in it.
"""

from __future__ import annotations

from nextquill.data.loaders.registry import FORMATS, Format, load

__all__ = ["FORMATS", "Format", "load"]
