"""One summary per user, in a file of JSON lines that people can read, edit and delete from.

    {"user_id": …, "signals_hash": …, "model": …, "summary": …, "created": …, "tokens": …, "edited": false}

A summary is kept with a hash of the signals it was made from and the name of the model that made it. It is *stale* once
either has changed, and then made anew; the others stay. What a person has edited is theirs: it is never stale, and
never overwritten unless that is asked for.

The file is read and written whole under a lock, so several processes may add to it; add many summaries at a time.
"""

from __future__ import annotations

import json
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from nextquill.data.lines import json_lines
from nextquill.data.records import HistoryItem, check_text, check_user_id
from nextquill.data.skipped import PlacedError
from nextquill.errors import ArgumentError, OutputExistsError, RecordError
from nextquill.storage.atomic_files import written_whole
from nextquill.storage.fingerprints import fingerprint
from nextquill.storage.locks import try_lock

# Writing takes milliseconds: who waits longer waits for a process that hangs.
_PATIENCE_S, _PAUSE_S = 30.0, 0.02
# Threads of one process would share the name of the temporary file.
_ONE_THREAD = threading.Lock()


@dataclass(frozen=True, slots=True)
class Summary:
    """A user's summary.

    Args:
        user_id: whose it is.
        signals_hash: of the signals it was made from, see `signals_hash`.
        model: the name of the model that made it.
        summary: the text; may be empty.
        created: when it was made or last edited, as ISO 8601 with a time zone.
        tokens: how many tokens of that model it took; None once it was edited.
        edited: a person has changed it.
    """

    user_id: str
    signals_hash: str
    model: str
    summary: str
    created: str
    tokens: int | None = None
    edited: bool = False

    @classmethod
    def made_now(
        cls, user_id: str, signals: Sequence[HistoryItem], *, model: str, summary: str, tokens: int | None = None
    ) -> Summary:
        """A summary that was made from these signals just now."""
        return cls(user_id, signals_hash(signals), model, summary, _now(), tokens)

    def is_stale(self, signals_hash: str, model: str | None = None) -> bool:
        """Whether it was made of other signals, or, if `model` is given, by another one; an edited one never is.

        Of names with an @, what stands before it is for people: a folder that was moved holds the same model.
        """
        return not self.edited and (self.signals_hash != signals_hash or not self.is_by(model))

    def is_by(self, model: str | None) -> bool:
        """Whether this model made it, or None is given."""
        return model is None or model.rpartition("@")[2] == self.model.rpartition("@")[2]


def signals_hash(signals: Sequence[HistoryItem]) -> str:
    """32 hexadecimal digits that change with any signal, its title or time, and with their order."""
    listed = json.dumps([item.to_dict() for item in signals], sort_keys=True)
    return fingerprint([listed], digits=32)


