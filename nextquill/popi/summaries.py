"""Summaries of users: their signals, the model that writes them, and the file that keeps them.

`summarize` writes summaries from signals. For use, `all_signals` gives everything that is known of a user. For
evaluation, `hold_out` gives the first of it, and the user's later pairs to judge the summary by.

`SummaryFile` keeps one summary per user, as JSON lines that people can read, edit and delete:

    {"user_id": …, "signals_hash": …, "model": …, "summary": …, "created": …, "tokens": …, "edited": false,
     "cut": false}

A summary is stored with a hash of its signals and the name of the model that wrote it. When either changes, it is
*stale* and is written again; the others stay. A summary that a person has edited is never stale, and is replaced only
on request. The file is read and written as a whole under a lock, so several processes may add to it. Each write costs
as much as the whole file: add many summaries at a time.
"""

from __future__ import annotations

import json
import os
import shutil
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from nextquill.data.lines import json_lines
from nextquill.data.records import HistoryItem, check_text, check_user_id
from nextquill.data.skipped import PlacedError
from nextquill.errors import ArgumentError, OutputExistsError, RecordError
from nextquill.popi.prompts import InferencePrompts
from nextquill.popi.users import LEAST_SIGNALS, Draw, User, held_out, in_time
from nextquill.ranks import deal
from nextquill.storage.atomic_files import written_whole
from nextquill.storage.fingerprints import fingerprint, seed_of
from nextquill.storage.locks import is_at, try_lock

if TYPE_CHECKING:
    from nextquill.popi.roles import Role

# Writing takes milliseconds, so a longer wait means that another process hangs.
_PATIENCE_S, _PAUSE_S = 30.0, 0.02
# Threads of one process would share the name of the temporary file.
_ONE_THREAD = threading.Lock()


@dataclass(frozen=True, slots=True)
class Summary:
    """A user's summary, which may be empty.

    Args:
        signals_hash: the hash of the user's signals, see `signals_hash`.
        model: the name of the model that wrote it.
        created: the time when it was written or last edited, in ISO 8601 with a time zone.
        tokens: its number of tokens for that model; None after an edit.
        edited: whether a person has edited it.
        cut: whether it is unfinished, as it reached the limit of tokens.
    """

    user_id: str
    signals_hash: str
    model: str
    summary: str
    created: str
    tokens: int | None = None
    edited: bool = False
    cut: bool = False

    @classmethod
    def made_now(
        cls,
        user_id: str,
        signals: Sequence[HistoryItem],
        *,
        model: str,
        summary: str,
        tokens: int | None = None,
        cut: bool = False,
    ) -> Summary:
        """Make a summary of these signals with the present time."""
        return cls(user_id, signals_hash(signals), model, summary, _now(), tokens, cut=cut)

    def is_stale(self, signals_hash: str, model: str | None = None) -> bool:
        """Whether it was written from other signals, or by another model than `model`; never after an edit.

        In names with an @, only the part after it counts, as a folder that was moved holds the same model.
        """
        return not self.edited and (self.signals_hash != signals_hash or not self.is_by(model))

    def is_by(self, model: str | None) -> bool:
        """Whether this model wrote it; always true for None."""
        return model is None or model.rpartition("@")[2] == self.model.rpartition("@")[2]


def signals_hash(signals: Sequence[HistoryItem]) -> str:
    """Return 32 hexadecimal digits that change with the signals' texts, titles, times and order."""
    listed = json.dumps([item.to_dict() for item in signals], sort_keys=True)
    return fingerprint([listed], digits=32)


