"""Summaries are written from the right signals and users, independently of others, and kept in a file."""

from __future__ import annotations

import json
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import IO, Any

import pytest

from nextquill.data import HistoryItem
from nextquill.errors import ArgumentError, BudgetError, OutputExistsError, RecordError
from nextquill.models.tiny_models import ScratchSize, build_model
from nextquill.popi import summaries
from nextquill.popi.prompts import InferencePrompts
from nextquill.popi.roles import Role
from nextquill.popi.summaries import Summary, SummaryFile, all_signals, hold_out, signals_hash, summarize
from nextquill.popi.users import Pair, User, check_draw

SIGNALS = (HistoryItem("I liked the sea."), HistoryItem("tea", title="drinks", timestamp=3.0))


def make(user: str = "ann", summary: str = "Likes the sea.", signals: Any = SIGNALS, model: str = "tiny") -> Summary:
    return Summary.made_now(user, signals, model=model, summary=summary, tokens=5)


@pytest.fixture
def file(tmp_path: Path) -> SummaryFile:
    return SummaryFile(tmp_path / "summaries.jsonl")


def test_the_hash_changes_with_everything_in_the_signals_and_their_order() -> None:
    first, second = SIGNALS
    others = [
        (),
        (first,),
        (second, first),
        (first, replace(second, title=None)),
        (first, replace(second, timestamp=4.0)),
        (first, replace(second, text="tee")),
        (replace(first, text="I liked the sea.tea"),),
    ]
    hashes = {signals_hash(signals) for signals in [SIGNALS, *others]}
    assert len(hashes) == 1 + len(others)
    # A fixed value, as a file of summaries outlives the version that wrote it.
    assert signals_hash(SIGNALS) == signals_hash(list(SIGNALS)) == "59536dcf904dae588737eac4f22919f4"


def test_a_line_has_the_documented_fields(file: SummaryFile) -> None:
    file.put(make(summary="Likes thé."))
    raw = json.loads(file.path.read_text(encoding="utf-8"))
    assert datetime.fromisoformat(raw.pop("created")).tzinfo is not None
    assert raw == {
        "user_id": "ann",
        "signals_hash": signals_hash(SIGNALS),
        "model": "tiny",
        "summary": "Likes thé.",
        "tokens": 5,
        "edited": False,
        "cut": False,
    }


def test_no_file_holds_no_summaries(file: SummaryFile) -> None:
    assert file.read() == {}
    assert file.get("ann", "x") is None
    assert file.put() == []
    assert not file.path.exists()


def test_summaries_are_read_back_and_replaced(file: SummaryFile) -> None:
    ann, bob = make(), make("bob", "a\u2028b\n\n</s>")
    assert file.put(ann, bob) == []
    assert SummaryFile(file.path).read() == {"ann": ann, "bob": bob}
    newer = make(summary="Likes hills.")
    file.put(newer)
    assert list(file.read().values()) == [newer, bob]


def test_only_missing_and_stale_summaries_are_to_be_written(file: SummaryFile) -> None:
    own, other = signals_hash(SIGNALS), signals_hash(SIGNALS[:1])
    file.put(make(), make("bob"))
    assert file.missing({"ann": own, "bob": other, "cy": own}) == ["bob", "cy"]
    assert file.missing({"ann": own, "bob": own}, model="other") == ["ann", "bob"]
    assert file.missing({"ann": own, "bob": own}, model="tiny") == []
    assert file.get("ann", own) == file.read()["ann"]
    assert file.get("ann", other) is None
    assert file.get("ann", own, model="other") is None


def test_an_edit_is_never_stale_and_never_overwritten_without_force(file: SummaryFile) -> None:
    own, other = signals_hash(SIGNALS), signals_hash(())
    file.put(make(), make("bob"))
    edited = file.edit("ann", " Likes hills. ")
    assert (edited.summary, edited.edited, edited.tokens) == ("Likes hills.", True, None)
    assert file.missing({"ann": other, "bob": own}, model="tiny") == []
    assert file.get("ann", other, model="other") == edited
    assert file.outdated_edits({"ann": other, "bob": other}) == ["ann"]
    assert file.outdated_edits({"ann": own}) == []
    newer = [make(summary="New."), make("bob", "New.")]
    assert file.put(*newer) == ["ann"]
    assert file.read() == {"ann": edited, "bob": newer[1]}
    assert file.put(*newer, force=True) == []
    assert file.read() == {"ann": newer[0], "bob": newer[1]}


