"""Writes `report.md`, one page about a run of `python -m benchmarks.verify_gpu`, from the files in its folder.

Every goal is stated with its bar and judged by stored rows. A goal without rows is "not measured".
`python -m benchmarks.gpu.report DIR` writes the page again.
"""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from benchmarks.cases import TRAINABLE, TRAINING, Task
from benchmarks.gpu.phase import read_rows
from benchmarks.gpu.probe import KINDS, ROWS, best_rates, floor
from benchmarks.gpu.verdict import Verdict
from benchmarks.measure import Row

FILES = ("probe", "smoke", "tests", "head", "step", "tuning")
HOLDS, FAILS, MISSING = "holds", "DOES NOT HOLD", "not measured"
#: The bars.
FLOOR, LIGER, STEP_1, STEP_8, MEMORY = 1.15, 5.0, 6.0, 15.0, 1 / 3
_PEERS = ("plain", "torch linear_cross_entropy", "Liger")
_OURS, _LIGER, _OFFICIAL = "ours, triton", "Liger", "official"
#: At most so many lines of a list.
_LISTED = 12

Rows = list[Row]


def write(folder: Path, verdicts: Sequence[Verdict] = ()) -> Path:
    """Write the page from the files that are there, and return its path."""
    found = {name: read_rows(folder / f"{name}.csv") for name in FILES}
    sections = (_head_of_page, _goals, lambda _: _phases(verdicts), _failures, _rates, _head, _step, _sweep, _profile)
    blocks = [block for section in sections if (block := section(found))]
    path = folder / "report.md"
    path.write_text("\n\n".join([*blocks, _missing(found)]) + "\n", encoding="utf-8")
    return path


# ---- tables ------------------------------------------------------------------------------------------


