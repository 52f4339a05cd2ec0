"""Examples that `prepare` has encoded once, read from disk a page at a time.

A prepared folder holds

    header.json               settings, the counts and check sums of each shard, and a digest of itself
    shard-00000.tokens        int32, every example's factual, counterfactual and placebo prompt and its response
    shard-00000.index         int64 [examples, 8], the columns `_COLUMNS`; `start` is an example's first token
    shard-00000.users         JSON, the user of each example

Tokens and index are mapped into memory. So a data set larger than the memory can be read in any order, and the workers
of a data loader share the pages that one of them has read.
"""

from __future__ import annotations

import dataclasses
import os
import sys
import zlib
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, overload

import torch
from torch import Tensor

from nextquill.data.encoding import ExampleEncoder
from nextquill.data.examples import (
    Branch,
    EncodedDataset,
    EncodedExample,
    EncodingStats,
    encoding_stats,
    examples_digest,
)
from nextquill.data.templates import PromptTemplate
from nextquill.data.tokenizing import tokenizer_digest
from nextquill.errors import CheckpointError
from nextquill.storage.json_files import first_difference, read_json
from nextquill.storage.manifests import is_changed

HEADER = "header.json"
FORMAT = 1
PARTS = ("tokens", "index", "users")
_DTYPES = {"tokens": torch.int32, "index": torch.int64}
_COLUMNS = ("start", "factual", "counterfactual", "placebo", "response", "index", "history_kept", "history_total")
_START, _FACTUAL, _COUNTERFACTUAL, _PLACEBO, _RESPONSE, _INDEX, _KEPT, _TOTAL = range(len(_COLUMNS))
#: Stands for the length of a missing placebo prompt.
_NONE = -1


class PreparedDataset(EncodedDataset):
    """The examples of a prepared folder, each read when it is asked for.

    It replaces an `EncodedDataset` everywhere. It can be sent to other processes, which map the files themselves.

    Args:
        folder: written by `prepare` or `nextquill prepare`.
        verify: read all files once and compare their check sums. Sizes are always compared.

    Raises:
        CheckpointError: the folder is not a prepared folder, not finished, or damaged; the message names the file.
    """

    def __init__(self, folder: str | os.PathLike[str], verify: bool = True) -> None:
        self.folder = Path(folder)
        self.header = read_header(self.folder)
        for shard in self.header["shards"]:
            check_shard(self.folder, shard, verify=verify)
        self.examples = self._stored = _StoredExamples(self.folder, self.header["shards"])

    @property
    def settings(self) -> dict[str, Any]:
        """The settings that the examples were encoded with, by name."""
        return dict(self.header["settings"])

    @property
    def template(self) -> PromptTemplate:
        """The template of the prompts."""
        return PromptTemplate(**self.settings["template"])

    @property
    def has_placebo(self) -> bool:
        """Whether every example has a placebo branch."""
        return all(bool((index[:, _PLACEBO] != _NONE).all()) for index in self._stored.indices())

    @property
    def user_ids(self) -> list[str]:
        """The user of each example."""
        return [user for shard in range(len(self.header["shards"])) for user in self._stored.users(shard)]

    @property
    def stats(self) -> EncodingStats:
        """Counts of what encoding kept and dropped."""
        counts = [index[:, [_KEPT, _TOTAL, _FACTUAL, _RESPONSE]] for index in self._stored.indices()]
        return encoding_stats(torch.cat(counts))

    @property
    def digest(self) -> str:
        """A digest of the examples, equal to that of the same examples in memory."""
        lengths = torch.cat([index[:, [_FACTUAL, _COUNTERFACTUAL, _RESPONSE]] for index in self._stored.indices()])
        return examples_digest(self.user_ids, lengths, self._stored.ids())

    @property
    def skipped(self) -> list[dict[str, Any]]:
        """The records that were left out, each with `index`, `user_id` and `error`."""
        return [dict(skipped) for shard in self.header["shards"] for skipped in shard["skipped"]]

    def num_branch_tokens(self, names: Sequence[str]) -> list[int]:
        """The tokens of each example's branches with these names, counted separately; 0 for a missing branch."""
        found = list[int]()
        for index in self._stored.indices():
            prompts = index[:, [_COLUMNS.index(name) for name in names]]
            found += (prompts.clamp(min=0) + (prompts >= 0) * index[:, _RESPONSE, None]).sum(1).tolist()
        return found

    def check(self, encoder: ExampleEncoder) -> None:
        """Check that an encoder would give these examples.

        Raises:
            CheckpointError: they were encoded with another tokenizer, template or budget; the message names it.
        """
        here = encoder_settings(encoder)
        if encoder.max_response_length is None:  # no limit, so any limit of the folder's fits
            here["max_response_length"] = self.settings["max_response_length"]
        there: dict[str, Any] = {name: self.settings.get(name) for name in here}
        there |= {"template": dict(self.settings["template"])}
        for template in (there["template"], here["template"]):
            if template.get("chat") is None:  # as the tokenizer has it, which is compared too
                template["chat"] = encoder.renderer.uses_chat
        if (difference := first_difference(there, here)) is not None:
            raise CheckpointError(f"{self.folder} was prepared with another {difference}; prepare the records again")


