"""The records of the study: people to train on, to choose on, and to test on.

A data set is a folder of plain record files: `train.jsonl`, `test_unseen.jsonl` with the texts of other people, and
`test_seen.jsonl` with later texts of the people in the first. Development people are taken out of the training file.
A file `persons.json` may map a person to words that are known to be personal, such as a surname.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import NamedTuple

from nextquill.data import Record, load_records
from nextquill.errors import ArgumentError
from nextquill.evaluation.identity import records_digest
from nextquill.storage.fingerprints import fingerprint
from nextquill.storage.json_files import json_object

DEV, TEST, SEEN = "dev", "test", "seen"


class Size(NamedTuple):
    """The most people of a set, and the most texts of all of them."""

    people: int
    texts: int


@dataclass(frozen=True)
class Sizes:
    """How much of a data set is used.

    Args:
        train, dev, test, seen: the most people and texts of each set.
        least: fewer test people are refused: no difference could be seen.
    """

    train: Size
    dev: Size
    test: Size
    seen: Size
    least: int


@dataclass(frozen=True)
class People:
    """One data set, divided.

    Args:
        train: records to train on.
        sets: the records of `DEV`, `TEST` and `SEEN`: everyone's first, then everyone's second, …
    """

    train: list[Record]
    sets: dict[str, list[Record]]

    def digest(self) -> str:
        """Identifies the records."""
        return fingerprint(records_digest(records) for records in (self.train, *self.sets.values()))


def read_people(name: str, folder: Path, sizes: Sizes) -> People:
    """The data set in `folder`, divided; the same folder and sizes give the same people.

    Raises:
        ArgumentError: a file is missing, a person is in both files of unseen people, or there are too few people.
        RecordError: a record cannot be read.
    """
    files = {}
    for stem in ("train", "test_unseen", "test_seen"):
        path = folder / f"{stem}.jsonl"
        if not path.is_file():
            raise ArgumentError(f"data: expected {name}={folder} to hold {path.name}, which is not there")
        files[stem] = load_records(path)
    known_file = folder / "persons.json"
    known = json_object(known_file) if known_file.is_file() else {}
    trained, unseen = ({record.user_id for record in files[stem]} for stem in ("train", "test_unseen"))
    check_apart(name, trained, unseen)
    # Development people take no more than a fifth of those there are to train on.
    dev = set(drawn(name, DEV, trained, min(sizes.dev.people, len(trained) // 5)))
    chosen = {
        "train": first_texts(
            files["train"], drawn(name, "train", trained - dev, sizes.train.people), sizes.train.texts
        ),
        DEV: first_texts(files["train"], dev, sizes.dev.texts),
        TEST: first_texts(files["test_unseen"], drawn(name, TEST, unseen, sizes.test.people), sizes.test.texts),
    }
    later = {record.user_id for record in files["test_seen"]} & {record.user_id for record in chosen["train"]}
    chosen[SEEN] = first_texts(files["test_seen"], drawn(name, SEEN, later, sizes.seen.people), sizes.seen.texts)
    for each, records in chosen.items():
        people, least = len({record.user_id for record in records}), sizes.least if each == TEST else 2
        if people < least:
            raise ArgumentError(f"data: expected at least {least} {each} people in {name}, got {people}")
    marked = {each: [_with_known(record, known) for record in records] for each, records in chosen.items()}
    return People(marked.pop("train"), marked)


def check_apart(name: str, trained: set[str], unseen: set[str], files: str = "") -> None:
    """Raise ArgumentError if a person is to train on and to test on; `files` is how the names of both files begin."""
    if both := sorted(trained & unseen):
        raise ArgumentError(
            f"data: {name}: {both[0]!r} is in {files}train.jsonl and in {files}test_unseen.jsonl; expected others"
        )


def drawn(name: str, purpose: str, users: set[str], most: int) -> list[str]:
    """At most that many people, drawn with a seed of their own."""
    return random.Random(f"{name} {purpose}").sample(sorted(users), min(most, len(users)))


def first_texts(records: Sequence[Record], users: Collection[str], most: int) -> list[Record]:
    """At most that many texts of these people, in the order of `People.sets`."""
    of: dict[str, list[Record]] = {user: [] for user in sorted(users)}
    for record in records:
        if record.user_id in of:
            of[record.user_id].append(record)
    rounds = zip_longest(*of.values())
    return [record for texts in rounds for record in texts if record is not None][:most]


def _with_known(record: Record, known: Mapping[str, Mapping[str, str]]) -> Record:
    words = list(known.get(record.user_id, {}).values())
    return dataclasses.replace(record, extra={**record.extra, "personal": words}) if words else record
