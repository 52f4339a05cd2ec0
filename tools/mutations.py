"""Plant defects in copies of a checkout, and report which suite of tests catches each.

    python -m tools.mutations FOLDER                    # all of tools/mutation_list; run it from this project's root
    python -m tools.mutations FOLDER --only tree- data- # mutations whose names begin like this
    python -m tools.mutations FOLDER --fast             # only with the tests of `make test`; the map takes minutes

FOLDER is a checkout of this project, of any age. It is not changed. Tests use the running interpreter's environment.
For each mutation, the tests that execute its lines run in a mutated copy until one fails: first the fast tests, as in
`make test`, then the slow ones. The first run for a content maps lines to tests, by running both suites under coverage.
Every verdict is written at once and is final for this content. An interrupted run resumes; `--again` judges again.

    fast, slow      a test of that suite failed or, only with the mutation, hung
    survived        all tests that execute the lines passed
    unfinished      all tests passed for which `--seconds` left time
    inapplicable    the text to replace is not in this checkout, or the mutated extension does not build
    broken          pytest could not run the tests that it ran without the mutation

Exit codes: 0 if all were caught, 1 if not, 2 for a wrong flag, 130 if interrupted.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from tools.checkouts import NATIVE, build_native, run_pytest, write_source
from tools.covering import Covering, Test
from tools.mutation import DoesNotApply, Mutation
from tools.mutation_list import MUTATIONS

CAUGHT = ("fast", "slow")
VERDICTS = (*CAUGHT, "survived", "unfinished", "inapplicable", "broken")
#: Seconds of tests in the first run of pytest, and the growth of each further run, as every start costs some seconds.
_FIRST, _GROWTH = 10.0, 4.0
#: The exit code of pytest if a test does not exist.
_NOT_FOUND = 4
#: A run has hung after this many seconds, plus this multiple of its tests' time, as fixtures run again and cores are
#: shared.
_HUNG, _TIMES = 120.0, 5.0


def main(arguments: Sequence[str] | None = None, mutations: Sequence[Mutation] = MUTATIONS) -> int:
    """Parse the flags, map lines to tests, plant the defects, and report."""
    parser = argparse.ArgumentParser(prog="python -m tools.mutations", description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path, help="a checkout")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="mutations whose names begin like this")
    parser.add_argument("--again", action="store_true", help="also judge mutations that have a verdict")
    parser.add_argument("--list", action="store_true", help="list the mutations and stop")
    parser.add_argument("--tests", nargs="+", default=[], metavar="PATH", help="only tests in these files or folders")
    parser.add_argument("--fast", action="store_true", help="leave out the slow tests, also in the map")
    parser.add_argument("--workers", type=int, default=2, help="mutations at a time, and processes for the map")
    parser.add_argument("--seconds", type=float, default=900.0, help="time limit for one mutation")
    parser.add_argument("--out", type=Path, help="file of verdicts, JSONL; by default with the map")
    parser.add_argument(
        "--cache", type=Path, default=Path.home() / ".cache" / "nextquill-mutations", help="folder of maps"
    )
    options = parser.parse_args(arguments)
    chosen = [each for each in mutations if not options.only or each.name.startswith(tuple(options.only))]
    if not chosen:
        parser.error(f"--only: no mutation is named {' or '.join(options.only)}; --list lists them")
    if options.workers < 1:
        parser.error(f"--workers: expected a positive number, got {options.workers}")
    if options.list:
        print("\n".join(f"{each.name}: {each.file}: {each.why}" for each in chosen))
        return 0
    try:
        return _run_all(options, chosen)
    except KeyboardInterrupt:
        print("interrupted; the same command resumes", file=sys.stderr)
        return 130


def _run_all(options: argparse.Namespace, chosen: Sequence[Mutation]) -> int:
    words = [*options.tests, *(("-m", "not slow") if options.fast else ())]
    covering = Covering(options.folder.resolve(), options.cache.resolve(), words, options.workers)
    out = options.out or covering.store / "verdicts.jsonl"
    known = {} if options.again else _read(out)
    done = {(name, found["digest"]) for name, found in known.items() if found["verdict"] in (*CAUGHT, "survived")}
    todo = [each for each in chosen if (each.name, each.digest) not in done]
    print(f"{len(chosen)} mutations, {len(chosen) - len(todo)} of them judged before; verdicts go to {out}", flush=True)
    _judge_all(todo, covering, options.workers, options.seconds, out)
    return _summarise(chosen, _read(out))


def _judge_all(todo: Sequence[Mutation], covering: Covering, workers: int, seconds: float, out: Path) -> None:
    stopping = threading.Event()
    with tempfile.TemporaryDirectory(prefix="mutations-") as temporary, ThreadPoolExecutor(workers) as pool:
        copies: SimpleQueue[Path] = SimpleQueue()
        for number in range(min(workers, len(todo))):
            copies.put(Path(shutil.copytree(covering.root, Path(temporary, str(number)))))

        def judge(mutation: Mutation) -> dict[str, Any]:
            root, began = copies.get(), time.monotonic()
            try:
                verdict = {} if stopping.is_set() else _judge(mutation, covering, root, seconds)
            finally:
                copies.put(root)
            return {"name": mutation.name, "digest": mutation.digest, **verdict, "took": time.monotonic() - began}

        futures = [pool.submit(judge, each) for each in todo]
        try:
            for number, future in enumerate(as_completed(futures), 1):
                found = future.result()
                with out.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(found) + "\n")
                line = f"{number:3d}/{len(todo)} {found['name']}: {found['verdict']} ({found['took']:.0f} s)"
                print(f"{line} {found['detail']}", flush=True)
        except BaseException:
            stopping.set()
            raise


def _judge(mutation: Mutation, covering: Covering, root: Path, seconds: float) -> dict[str, Any]:
    """Judge one mutation in its copy, which is restored afterwards."""
    try:
        source = mutation.source(root)
    except DoesNotApply as error:
        return {"verdict": "inapplicable", "detail": str(error)}
    tests = covering.tests_of(mutation.file, mutation.lines(source), mutation.tests)
    is_native = mutation.file.startswith("csrc/")
    write_source(root / mutation.file, source.replace(mutation.old, mutation.new))
    try:
        if is_native and (problem := build_native(root)):
            return {"verdict": "inapplicable", "detail": problem}
        return _run(tests, root, time.monotonic() + seconds)
    finally:
        write_source(root / mutation.file, source)
        shutil.rmtree(root / NATIVE, ignore_errors=True)


def _run(tests: Sequence[Test], root: Path, end: float) -> dict[str, Any]:
    """Run tests until one fails."""
    ran = 0
    for suite, chunk in _chunks(tests):
        if time.monotonic() > end:
            return {"verdict": "unfinished", "detail": f"{ran} of {len(tests)} tests passed"}
        limit = _HUNG + _TIMES * sum(test.seconds for test in chunk)
        done = run_pytest(root, [test.id for test in chunk], seconds=limit)
        if done.code == _NOT_FOUND:  # ids may hold a default that the mutation changes, or the checkout's path
            done = run_pytest(root, sorted({test.id.partition("[")[0] for test in chunk}), seconds=limit)
        if done.failed:
            return {"verdict": suite, "detail": done.failed[0]}
        if done.code is None:
            return {"verdict": suite, "detail": f"hung for {limit:.0f} s"}
        if done.code != 0:
            return {"verdict": "broken", "detail": done.output[-2000:]}
        ran += len(chunk)
    return {"verdict": "survived", "detail": f"{ran} tests passed"}


def _chunks(tests: Sequence[Test]) -> Iterator[tuple[str, list[Test]]]:
    """Divide the tests into runs of pytest: fast tests, then slow ones, in a few runs of growing length."""
    for suite in CAUGHT:
        chunk: list[Test] = []
        room = budget = _FIRST
        for test in (each for each in tests if each.is_slow == (suite == "slow")):
            chunk.append(test)
            room -= test.seconds
            if room <= 0:
                yield suite, chunk
                chunk, budget = [], budget * _GROWTH
                room = budget
        if chunk:
            yield suite, chunk


def _read(out: Path) -> dict[str, dict[str, Any]]:
    """The last verdict of every mutation."""
    lines = out.read_text(encoding="utf-8").splitlines() if out.exists() else []
    return {found["name"]: found for found in map(json.loads, lines)}


def _summarise(chosen: Sequence[Mutation], verdicts: dict[str, dict[str, Any]]) -> int:
    names = {verdict: [each for each in chosen if verdicts[each.name]["verdict"] == verdict] for verdict in VERDICTS}
    counts = Counter({verdict: len(those) for verdict, those in names.items()})
    print("\n" + ", ".join(f"{verdict} {counts[verdict]}" for verdict in VERDICTS))
    for verdict in VERDICTS[1:]:
        for each in names[verdict]:
            print(f"{verdict}: {each.name}: {each.file}: {each.why} [{verdicts[each.name]['detail']}]")
    return 0 if sum(counts[verdict] for verdict in CAUGHT) == len(chosen) else 1


if __name__ == "__main__":
    sys.exit(main())