class _StoredExamples(Sequence[EncodedExample]):
    """The examples of all shards, whose files are mapped into memory on first use."""

    def __init__(self, folder: Path, shards: list[dict[str, Any]]) -> None:
        self._folder, self._shards = folder, shards
        self._ends: list[int] = list(accumulate(shard["examples"] for shard in shards))
        self._mapped: dict[tuple[int, str], Tensor] = {}
        self._users: dict[int, list[str]] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_mapped": {}, "_users": {}}

    def __len__(self) -> int:
        return self._ends[-1]

    @overload
    def __getitem__(self, place: int) -> EncodedExample: ...
    @overload
    def __getitem__(self, place: slice) -> list[EncodedExample]: ...

    def __getitem__(self, place: int | slice) -> EncodedExample | list[EncodedExample]:
        if isinstance(place, slice):
            return [self[each] for each in range(*place.indices(len(self)))]
        position = place + len(self) if place < 0 else place
        if not 0 <= position < len(self):
            raise IndexError(f"expected an index below {len(self)}, got {place}")
        shard = bisect_right(self._ends, position)
        return self._example(shard, position - self._ends[shard] + self._shards[shard]["examples"])

    def indices(self) -> list[Tensor]:
        """Each shard's index, int64 [examples, 8]."""
        return [self._map(shard, "index").view(-1, len(_COLUMNS)) for shard in range(len(self._shards))]

    def ids(self) -> Iterator[Any]:
        """Each shard's token ids without the placebo prompts, int32 arrays."""
        for shard, index in enumerate(self.indices()):
            lengths = index[:, [_FACTUAL, _COUNTERFACTUAL, _PLACEBO, _RESPONSE]].clamp(min=0)
            ids = self._map(shard, "tokens")
            if lengths[:, 2].any():
                kept = torch.tensor([True, True, False, True]).repeat(len(lengths))
                ids = ids[kept.repeat_interleave(lengths.view(-1))]
            yield ids.numpy()

    def users(self, shard: int) -> list[str]:
        """The user of each example of a shard."""
        if shard not in self._users:
            self._users[shard] = read_json(self._folder / f"{self._shards[shard]['name']}.users")
        return self._users[shard]

    def _example(self, shard: int, row: int) -> EncodedExample:
        index = self._map(shard, "index")[row * len(_COLUMNS) : (row + 1) * len(_COLUMNS)].tolist()
        lengths = [index[_FACTUAL], index[_COUNTERFACTUAL], max(index[_PLACEBO], 0), index[_RESPONSE]]
        ids = self._map(shard, "tokens")[index[_START] : index[_START] + sum(lengths)]
        factual, counterfactual, placebo, response = ids.split(lengths)
        return EncodedExample(
            user_id=self.users(shard)[row],
            index=index[_INDEX],
            factual=Branch(factual, response),
            counterfactual=Branch(counterfactual, response),
            placebo=None if index[_PLACEBO] == _NONE else Branch(placebo, response),
            history_kept=index[_KEPT],
            history_total=index[_TOTAL],
        )

    def _map(self, shard: int, part: str) -> Tensor:
        found = self._mapped.get((shard, part))
        if found is None:
            path, dtype = self._folder / f"{self._shards[shard]['name']}.{part}", _DTYPES[part]
            size = self._shards[shard]["files"][part]["bytes"] // dtype.itemsize
            found = self._mapped[shard, part] = torch.from_file(str(path), shared=False, size=size, dtype=dtype)
        return found


def is_prepared(path: str | os.PathLike[str]) -> bool:
    """Whether a path is a prepared folder."""
    return (Path(path) / HEADER).is_file()


def encoder_settings(encoder: ExampleEncoder) -> dict[str, Any]:
    """The settings that an encoder's examples depend on, by name; JSON."""
    return {
        "tokenizer": tokenizer_digest(encoder.renderer.tokenizer),
        "template": dataclasses.asdict(encoder.template),
        "max_length": encoder.max_length,
        "max_response_length": encoder.max_response_length,
    }


def read_header(folder: Path, name: str = HEADER) -> dict[str, Any]:
    """The header of a prepared folder; CheckpointError if it is missing, or has another format or byte order."""
    path = folder / name
    try:
        header: dict[str, Any] = read_json(path)
        found, order = header["nextquill_prepared"], header["byteorder"]
        complete = {"settings", "shards", "complete"} <= header.keys()
    except OSError as error:
        raise CheckpointError(f"{folder}: expected a prepared folder, with a {name} that can be read") from error
    except (ValueError, TypeError, KeyError) as error:
        raise CheckpointError(f"{path}: damaged, or not the header of a prepared folder") from error
    if found != FORMAT or order != sys.byteorder or not complete:
        raise CheckpointError(
            f"{path}: expected format {FORMAT} in {sys.byteorder}-endian order, got {found} in {order}-endian order; "
            "prepare the records again"
        )
    if is_changed(header):
        raise CheckpointError(f"{path}: damaged or changed, its digest differs; prepare the records again")
    return header


def check_shard(folder: Path, shard: dict[str, Any], *, verify: bool) -> None:
    """Raise CheckpointError if a shard's file is missing, has another size or, with `verify`, another check sum."""
    for part in PARTS:
        path, expected = folder / f"{shard['name']}.{part}", shard["files"][part]
        try:
            size = path.stat().st_size
            found = zlib.crc32(path.read_bytes()) if verify and size == expected["bytes"] else expected["crc32"]
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read: {error.strerror}; prepare the records again") from error
        if size != expected["bytes"]:
            raise CheckpointError(
                f"{path}: damaged, expected {expected['bytes']} bytes, got {size}; prepare the records again"
            )
        if found != expected["crc32"]:
            raise CheckpointError(f"{path}: damaged, its check sum differs; prepare the records again")
