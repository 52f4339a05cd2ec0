"""`nextquill convert`: its output, its refusals, and no half-written files."""

import json
import os
import shutil
from pathlib import Path

import pytest

from nextquill.data import read_jsonl

FIXTURES = Path(__file__).parents[1] / "data" / "loaders" / "fixtures"
LAMP = [
    "--format",
    "lamp",
    "--input",
    FIXTURES / "lamp_2_questions.json",
    "--outputs",
    FIXTURES / "lamp_2_outputs.json",
]
EVENTS = ["--format", "events", "--input", FIXTURES / "events.jsonl", "--query", "Write {title}"]


@pytest.fixture
def convert(nextquill, tmp_path):
    """Run it into `out.jsonl`; further words are further flags."""

    def call(*words):
        return nextquill("convert", *words, "--output_file", tmp_path / "out.jsonl")

    return call


def _lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _records(folder, count, bad=()):
    path = folder / "in.jsonl"
    rows = [{"user_id": f"u{i % 3}", "query": f"q{i}", "response": f"r{i}", "history": ["a"]} for i in range(count)]
    lines = ["{" if i in bad else json.dumps(row) for i, row in enumerate(rows)]
    path.write_text("\n".join(lines))
    return path


def test_it_writes_records_and_says_what_they_are(convert, tmp_path):
    result = convert(*EVENTS)
    assert (result.code, result.out) == (0, "")
    assert result.err == (
        f"nextquill: {tmp_path / 'out.jsonl'}: 5 records, 2 users, 5 history items (1.0 a record), 2 records without "
        "history, 1970-01-01 to 1970-01-01\n"
    )
    assert [record.response for record in read_jsonl(tmp_path / "out.jsonl")] == [
        "One.", "Two a.", "Two b.", "Three.", "Hello.",
    ]  # fmt: skip
    assert [path.name for path in tmp_path.iterdir()] == ["out.jsonl"]


def test_flags_of_the_format_reach_it(convert, tmp_path):
    assert convert(*LAMP, "--task", "mine", "--limit", 1).code == 0
    assert [line["task"] for line in _lines(tmp_path / "out.jsonl")] == ["mine"]


def test_columns_and_a_time_zone_are_given_in_a_config_file_too(convert, tmp_path):
    (tmp_path / "posts.csv").write_text("author,body,when\nann,Hello,2020-01-01T01:00:00\n")
    config = tmp_path / "convert.yaml"
    config.write_text(
        f"format: events\ninput: [{tmp_path / 'posts.csv'}]\nquery: Write\ntimezone: Europe/Berlin\n"
        "columns: [user_id=author, text=body, timestamp=when]\n"
    )
    assert convert("--config", config).code == 0
    (line,) = _lines(tmp_path / "out.jsonl")
    assert (line["user_id"], line["response"], line["timestamp"]) == ("ann", "Hello", 1577836800.0)


def test_bad_rows_are_listed_on_the_screen_and_in_a_file(convert, tmp_path):
    source = _records(tmp_path, 20, bad=(3, 7))
    result = convert("--format", "table", "--input", source, "--skip_bad", "--skipped_file", tmp_path / "bad.jsonl")
    assert result.code == 0
    assert result.err.startswith(f"nextquill: skipped 2 bad records (2 json)\n  {source} line 4: not valid JSON: ")
    assert len(read_jsonl(tmp_path / "out.jsonl")) == 18
    notes = _lines(tmp_path / "bad.jsonl")
    assert [(note["where"], note["field"], note["kind"]) for note in notes] == [
        (f"{source} line 4", None, "json"),
        (f"{source} line 8", None, "json"),
    ]


def test_a_terminal_gets_no_escape_sequence_of_a_row(convert, tmp_path):
    source = tmp_path / "in\x1b[1m.jsonl"
    good = {"user_id": "u", "query": "q", "response": "r", "history": []}
    rows = [good, {**good, "history": [{"text\x1b[2J": ""}]}, {"\x9b\u202e": 1}]
    source.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows))
    flags = ("--format", "table", "--input", source)
    for result in (convert(*flags), convert(*flags, "--skip_bad", "--max_skipped", 1)):
        assert not set("\x1b\x9b\u202e") & set(result.err)
        assert r"in\x1b[1m.jsonl line 2" in result.err
    assert r"there are \x9b\u202e" in result.err


