"""Reads files line by line, plain or gzipped, as bytes or as JSON.

A reader never holds more than `max_line_bytes` of a line, and skips the rest of a longer one. So a broken line, or a
file that is not text, costs an error message and no memory.
"""

from __future__ import annotations

import codecs
import gzip
import io
import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import BinaryIO, cast

from nextquill.data.skipped import PlacedError, SkippedRecords, converted, skip_or_raise
from nextquill.errors import RecordError
from nextquill.storage.input_files import open_input
from nextquill.storage.json_files import parsed

#: Begins the name of a data set of the Hugging Face hub.
HUB = "hf://"
#: The longest line that is read. Lines of the public data sets stay below a tenth of it.
MAX_LINE_BYTES = 32 * 2**20
_GZIP = b"\x1f\x8b"
_CHUNK = 2**20


@contextmanager
def opened(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """Open a file for reading bytes, decompressed if it is gzipped, whatever its name; RecordError if that fails."""
    name = os.fspath(path)
    try:
        with open_input(path) as file:
            if file.peek(len(_GZIP))[: len(_GZIP)] == _GZIP:
                yield cast(BinaryIO, io.BufferedReader(gzip.GzipFile(fileobj=file)))
            else:
                yield file
    except OSError as error:
        raise RecordError(f"{name}: cannot be read: {error.strerror or error}") from error
    except (EOFError, zlib.error) as error:
        raise RecordError(f"{name}: cannot be read: broken gzip: {error}") from error


def numbered_lines(
    path: str | os.PathLike[str], *, max_line_bytes: int = MAX_LINE_BYTES, skipped: SkippedRecords | None = None
) -> Iterator[tuple[int, bytes]]:
    """Yield each line's number, from 1, and its bytes with the line break; RecordError if the file cannot be read.

    A line that is too long is skipped, or raised without `skipped`.
    """
    with opened(path) as file:
        number = 0
        while line := file.readline(max_line_bytes + 1):
            number += 1
            if len(line) <= max_line_bytes or line.endswith(b"\n"):
                yield number, line
                continue
            length = len(line)
            del line
            while rest := file.readline(_CHUNK):
                length += len(rest)
                if rest.endswith(b"\n"):
                    break
            problem = f"expected a line of at most {max_line_bytes} bytes, got {length}"
            skip_or_raise(PlacedError(f"{os.fspath(path)} line {number}", problem, kind="length"), skipped)


def json_lines(
    path: str | os.PathLike[str], *, max_line_bytes: int = MAX_LINE_BYTES, skipped: SkippedRecords | None = None
) -> Iterator[tuple[str, object]]:
    """The place and the value of each line of a JSONL file, without blank lines; RecordError if it cannot be read.

    A line that is too long, not UTF-8 or not JSON is skipped, or raised without `skipped`.
    """
    lines = numbered_lines(path, max_line_bytes=max_line_bytes, skipped=skipped)
    texts = converted(((f"{os.fspath(path)} line {number}", line) for number, line in lines), decoded, skipped)
    return converted(((where, text) for where, text in texts if text and not text.isspace()), parsed_json, skipped)


def parsed_json(where: str, text: str | bytes, name: str | None = None) -> object:
    """The value of a JSON text, which stands in the field `name`; RecordError if it is not valid JSON."""
    try:
        value: object = parsed(text)
    except ValueError as error:
        raise PlacedError(where, f"not valid JSON: {error}", name, "json") from error
    return value


def decoded(where: str, line: bytes, *, byte_order_mark: bool = True) -> str:
    """A line as text, without a byte-order mark; RecordError if it is not UTF-8."""
    try:
        # Editors on Windows write a byte-order mark at the start of a file, and JSON parsers refuse it.
        return (line.removeprefix(codecs.BOM_UTF8) if byte_order_mark else line).decode()
    except UnicodeDecodeError as error:
        raise PlacedError(where, f"not UTF-8: {error.reason} at byte {error.start}", kind="utf-8") from error
