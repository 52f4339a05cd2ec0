"""Reads a JSON file that is one long list, an item at a time.

Only one item is held, and a buffer of at most twice the longest item. If an item is cut off in the buffer, the unread
text is doubled. LaMP's files are such lists: for 6,000 questions in 207 MiB this takes less than 1 MiB of memory, while
`json.load` takes 640 MiB and the streaming JSON reader of `datasets` 1,700 MiB.
"""

from __future__ import annotations

import codecs
import json
import os
from collections.abc import Iterator
from itertools import count
from typing import BinaryIO

from nextquill.data.lines import MAX_LINE_BYTES, opened
from nextquill.data.skipped import PlacedError
from nextquill.storage.json_files import DECODER

_CHUNK = 2**18
_SPACE = " \t\n\r"
#: Characters. An error this near to the end of the buffer may come from a cut-off token; only strings can be longer.
_TOKEN = 16


def json_list(path: str | os.PathLike[str], *, max_item_bytes: int = MAX_LINE_BYTES) -> Iterator[tuple[str, object]]:
    """Yield the place of each item, with its line and position, and its value.

    The file is plain or gzipped. A broken list cannot be read any further, so its errors are raised and never skipped.
    """
    with opened(path) as file:
        yield from _Parser(os.fspath(path), file, max_item_bytes).items()


class _Parser:
    def __init__(self, name: str, file: BinaryIO, most: int) -> None:
        self._name, self._file, self._most = name, file, most
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")()
        self._buffer, self._at, self._line, self._ended = "", 0, 1, False

    def items(self) -> Iterator[tuple[str, object]]:
        if self._next() != "[":
            raise self._error("expected a JSON list")
        self._at += 1
        if self._next() == "]":
            self._at += 1
        else:
            for position in count():
                self._next()
                where = f"{self._name} line {self._line} item {position}"  # a list may be all on one line
                yield where, self._item()
                mark = self._next()
                self._at += 1
                if mark == "]":
                    break
                if mark != ",":
                    raise self._error(f"not valid JSON: expected ',' or ']' after an item, got {mark!r}")
        if self._next():
            raise self._error("not valid JSON: expected nothing after the list")

    def _item(self) -> object:
        while True:
            try:
                value: object
                value, end = DECODER.raw_decode(self._buffer, self._at)
            except RecursionError as error:
                raise self._error(f"not valid JSON: {error}") from error
            except ValueError as error:
                if not self._cut_off(error) or not self._read():
                    self._line += self._buffer.count("\n", self._at, getattr(error, "pos", self._at))
                    raise self._error(f"not valid JSON: {error}") from error
                continue
            # A number this near to the end may be cut off: "1" can be the beginning of "1.5" or, from "1e-", of "1e-5".
            safe = len(self._buffer) - (_TOKEN if isinstance(value, (int, float)) else 0)
            if end < safe or not self._read():
                self._line += self._buffer.count("\n", self._at, end)
                self._at = end
                return value

    def _cut_off(self, error: ValueError) -> bool:
        if not isinstance(error, json.JSONDecodeError):  # an integer with more digits than Python reads
            return False
        return error.msg.startswith("Unterminated string") or error.pos >= len(self._buffer) - _TOKEN

    def _next(self) -> str:
        """Move to the next character that is not white space, and return it; "" at the end of the file."""
        while True:
            while self._at < len(self._buffer):
                character = self._buffer[self._at]
                if character not in _SPACE:
                    return character
                self._line += character == "\n"
                self._at += 1
            if not self._read():
                return ""

    def _read(self) -> bool:
        """Double the unread text, and drop the text before it; False at the end of the file."""
        if self._ended:
            return False
        unread = self._buffer[self._at :]
        if len(unread) > self._most:
            raise self._error(f"expected an item of at most {self._most} bytes, got more", "length")
        data = self._file.read(max(_CHUNK, len(unread)))
        self._ended = not data
        try:
            self._buffer, self._at = unread + self._decoder.decode(data, final=self._ended), 0
        except UnicodeDecodeError as error:
            self._line += unread.count("\n") + data.count(b"\n", 0, error.start)
            raise self._error(f"not UTF-8: {error.reason}", "utf-8") from error
        return True

    def _error(self, problem: str, kind: str = "json") -> PlacedError:
        return PlacedError(f"{self._name} line {self._line}", problem, kind=kind)
