"""A prepared folder holds the encoder's examples, resumes after a stop, and names damage."""

from __future__ import annotations

import contextlib
import json
import pickle
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from nextquill.data import (
    EncodedDataset,
    EncodingStats,
    ExampleEncoder,
    PreparedDataset,
    PromptTemplate,
    Record,
    TreeCollator,
    prepare,
)
from nextquill.data.placebo import EVALUATION, stream_placebo_histories
from nextquill.errors import ArgumentError, BudgetError, CheckpointError, OutputExistsError, RecordError

Make = Callable[..., PreparedDataset]


@pytest.fixture
def records(make_record: Any) -> list[Record]:
    texts = ["Thin plot.", "Long waves.", "Nothing but waves, again."]
    return [
        make_record(*texts[: i % 4], user_id=f"user {i % 5} ü", query=f"tale {i}", response="Good. " * (1 + i % 3))
        for i in range(23)
    ]


@pytest.fixture
def encoder(plain_tokenizer: Any) -> ExampleEncoder:
    return ExampleEncoder(plain_tokenizer, max_length=64)


@pytest.fixture
def make(records: list[Record], encoder: ExampleEncoder, tmp_path: Path) -> Make:
    def call(source: Iterable[Record] | None = None, **options: Any) -> PreparedDataset:
        used = options.pop("encoder", encoder)
        source = records if source is None else source
        return prepare(iter(source), used, tmp_path / "prepared", **{"shard_examples": 5, **options})

    return call


class Killed(BaseException):
    """Stands for the sudden end of the process."""


def cut(records: list[Record], after: int) -> Iterator[Record]:
    yield from records[:after]
    raise Killed


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nextquill.data.encoding._BATCH_SIZE", 2)
    monkeypatch.setattr("nextquill.data.encoding._AHEAD", 3)


@pytest.mark.parametrize("placebo", [False, True])
def test_examples_are_those_of_the_encoder(
    make: Make, records: list[Record], encoder: ExampleEncoder, tmp_path: Path, placebo: bool
) -> None:
    prepared, expected = make(placebo=placebo, seed=3), list(encoder.encode_iter(records, placebo, seed=3))
    assert list(prepared.examples) == expected
    assert [prepared[i] for i in (-1, 0, 7)] == [expected[i] for i in (-1, 0, 7)]
    assert prepared.examples[4:9] == expected[4:9]
    assert prepared.user_ids == [example.user_id for example in expected]
    assert prepared.has_placebo is placebo
    assert prepared.stats == EncodingStats.from_examples(expected)
    assert prepared.stats.examples_truncated
    for names in (["factual"], ["factual", "counterfactual", "placebo"]):
        sizes = [sum(len(b.input_ids) for name in names if (b := getattr(e, name)) is not None) for e in expected]
        assert prepared.num_branch_tokens(names) == sizes
    for outside in (23, -24):
        with pytest.raises(IndexError):
            prepared[outside]
    assert [path.name for path in tmp_path.iterdir()] == ["prepared"]
    assert len(prepared.header["shards"]) == 5


@pytest.mark.parametrize("placebo", [True, False])
def test_its_digest_is_that_of_the_examples_in_memory(
    make: Make, records: list[Record], encoder: ExampleEncoder, placebo: bool
) -> None:
    """So a run may resume from prepared records; placebo branches are not trained on."""
    encoded = EncodedDataset(encoder.encode_all(records))
    assert make(placebo=placebo).digest == encoded.digest
    others = [encoded.examples[::-1], encoded.examples[1:], [*encoded.examples[:-1], encoded.examples[0]]]
    assert len({encoded.digest, *(EncodedDataset(other).digest for other in others)}) == 4


def test_it_can_be_sent_to_a_data_loaders_workers(make: Make) -> None:
    prepared = make(placebo=True)
    copy = pickle.loads(pickle.dumps(prepared))
    assert list(copy.examples) == list(prepared.examples)
    loader: Any = torch.utils.data.DataLoader(
        prepared, batch_size=4, num_workers=1, collate_fn=TreeCollator(), multiprocessing_context="spawn"
    )
    assert [int(i) for batch in loader for i in batch["example_index"]] == list(range(23))


