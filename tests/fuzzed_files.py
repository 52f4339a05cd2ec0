"""Files damaged at random, given to the commands: every case must end soon, with success or with an error of one line.

A case follows from its number alone. Cases run in one worker process, in which torch is imported once. A case that
hangs or kills the process costs that process, and the next case gets a new one.
"""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import multiprocessing
import random
import re
import shutil
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from tests.cli.conftest import write_records

MOST_SECONDS = 10.0  # of the processor
_PATIENCE = 180.0  # seconds of a busy machine until a case counts as one that hangs

_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
_TEXTS = (
    "",
    " ",
    "é",
    "\x1b[2J\x1b]0;x\x07",
    "\u202e",
    "\x00",
    "\ud800",
    "<|endoftext|>",
    "x" * 5000,
    "\r\n",
    "\u2028",
)
_VALUES = (
    None, True, -1, 0, 1, 2**31, 10**19, 10**400, 1.5, -1e308, float("nan"), float("inf"), [], {}, [[]], [None],
    {"": 1}, "1e999", "2020-13-45", "2020-05-09T06:53:20Z", *_TEXTS,
)  # fmt: skip
_PIECES = (
    b"\x00", b"\xff", b"\xef\xbb\xbf", b"\xed\xa0\x80", b"\n", b"\r", b'"', b"'", b"\\", b"{", b"}", b"[", b"]", b":",
    b",", b"[" * 3000, b'{"a":' * 3000, b'{"a": 1, "a": 2}', b"NaN", b"-Infinity", b"1e999", b"9" * 5000, b"null",
    b"\\ud800", b"\x1b[31m", b"\x1f\x8b", b"PK\x03\x04", b"%", b"#", b"|", b"&a [*a, *a]", b"*a", b"<<: ",
    b"!!python/object:os.system ",
    b"!!bool x", b"2020-13-45", b"? ", b"---\n", b"{{", b"}}", b"{%", b"%}",
)  # fmt: skip
_YAML = """\
limit: 3
num_items: &n 2
select: recency
overwrite: true
input: [records.jsonl]
format: table
keep_duplicates: false
"""
_TRAIN_YAML = "lr_scheduler_kwargs: {a: &a [1, 2], b: *a}\nseed: 3\nlogging_steps: 5\nlora_r: 4\nloss: perce\n"
_TEMPLATES = (
    "{{ query }}", "{% for h in history %}{{ h.text }}\n{% endfor %}", "{{ history[0].title }}",
    "{% if counterfactual %}",
    "{% endif %}", "{{ history | length }}", "{{ query.upper() }}", "{{ x.y.z }}", "{{ ''.__class__.__mro__ }}",
    "{% set a = query %}", "{{ a }}", "{# comment", "{{ 1 // 0 }}", "{{ query[:5] }}", "{% raw %}", "{% endraw %}",
    "{% macro m(x) %}{{ x }}{% endmacro %}", "{{ m(query) }}", "{% include 'x' %}", "{{ raise() }}", "text", "\n",
    "{{ (" * 200,
)  # fmt: skip


# ---- what is changed -------------------------------------------------------------------------------


def changed_bytes(data: bytes, draw: random.Random) -> bytes:
    """The bytes of a file after one to three changes."""
    for _ in range(draw.randint(1, 3)):
        at, length = draw.randrange(len(data) + 1), draw.choice((1, 1, 4, 50))
        kind = draw.choice(("flip", "cut", "delete", "insert", "insert", "repeat", "empty", "zero"))
        if kind == "flip" and at < len(data):
            data = data[:at] + bytes([data[at] ^ 1 << draw.randrange(8)]) + data[at + 1 :]
        elif kind == "cut":
            data = data[:at]
        elif kind == "delete":
            data = data[:at] + data[at + length :]
        elif kind == "insert":
            data = data[:at] + draw.choice(_PIECES) + data[at:]
        elif kind == "repeat":
            data = data[:at] + data[max(0, at - length) : at] * draw.randint(1, 9) + data[at:]
        elif kind == "empty" and draw.random() < 0.2:
            data = b""
        elif kind == "zero":
            data = data[:at] + bytes(length) + data[at + length :]
    return data


def changed_json(value: Any, draw: random.Random) -> Any:
    """A JSON value in which one value is another, missing, or new."""
    if isinstance(value, dict) and value and draw.random() < 0.9:
        name = draw.choice(sorted(value))
        kind = draw.choice(("inside", "inside", "inside", "delete", "add", "rename"))
        others = {key: each for key, each in value.items() if key != name}
        if kind == "delete":
            return others
        if kind == "add":
            return {**value, draw.choice(("new", "", *_TEXTS[:5])): draw.choice(_VALUES)}
        if kind == "rename":
            return {**others, name.upper(): value[name]}
        return {**value, name: changed_json(value[name], draw)}
    if isinstance(value, list) and value and draw.random() < 0.7:
        at = draw.randrange(len(value))
        return [*value[:at], changed_json(value[at], draw), *value[at + 1 :]]
    return draw.choice(_VALUES)