def test_an_edit_may_leave_nothing(file: SummaryFile) -> None:
    file.put(make())
    file.edit("ann", " ")
    assert file.read()["ann"].summary == ""


def test_a_deleted_summary_leaves_no_trace_in_the_folder(file: SummaryFile) -> None:
    file.put(make(), make("bob", "Something else."))
    file.edit("ann", "Secret.")
    file.delete("ann")
    assert list(file.read()) == ["bob"]
    assert [path.name for path in file.path.parent.iterdir()] == ["summaries.jsonl"]
    assert "Secret" not in file.path.read_text()
    file.delete("bob")
    assert file.read() == {}


@pytest.mark.parametrize("change", [lambda f: f.edit("eve", "x"), lambda f: f.delete("eve")], ids=["edit", "delete"])
def test_a_user_without_summary_is_named(file: SummaryFile, change: Any) -> None:
    file.put(make())
    before = file.path.read_bytes()
    with pytest.raises(ArgumentError, match=r"^user_id: expected one of the 1 users in .*, got 'eve'"):
        change(file)
    assert file.path.read_bytes() == before


GOOD = {"user_id": "ann", "signals_hash": "h", "model": "m", "summary": "s", "created": "c", "tokens": 3}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", r"line 2: not valid JSON"),
        ("[]", r"line 2: expected an object"),
        (json.dumps({**GOOD, "user_id": None}), r"line 2: field 'user_id'"),
        (json.dumps({**GOOD, "summary": 3}), r"line 2: field 'summary': expected a string, got int"),
        (json.dumps({**GOOD, "tokens": -1}), r"line 2: field 'tokens': expected a number of tokens"),
        (json.dumps({**GOOD, "edited": 1}), r"line 2: field 'edited': expected true or false"),
        (json.dumps({**GOOD, "cut": "no"}), r"line 2: field 'cut': expected true or false"),
        (json.dumps({**GOOD, "sumary": "s"}), r"line 2: expected user_id, .*, got 'sumary'"),
        (json.dumps(GOOD), r"line 2: expected one summary of a user, got a second of 'ann'"),
    ],
)
def test_a_bad_line_is_named_and_nothing_is_overwritten(file: SummaryFile, line: str, message: str) -> None:
    content = f"{json.dumps(GOOD)}\n{line}\n"
    file.path.write_text(content)
    for use in (file.read, lambda: file.put(make("bob")), lambda: file.delete("ann")):
        with pytest.raises(RecordError, match=message):
            use()
    assert file.path.read_text() == content


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(RecordError, match=r"summaries.jsonl: cannot be written: No such file"):
        SummaryFile(tmp_path / "none" / "summaries.jsonl").put(make())


def test_a_private_file_stays_private_and_a_link_stays_a_link(file: SummaryFile, tmp_path: Path) -> None:
    file.put(make())
    file.path.chmod(0o600)
    link = tmp_path / "link.jsonl"
    link.symlink_to(file.path)
    SummaryFile(link).put(make("bob"))
    assert link.is_symlink()
    assert file.path.stat().st_mode & 0o777 == 0o600
    assert list(file.read()) == ["ann", "bob"]


@pytest.mark.parametrize("like", ["threads", "processes"])
def test_writers_at_the_same_time_lose_nothing(file: SummaryFile, like: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if like == "processes":
        pytest.importorskip("fcntl")
        monkeypatch.setattr(os, "getpid", threading.get_ident)
        monkeypatch.setattr(summaries, "_ONE_THREAD", nullcontext())

    def write(name: str) -> None:
        for place in range(8):
            SummaryFile(file.path).put(make(f"{name}{place}"))

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(write, "abcd"))
    assert sorted(file.read()) == sorted(f"{name}{place}" for name in "abcd" for place in range(8))


