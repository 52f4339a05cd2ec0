from __future__ import annotations

import gzip
import json
import sys
from pathlib import Path
from typing import Any

import datasets
import pytest

from nextquill.data import load_records, parse_record
from nextquill.data.loaders import load
from nextquill.errors import ArgumentError, RecordError


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, fixtures: Path, tmp_path: Path) -> list[tuple[Any, ...]]:
    """Replace the hub by fixtures, which `datasets` itself streams. Yields the calls."""
    calls: list[tuple[Any, ...]] = []
    real = datasets.load_dataset
    files = {
        "topic_writing_user": "longlamp_topics.jsonl",
        "Books": "amazon_reviews.jsonl",
        "items": "amazon_items.jsonl",
    }

    def load_dataset(name: str, config: str | None = None, **options: Any) -> Any:
        calls.append((name, config, options))
        if config == "absent":
            raise ValueError("BuilderConfig 'absent' not found.\nAvailable: ['topic_writing_user']")
        path = str(fixtures / files[str(config)])
        return real("json", data_files=path, cache_dir=str(tmp_path), **{**options, "split": "train"})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return calls


def test_the_hub_is_streamed_by_name_configuration_and_split(hub: list[Any], fixtures: Path) -> None:
    place = "hf://LongLaMP/LongLaMP/topic_writing_user"
    assert list(load("longlamp", place, split="val")) == list(load("longlamp", fixtures / "longlamp_topics.jsonl"))
    assert hub == [("LongLaMP/LongLaMP", "topic_writing_user", {"split": "val", "streaming": True})]


def test_a_place_on_the_hub_may_name_its_split(hub: list[Any]) -> None:
    list(load("longlamp", "hf://LongLaMP/LongLaMP/topic_writing_user:val"))
    assert hub == [("LongLaMP/LongLaMP", "topic_writing_user", {"split": "val", "streaming": True})]


def test_two_splits_are_refused(hub: list[Any]) -> None:
    with pytest.raises(ArgumentError, match=r"^split: expected none beside the one in hf://a/b:val, got 'test'"):
        list(load("longlamp", "hf://a/b:val", split="test"))
    assert not hub


def test_records_are_read_from_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    row = {"user_id": "u", "query": "q", "response": "r", "history": ["a"], "timestamp": "2020-05-09T06:53:20Z"}
    calls: list[Any] = []
    monkeypatch.setattr(
        datasets, "load_dataset", lambda *names, **options: calls.append((names, options)) or [row, row]
    )
    assert load_records("hf://a/b/c:test") == [parse_record(row, "here")] * 2
    assert calls == [(("a/b", "c"), {"split": "test", "streaming": True})]
    bad = {**row, "response": ""}
    monkeypatch.setattr(datasets, "load_dataset", lambda *names, **options: [row, bad])
    with pytest.raises(RecordError, match=r"^hf://a/b train row 1: field 'response': expected some text"):
        load_records("hf://a/b")


def test_a_hub_that_cannot_be_reached_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*names: Any, **options: Any) -> Any:
        raise ConnectionError("Couldn't reach 'a/b'\non the Hub")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(ArgumentError, match=r"^source: hf://a/b, split 'train': Couldn't reach 'a/b' on the Hub$"):
        load_records("hf://a/b")


def test_rows_of_the_hub_are_named(hub: list[Any]) -> None:
    with pytest.raises(
        RecordError, match=r"^hf://a/b/topic_writing_user train row 0: field 'input': expected a string"
    ):
        list(load("longlamp", "hf://a/b/topic_writing_user", columns={"input": "profile", "profile": "input"}))


def test_metadata_have_a_split_of_their_own(hub: list[Any], fixtures: Path) -> None:
    records = load("amazon", "hf://a/main/Books", metadata="hf://a/meta/items", split="test")
    local = load("amazon", fixtures / "amazon_reviews.jsonl", metadata=fixtures / "amazon_items.jsonl")
    assert [record.response for record in records] == [record.response for record in local]
    assert [(name, options["split"]) for name, _, options in hub] == [("a/meta", "full"), ("a/main", "test")]


def test_what_the_hub_does_not_have_is_one_line(hub: list[Any]) -> None:
    message = r"^source: hf://a/b/absent, split 'train': BuilderConfig 'absent' not found. Available: \['topic"
    with pytest.raises(ArgumentError, match=message):
        list(load("longlamp", "hf://a/b/absent"))


def test_a_streamed_data_set_is_a_source(fixtures: Path, tmp_path: Path) -> None:
    path = fixtures / "alignx.json"
    streamed = datasets.load_dataset(
        "json", data_files=str(path), split="train", streaming=True, cache_dir=str(tmp_path)
    )
    assert isinstance(streamed, datasets.IterableDataset)
    assert list(load("preferences", streamed)) == list(load("preferences", path))


def test_a_data_set_in_memory_is_a_source(fixtures: Path) -> None:
    rows = [json.loads(line) for line in (fixtures / "elix.jsonl").read_text().splitlines()]
    assert list(load("preferences", datasets.Dataset.from_list(rows))) == list(load("preferences", rows))


@pytest.mark.parametrize("name", ["events.jsonl", "lamp_2_questions.json", "posts.csv"])
def test_gzipped_files_are_the_same_rows(fixtures: Path, tmp_path: Path, name: str) -> None:
    packed = tmp_path / f"{name}.gz"
    packed.write_bytes(gzip.compress((fixtures / name).read_bytes()))
    options: dict[str, Any] = {"events.jsonl": {"query": "q"}, "posts.csv": {"query": "q", "columns": {}}}.get(name, {})
    if name == "posts.csv":
        options["columns"] = {"user_id": "author", "text": "body", "timestamp": "when"}
    elif name.startswith("lamp"):
        options["outputs"] = fixtures / "lamp_2_outputs.json"
    form = "lamp" if name.startswith("lamp") else "events"
    assert list(load(form, packed, **options)) == list(load(form, fixtures / name, **options))


def test_a_broken_gzip_is_named(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"a": 1}\n' * 9)[:-12])
    with pytest.raises(RecordError, match=r"t.jsonl.gz: cannot be read: "):
        list(load("table", path))


@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv", "parquet"])
def test_a_missing_file_and_a_folder_are_named(tmp_path: Path, suffix: str) -> None:
    (tmp_path / f"folder.{suffix}").mkdir()
    for name in ("absent", "folder"):
        with pytest.raises(RecordError, match=rf"{name}\.{suffix}: cannot be read: "):
            list(load("table", tmp_path / f"{name}.{suffix}"))


@pytest.mark.parametrize(("package", "source"), [("datasets", "hf://a/b"), ("pyarrow", "t.parquet")])
def test_a_package_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch, package: str, source: str) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=rf"^{package} reads {source}: .*pip install 'nextquill\[cli\]'$"):
        list(load("table", source))
