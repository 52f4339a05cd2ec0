"""Encodes records into a folder that training reads from disk; `nextquill.data.prepared` describes its files.

Examples are written shard by shard into `FOLDER.partial`, which becomes `FOLDER` when all are there. A stopped run
resumes after its last complete shard. It reads the earlier records again, to check that they are the same, but does not
encode them again.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
import zlib
from array import array
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from nextquill.data._checks import check_integer
from nextquill.data.encoding import ExampleEncoder
from nextquill.data.examples import EncodedExample
from nextquill.data.prepared import (
    FORMAT,
    HEADER,
    PARTS,
    PreparedDataset,
    check_shard,
    encoder_settings,
    is_prepared,
    read_header,
)
from nextquill.data.records import Record
from nextquill.errors import CheckpointError, OutputExistsError, RecordError, naming
from nextquill.storage.atomic_files import move_into_place, write_whole
from nextquill.storage.json_files import first_difference
from nextquill.storage.locks import LOCK_FILE, held
from nextquill.storage.manifests import with_digest

_PROGRESS = "progress.json"
#: 4096 examples of 2,000 tokens take 34 MB. A stopped run loses at most one shard, some five seconds of work.
SHARD_EXAMPLES = 4096


def prepare(
    records: Iterable[Record],
    encoder: ExampleEncoder,
    folder: str | os.PathLike[str],
    *,
    placebo: bool = False,
    seed: int = 0,
    skip_bad: bool = False,
    overwrite: bool = False,
    shard_examples: int = SHARD_EXAMPLES,
    progress: Callable[[int], None] | None = None,
    workers: int = 1,
) -> PreparedDataset:
    """Encode records, in bounded memory, into a folder for `PreparedDataset`.

    Args:
        records: read once, in order. A stopped run needs the same records to resume.
        encoder: tokenizer, template and budget.
        folder: appears when all examples are there; until then they are in `FOLDER.partial`.
        placebo: also encode each response with another user's history, as evaluation needs it; see
            `ExampleEncoder.encode_iter`.
        seed: decides which other user that is.
        skip_bad: leave out records that do not fit the budget, and list them in the header. Otherwise the first one is
            an error.
        overwrite: replace a prepared folder, and the shards of a stopped run with other settings or records.
        shard_examples: examples in a shard.
        progress: called with the number of records read since the last call, those read again included.
        workers: processes that encode; 1 for threads of this one. The folder does not depend on it.

    Raises:
        OutputExistsError: the folder exists, or another process is writing it.
        CheckpointError: a stopped run's shards are damaged, or were made with other settings or records; the message
            names the difference.
        BudgetError, RecordError: a record cannot be encoded, or none can. Earlier shards stay, and the run can be
            resumed.
    """
    check_integer("shard_examples", shard_examples, least=1)
    check_integer("workers", workers, least=1)
    target = Path(folder)
    _check_target(target, overwrite)
    settings = {**encoder_settings(encoder), "placebo": placebo, "seed": seed, "skip_bad": skip_bad}
    with _Shards(target, settings, overwrite) as shards:
        source = _Followed(records, shards.done, progress)
        on_bad = shards.skip if skip_bad else None
        for example in encoder.encode_iter(source, placebo, seed, on_bad, shards.records, workers):
            shards.add(example)
            if len(shards) == shard_examples:
                shards.write(*source.until(example.index))
        shards.write(*source.until(None))
        shards.finish()
    return PreparedDataset(target, verify=False)


class _Followed:
    """The records, with a running digest that is compared with the digest of every shard in `done`.

    The encoder reads ahead, so digests wait in a queue until the examples of their records are written.
    """

    def __init__(
        self, records: Iterable[Record], done: list[dict[str, Any]], progress: Callable[[int], None] | None
    ) -> None:
        self._records, self._progress = records, progress or (lambda count: None)
        self._digest, self._count = hashlib.sha256(), 0
        self._known = {shard["records"]: shard for shard in done}
        self._digests = deque[tuple[int, str]]()

    def __iter__(self) -> Iterator[Record]:
        last = max(self._known, default=0)
        for record in self._records:
            self._digest.update(_contents(record))
            self._count += 1
            if (shard := self._known.get(self._count)) is not None:
                self._compare(shard)
            if self._count >= last:
                self._digests.append((self._count, self._digest.hexdigest()[:16]))
            self._progress(1)
            yield record
        if self._count < last:
            raise CheckpointError(f"records: the stopped run read {last} of them, now there are {self._count}")

    def until(self, index: int | None) -> tuple[int, str]:
        """The number of records up to this index, and their digest; of all records read so far for None."""
        while len(self._digests) > 1 and (index is None or self._digests[0][0] <= index):
            self._digests.popleft()
        return self._digests[0] if self._digests else (0, "")

    def _compare(self, shard: dict[str, Any]) -> None:
        if shard["digest"] != self._digest.hexdigest()[:16]:
            raise CheckpointError(
                f"records: one of the first {self._count} differs from the one that the stopped run read "
                f"({shard['name']}); give the same records, or overwrite=True"
            )


def _contents(record: Record) -> bytes:
    """All values in a record that its example depends on. `repr` would take three times as long."""
    parts = [record.user_id, record.query, record.response, repr(record.timestamp)]
    for item in record.history:
        parts += (item.text, repr(item.title), repr(item.timestamp))
    return f"{list(map(len, parts))}{''.join(parts)}".encode(errors="surrogatepass")


class _Shards:
    """The shards of a partial folder, the last of which is being filled."""

    def __init__(self, target: Path, settings: dict[str, Any], overwrite: bool) -> None:
        self._target, self._folder = target, target.with_name(f"{target.name}.partial")
        self._settings = settings
        self._folder.mkdir(parents=True, exist_ok=True)
        self.done: list[dict[str, Any]] = []
        with ExitStack() as hold:
            hold.enter_context(held(self._folder / LOCK_FILE, self._folder, "folder"))
            self.done = self._read_back(overwrite)
            self._hold = hold.pop_all()
        self.skipped: list[dict[str, Any]] = []
        self._clear()

    def __enter__(self) -> _Shards:
        return self

    def __exit__(self, *error: object) -> None:
        if self._folder.exists() and not self.done:
            shutil.rmtree(self._folder)
        self._hold.close()

    def __len__(self) -> int:
        return len(self._users)

    @property
    def records(self) -> int:
        """The number of records in the complete shards, left-out ones included."""
        return int(self.done[-1]["records"]) if self.done else 0

    def add(self, example: EncodedExample) -> None:
        """Add an example to the current shard."""
        branches = (example.factual, example.counterfactual, example.placebo)
        prompts = [array("i") if branch is None else branch.to_arrays()[0] for branch in branches]
        lengths = [-1 if branch is None else branch.prompt_length for branch in branches]
        response = example.factual.to_arrays()[1]
        counts = (len(response), example.index, example.history_kept, example.history_total)
        self._index.extend((len(self._tokens), *lengths, *counts))
        for ids in (*prompts, response):
            self._tokens.extend(ids)
        self._users.append(example.user_id)

    def skip(self, index: int, record: Record, error: Exception) -> None:
        """List a record that is left out."""
        self.skipped.append({"index": index, "user_id": record.user_id, "error": str(error)})

    def write(self, records: int, digest: str) -> None:
        """Write the current shard, which ends after this number of records, and their digest."""
        if not self._users and not self.skipped:
            return
        if self._users or not self.done:
            self.done.append(self._written(f"shard-{len(self.done):05d}"))
        last = self.done[-1]
        ready = [skipped for skipped in self.skipped if skipped["index"] < records]
        last |= {"records": records, "digest": digest, "skipped": last["skipped"] + ready}
        self.skipped = self.skipped[len(ready) :]
        write_whole(self._folder / _PROGRESS, self._header(complete=False))
        self._clear()

    def finish(self) -> None:
        """Rename the partial folder to its final name; RecordError if no record could be encoded."""
        if not any(shard["examples"] for shard in self.done):
            first = next((skipped["error"] for shard in self.done for skipped in shard["skipped"]), None)
            self.done = []
            raise RecordError(f"records: {'there are none' if first is None else f'none can be encoded: {first}'}")
        write_whole(self._folder / HEADER, self._header(complete=True))
        (self._folder / _PROGRESS).unlink(missing_ok=True)
        (self._folder / LOCK_FILE).unlink()
        move_into_place(self._folder, self._target)

    def _clear(self) -> None:
        self._tokens, self._index, self._users = array("i"), array("q"), list[str]()

    def _written(self, name: str) -> dict[str, Any]:
        contents = (self._tokens.tobytes(), self._index.tobytes(), json.dumps(self._users).encode())
        files = {}
        for part, content in zip(PARTS, contents, strict=True):
            write_whole(self._folder / f"{name}.{part}", content)
            files[part] = {"bytes": len(content), "crc32": zlib.crc32(content)}
        return {"name": name, "examples": len(self._users), "files": files, "skipped": []}

    def _header(self, *, complete: bool) -> bytes:
        header = {
            "nextquill_prepared": FORMAT,
            "byteorder": sys.byteorder,
            "complete": complete,
            "settings": self._settings,
            "shards": self.done,
        }
        return (json.dumps(with_digest(header), indent=1) + "\n").encode()

    def _read_back(self, overwrite: bool) -> list[dict[str, Any]]:
        """The complete shards of a stopped run; none if they belong to another run and may be overwritten."""
        for unfinished in self._folder.glob(".*.tmp"):
            unfinished.unlink()
        files = [name for name in (_PROGRESS, HEADER) if (self._folder / name).is_file()]
        if not files:
            names = sorted(each.name for each in self._folder.iterdir())
            if unknown := [name for name in names if not name.startswith((".", "shard-"))]:
                raise OutputExistsError(
                    f"folder: {self._folder} exists and holds {unknown[0]}, which is not part of a prepared folder"
                )
            return []
        try:
            with naming("folder"):
                return self._checked_shards(files[0])
        except CheckpointError:
            if not overwrite:
                raise
            for each in self._folder.iterdir():
                if each.name != LOCK_FILE:
                    each.unlink()
            return []

    def _checked_shards(self, name: str) -> list[dict[str, Any]]:
        header = read_header(self._folder, name)  # the whole folder's, if a run was killed before it was renamed
        if (difference := first_difference(header["settings"], self._settings)) is not None:
            raise CheckpointError(
                f"{self._folder} was started with another {difference}; delete it, or start again with overwrite=True"
            )
        shards: list[dict[str, Any]] = header["shards"]
        for shard in shards:
            check_shard(self._folder, shard, verify=True)
        return shards


def _check_target(target: Path, overwrite: bool) -> None:
    if not target.exists():
        return
    if not target.is_dir():
        raise OutputExistsError(f"folder: {target} is a file")
    if any(target.iterdir()) and not (overwrite and is_prepared(target)):
        what = "choose another, or give overwrite=True" if is_prepared(target) else "it is not a prepared folder"
        raise OutputExistsError(f"folder: {target} exists and is not empty; {what}")