def changed_file(path: Path, draw: random.Random) -> None:
    """Damage a file: a JSON file in its values or its bytes, any other in its bytes."""
    data = path.read_bytes()
    if path.suffix == ".json" and draw.random() < 0.7:
        path.write_text(json.dumps(changed_json(json.loads(data), draw)))
    else:
        path.write_bytes(changed_bytes(data, draw))


# ---- the cases -------------------------------------------------------------------------------------


def make_base(folder: Path) -> None:
    """What the cases damage: records, a run of a tiny model with a checkpoint, and an adapter."""
    write_records(folder / "records.jsonl", 6)
    sizes = ("--per_device_train_batch_size", 3, "--save_steps", 1, "--max_steps", 1)
    records = ("--train_file", folder / "records.jsonl")
    for name, model in (("run", ("tiny",)), ("adapter", (folder / "run", "--lora_r", 2))):
        code, err = call("train", *records, *sizes, "--output_dir", folder / name, "--model", *model)
        assert code == 0, err


def records_case(base: Path, place: Path, draw: random.Random) -> tuple[Any, ...]:
    """Records in a file of any kind, which `convert` reads."""
    rows = [json.loads(line) for line in (base / "records.jsonl").read_text(encoding="utf-8").splitlines()]
    if draw.random() < 0.6:
        rows[2] = changed_json(rows[2], draw)
    kind = draw.choice((".jsonl", ".jsonl", ".json", ".csv", ".jsonl.gz", ".parquet"))
    path = place / f"records{kind}"
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    if kind == ".json":
        lines = json.dumps(rows, indent=draw.choice((None, 1))).encode()
    elif kind == ".csv":
        cells = (json.dumps(row.get("history") if isinstance(row, dict) else row) for row in rows)
        lines = b"user_id,query,response,history\n" + b"".join(
            b'u,q,r,"' + cell.replace('"', '""').encode() + b'"\n' for cell in cells
        )
    elif kind == ".parquet":
        import pyarrow
        import pyarrow.parquet

        good = [row for row in rows if isinstance(row, dict)][:2]
        with contextlib.suppress(Exception):  # not every value has a type there
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(good), path)
        lines = path.read_bytes() if path.is_file() else b""
    lines = changed_bytes(lines, draw) if draw.random() < 0.6 else lines
    path.write_bytes(gzip.compress(lines) if kind.endswith(".gz") and draw.random() < 0.8 else lines)
    flags = draw.choice(((), ("--skip_bad", "--max_skipped", 1), ("--timezone", "UTC"), ("--split_by", "last")))
    if flags[:1] == ("--split_by",):
        flags = (*flags, "--eval_file", place / "eval.jsonl", "--test_file", place / "test.jsonl")
    form = draw.choice(("table", "table", "table", "events", "chat", "preferences"))
    return ("convert", "--input", path, "--format", form, "--output_file", place / "out.jsonl", *flags)


def yaml_case(base: Path, place: Path, draw: random.Random) -> tuple[Any, ...]:
    """A file of flags. Those of `train` hold mappings; its records are missing, so it ends early."""
    is_train, path = draw.random() < 0.3, place / "flags.yaml"
    path.write_bytes(changed_bytes((_TRAIN_YAML if is_train else _YAML).encode(), draw))
    if is_train:
        return (
            "train",
            "--config",
            path,
            "--train_file",
            place / "none",
            "--output_dir",
            place / "o",
            "--model",
            "tiny",
        )
    return ("convert", "--config", path, "--input", base / "records.jsonl", "--output_file", place / "out.jsonl")


def config_case(base: Path, place: Path, draw: random.Random) -> tuple[Any, ...]:
    """A file of a model or an adapter."""
    name, folder = draw.choice(("run", "run", "adapter")), place / "model"
    folder.mkdir()
    for path in (base / name).iterdir():
        if path.is_file():
            shutil.copy(path, folder)
    files = [path for path in sorted(folder.iterdir()) if path.suffix in (".json", ".safetensors")]
    changed_file(draw.choice([path for path in files if path.name not in ("metrics.json", "nextquill_run.json")]), draw)
    records = base / "records.jsonl"
    if draw.random() < 0.5:
        return ("inspect", "--model", folder, "--records_file", records)
    return ("score", "--model", folder, "--eval_file", records, "--limit", 1, "--output_file", place / "out.jsonl")


