from __future__ import annotations

import gzip
import json
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nextquill.data.loaders import json_list as module
from nextquill.data.loaders.json_list import json_list
from nextquill.errors import RecordError

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)


@settings(deadline=None)
@given(
    items=st.lists(VALUES, max_size=6),
    indent=st.sampled_from([None, 0, 2]),
    ascii_only=st.booleans(),
    chunk=st.integers(1, 40),
)
def test_items_and_their_lines_do_not_depend_on_where_reads_end(
    tmp_path_factory: pytest.TempPathFactory, items: list[Any], indent: int | None, ascii_only: bool, chunk: int
) -> None:
    path = tmp_path_factory.getbasetemp() / "list.json"
    text = json.dumps(items, indent=indent, ensure_ascii=ascii_only)
    path.write_bytes(text.encode("utf-8", "surrogatepass").replace(b"\n", b"\r\n"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_CHUNK", chunk)
        if not ascii_only and any("\ud800" <= character <= "\udfff" for character in text):
            with pytest.raises(RecordError, match="not UTF-8"):
                list(json_list(path))
            return
        found = list(json_list(path))
    assert [item for _, item in found] == items
    lines, start = [], 1
    for item in items:
        start += indent is not None
        lines.append(f"{path} line {start} item {len(lines)}")
        start += json.dumps(item, indent=indent, ensure_ascii=ascii_only).count("\n")
    assert [where for where, _ in found] == lines


def test_a_gzipped_list_with_a_byte_order_mark_is_read(tmp_path: Path) -> None:
    path = tmp_path / "list.json.gz"
    path.write_bytes(gzip.compress(b"\xef\xbb\xbf [1, {}]\n"))
    assert [item for _, item in json_list(path)] == [1, {}]


BAD = {
    "object": (b'{"a": 1}', "line 1: expected a JSON list"),
    "nothing": (b"", "line 1: expected a JSON list"),
    "open": (b"[1,\n2", "line 2: not valid JSON: expected ',' or ']' after an item, got ''"),
    "open-string": (b'[1,\n"a', "line 2: not valid JSON: Unterminated string"),
    "two-commas": (b"[1,,2]", "line 1: not valid JSON: Expecting value"),
    "last-comma": (b"[1,\n2,\n]", "line 3: not valid JSON: Expecting value"),
    "no-comma": (b"[{}\n{}]", "line 2: not valid JSON: expected ',' or ']' after an item, got '{'"),
    "inside": (b'[{},\n{"a": 1,\n"b" 2},\n{"c": "' + b"x" * 50 + b'"}]', "line 3: not valid JSON: Expecting ':'"),
    "after": (b"[1]\n[2]", "line 2: not valid JSON: expected nothing after the list"),
    "not-utf8": (b'["a",\n"\xff"]', "line 2: not UTF-8: "),
    "cut-utf8": (b'["a", "\xc3', "line 1: not UTF-8: "),
    "digits": (b"[1,\n" + b"9" * 5000 + b"]", "line 2: not valid JSON: Exceeds the limit"),
    "deep": (b"[" * 200000, "line 1: not valid JSON: "),
}


@pytest.mark.parametrize(("content", "message"), BAD.values(), ids=BAD.keys())
def test_a_broken_list_is_named_by_line(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "list.json"
    path.write_bytes(content)
    with pytest.raises(RecordError) as caught:
        list(json_list(path))
    assert str(caught.value).startswith(f"{path} {message}")


def test_an_item_that_is_too_long_is_refused_before_it_is_held(tmp_path: Path) -> None:
    path = tmp_path / "list.json"
    path.write_bytes(b'[1, "' + b"x" * (8 * 2**20) + b'"]')
    tracemalloc.start()
    try:
        with pytest.raises(RecordError, match=r"line 1: expected an item of at most 300000 bytes, got more$"):
            list(json_list(path, max_item_bytes=300_000))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 4 * 2**20


def test_a_long_list_is_not_held(tmp_path: Path) -> None:
    path = tmp_path / "list.json"
    path.write_text(json.dumps([{"text": "x" * 1000}] * 8000))
    tracemalloc.start()
    try:
        assert sum(1 for _ in json_list(path)) == 8000
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 2 * 2**20 < path.stat().st_size
