"""`nextquill convert`: public data sets, chat logs, tables and event logs as training records."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

from nextquill.cli.flags import check_positive, claim_output_file, option
from nextquill.cli.main import OK
from nextquill.cli.parsing import parse
from nextquill.cli.terminal import bar, say, say_skipped
from nextquill.data import Record, SkippedRecords
from nextquill.data.lines import MAX_LINE_BYTES
from nextquill.data.loaders import FORMATS, load
from nextquill.data.times import TIME_UNITS
from nextquill.errors import ArgumentError, RecordError
from nextquill.storage.atomic_files import written_together
from nextquill.storage.input_files import real_path

DESCRIPTION = (
    "Turn a data set into records: JSONL with user_id, query, history, response and timestamp, which train, evaluate "
    "and score read. Formats: "
    + "; ".join(f"{name} ({form.summary})" for name, form in FORMATS.items())
    + ". Rows are read one at a time; the error of a bad row names file, line and field. OUTPUT appears when complete."
)
_SHOWN = 10  # messages of skipped records on the screen; --skipped_file holds all


@dataclass
class ConvertInput:
    """Data: what is read."""

    input: list[str] = option(
        "Files (.jsonl, .json, .csv, .tsv, each also gzipped, or .parquet), or hf://OWNER/NAME[/CONFIG][:SPLIT].",
        metavar="PATH",
    )
    format: str = option("The format of the rows.", choices=list(FORMATS))
    split: str | None = option("The split on the hub (default: train).", None)
    columns: list[str] | None = option(
        "Columns with other names than their fields, such as user_id=author response=body.", None,
        metavar="FIELD=COLUMN",
    )  # fmt: skip
    timezone: str | None = option("Zone of times without one, such as Europe/Berlin; otherwise they are errors.", None)
    time_unit: str | None = option("Unit of numeric times (default: ms for amazon, else s).", None, choices=TIME_UNITS)
    limit: int | None = option("Use only the first INT records.", None)


@dataclass
class ConvertFormat:
    """Options of single formats."""

    outputs: str | None = option("lamp: the file with the outputs.", None, metavar="FILE")
    task: str | None = option("lamp: the task's name in the records.", None)
    metadata: str | None = option("amazon: the items: a file, or hf://OWNER/NAME/CONFIG.", None, metavar="PATH")
    metadata_split: str | None = option("amazon: the items' split on the hub (default: full).", None)
    max_pairs: int | None = option("preferences: most earlier pairs in the history (default: 8).", None)
    respond_as: str | None = option(
        "chat: the role whose last turn is the response (default: assistant).", None, choices=["assistant", "user"]
    )
    query: str | None = option("events: the query, such as 'Write the next post titled {title}'.", None)
    min_history: int | None = option("events: fewest earlier texts of a record (default: 0).", None)
    max_history: int | None = option("events, chat: most earlier texts; the newest are kept (default: all).", None)


@dataclass
class ConvertRows:
    """Bad rows."""

    skip_bad: bool = option("Leave out and count bad records, and show the first.", False)
    max_skipped: float = option("With --skip_bad: the largest share of bad records that is not an error.", 0.1)
    skipped_file: str | None = option("With --skip_bad: where to list what was left out, JSONL.", None, metavar="FILE")
    require_history: bool = option("Treat a record without history as bad.", False)
    keep_duplicates: bool = option("Keep records with the same user, query, response and time as another.", False)
    max_line_bytes: int = option("Most bytes of a line, a CSV record, or an item of a JSON list.", MAX_LINE_BYTES)


@dataclass
class ConvertOutput:
    """Output: the files that are written."""

    output_file: str = option("Where to write the records, JSONL.", metavar="OUTPUT")
    overwrite: bool = option("Replace existing output files.", False)
    select: str = option(
        "History to keep: all, the newest items (recency), those with the query's words (bm25) or its meaning "
        "(dense), or the same items for all records of a user (fixed).", "all",
        choices=["all", "recency", "bm25", "dense", "fixed"],
    )  # fmt: skip
    num_items: int | None = option("With --select: history items to keep.", None)
    split_by: str | None = option(
        "Split the records. last: each user's last record goes to --test_file, the one before to --eval_file. users: "
        "a share of the users goes to each. The records are held in memory.", None, choices=["last", "users"],
    )  # fmt: skip
    eval_file: str | None = option("With --split_by: where the evaluation records go.", None, metavar="FILE")
    test_file: str | None = option("With --split_by: where the test records go.", None, metavar="FILE")
    share: float = option("With --split_by users: the share of users in each of the two files.", 0.1)
    seed: int = option("With --split_by users: decides which users.", 0)


OPTIONS = (ConvertInput, ConvertFormat, ConvertRows, ConvertOutput)
FLAGS = {"source": "input", "records": "input", "name": "select", "max_share": "max_skipped"}


def run(arguments: Sequence[str]) -> int:
    """Run the command; its exit code."""
    source, form, rows, output = parse("convert", DESCRIPTION, OPTIONS, arguments)
    check_positive(source, ("limit",))
    check_positive(rows, ("max_line_bytes",))
    _check_together(rows, output)
    targets = _claimed(source, form, rows, output)
    note = targets.pop("skipped_file", None)
    skipped = _skipped(rows)
    records = _records(source, form, rows, skipped)
    selector = _selector(output, lambda: _records(source, form, rows, _skipped(rows)))
    failure = None
    with written_together([] if note is None else [note]) as streams:
        if skipped is not None and streams:
            skipped.on_skip = partial(_write_note, streams[0])
        try:
            shown = bar(records, total=source.limit, desc="Converting", unit=" records")
            summaries = _convert(shown, selector, output, targets)
            if skipped is not None:
                skipped.check("input")
        except RecordError as error:
            failure = error  # raised after the list of skipped records is written, which explains it
    if skipped is not None:
        say_skipped(skipped, more="; --skipped_file lists all")
    if failure is not None:
        raise failure
    for name, path in targets.items():
        say(f"{path}: {summaries[name]}")
    return OK


def _convert(
    records: Iterable[Record], selector: Any, output: ConvertOutput, targets: Mapping[str, Path]
) -> dict[str, _Summary]:
    """Write each record to its file."""
    summaries = {name: _Summary() for name in targets}
    with written_together(list(targets.values())) as opened:
        streams = dict(zip(targets, opened, strict=True))
        for name, record in _parted(records, output):
            chosen = record if selector is None else selector.select(record)
            streams[name].write(_line(chosen))
            summaries[name].add(chosen)
    return summaries


def _records(
    source: ConvertInput, form: ConvertFormat, rows: ConvertRows, skipped: SkippedRecords | None
) -> Iterator[Record]:
    """The records of the input; arguments are checked at once."""
    found = load(
        source.format,
        source.input,
        split=source.split,
        columns=_columns(source.columns or []),
        timezone=source.timezone,
        time_unit=source.time_unit,
        max_line_bytes=rows.max_line_bytes,
        skipped=skipped,
        require_history=rows.require_history,
        keep_duplicates=rows.keep_duplicates,
        **{name: value for name, value in vars(form).items() if value is not None},
    )
    return islice(found, source.limit)


def _columns(given: Sequence[str]) -> dict[str, str]:
    columns: dict[str, str] = {}
    for word in given:
        name, equals, column = word.partition("=")
        if not equals or not name or not column:
            raise ArgumentError(f"columns: expected FIELD=COLUMN, got {word!r}")
        if name in columns:
            raise ArgumentError(f"columns: expected every field once, got {name} twice")
        columns[name] = column
    return columns


def _selector(output: ConvertOutput, records: Callable[[], Iterable[Record]]) -> Any:
    """The selector of the history, or None to keep all of it; "fixed" reads the records once beforehand."""
    if output.select == "all" and output.num_items is None:
        return None
    from nextquill.data.histories import FixedSelector, make_selector

    selector = make_selector(output.select, num_items=output.num_items)
    if isinstance(selector, FixedSelector):
        selector.fit(bar(records(), desc="Reading", unit=" records"))
        if selector.users_without_history:
            say(
                f"--select fixed: {selector.records_without_history:,} records of "
                f"{len(selector.users_without_history):,} users get no history, as no text precedes all of a user's "
                "records; with events, --min_history leaves out the first records"
            )
    return selector


def _parted(records: Iterable[Record], output: ConvertOutput) -> Iterator[tuple[str, Record]]:
    """Each record with the flag of the file it goes to."""
    if output.split_by is None:
        yield from (("output_file", record) for record in records)
        return
    from nextquill.data.splits import hold_out_users, leave_last_out

    if output.split_by == "last":
        splits = leave_last_out(list(records))
        if splits.order == "file order":
            say("no record has a time, so a user's last record is the last in the input")
    else:
        splits = hold_out_users(list(records), output.share, output.seed, validation_share=output.share)
    parts = {"output_file": splits.train, "eval_file": splits.validation, "test_file": splits.test}
    for name, part in parts.items():
        yield from ((name, record) for record in part)


def _check_together(rows: ConvertRows, output: ConvertOutput) -> None:
    for name in ("skipped_file", "max_skipped"):
        if not rows.skip_bad and getattr(rows, name) != getattr(ConvertRows, name):
            raise ArgumentError(f"{name}: expected --skip_bad with it; without, the first bad record is an error")
    if not 0 < output.share < 0.5:
        raise ArgumentError(f"share: expected a share above 0 and below 0.5, as it is taken twice, got {output.share}")
    for name in ("share", "seed"):
        if output.split_by != "users" and getattr(output, name) != getattr(ConvertOutput, name):
            raise ArgumentError(f"{name}: expected together with --split_by users")
    for name in ("eval_file", "test_file"):
        if (getattr(output, name) is None) != (output.split_by is None):
            raise ArgumentError(f"{name}: expected together with --split_by, which fills it")


def _claimed(source: ConvertInput, form: ConvertFormat, rows: ConvertRows, output: ConvertOutput) -> dict[str, Path]:
    """The output files by flag; each can be written and is not read."""
    given = {name: getattr(output, name) for name in ("output_file", "eval_file", "test_file")}
    given["skipped_file"] = rows.skipped_file
    paths: dict[str, Path] = {}
    taken_by = {real_path(path): "--input" for path in source.input}
    taken_by |= {real_path(path): f"--{name}" for name in ("outputs", "metadata") if (path := getattr(form, name))}
    for name, word in given.items():
        if word is None:
            continue
        path = claim_output_file(word, overwrite=output.overwrite, flag=name)
        taken = taken_by.setdefault(real_path(path), f"--{name}")
        if taken != f"--{name}":
            raise ArgumentError(f"{name}: expected a file of its own, got {path}, which is that of {taken}")
        paths[name] = path
    return paths


def _skipped(rows: ConvertRows) -> SkippedRecords | None:
    return SkippedRecords(_SHOWN, rows.max_skipped) if rows.skip_bad else None


def _line(record: Record) -> bytes:
    return (json.dumps(record.to_dict(), ensure_ascii=False, allow_nan=False) + "\n").encode()


def _write_note(stream: BinaryIO, error: RecordError) -> None:
    """Write a skipped record's error as a line; only a `PlacedError` knows its place, field and kind."""
    note = {name: getattr(error, name, None) for name in ("where", "field", "kind")}
    stream.write((json.dumps(note | {"message": str(error)}) + "\n").encode())


class _Summary:
    """The contents of a file of records, in a line."""

    def __init__(self) -> None:
        self._records = self._items = self._without = 0
        self._users: set[str] = set()
        self._first, self._last = math.inf, -math.inf

    def add(self, record: Record) -> None:
        self._records += 1
        self._users.add(record.user_id)
        self._items += len(record.history)
        self._without += not record.history
        if record.timestamp is not None:
            self._first, self._last = min(self._first, record.timestamp), max(self._last, record.timestamp)

    def __str__(self) -> str:
        mean = self._items / self._records if self._records else 0.0
        parts = [
            f"{self._records:,} records",
            f"{len(self._users):,} users",
            f"{self._items:,} history items ({mean:.1f} a record)",
        ]
        if self._without:
            parts.append(f"{self._without:,} records without history")
        if self._first <= self._last:
            parts.append(f"{_day(self._first)} to {_day(self._last)}")
        return ", ".join(parts)


def _day(seconds: float) -> str:
    try:
        return datetime.fromtimestamp(seconds, timezone.utc).date().isoformat()
    except (ValueError, OverflowError, OSError):  # a year outside the calendar
        return f"{seconds:.0f} s"