def test_too_many_bad_rows_are_an_error_that_leaves_the_list_and_no_output(convert, tmp_path):
    source = _records(tmp_path, 20, bad=range(15))
    result = convert("--format", "table", "--input", source, "--skip_bad", "--skipped_file", tmp_path / "bad.jsonl")
    assert result.code == 1
    assert "  and 5 more; --skipped_file lists all\n" in result.err
    assert f"nextquill: {source}: 15 of 20 records were skipped, 75.0%; expected at most 10.0%" in result.err
    assert len(_lines(tmp_path / "bad.jsonl")) == 15
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad.jsonl", "in.jsonl"]


def test_the_first_bad_row_is_an_error_that_leaves_nothing(convert, tmp_path):
    source = _records(tmp_path, 20, bad=(3,))
    result = convert("--format", "table", "--input", source)
    assert (result.code, result.out) == (1, "")
    assert result.err.startswith(f"nextquill: {source} line 4: not valid JSON: ")
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]


def test_a_limited_run_counts_the_bad_rows_it_saw(convert, tmp_path):
    source = _records(tmp_path, 20, bad=(0, 1))
    result = convert("--format", "table", "--input", source, "--skip_bad", "--limit", 4)
    assert result.code == 1
    assert "2 of 6 records were skipped, 33.3%" in result.err


@pytest.mark.parametrize(("name", "kept"), [("recency", ["Two b."]), ("bm25", ["One."]), ("fixed", ["One."])])
def test_a_part_of_the_history_is_selected(convert, tmp_path, name, kept):
    source = tmp_path / "in.jsonl"
    history = [{"text": "One.", "timestamp": 1}, {"text": "Two b.", "timestamp": 2}]
    rows = [
        {"user_id": "u", "query": "One", "response": "a", "history": history[:1], "timestamp": 2},
        {"user_id": "u", "query": "One", "response": "b", "history": history, "timestamp": 3},
    ]
    source.write_text("\n".join(map(json.dumps, rows)))
    result = convert("--format", "table", "--input", source, "--select", name, "--num_items", 1)
    assert result.code == 0, result.err
    assert [item["text"] for item in _lines(tmp_path / "out.jsonl")[1]["history"]] == kept


def test_it_says_who_has_no_fixed_history(convert, tmp_path):
    result = convert(*EVENTS, "--select", "fixed", "--num_items", 1)
    assert "--select fixed: 5 records of 2 users get no history, as no text precedes all" in result.err
    result = convert(*EVENTS, "--select", "fixed", "--num_items", 1, "--min_history", 1, "--overwrite")
    assert (result.code, "get no history" in result.err) == (0, False)
    assert {line["history"][0]["text"] for line in _lines(tmp_path / "out.jsonl")} == {"One."}


@pytest.mark.parametrize(("how", "sizes"), [("last", (6, 3, 3)), ("users", (4, 4, 4))])
def test_records_are_divided(convert, tmp_path, how, sizes):
    parts = [tmp_path / name for name in ("out.jsonl", "eval.jsonl", "test.jsonl")]
    flags = ["--split_by", how, "--eval_file", parts[1], "--test_file", parts[2]]
    flags += ["--share", 0.3] if how == "users" else []
    result = convert("--format", "table", "--input", _records(tmp_path, 12), *flags)
    assert result.code == 0, result.err
    assert ("no record has a time" in result.err) == (how == "last")
    assert tuple(len(_lines(part)) for part in parts) == sizes
    assert len({line["query"] for part in parts for line in _lines(part)}) == 12