def test_opening_reads_no_tokens(make: Make, tmp_path: Path) -> None:
    make()
    unread = PreparedDataset(tmp_path / "prepared", verify=False)
    assert len(unread) == 23
    assert (len(unread.user_ids), unread.stats.examples) == (23, 23)
    assert {part for _, part in unread._stored._mapped} == {"index"}


@pytest.mark.parametrize("placebo", [False, True])
@pytest.mark.parametrize("after", [3, 11, 16, 22])
@pytest.mark.usefixtures("small_batches")
def test_a_stopped_run_goes_on_and_leaves_the_same_bytes(
    make: Make, records: list[Record], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int, placebo: bool
) -> None:
    monkeypatch.setattr(stream_placebo_histories, "__defaults__", ((EVALUATION,), 6))  # reads six records ahead
    make(placebo=placebo)
    whole = files(tmp_path / "prepared")
    shutil.rmtree(tmp_path / "prepared")
    with pytest.raises(Killed):
        make(cut(records, after), placebo=placebo)
    partial = tmp_path / "prepared.partial"
    done = json.loads((partial / "progress.json").read_bytes())["shards"] if partial.exists() else []
    assert bool(done) is (after > (11 if placebo else 3))
    encoded, own = list[int](), ExampleEncoder._steps

    def noting(self: ExampleEncoder, index: int, *rest: Any) -> Any:
        encoded.append(index)
        return own(self, index, *rest)

    monkeypatch.setattr(ExampleEncoder, "_steps", noting)
    make(placebo=placebo)
    assert files(tmp_path / "prepared") == whole
    assert sorted(encoded) == list(range(5 * len(done), 23)), "encoded again"


@pytest.mark.usefixtures("small_batches")
def test_a_torn_shard_behind_the_last_one_is_written_again(make: Make, records: list[Record], tmp_path: Path) -> None:
    make()
    whole = files(tmp_path / "prepared")
    shutil.rmtree(tmp_path / "prepared")
    with pytest.raises(Killed):
        make(cut(records, 17))
    partial = tmp_path / "prepared.partial"
    done = len(json.loads((partial / "progress.json").read_bytes())["shards"])
    (partial / f"shard-{done:05d}.tokens").write_bytes(b"torn")
    (partial / f".shard-{done:05d}.index.tmp").write_bytes(b"torn")
    make()
    assert files(tmp_path / "prepared") == whole


DIFFERENT: dict[str, tuple[dict[str, Any], str]] = {
    "seed": ({"seed": 9}, "seed: there 0, here 9"),
    "placebo": ({"placebo": True}, "placebo: there False, here True"),
    "bad records": ({"skip_bad": True}, "skip_bad: there False, here True"),
}


@pytest.fixture
def stopped(make: Make, records: list[Record], tmp_path: Path, small_batches: None) -> Path:
    with pytest.raises(Killed):
        make(cut(records, 17))
    return tmp_path / "prepared.partial"


@pytest.mark.parametrize("what", DIFFERENT)
def test_other_settings_are_refused_by_name(make: Make, stopped: Path, what: str) -> None:
    options, message = DIFFERENT[what]
    before = files(stopped)
    with pytest.raises(CheckpointError, match=f"was started with another {message}"):
        make(**options)
    assert files(stopped) == before
    assert len(make(**options, overwrite=True)) == 23
    assert not stopped.exists()


@pytest.mark.usefixtures("stopped")
def test_another_encoder_is_refused_by_name(make: Make, plain_tokenizer: Any, bos_tokenizer: Any) -> None:
    others = {
        "max_length: there 64, here 65": ExampleEncoder(plain_tokenizer, max_length=65),
        "max_response_length: there None, here 50": ExampleEncoder(plain_tokenizer, None, 64, 50),
        "template order: there 'official', here 'history_first'": ExampleEncoder(
            plain_tokenizer, PromptTemplate(order="history_first"), 64
        ),
        "tokenizer: there '": ExampleEncoder(bos_tokenizer, max_length=64),
    }
    for message, encoder in others.items():
        with pytest.raises(CheckpointError, match=f"was started with another {message}"):
            make(encoder=encoder)


