"""Reads JSON files, and says how two sets of settings differ. An error names the damaged file, and the line if any."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from nextquill.errors import RecordError
from nextquill.storage.input_files import MIB, open_input, read_input

#: The size of the largest JSON file that is read as a whole.
MOST_BYTES = 256 * MIB


def once_each(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The object with these keys; ValueError where a key occurs twice, as `json` would silently take the last."""
    found = dict(pairs)
    if len(found) < len(pairs):
        counts = Counter(key for key, _ in pairs)
        raise ValueError(f"the key {max(counts, key=counts.__getitem__)!r} occurs twice in an object")
    return found


#: Reads JSON in which no object has a key twice. Made once, as `json.loads` makes one for each call with a hook.
DECODER = json.JSONDecoder(object_pairs_hook=once_each)


def parsed(text: str | bytes) -> Any:
    """The value of a JSON text; ValueError if it is not UTF-8 or JSON, nests too deeply, or repeats a key."""
    try:
        return DECODER.decode(text if isinstance(text, str) else text.decode("utf-8-sig"))
    except RecursionError as error:
        raise ValueError("its objects or lists are nested too deeply") from error


def read_json(path: Path) -> Any:
    """The value that a file holds; OSError if it cannot be read, ValueError as `parsed`."""
    return parsed(read_input(path, MOST_BYTES))


def json_object(path: Path) -> dict[str, Any]:
    """The object that a file holds; RecordError if it cannot be read, or is not a JSON object."""
    try:
        return _object(read_input(path, MOST_BYTES), str(path))
    except OSError as error:
        raise RecordError(f"{path}: cannot be read: {error.strerror or error}") from error


def json_objects(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield each line's place, for errors, and the object that it holds; RecordError as `json_object`."""
    try:
        with open_input(path) as stream:
            for number, line in enumerate(stream, start=1):
                where = f"{path} line {number}"
                yield where, _object(line, where)
    except OSError as error:
        raise RecordError(f"{path}: cannot be read: {error.strerror or error}") from error


def line_fields(line: str | bytes) -> dict[str, Any]:
    """The JSON object in a line; a line that was cut short, or is not an object, has no fields."""
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def first_difference(there: Mapping[str, Any], here: Mapping[str, Any]) -> str | None:
    """The name of the first setting that differs, with both values; None if all are equal. Nested names are joined."""
    found = different_values(there, here)
    return None if found is None else f"{found[0]}: there {found[1]!r}, here {found[2]!r}"


def different_values(there: Mapping[str, Any], here: Mapping[str, Any]) -> tuple[str, Any, Any] | None:
    """The name of the first setting that differs, and both values; None if all are equal. Nested names are joined."""
    for name in {**there, **here}:
        old, new = there.get(name), here.get(name)
        if isinstance(old, dict) and isinstance(new, dict):
            if (inner := different_values(old, new)) is not None:
                return f"{name} {inner[0]}", *inner[1:]
        elif old != new:
            return name, old, new
    return None


def _object(text: bytes, where: str) -> dict[str, Any]:
    try:
        value = parsed(text)
    except ValueError as error:
        raise RecordError(f"{where}: not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise RecordError(f"{where}: expected an object, got {type(value).__name__}")
    return value
