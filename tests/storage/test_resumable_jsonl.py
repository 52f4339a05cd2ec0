"""Writing that stops anywhere resumes to the same bytes, and a file is only taken by the run that started it."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest

from nextquill.errors import CheckpointError, OutputExistsError
from nextquill.storage.locks import HAS_LOCKS
from nextquill.storage.resumable_jsonl import BegunFile, PartialFile
from tests.helpers import run_python

RUN = {"model": "a ü", "seed": 3}
LINES = [{"index": index, "text": f"line {index} ü {'x' * index}"} for index in (2, 0, 3, 1)]
WHOLE = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in sorted(LINES, key=lambda line: line["index"]))


def write_missing(target: Path, lines: list[dict[str, object]] = LINES) -> None:
    with PartialFile(target, RUN) as partial:
        for line in lines:
            if line["index"] not in partial:
                partial.write(line)
        partial.finish(range(len(LINES)))


def stopped_after(target: Path, count: int) -> Path:
    """A partial file with the first lines, as an error leaves it."""
    with PartialFile(target, RUN) as partial:
        for line in LINES[:count]:
            partial.write(line)
    return partial.path


def test_lines_are_written_in_the_order_of_their_indices(tmp_path: Path) -> None:
    write_missing(tmp_path / "out.jsonl")
    assert (tmp_path / "out.jsonl").read_bytes() == WHOLE.encode()
    assert [path.name for path in tmp_path.iterdir()] == ["out.jsonl"]


def test_a_file_cut_at_any_byte_resumes_to_the_same_bytes(tmp_path: Path) -> None:
    partial = stopped_after(tmp_path / "out.jsonl", len(LINES))
    content = partial.read_bytes()
    for length in range(len(content) + 1):
        target = tmp_path / f"{length}.jsonl"
        target.with_name(f"{target.name}.partial").write_bytes(content[:length])
        write_missing(target)
        assert target.read_bytes() == WHOLE.encode(), f"cut after {length} of {len(content)} bytes"
        assert not target.with_name(f"{target.name}.partial").exists()


def test_a_resumed_file_knows_its_lines(tmp_path: Path) -> None:
    stopped_after(tmp_path / "out.jsonl", 2)
    with PartialFile(tmp_path / "out.jsonl", RUN) as partial:
        assert (len(partial), 2 in partial, 0 in partial, 3 in partial, partial.is_new) == (2, True, True, False, False)


@pytest.mark.parametrize(
    "broken", [b"{\n", b"[]\n", b'{"index": "0"}\n', b'{"index": 2, "text": "again"}\n', b"\xff\n"]
)
def test_everything_after_a_broken_line_is_written_again(tmp_path: Path, broken: bytes) -> None:
    path = stopped_after(tmp_path / "out.jsonl", 2)
    lost = {"index": 3, "text": "from before the crash"}
    path.write_bytes(path.read_bytes() + broken + json.dumps(lost).encode() + b"\n")
    write_missing(tmp_path / "out.jsonl")
    assert (tmp_path / "out.jsonl").read_bytes() == WHOLE.encode()


def test_a_file_without_lines_is_deleted(tmp_path: Path) -> None:
    stopped_after(tmp_path / "out.jsonl", 0)
    assert list(tmp_path.iterdir()) == []


def test_the_target_needs_exactly_the_given_lines(tmp_path: Path) -> None:
    path = stopped_after(tmp_path / "out.jsonl", 2)
    with PartialFile(tmp_path / "out.jsonl", RUN, argument="--out") as partial:
        for indices in ([0, 1, 2], [0], [0, 2, 2]):
            with pytest.raises(CheckpointError, match=r"^--out: .* does not hold every record once; delete it$"):
                partial.finish(indices)
    assert path.exists()
    assert not (tmp_path / "out.jsonl").exists()


@pytest.mark.parametrize(
    ("run", "message"),
    [
        ({**RUN, "seed": 4}, "was started with another seed: there 3, here 4"),
        ({"model": "a ü"}, "was started with another seed: there 3, here None"),
        ({**RUN, "limit": 1}, "was started with another limit: there None, here 1"),
    ],
)
def test_another_run_is_refused_by_name_unless_it_overwrites(
    tmp_path: Path, run: dict[str, object], message: str
) -> None:
    path = stopped_after(tmp_path / "out.jsonl", 2)
    before = path.read_bytes()
    with pytest.raises(CheckpointError, match=f"^folder: .*{message}; delete it, or start again with overwrite=True$"):
        PartialFile(tmp_path / "out.jsonl", run, argument="folder")
    assert path.read_bytes() == before
    with PartialFile(tmp_path / "out.jsonl", run, overwrite=True) as partial:
        assert len(partial) == 0


def test_a_file_of_somebody_else_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl.partial"
    path.write_text("my thesis\n")
    with pytest.raises(CheckpointError, match="exists, and nextquill did not start it"):
        PartialFile(tmp_path / "out.jsonl", RUN)
    assert path.read_text() == "my thesis\n"


def test_a_begun_file_keeps_its_contents_until_begin(tmp_path: Path) -> None:
    path = stopped_after(tmp_path / "out.jsonl", 2)
    before = path.read_bytes()
    begun = BegunFile(tmp_path / "out.jsonl", {**RUN, "seed": 4}, overwrite=True)
    assert begun.is_new
    assert path.read_bytes() == before
    begun.begin()
    assert path.read_bytes().count(b"\n") == 1
    begun.close(remove=False)
    begun = BegunFile(tmp_path / "out.jsonl", {**RUN, "seed": 4})
    assert not begun.is_new
    begun.close(remove=True)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not HAS_LOCKS, reason="this system has no flock")
def test_a_second_process_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    target = tmp_path / "out.jsonl"
    code = (
        "import sys; from pathlib import Path; from nextquill.errors import OutputExistsError\n"
        "from nextquill.storage.resumable_jsonl import PartialFile\n"
        "try: PartialFile(Path(sys.argv[1]), {'other': 1}, overwrite=True)\n"
        "except OutputExistsError as error: print(error)"
    )
    with PartialFile(target, RUN) as partial:
        partial.write(LINES[0])
        before = partial.path.read_bytes()
        refusal = run_python(code, str(target)).strip()
        assert re.fullmatch(rf"output_file: another process( \({os.getpid()}: .*\))? is writing {target}", refusal)
        with pytest.raises(OutputExistsError):
            PartialFile(target, RUN)
        assert partial.path.read_bytes() == before
    write_missing(target)
    assert target.read_bytes() == WHOLE.encode()