@pytest.mark.usefixtures("stopped")
def test_other_records_are_refused(make: Make, records: list[Record], make_record: Any) -> None:
    with pytest.raises(
        CheckpointError, match=r"one of the first 5 differs from the one that the stopped run read \(shard-00000\)"
    ):
        make([make_record(query="other"), *records[1:]])
    with pytest.raises(CheckpointError, match=r"the stopped run read \d+ of them, now there are 3"):
        make(records[:3])
    assert len(make([*records, make_record(query="one more")])) == 24


def test_a_bad_record_leaves_what_was_before_it(
    make: Make, records: list[Record], tmp_path: Path, make_record: Any
) -> None:
    bad = make_record(user_id="bob", response="word " * 200)
    with pytest.raises(BudgetError, match=r"^record 12 \(user 'bob'\): the prompt"):
        make([*records[:12], bad, *records[12:]])
    assert len(json.loads((tmp_path / "prepared.partial" / "progress.json").read_bytes())["shards"]) == 2
    assert len(make([*records[:12], *records[12:]])) == 23


@pytest.mark.usefixtures("small_batches")
def test_bad_records_are_left_out_and_listed(make: Make, records: list[Record], make_record: Any) -> None:
    bad = make_record(user_id="bob", response="word " * 200)
    source = [bad, *records[:12], bad, *records[12:], bad]
    with pytest.raises(Killed):
        make(cut(source, 20), skip_bad=True)
    prepared = make(source, skip_bad=True)
    assert [example.index for example in prepared.examples] == [*range(1, 13), *range(14, 25)]
    assert [skipped["index"] for skipped in prepared.skipped] == [0, 13, 25]
    assert {skipped["user_id"] for skipped in prepared.skipped} == {"bob"}
    assert prepared.skipped[1]["error"].startswith("record 13 (user 'bob'): the prompt without any history takes")


def test_nothing_at_all_is_an_error_and_leaves_nothing(make: Make, tmp_path: Path, make_record: Any) -> None:
    with pytest.raises(RecordError, match=r"^records: there are none$"):
        make([])
    with pytest.raises(RecordError, match=r"^records: none can be encoded: record 0 \(user 'ann'\): "):
        make([make_record(response="word " * 200)], skip_bad=True)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("part", ["tokens", "index", "users"])
def test_a_damaged_shard_is_named(make: Make, tmp_path: Path, part: str) -> None:
    make()
    path = tmp_path / "prepared" / f"shard-00003.{part}"
    content = path.read_bytes()
    path.write_bytes(content[:-1])
    with pytest.raises(CheckpointError, match=rf"shard-00003\.{part}: damaged, expected {len(content)} bytes, got"):
        PreparedDataset(path.parent, verify=False)
    path.write_bytes(bytes([content[0] ^ 1]) + content[1:])
    with pytest.raises(CheckpointError, match=rf"shard-00003\.{part}: damaged, its check sum differs"):
        PreparedDataset(path.parent)
    path.unlink()
    with pytest.raises(CheckpointError, match=rf"shard-00003\.{part}: cannot be read: No such file"):
        PreparedDataset(path.parent)