WRONG = {
    "format": (["--format", "lamb"], "argument --format: invalid choice: 'lamb'"),
    "option": (["--metadata", "x.jsonl"], "--metadata: format 'events' has no such option"),
    "zone": (["--timezone", "Mars"], "--timezone: expected a name such as 'Europe/Berlin', got 'Mars'"),
    "split": (["--split", "train"], "--split: expected none for local files, got 'train'"),
    "suffix": (["--input", "a.txt"], "--input: expected a file ending in .jsonl"),
    "columns": (["--columns", "text"], "--columns: expected FIELD=COLUMN, got 'text'"),
    "columns-twice": (["--columns", "text=a", "text=b"], "--columns: expected every field once, got text twice"),
    "limit": (["--limit", 0], "--limit: expected a positive number, got 0"),
    "bytes": (["--max_line_bytes", 0], "--max_line_bytes: expected a positive number, got 0"),
    "share-skipped": (["--skip_bad", "--max_skipped", 2], "--max_skipped: expected a share from 0 to 1, got 2.0"),
    "skipped": (["--skipped_file", "x"], "--skipped_file: expected --skip_bad with it"),
    "items": (["--num_items", 0], "--num_items: expected at least 1, got 0"),
    "select": (["--select", "bm25"], "--num_items: expected a number of items with 'bm25'"),
    "query": (["--query", "{"], "--query: expected a sentence with {columns} in braces"),
    "eval": (["--eval_file", "x"], "--eval_file: expected together with --split_by"),
    "test": (["--split_by", "last", "--eval_file", "x"], "--test_file: expected together with --split_by"),
    "max-skipped": (["--max_skipped", 0.2], "--max_skipped: expected --skip_bad with it"),
    "share-alone": (["--share", 0.2], "--share: expected together with --split_by users"),
    "seed-alone": (["--seed", 3], "--seed: expected together with --split_by users"),
    "share": (["--share", 0.5], "--share: expected a share above 0 and below 0.5"),
}


@pytest.mark.parametrize(("flags", "message"), WRONG.values(), ids=WRONG.keys())
def test_a_wrong_flag_is_named_before_anything_is_written(convert, tmp_path, flags, message):
    result = convert(*EVENTS, *flags)
    assert result.code == 2
    assert f"nextquill: {message}" in result.err
    assert list(tmp_path.iterdir()) == []


def test_an_output_that_is_there_is_kept(convert, tmp_path):
    (tmp_path / "out.jsonl").write_text("mine")
    result = convert(*EVENTS)
    assert (result.code, (tmp_path / "out.jsonl").read_text()) == (1, "mine")
    assert "--output_file: " in result.err
    assert convert(*EVENTS, "--overwrite").code == 0
    assert len(read_jsonl(tmp_path / "out.jsonl")) == 5
    bad = convert("--format", "table", "--input", _records(tmp_path, 3, bad=(1,)), "--overwrite")
    assert bad.code == 1
    assert len(read_jsonl(tmp_path / "out.jsonl")) == 5, "what was there stays until all is written"


def test_a_device_and_a_folder_are_not_replaced(nextquill, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    for name, problem in (("pipe", "is not a file that can be replaced"), ("folder", "is a folder")):
        result = nextquill("convert", *EVENTS, "--output_file", tmp_path / name, "--overwrite")
        assert (result.code, result.err) == (1, f"nextquill: --output_file: {tmp_path / name} {problem}\n")
    assert (tmp_path / "pipe").is_fifo()


def test_files_are_not_written_over_each_other(convert, tmp_path):
    shutil.copy(FIXTURES / "events.jsonl", tmp_path / "out.jsonl")
    result = convert("--format", "events", "--query", "q", "--input", tmp_path / "out.jsonl", "--overwrite")
    assert (result.code, result.err.split(",")[0]) == (2, "nextquill: --output_file: expected a file of its own")
    golds = shutil.copy(FIXTURES / "lamp_2_outputs.json", tmp_path / "out.jsonl")
    result = convert(*LAMP, "--outputs", golds, "--overwrite")
    assert (result.code, result.err.split(", ")[-1]) == (2, "which is that of --outputs\n")
    result = convert(*LAMP, "--skip_bad", "--skipped_file", tmp_path / "out.jsonl", "--overwrite")
    assert (result.code, result.err.split(",")[0]) == (2, "nextquill: --skipped_file: expected a file of its own")


def test_an_interrupted_run_leaves_nothing(convert, tmp_path, monkeypatch):
    from nextquill.cli import convert as module

    def interrupted(record):
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "_line", interrupted)
    assert convert(*EVENTS).code == 130
    assert list(tmp_path.iterdir()) == []