def test_a_file_that_is_replaced_during_the_wait_is_locked_again(
    file: SummaryFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    fcntl = pytest.importorskip("fcntl")
    file.put(make())
    monkeypatch.setattr(summaries, "_PATIENCE_S", 0.05)
    lock, other = summaries.try_lock, file.path.with_name("other")
    other.write_bytes(file.path.read_bytes())
    with other.open("ab") as holder:
        fcntl.flock(holder, fcntl.LOCK_EX)

        def replaced_first(stream: IO[bytes]) -> bool:
            locked = lock(stream)
            if other.exists():
                other.replace(file.path)
            return locked

        monkeypatch.setattr(summaries, "try_lock", replaced_first)
        with pytest.raises(OutputExistsError, match=r"another process has held it"):
            file.put(make("bob"))


def test_a_locked_file_is_refused_after_a_wait(file: SummaryFile, monkeypatch: pytest.MonkeyPatch) -> None:
    fcntl = pytest.importorskip("fcntl")
    file.put(make())
    monkeypatch.setattr(summaries, "_PATIENCE_S", 0.05)
    with file.path.open("ab") as holder:
        fcntl.flock(holder, fcntl.LOCK_EX)
        with pytest.raises(OutputExistsError, match=r"another process has held it"):
            file.put(make("bob"))
    file.put(make("bob"))
    assert len(file.read()) == 2


def test_an_interrupted_write_leaves_the_file_as_it_was(file: SummaryFile, monkeypatch: pytest.MonkeyPatch) -> None:
    file.put(make())
    before = file.path.read_bytes()

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        file.put(make("bob"))
    monkeypatch.undo()
    assert file.path.read_bytes() == before
    assert len(list(file.path.parent.iterdir())) == 1


# ---- writing ---------------------------------------------------------------------------------------

SIZE = ScratchSize(vocabulary=260, hidden_size=32, layers=1, heads=1, intermediate_size=48, positions=2048)


def pair(k, timestamp=None):
    return Pair(f"Question {k} of many?", f"Answer {k}, gladly.", f"Reply {k}, never.", timestamp)


def user(name, pairs=4, items=1):
    return User(name, tuple(map(pair, range(pairs))), tuple(HistoryItem(f"Past text {k}.") for k in range(items)))


def test_all_signals_are_the_newest_items_and_pairs():
    someone = user("a", pairs=2, items=2)
    known = [*someone.items, *(each.as_item() for each in someone.pairs)]
    assert all_signals(someone, num_signals=9) == tuple(known)
    assert all_signals(someone, num_signals=3) == tuple(known[1:])
    dated = User("b", (pair(0, 1.0), pair(1, 9.0)), (HistoryItem("Between.", timestamp=5.0),))
    assert [item.timestamp for item in all_signals(dated, num_signals=2)] == [5.0, 9.0]


def test_users_who_cannot_be_judged_are_named():
    found = hold_out([user("a"), user("b", pairs=0), user("c", pairs=1), user("d", pairs=1, items=0)], num_signals=3)
    assert [draw.user_id for draw in found.draws] == ["a"]
    assert (found.no_pairs, found.few_signals) == (("b",), ("c", "d"))
    assert found.left_out == {"no_pairs": 1, "few_signals": 2}
    assert str(found) == (
        "1 users, 2 pairs; 1 left out without pairs, such as 'b'; 2 left out with too few signals, such as 'c'"
    )
    for draw in found.draws:
        check_draw(draw)
    with pytest.raises(RecordError, match="1 left out with too few signals"):
        hold_out([user("d", pairs=1)], num_signals=3)
    assert len(hold_out([user("c", pairs=1)], num_signals=1).draws) == 1


@pytest.fixture(scope="module")
def role(tokenizer):
    return Role("inference", build_model(SIZE, 0).eval(), tokenizer, None, None, frozen=True)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_summary_does_not_depend_on_the_other_users(role, tokenizer, temperature):
    prompts = InferencePrompts(tokenizer)
    signals = {f"u{k}": all_signals(user(f"u{k}", items=1 + k), num_signals=9) for k in range(4)}
    options = {"max_new_tokens": 8, "temperature": temperature}
    found = {each.user_id: each for each in summarize(role, prompts, signals, batch_size=3, **options)}
    assert found.keys() == signals.keys()
    for name, own in signals.items():
        (alone,) = summarize(role, prompts, {name: own}, **options)
        assert alone == found[name]
        assert alone.tokens <= 8
    if temperature:
        again = {each.user_id: each for each in summarize(role, prompts, signals, seed=1, **options)}
        assert again != found


def test_a_signal_that_does_not_fit_is_named_before_any_summary_is_written(role, tokenizer):
    prompts = InferencePrompts(tokenizer, max_prompt_tokens=400)
    signals = {"a": (HistoryItem("Short."),), "b": (HistoryItem("long " * 200),)}
    with pytest.raises(BudgetError, match="user 'b'"):
        next(summarize(role, prompts, signals))