@pytest.mark.usefixtures("stopped")
def test_a_flipped_bit_of_the_header_is_found_or_changes_nothing(make: Make, tmp_path: Path) -> None:
    """White space between values may change; a header without a digest, as of earlier versions, is read."""
    whole = make()
    path, found = tmp_path / "prepared" / "header.json", 0
    content = path.read_bytes()
    for place in range(0, len(content), 3):
        path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        found += 1
        with contextlib.suppress(CheckpointError):
            opened = PreparedDataset(tmp_path / "prepared").header
            assert {**opened, "digest": ""} == {**whole.header, "digest": ""} or "digest" not in opened
            found -= 1
    assert found > len(content) / 3 / 3
    header = json.loads(content)
    header["shards"][0]["examples"] -= 1
    path.write_text(json.dumps(header))
    with pytest.raises(CheckpointError, match=r"header\.json: damaged or changed, its digest differs; prepare the"):
        PreparedDataset(tmp_path / "prepared")
    del header["digest"]
    path.write_text(json.dumps(header))
    assert len(PreparedDataset(tmp_path / "prepared")) == len(whole) - 1


def test_a_damaged_shard_of_a_stopped_run_is_named(make: Make, stopped: Path) -> None:
    (stopped / "shard-00001.tokens").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"shard-00001\.tokens: damaged"):
        make()
    assert len(make(overwrite=True)) == 23


def test_a_folder_that_is_none_is_refused(make: Make, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"expected a prepared folder, with a header\.json"):
        PreparedDataset(tmp_path)
    make()
    header = tmp_path / "prepared" / "header.json"
    whole = header.read_text()
    for content, message in (
        (whole[:-20], "damaged, or not the header"),
        ("[]", "damaged, or not the header"),
        (whole.replace('"nextquill_prepared": 1', '"nextquill_prepared": 2'), "expected format 1"),
    ):
        header.write_text(content)
        with pytest.raises(CheckpointError, match=message):
            PreparedDataset(tmp_path / "prepared")


def test_what_is_there_is_not_overwritten_unasked(make: Make, tmp_path: Path) -> None:
    target = tmp_path / "prepared"
    target.write_text("precious")
    with pytest.raises(OutputExistsError, match="is a file"):
        make(overwrite=True)
    target.unlink()
    make()
    with pytest.raises(OutputExistsError, match="exists and is not empty; choose another, or give overwrite=True"):
        make()
    assert make(seed=1, overwrite=True).settings["seed"] == 1
    (target / "header.json").unlink()
    with pytest.raises(OutputExistsError, match="it is not a prepared folder"):
        make(overwrite=True)
    shutil.rmtree(target)
    (tmp_path / "prepared.partial").mkdir()
    (tmp_path / "prepared.partial" / "thesis.tex").write_text("precious")
    with pytest.raises(OutputExistsError, match=r"holds thesis\.tex, which is not part of a prepared folder"):
        make(overwrite=True)


def test_two_runs_into_one_folder_are_refused(make: Make, records: list[Record]) -> None:
    def while_another_runs() -> Iterator[Record]:
        with pytest.raises(OutputExistsError, match=r"another process.* is writing"):
            make()
        yield from records

    pytest.importorskip("fcntl")
    assert len(make(while_another_runs())) == 23


def test_an_encoder_that_would_give_others_is_named(make: Make, plain_tokenizer: Any, encoder: ExampleEncoder) -> None:
    prepared = make()
    prepared.check(encoder)
    prepared.check(ExampleEncoder(plain_tokenizer, prepared.template, 64))
    for other, message in (
        (ExampleEncoder(plain_tokenizer, max_length=99), "max_length: there 64, here 99"),
        (
            ExampleEncoder(plain_tokenizer, PromptTemplate(closing_cue="So:"), 64),
            r"template closing_cue: there '\[Resp",
        ),
    ):
        with pytest.raises(CheckpointError, match=f"was prepared with another {message}"):
            prepared.check(other)


def test_progress_counts_every_record_once(make: Make, records: list[Record], make_record: Any) -> None:
    counts: list[int] = []
    bad = make_record(response="word " * 200)
    make([bad, *records, bad, bad], skip_bad=True, progress=counts.append)
    assert sum(counts) == 26


def test_a_shard_holds_at_least_one_example(make: Make) -> None:
    with pytest.raises(ArgumentError, match=r"^shard_examples: expected at least 1, got 0$"):
        make(shard_examples=0)
