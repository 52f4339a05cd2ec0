"""Divides records into training, validation and test sets, by time or by user.

    leave_last_out     tests on each user's last record, validates on the one before: known users, later texts
    by_time            tests on all records from a given time on: what a deployed model would meet
    hold_out_users     tests on all records of some users: users that the training has not seen

`nextquill.data.leaks` checks any division.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from nextquill.data._checks import check_integer
from nextquill.data.records import Record
from nextquill.errors import ArgumentError, RecordError
from nextquill.storage.fingerprints import digest_of


@dataclass(frozen=True)
class Splits:
    """A division of records, each part in their order.

    Args:
        train, validation, test: the parts.
        order: how a user's records were ordered: by "timestamp", or by "file order" if none has a timestamp; None if
            the order had no influence.
    """

    train: list[Record]
    validation: list[Record]
    test: list[Record]
    order: Literal["timestamp", "file order"] | None = None


def leave_last_out(records: Sequence[Record], *, least_records: int = 3) -> Splits:
    """Use each user's last record for testing, the one before for validation, and the others for training.

    Args:
        records: the records, all with timestamps, or all without and then in the order of time. With equal timestamps,
            the one that stands later in `records` counts as the later.
        least_records: users with fewer records are only used for training; at least 3, so that every tested user is
            also in the training.

    Raises:
        RecordError: some records have a timestamp and others have none, or no user has `least_records`.
        ArgumentError: `least_records` is below 3.
    """
    check_integer("least_records", least_records, least=3)
    dated = _all_dated(records)
    users: dict[str, list[int]] = {}
    for position, record in enumerate(records):
        users.setdefault(record.user_id, []).append(position)
    validation, test = set(), set()
    for positions in users.values():
        if len(positions) >= least_records:
            *_, before, last = sorted(positions, key=lambda p: (records[p].timestamp or 0.0, p))
            validation.add(before)
            test.add(last)
    if not test:
        raise RecordError(f"records: expected a user with at least {least_records} records, got none")
    return Splits(
        train=[record for p, record in enumerate(records) if p not in validation and p not in test],
        validation=[records[p] for p in sorted(validation)],
        test=[records[p] for p in sorted(test)],
        order="timestamp" if dated else "file order",
    )


def by_time(records: Iterable[Record], cutoff: float, *, validation_from: float | None = None) -> Splits:
    """Use the records from `cutoff` on for testing.

    Args:
        records: the records, all with timestamps.
        cutoff: the start of the test, in seconds since the epoch.
        validation_from: the start of the validation, before `cutoff`; None for no validation.

    Raises:
        RecordError: a record has no timestamp, or a part would be empty.
        ArgumentError: `validation_from` is not before `cutoff`.
    """
    start = cutoff if validation_from is None else validation_from
    if start > cutoff or (validation_from is not None and start == cutoff):
        raise ArgumentError(f"validation_from: expected a time before the cutoff {cutoff}, got {validation_from}")
    train, validation, test = list[Record](), list[Record](), list[Record]()
    for position, record in enumerate(records):
        if record.timestamp is None:
            raise RecordError(f"record {position} (user {record.user_id!r}): expected a timestamp, got none")
        part = train if record.timestamp < start else validation if record.timestamp < cutoff else test
        part.append(record)
    parts = {"train": train, "test": test} | ({} if validation_from is None else {"validation": validation})
    for name, part in parts.items():
        if not part:
            raise RecordError(f"cutoff: expected records on both sides of every boundary, got none for {name}")
    return Splits(train, validation, test, "timestamp")


def hold_out_users(records: Sequence[Record], share: float, seed: int = 0, *, validation_share: float = 0.0) -> Splits:
    """Use all records of some users for testing.

    Users are ranked by a hash of the seed and their name. So when users are added, few others move to another part.

    Args:
        share: the share of users for testing; at least one user is tested.
        seed: decides which users.
        validation_share: the share of users for validation.

    Raises:
        ArgumentError: a share is not in [0, 1), `share` is 0, or no user would be left for training.
    """
    for name, value in (("share", share), ("validation_share", validation_share)):
        if not 0 <= value < 1:
            raise ArgumentError(f"{name}: expected a share in [0, 1), got {value}")
    if share == 0:
        raise ArgumentError("share: expected a share above 0, got 0")
    users = sorted({record.user_id for record in records}, key=lambda user: digest_of(f"{seed} {user}"))
    tested = max(1, round(share * len(users)))
    validated = max(1, round(validation_share * len(users))) if validation_share else 0
    if tested + validated >= len(users):
        raise ArgumentError(
            f"share: expected users left for training, got {tested} for testing and {validated} for validation of "
            f"{len(users)}"
        )
    test_users, validation_users = set(users[:tested]), set(users[tested : tested + validated])
    splits = Splits([], [], [])
    for record in records:
        held_out = splits.validation if record.user_id in validation_users else splits.train
        (splits.test if record.user_id in test_users else held_out).append(record)
    return splits


def _all_dated(records: Sequence[Record]) -> bool:
    """Return True if all records have a timestamp, False if none has one; raise RecordError if only some have."""
    undated = [position for position, record in enumerate(records) if record.timestamp is None]
    if not undated or len(undated) == len(records):
        return not undated
    first = undated[0]
    raise RecordError(
        f"record {first} (user {records[first].user_id!r}): expected a timestamp, as other records have one, got none"
    )