def _table(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    rows = [header, ["---"] * len(header), *lines]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _value(rows: Rows, **wanted: str) -> float | None:
    """The value of the only row with these fields, or None."""
    found = [row.value for row in rows if all(getattr(row, name) == value for name, value in wanted.items())]
    return found[0] if found and found[0] == found[0] else None


def _number(value: float | None, unit: str = "") -> str:
    return "–" if value is None else f"{value:.3g}{unit}"


def _head_of_page(found: dict[str, Rows]) -> str:
    every = [row for rows in found.values() for row in rows]
    if not every:
        return "# A run on a GPU\n\nNo figures."
    devices, commits = sorted({row.device for row in every}), sorted({row.commit for row in every})
    facts = [row.case for row in found["probe"] if row.metric == "fact"]
    versions = sorted({f"torch {row.torch}, triton {row.triton or 'none'}, Python {row.python}" for row in every})
    lines = [f"- {line}" for line in (*devices, *versions, f"commit {', '.join(commits)}", *facts)]
    return f"# A run on {devices[0]}, {every[0].time[:10]}\n\n" + "\n".join(lines)


def _phases(verdicts: Sequence[Verdict]) -> str:
    if not verdicts:
        return ""
    return "## Phases\n\n" + "\n".join(f"- {verdict}" for verdict in verdicts)


# ---- goals -------------------------------------------------------------------------------------------


def _goals(found: dict[str, Rows]) -> str:
    if any(row.metric == "fact" and "no GPU" in row.case for row in found["probe"]):
        return "## What holds\n\nNothing is judged: this was a run without a GPU, with tiny sizes."
    lines = [
        ("tests on the GPU", "none fails", *_count(found["tests"], lambda row: row.metric == "failed", "passed")),
        ("operators against float64", "none is wrong", *_count(found["smoke"], lambda row: bool(row.note), "")),
        *_floor_goals(found),
        *_liger_goals(found["head"]),
        *_step_goals(found["step"]),
    ]
    return "## What holds\n\n" + _table(("goal", "bar", "measured", ""), lines)


def _count(rows: Rows, is_bad: Callable[[Row], bool], good: str) -> tuple[str, str]:
    left = [row.note for row in rows if row.metric == "status"]
    rows = [row for row in rows if row.metric != "status"]
    if not rows:
        return "–", MISSING
    bad = sum(map(is_bad, rows))
    fine = sum(not is_bad(row) and (not good or row.metric == good) for row in rows)
    found = f"{fine} right, {bad} wrong"
    if bad or not fine:
        return found, FAILS
    return (f"{found}; the rest {left[0]}", "holds so far") if left else (found, HOLDS)


def _judged(value: float | None, bar: float, at_most: bool = False) -> str:
    if value is None:
        return MISSING
    return HOLDS if (value <= bar if at_most else value >= bar) else FAILS


def _floor_goals(found: dict[str, Rows]) -> list[tuple[str, ...]]:
    ratios = [each for each in _floor_ratios(found) if each[2] == TRAINABLE and each[1] == "NextQuill"]
    bar = f"≤ {FLOOR} × its products"
    if not ratios:
        return [("the pair loss near its products' own time", bar, "–", MISSING)]
    return [
        (f"NextQuill, {head} head, {case}", bar, _number(ratio, "×"), _judged(ratio, FLOOR, at_most=True))
        for case, _, head, ratio in ratios
    ]


def _floor_ratios(found: dict[str, Rows]) -> list[tuple[str, str, str, float]]:
    """Case, loss, head and seconds over the floor at the probe's rates, for every task of ours."""
    rates = best_rates([{name: str(value) for name, value in vars(row).items()} for row in found["probe"]])
    ratios = []
    for row in found["head"]:
        if row.metric != "seconds" or row.provider != _OURS:
            continue
        sizes = {key: int(value) for key, value in re.findall(r"([NDV])=(\d+)", row.case)}
        least = floor(rates, Task(row.loss, row.mode, row.head), sizes["N"], sizes["D"], sizes["V"])
        if least:
            ratios.append((row.case, row.loss, row.head, row.value / least))
    return ratios


def _liger_goals(rows: Rows) -> list[tuple[str, ...]]:
    bar, name = f"≥ {LIGER:g} × faster", "NextQuill over Liger's composition"
    pairs = _speed_up_over(rows, _LIGER)
    if not pairs:
        return [(name, bar, "–", MISSING)]
    return [(f"{name}, {case}", bar, _number(ratio, "×"), _judged(ratio, LIGER)) for case, ratio in pairs]


def _speed_up_over(rows: Rows, peer: str) -> list[tuple[str, float]]:
    seconds = {
        (row.case, row.head, row.provider): row.value
        for row in rows
        if row.metric == "seconds" and row.loss == "NextQuill" and row.mode == TRAINING
    }
    return [
        (f"{case}, {head}", value / seconds[case, head, _OURS])
        for (case, head, provider), value in seconds.items()
        if provider == peer and (case, head, _OURS) in seconds
    ]


def _step_goals(rows: Rows) -> list[tuple[str, ...]]:
    lines: list[tuple[str, ...]] = []
    for case in dict.fromkeys(row.case for row in rows) or ("",):
        mine = [row for row in rows if row.case == case]
        place = f", {case.split(':')[0]}" if case else ""
        for provider, bar in (("ours, K=1", STEP_1), ("ours, K=8", STEP_8)):
            value = _value(mine, provider=provider, metric="examples", loss="NextQuill")
            goal = f"examples per second, {provider}, over the published scheme{place}"
            lines.append((goal, f"≥ {bar:g}×", _number(value, "×"), _judged(value, bar)))
        for metric, what in (("peak", "memory"), ("step_peak", "memory without weights and optimiser")):
            theirs = _value(mine, provider=_OFFICIAL, metric=metric)
            ours = _value(mine, provider="ours, K=1", metric=metric, loss="NextQuill")
            ratio = ours / theirs if ours is not None and theirs else None
            goal = f"{what}, ours, K=1, over the published scheme's{place}"
            lines.append((goal, "≤ 1/3", _number(ratio, "×"), _judged(ratio, MEMORY, at_most=True)))
    return lines


# ---- the sections ------------------------------------------------------------------------------------


def _failures(found: dict[str, Rows]) -> str:
    tests = [f"`{row.case}`: {row.note}" for row in found["tests"] if row.metric == "failed"]
    others = [
        f"{row.suite}: {row.case}, {row.provider}: {row.note}"
        for name in ("smoke", "head", "step", "tuning")
        for row in found[name]
        if _is_failure(row)
    ]
    wrong = [*others, *tests]
    if not wrong:
        return ""
    more = [f"- and {len(wrong) - _LISTED * 2} more"] if len(wrong) > _LISTED * 2 else []
    lines = [f"- {line[:300]}" for line in wrong[: _LISTED * 2]]
    return "## What failed\n\n" + "\n".join([*lines, *more])


def _is_failure(row: Row) -> bool:
    """Whether a row says that something is wrong, and not merely absent or too large."""
    refused = row.metric == "status" and re.search(r"^\w*Error: | off by .*allowed|not timed$", row.note)
    return row.note.startswith("FAILED") or bool(refused)


def _rates(found: dict[str, Rows]) -> str:
    rows = [row for row in found["probe"] if row.metric == "gemm"]
    copies = [f"Copies run at {row.value:.0f} {row.unit}." for row in found["probe"] if row.metric == "copy"]
    if not rows:
        return ""
    lines = []
    for kind in KINDS:
        for hidden in sorted({size for _, size in best_rates([{**vars(row), "value": "0"} for row in rows])}):
            cells = [
                next((f"{row.value:.4g}" for row in rows if _is_product(row, kind, hidden, count)), "–")
                for count in ROWS
            ]
            lines.append((kind, str(hidden), *cells))
    header = ("product", "D", *(f"M={count}" for count in ROWS))
    return "\n\n".join(("## What this GPU multiplies, TFLOP/s", " ".join(copies), _table(header, lines)))


def _is_product(row: Row, kind: str, hidden: int, count: int) -> bool:
    return row.provider == kind and row.case.startswith(f"M={count}, D={hidden},")


def _head(found: dict[str, Rows]) -> str:
    rows = [row for row in found["head"] if row.mode == TRAINING or row.loss.endswith("nll")]
    floors = {(case, loss, head): ratio for case, loss, head, ratio in _floor_ratios(found)}
    lines = []
    for case, loss, head in dict.fromkeys((row.case, row.loss, row.head) for row in rows):
        mine = [row for row in rows if (row.case, row.loss, row.head) == (case, loss, head)]
        ours = _value(mine, provider=_OURS, metric="seconds")
        if ours is None:
            continue
        times = [_value(mine, provider=peer, metric="seconds") for peer in _PEERS]
        peaks = [_value(mine, provider=peer, metric="peak") for peer in (_OURS, "plain")]
        lines.append(
            (
                case, ", ".join(filter(None, (loss, head))), _number(1000 * ours),
                _number(floors.get((case, loss, head)), "×"),
                *(_number(time / ours if time else None, "×") for time in times),
                *("–" if peak is None else f"{peak:.0f}" for peak in peaks),
            )
        )  # fmt: skip
    if not lines:
        return ""
    header = ("shape", "loss", "ms", "over its floor", "plain", "torch's", "Liger", "MiB", "MiB, plain")
    text = "Times of the others are multiples of ours: above 1, ours is faster."
    return "\n\n".join(("## The loss alone", text, _table(header, lines)))


def _step(found: dict[str, Rows]) -> str:
    lines = []
    for case, loss, provider in dict.fromkeys((row.case, row.loss, row.provider) for row in found["step"]):
        mine = [row for row in found["step"] if (row.case, row.loss, row.provider) == (case, loss, provider)]
        seconds = _value(mine, metric="seconds")
        if seconds is not None:
            values = [_value(mine, metric=metric) for metric in ("examples", "time", "tokens", "peak", "step_peak")]
            cells = [_number(1000 * seconds), *(_number(value, "×") for value in values[:2])]
            cells += ["–" if value is None else f"{value:.0f}" for value in values[2:]]
            lines.append((case.split(":")[0], loss, provider, *cells))
    if not lines:
        return ""
    header = (
        "model", "loss", "way", "ms per example", "examples/s over the published", "time over SFT", "tokens/s",
        "MiB", "MiB of the step",
    )  # fmt: skip
    return "## A whole step\n\n" + _table(header, lines)


def _sweep(found: dict[str, Rows]) -> str:
    rows = [row for row in found["tuning"] if row.suite == "sweep" and row.metric == "seconds"]
    lines = []
    for case, head in dict.fromkeys((row.case, row.head) for row in rows):
        mine = {row.provider: row.value for row in rows if (row.case, row.head) == (case, head)}
        best, default = min(mine, key=lambda name: mine[name]), mine.get("default chunk")
        least = _value(found["tuning"], suite="sweep", case=case, head=head, provider=best, metric="floor_ratio")
        cells = (_number(1000 * default if default else None), best, _number(1000 * mine[best]), _number(least, "×"))
        lines.append((case, head, *cells))
    if not lines:
        return ""
    header = ("shape", "head", "ms, default chunk", "fastest", "ms", "over its floor")
    return "## Chunk sizes\n\n" + _table(header, lines)


def _profile(found: dict[str, Rows]) -> str:
    rows = [row for row in found["tuning"] if row.suite in ("profile", "tune", "counters") and row.rounds]
    if not rows:
        return ""
    blocks = ["## Kernels"]
    for case in dict.fromkeys(row.case for row in rows if row.suite == "profile"):
        mine = [row for row in rows if row.suite == "profile" and row.case == case]
        kernels = [row for row in mine if row.metric == "kernel"][:8]
        totals = [row for row in mine if row.metric == "total"]
        lines = [(f"`{row.provider[:60]}`", f"{row.value:.3g}", row.note) for row in (*kernels, *totals)]
        blocks.append(f"{case}\n\n" + _table(("kernel", "ms", ""), lines))
    counters = [(row.case, row.provider, f"{row.value:.4g} {row.unit}") for row in rows if row.suite == "counters"]
    tuned = [row for row in rows if row.suite == "tune"]
    tiles = [(row.case, f"{row.value:.4g} {row.unit}", row.note) for row in tuned if row.metric != "row_tile"]
    tiles += _row_tiles([row for row in tuned if row.metric == "row_tile"])
    if counters:
        blocks.append(_table(("kernel", "counter", ""), counters))
    if tiles:
        blocks.append(_table(("tuned kernel", "fastest", ""), tiles))
    return "\n\n".join(blocks)


def _row_tiles(rows: Rows) -> list[tuple[str, str, str]]:
    """The fastest tile of each kernel that walks along rows, and the one in use."""
    lines = []
    for name in dict.fromkeys(row.provider for row in rows):
        mine = [row for row in rows if row.provider == name]
        best, own = max(mine, key=lambda row: row.value), [row for row in mine if row.note == "in use"]
        used = f"in use: {own[0].case.partition('stages ')[2]} with {own[0].value:.4g} {own[0].unit}" if own else ""
        lines.append((best.case, f"{best.value:.4g} {best.unit}", used))
    return lines


def _missing(found: dict[str, Rows]) -> str:
    """What has no figure: whole phases, and what a phase left out, by reason."""
    suites = {row.suite for rows in found.values() for row in rows}
    names = ("probe", "smoke", "tests", "head", "step", "sweep", "profile", "tune", "counters")
    lines = [f"- {name}: no row" for name in names if name not in suites]
    left = [row for rows in found.values() for row in rows if row.metric == "status"]
    left = [row for row in left if not _is_failure(row)]
    counts = Counter((row.suite, row.provider, row.note.removeprefix("not measured: ")) for row in left)
    for (suite, provider, note), count in counts.items():
        same = (row for row in left if (row.suite, row.provider) == (suite, provider) and row.note.endswith(note))
        case = next(same).case
        what = f"{count} cases, {case} among them" if count > 1 else case
        lines.append(f"- {suite}: {', '.join(filter(None, (provider, what)))}: {note}"[:300])
    skipped = Counter(row.note for row in found["tests"] if row.metric == "skipped")
    lines += [f"- tests: {count} skipped: {note}" for note, count in skipped.most_common(_LISTED)]
    return "## Not measured\n\n" + ("\n".join(lines) or "Nothing.")


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the page of a folder."""
    flags = list(sys.argv[1:] if arguments is None else arguments)
    if len(flags) != 1 or not Path(flags[0]).is_dir():
        print("usage: python -m benchmarks.gpu.report DIR", file=sys.stderr)
        return 2
    print(write(Path(flags[0])))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
