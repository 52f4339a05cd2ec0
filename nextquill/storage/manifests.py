"""Manifests: the files of a finished folder with sizes and digests, so that damage is found before it is used.

    {"nextquill_manifest": 1, "files": {"model.safetensors": {"bytes": 123, "digest": "…"}, …}}

Files that are added later do not count. Some files have other entries:

    {"without": ["log_history"], "digest": "…"}            a JSON file of which these fields may change
    {"bytes": 123, "directory_at": 100, "digest": "…"}     a zip file of `torch.save`; the digest is of its directory

The directory of a zip file, at its end, holds a check sum of every tensor. So writing a manifest reads only the
directory, and a check reads the tensors. That makes writing cheap: the optimizer's file has two thirds of a
checkpoint's bytes.

A file of JSON objects can be its own witness: an object with a `digest` of its other fields shows a later change.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from mmap import ACCESS_READ, mmap
from pathlib import Path
from typing import Any
from zipfile import BadZipFile, ZipFile, is_zipfile

from nextquill.errors import RecordError
from nextquill.storage.fingerprints import fast_digest, fingerprint
from nextquill.storage.json_files import json_object

MANIFEST = "nextquill_manifest.json"
_FORMAT = "nextquill_manifest"
_DIGEST = "digest"


def write_manifest(
    folder: Path, without: Mapping[str, Sequence[str]] | None = None, among: Sequence[str] = ("*",)
) -> None:
    """List the files of a folder and of the folders in it.

    Args:
        folder: the folder, which gets the manifest.
        without: by the names of JSON files, the fields that may change.
        among: patterns of the folder's own files and folders that are listed.
    """
    left_out = without or {}
    tops = [path for pattern in among for path in folder.glob(pattern)]
    inner = [path for top in tops for path in (top, *top.rglob("*"))]
    paths = sorted(path for path in inner if path.is_file() and path.name != MANIFEST)
    names = [path.relative_to(folder).as_posix() for path in paths]
    files = {name: _described(folder / name, left_out.get(name)) for name in names}
    # Not synchronised, as the files that it lists are not: that alone would take as long as reading them.
    (folder / MANIFEST).write_text(json.dumps({_FORMAT: 1, "files": files}, indent=2) + "\n", encoding="utf-8")


def has_manifest(folder: Path) -> bool:
    """Whether a folder has a manifest; those of earlier versions have none."""
    return (folder / MANIFEST).is_file()


def damage(folder: Path, among: Sequence[str] = ("*",)) -> str | None:
    """The first difference between a folder and its manifest, in words that name the file; None if it is whole.

    `among` are patterns of the folder's own files and folders that are compared.
    """
    try:
        files = json_object(folder / MANIFEST)["files"]
        chosen = {
            name: expected
            for name, expected in files.items()
            if any(fnmatchcase(name.partition("/")[0], pattern) for pattern in among)
        }
    except RecordError as error:
        return str(error)
    except (KeyError, TypeError, AttributeError):
        return f"{MANIFEST} is damaged"
    return difference(folder, chosen, MANIFEST)


def listed(folder: Path, names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """The entries of a manifest for these files of a folder, by name."""
    return {name: _described(folder / name, None) for name in names}


def difference(folder: Path, files: Mapping[str, Any], source: str) -> str | None:
    """The first difference between a folder and these entries, in words that name the file; None if there is none.

    `source` is the file that the entries were read from.
    """
    try:
        for name, expected in files.items():
            if not (folder / name).is_file():
                return f"{name} is missing"
            size = (folder / name).stat().st_size
            if size != expected.get("bytes", size):
                return f"{name} is damaged: expected {expected['bytes']} bytes, got {size}"
            if not _agrees(folder / name, expected):
                return f"{name} is damaged or was changed: its digest differs"
    except RecordError as error:
        return str(error)
    except (KeyError, TypeError, AttributeError):
        return f"{source} is damaged"
    return None


def with_digest(fields: Mapping[str, Any]) -> dict[str, Any]:
    """A JSON object with these fields and, last, a `digest` of them."""
    return {**fields, _DIGEST: _digest_of(json.loads(json.dumps(fields)))}


def is_changed(fields: Mapping[str, Any]) -> bool:
    """Whether a JSON object differs from what `with_digest` made; one without a digest, as of earlier versions, passes.

    A change of white space or of the fields' order is none.
    """
    kept = {name: value for name, value in fields.items() if name != _DIGEST}
    return len(kept) < len(fields) and fields[_DIGEST] != _digest_of(kept)


def _digest_of(fields: Mapping[str, Any]) -> str:
    return fingerprint([json.dumps(fields, sort_keys=True)])


def _agrees(path: Path, expected: Mapping[str, Any]) -> bool:
    fields, start = expected.get("without"), expected.get("directory_at", 0)
    if expected["digest"] != (_content(path, start) if fields is None else _fields(path, fields)):
        return False
    if not start:
        return True
    try:
        with ZipFile(path) as file:
            return file.testzip() is None
    except (BadZipFile, EOFError, NotImplementedError, RuntimeError, ValueError, zlib.error):
        return False  # flipped bits in an entry's header may say anything


def _described(path: Path, fields: Sequence[str] | None) -> dict[str, Any]:
    if fields is not None:
        return {"without": list(fields), "digest": _fields(path, fields)}
    found: dict[str, Any] = {"bytes": path.stat().st_size}
    if is_zipfile(path):
        from torch.serialization import get_crc32_options  # reports read checkpoints too, without torch

        if get_crc32_options():
            with ZipFile(path) as file:
                found["directory_at"] = file.start_dir
    return {**found, "digest": _content(path, found.get("directory_at", 0))}


def _fields(path: Path, without: Sequence[str]) -> str:
    """A digest of a JSON object without these fields."""
    kept = {name: value for name, value in json_object(path).items() if name not in without}
    return fast_digest([json.dumps(kept, sort_keys=True).encode()])


def _content(path: Path, start: int = 0) -> str:
    """A digest of the bytes from `start` on."""
    if not path.stat().st_size:  # which cannot be mapped
        return fast_digest([])
    with (
        path.open("rb") as stream,
        mmap(stream.fileno(), 0, access=ACCESS_READ) as content,
        memoryview(content) as view,
        view[start:] as part,
    ):
        return fast_digest([part])