def checkpoint_case(base: Path, place: Path, draw: random.Random) -> tuple[Any, ...]:
    """A file of a checkpoint, from which training resumes."""
    name = draw.choice(("run", "run", "adapter"))
    folder = Path(shutil.copytree(base / name, place / name))
    files = [path for path in sorted((folder / "checkpoint-1").iterdir()) if path.suffix != ".md"]
    changed_file(draw.choice(files), draw)
    model = ("tiny",) if name == "run" else (base / "run", "--lora_r", 2)
    sizes = ("--per_device_train_batch_size", 3, "--max_steps", 2, "--resume_from_checkpoint", "true")
    optimiser = draw.choice(((), (), ("--optim", draw.choice(("sgd", "adafactor", "adagrad", "rmsprop")))))
    where = ("--train_file", base / "records.jsonl", "--output_dir", folder)
    return ("train", *where, "--model", *model, *sizes, *optimiser)


def template_case(base: Path, place: Path, draw: random.Random) -> tuple[Any, ...]:
    """A prompt template, which `inspect` renders."""
    text = "".join(draw.choice(_TEMPLATES) for _ in range(draw.randint(1, 6)))
    path = place / "prompt.jinja"
    path.write_bytes(changed_bytes(text.encode(), draw) if draw.random() < 0.3 else text.encode())
    return ("inspect", "--model", base / "run", "--records_file", base / "records.jsonl", "--prompt_jinja", path)


Case = Callable[[Path, Path, random.Random], tuple[Any, ...]]
#: Each kind of case, and how many of 100 are of it.
KINDS: tuple[tuple[Case, int], ...] = (
    (records_case, 45),
    (yaml_case, 22),
    (config_case, 15),
    (template_case, 14),
    (checkpoint_case, 4),
)
_SCHEDULE = [case for case, share in KINDS for _ in range(share)]
random.Random(0).shuffle(_SCHEDULE)


# ---- running them ----------------------------------------------------------------------------------


def call(*words: Any) -> tuple[int, str]:
    """Run a command in this process; its exit code and what it wrote to stderr."""
    from nextquill.cli.main import main

    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main([str(word) for word in words])
    assert not _CONTROLS.search(out.getvalue()), f"control characters on stdout: {out.getvalue()!r}"
    return code, err.getvalue()


def run_case(number: int, base: Path, place: Path) -> str:
    """Run one case; an empty string, or what is wrong with it."""
    draw = random.Random(number)
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    words = _SCHEDULE[number % len(_SCHEDULE)](base, place, draw)
    began = time.process_time()
    try:
        code, err = call(*words)
    except BaseException:  # noqa: BLE001  (whatever a user would see as a traceback)
        return f"traceback: {traceback.format_exc(limit=-6)}"
    seconds, last = time.process_time() - began, err.strip().rpartition("\n")[2]
    if seconds > MOST_SECONDS:
        return f"took {seconds:.0f} seconds"
    if _CONTROLS.search(err.replace("\r\x1b[K", "")):
        return f"control characters on stderr: {err!r}"
    if code and not last.startswith("nextquill: "):
        return f"exit code {code} without a message: {err[-300:]!r}"
    if code and len(last) > 3000:
        return f"a message of {len(last)} characters: {last[:300]!r}"
    return ""


def _work(pipe: Connection, base: Path, place: Path) -> None:
    import torch

    torch.set_num_threads(1)
    if not base.is_dir():
        base.mkdir()
        make_base(base)
    pipe.send("ready")
    while (number := pipe.recv()) is not None:
        pipe.send(run_case(number, base, place))


def failures(numbers: Iterable[int], folder: Path) -> Iterator[tuple[int, str]]:
    """Run these cases; yield the number of each that fails, and what is wrong with it."""
    context = multiprocessing.get_context("spawn")
    worker: Any = None
    try:
        for number in numbers:
            if worker is None:
                pipe, other = context.Pipe()
                worker = context.Process(target=_work, args=(other, folder / "base", folder / "case"), daemon=True)
                worker.start()
                other.close()
                assert pipe.recv() == "ready"
            pipe.send(number)
            try:
                problem = pipe.recv() if pipe.poll(_PATIENCE) else "hangs"
            except EOFError:
                problem = "killed the process"
            if problem:
                yield number, problem
            if problem in ("hangs", "killed the process"):
                worker.kill()
                worker.join()
                worker = None
    finally:
        if worker is not None:
            pipe.send(None)
            worker.join(60)
            worker.kill()
