from __future__ import annotations

import pickle

import pytest

from nextquill.data import SkippedRecords
from nextquill.data.skipped import PlacedError
from nextquill.errors import ArgumentError, RecordError


def test_all_are_counted_and_the_first_are_kept() -> None:
    seen: list[RecordError] = []
    skipped = SkippedRecords(max_kept=2, on_skip=seen.append)
    for number in range(5):
        skipped.skip(PlacedError(f"t line {number}", "bad", "query", "field"))
    skipped.skip(RecordError("of another kind"))
    assert skipped.messages == ["t line 0: field 'query': bad", "t line 1: field 'query': bad"]
    assert (skipped.total, skipped.counts, len(seen)) == (6, {"field": 6}, 6)


@pytest.mark.parametrize(("good", "bad", "refused"), [(9, 1, False), (8, 1, True), (0, 0, False), (0, 1, True)])
def test_check_refuses_a_larger_share(good: int, bad: int, refused: bool) -> None:
    skipped = SkippedRecords(max_kept=0, max_share=0.1)
    for _ in range(good):
        skipped.accept()
    for _ in range(bad):
        skipped.skip(PlacedError("t line 1", "bad"))
    if not refused:
        skipped.check("t")
        return
    with pytest.raises(
        RecordError, match=r"^t: (all 1 records were skipped|1 of 9 records were skipped, 11.1%; expect)"
    ):
        skipped.check("t")


def test_all_bad_is_refused_whatever_the_share() -> None:
    skipped = SkippedRecords(max_share=1.0)
    skipped.skip(PlacedError("t line 1", "bad"))
    with pytest.raises(RecordError, match=r"^t: all 1 records were skipped; the first: t line 1: bad$"):
        skipped.check("t")


@pytest.mark.parametrize(("name", "value"), [("max_kept", -1), ("max_share", 1.5), ("max_share", float("nan"))])
def test_bad_arguments_are_named(name: str, value: float) -> None:
    with pytest.raises(ArgumentError, match=rf"^{name}: expected "):
        SkippedRecords(**{name: value})  # type: ignore[arg-type]


def test_an_error_can_be_sent_between_processes() -> None:
    error = pickle.loads(pickle.dumps(PlacedError("t line 1", "bad", "query", "json")))
    assert (str(error), error.where, error.field, error.kind) == (
        "t line 1: field 'query': bad",
        "t line 1",
        "query",
        "json",
    )