class SummaryFile:
    """The summaries in a file, which need not exist yet.

    Args:
        path: the file; its folder must exist. A link is followed.

    Raises (every method):
        RecordError: the file cannot be read, or a line is not a summary or repeats a user.
        OutputExistsError: the method writes, and another process has held the file for 30 s.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(os.path.realpath(path))

    def read(self) -> dict[str, Summary]:
        """Return all summaries by user, in the order of the file; none if there is no file."""
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
        """Return the summary of a user, or None if there is none or it is stale; see `Summary.is_stale`."""
        summary = self.read().get(user_id)
        return None if summary is None or summary.is_stale(signals_hash, model) else summary

    def missing(self, hashes: Mapping[str, str], model: str | None = None) -> list[str]:
        """Return the users without a summary or with a stale one, out of `hashes` (by user), in their order."""
        known = self.read()
        return [user for user, own in hashes.items() if user not in known or known[user].is_stale(own, model)]

    def outdated_edits(self, hashes: Mapping[str, str]) -> list[str]:
        """Return the users whose summary a person has edited and whose signals have changed since it was written."""
        edited = {user: summary.signals_hash for user, summary in self.read().items() if summary.edited}
        return [user for user, own in hashes.items() if edited.get(user, own) != own]

    def put(self, *summaries: Summary, force: bool = False) -> list[str]:
        """Add summaries, or replace those of the same users. The last summary of a user counts.

        Returns the users whose summary was kept because a person has edited it; with `force` these are replaced too.
        """
        kept = list[str]()
        if not summaries:
            return kept
        with self._changed() as known:
            edited = {user for user, summary in known.items() if summary.edited}
            for summary in summaries:
                if summary.user_id in edited and not force:
                    kept.append(summary.user_id)
                else:
                    known[summary.user_id] = summary
        return kept

    def edit(self, user_id: str, text: str) -> Summary:
        """Replace the text of a user's summary by a person's, which may be blank; ArgumentError without a summary."""
        tidy = check_text(text, "edit", "text").strip()
        with self._changed(user_id) as known:
            known[user_id] = replace(known[user_id], summary=tidy, created=_now(), tokens=None, edited=True, cut=False)
            return known[user_id]

    def delete(self, user_id: str) -> None:
        """Delete a user's summary, edited or not; ArgumentError without one.

        The next run writes a new one if it gets the user's signals.
        """
        with self._changed(user_id) as known:
            del known[user_id]

    @contextmanager
    def _changed(self, user_id: str | None = None) -> Iterator[dict[str, Summary]]:
        """Give all summaries, among them this user's, and write them at the end of the block if they have changed."""
        with _ONE_THREAD, self._locked():
            known = self.read()
            if user_id is not None and user_id not in known:
                raise ArgumentError(f"user_id: expected one of the {len(known)} users in {self.path}, got {user_id!r}")
            before = dict(known)
            yield known
            if known != before:
                with written_whole(self.path) as stream:
                    shutil.copymode(self.path, stream.name)  # a private file stays private
                    for summary in known.values():
                        stream.write((json.dumps(asdict(summary), ensure_ascii=False) + "\n").encode())

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Lock the file that has the name now, as another process may have just replaced it."""
        until = time.monotonic() + _PATIENCE_S
        while True:
            try:
                stream = self.path.open("ab")
            except OSError as error:
                raise RecordError(f"{self.path}: cannot be written: {error.strerror or error}") from error
            with stream:
                if try_lock(stream) and is_at(stream, self.path):
                    yield
                    return
            if time.monotonic() > until:
                raise OutputExistsError(f"{self.path}: another process has held it for {_PATIENCE_S:.0f} s")
            time.sleep(_PAUSE_S)


def _parsed(raw: object, where: str) -> Summary:
    if not isinstance(raw, Mapping):
        raise PlacedError(where, f"expected an object with named fields, got {type(raw).__name__}")
    names = [each.name for each in fields(Summary)]
    unknown = sorted(map(str, raw.keys() - set(names)))
    if unknown:
        raise PlacedError(where, f"expected {', '.join(names)}, got {unknown[0]!r}")
    tokens, flags = raw.get("tokens"), {name: raw.get(name, False) for name in ("edited", "cut")}
    if tokens is not None and (not isinstance(tokens, int) or isinstance(tokens, bool) or tokens < 0):
        raise PlacedError(where, f"expected a number of tokens or null, got {tokens!r}", "tokens")
    for name, flag in flags.items():
        if not isinstance(flag, bool):
            raise PlacedError(where, f"expected true or false, got {flag!r}", name)
    texts: dict[str, Any] = {
        name: check_text(raw.get(name), where, name) for name in ("signals_hash", "model", "summary", "created")
    }
    return Summary(check_user_id(raw.get("user_id"), where), **texts, tokens=tokens, **flags)


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


@dataclass(frozen=True)
class HeldOut:
    """The first signals and later pairs of each user to evaluate, and the users that are left out, see `UserCounts`."""

    draws: tuple[Draw, ...]
    no_pairs: tuple[str, ...] = ()
    few_signals: tuple[str, ...] = ()

    @property
    def left_out(self) -> dict[str, int]:
        """The number of users that are left out, by reason."""
        return {"no_pairs": len(self.no_pairs), "few_signals": len(self.few_signals)}

    def __str__(self) -> str:
        whole = f"{len(self.draws)} users, {sum(len(draw.pairs) for draw in self.draws)} pairs"
        left_out = ((self.no_pairs, "without pairs"), (self.few_signals, "with too few signals"))
        return "; ".join([whole, *(f"{len(ids)} left out {why}, such as {ids[0]!r}" for ids, why in left_out if ids)])


def hold_out(users: Sequence[User], *, num_signals: int, max_pairs: int | None = None) -> HeldOut:
    """Apply `held_out` to every user who can be evaluated: with a pair and two signals (one if `num_signals` is 1).

    Raises:
        RecordError: no user can be evaluated; the message says why.
        ArgumentError: a number is below 1.
    """
    least = min(LEAST_SIGNALS, num_signals)
    draws = [held_out(user, num_signals=num_signals, max_pairs=max_pairs) for user in users if user.pairs]
    found = HeldOut(
        tuple(draw for draw in draws if len(draw.signals) >= least),
        tuple(user.user_id for user in users if not user.pairs),
        tuple(draw.user_id for draw in draws if len(draw.signals) < least),
    )
    if not found.draws:
        raise RecordError(f"users: expected some with pairs and signals beside them, got none: {found}")
    return found


def all_signals(user: User, *, num_signals: int) -> tuple[HistoryItem, ...]:
    """Return the newest signals of everything known about a user. Without times, the pairs come after the items."""
    items = [*user.items, *(pair.as_item() for pair in user.pairs)]
    return tuple([items[place] for place in in_time(items)][-num_signals:])


class Written(NamedTuple):
    """A summary by the inference model; `ended` says whether it ended within `max_new_tokens`. It may be empty."""

    user_id: str
    text: str
    tokens: int
    ended: bool


def summarize(
    role: Role,
    prompts: InferencePrompts,
    signals: Mapping[str, Sequence[HistoryItem]],
    *,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    seed: int = 0,
    batch_size: int = 16,
) -> Iterator[Written]:
    """Yield each user's summary as soon as its batch is written, the longest prompts first.

    Args:
        signals: the signals by user, oldest first.
        temperature: 0 for the most likely tokens; above 0, a sample that depends on `seed` and the user alone.
        batch_size: the number of users at a time.

    Raises:
        BudgetError: a user's newest signal does not fit into the prompt; raised before any summary is written.
        ArgumentError: a number is out of range.
    """
    from nextquill.generation import Prompt
    from nextquill.generation.rollouts import ModelRollouts

    rollouts = ModelRollouts(
        role.model,
        role.tokenizer,
        prompts.stop_ids,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        batch_size=batch_size,
    )
    for user, own in signals.items():
        prompts.check(user, own)
    users = list(signals)
    seeds = [seed_of(seed, "summarize", user) for user in users]
    asked = [Prompt(place, prompts.ids(signals[user])[0], seeds[place]) for place, user in enumerate(users)]
    asked.sort(key=lambda prompt: -len(prompt.ids))

    def written(batch: Sequence[Prompt]) -> Iterator[Written]:
        with role.active():
            samples = rollouts.sample(batch)
        for prompt, sample in zip(batch, samples, strict=True):
            tokens = len(sample.ids) - sample.ended
            yield Written(users[prompt.index], prompts.summary(sample), tokens, sample.ended)

    yield from deal((asked[start : start + batch_size] for start in range(0, len(asked), batch_size)), written)