class SummaryFile:
    """The summaries in a file, which need not be there yet.

    Args:
        path: the file; its folder has to be there. A link is followed.

    Raises (every method):
        RecordError: the file cannot be read, or a line is no summary or of a user who already has one.
        OutputExistsError: a method that writes, and another process has held the file for 30 s.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(os.path.realpath(path))

    def read(self) -> dict[str, Summary]:
        """All summaries by user, in the order of the file; none if there is no file."""
        if not self.path.exists():
            return {}
        found: dict[str, Summary] = {}
        for where, raw in json_lines(self.path):
            summary = _parsed(raw, where)
            if summary.user_id in found:
                raise PlacedError(where, f"expected one summary of a user, got a second of {summary.user_id!r}")
            found[summary.user_id] = summary
        return found

    def get(self, user_id: str, signals_hash: str, model: str | None = None) -> Summary | None:
        """The summary of a user, if there is one that is not stale; see `Summary.is_stale`."""
        summary = self.read().get(user_id)
        return None if summary is None or summary.is_stale(signals_hash, model) else summary

    def missing(self, hashes: Mapping[str, str], model: str | None = None) -> list[str]:
        """Those users, of `hashes` by user, who have no summary or a stale one, in their order."""
        known = self.read()
        return [user for user, own in hashes.items() if user not in known or known[user].is_stale(own, model)]

    def outdated_edits(self, hashes: Mapping[str, str]) -> list[str]:
        """Those users whose summary a person has edited, and whose signals have changed since it was made."""
        known = self.read()
        edited = {user: own for user, own in hashes.items() if user in known and known[user].edited}
        return [user for user, own in edited.items() if known[user].signals_hash != own]

    def put(self, *summaries: Summary, force: bool = False) -> list[str]:
        """Add summaries, or replace those of the same users.

        Args:
            summaries: at most one per user counts, the last.
            force: replace also what a person has edited.

        Returns:
            The users whose summary was left as it is because a person has edited it.
        """
        kept = list[str]()

        def change(known: dict[str, Summary]) -> None:
            edited = {user for user, summary in known.items() if summary.edited}
            for summary in summaries:
                if summary.user_id in edited and not force:
                    kept.append(summary.user_id)
                else:
                    known[summary.user_id] = summary

        if summaries:
            self._change(change)
        return kept

    def edit(self, user_id: str, text: str) -> Summary:
        """Replace the text of a user's summary by a person's; blank for none.

        Raises:
            ArgumentError: the user has no summary.
        """
        tidy = check_text(text, "edit", "text").strip()

        def change(known: dict[str, Summary]) -> None:
            self._check_known(known, user_id)
            known[user_id] = replace(known[user_id], summary=tidy, created=_now(), tokens=None, edited=True)

        return self._change(change)[user_id]

    def delete(self, user_id: str) -> None:
        """Delete a user's summary, edited or not; the next run makes a new one if it is given the user's signals.

        Raises:
            ArgumentError: the user has no summary.
        """

        def change(known: dict[str, Summary]) -> None:
            self._check_known(known, user_id)
            del known[user_id]

        self._change(change)

    def _check_known(self, known: Mapping[str, Summary], user_id: str) -> None:
        if user_id not in known:
            raise ArgumentError(f"user_id: expected one of the {len(known)} users in {self.path}, got {user_id!r}")

    def _change(self, change: Callable[[dict[str, Summary]], None]) -> dict[str, Summary]:
        with _ONE_THREAD, self._locked():
            known = self.read()
            before = dict(known)
            change(known)
            if known != before:
                with written_whole(self.path) as stream:
                    shutil.copymode(self.path, stream.name)  # what was private stays private
                    for summary in known.values():
                        stream.write((json.dumps(asdict(summary), ensure_ascii=False) + "\n").encode())
        return known

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Hold the file: the one that bears the name now, as another process may have just replaced it."""
        until = time.monotonic() + _PATIENCE_S
        while True:
            try:
                stream = self.path.open("ab")
            except OSError as error:
                raise RecordError(f"{self.path}: cannot be written: {error.strerror or error}") from error
            with stream:
                if try_lock(stream) and _is_at(stream.fileno(), self.path):
                    yield
                    return
            if time.monotonic() > until:
                raise OutputExistsError(f"{self.path}: another process has held it for {_PATIENCE_S:.0f} s")
            time.sleep(_PAUSE_S)


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _parsed(raw: object, where: str) -> Summary:
    if not isinstance(raw, Mapping):
        raise PlacedError(where, f"expected an object with named fields, got {type(raw).__name__}")
    names = [each.name for each in fields(Summary)]
    unknown = sorted(map(str, raw.keys() - set(names)))
    if unknown:
        raise PlacedError(where, f"expected {', '.join(names)}, got {unknown[0]!r}")
    tokens, edited = raw.get("tokens"), raw.get("edited", False)
    if tokens is not None and (not isinstance(tokens, int) or isinstance(tokens, bool) or tokens < 0):
        raise PlacedError(where, f"expected a number of tokens or null, got {tokens!r}", "tokens")
    if not isinstance(edited, bool):
        raise PlacedError(where, f"expected true or false, got {edited!r}", "edited")
    texts: dict[str, Any] = {
        name: check_text(raw.get(name), where, name) for name in ("signals_hash", "model", "summary", "created")
    }
    return Summary(check_user_id(raw.get("user_id"), where), **texts, tokens=tokens, edited=edited)


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
