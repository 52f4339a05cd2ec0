"""Write the tables of the README and of the docs: `python -m benchmarks.table` (`--check` only compares).

A table stands between `<!-- table: NAME -->` and `<!-- end table -->`; nothing in it is written by hand.
"""

from __future__ import annotations

import argparse
import csv
import os
import re
import sys
from collections.abc import Callable, Sequence
from functools import partial
from itertools import product
from statistics import median
from typing import Any

from benchmarks.measure import RESULTS, short_name

BASELINE = "plain"
PAGES = tuple(
    RESULTS.parent.parent / name
    for name in (
        "README.md",
        "docs/benchmarks.md",
        "docs/evidence.md",
        "docs/design/gpu.md",
        "docs/design/scale.md",
        "docs/reference/architectures.md",
    )
)
_BLOCK = re.compile(r"(<!-- table: (\w+) -->\n)(.*?)(<!-- end table -->)", re.DOTALL)


NOT_MEASURED, NOT_ON_A_GPU = "Not measured yet.", "Not measured on a GPU yet."

#: Rows that the README leaves out: K = 1 and K = 8 are enough, and PerCE costs what NextQuill's detached form does.
_STEP_DETAILS = ("ours, K=4", "PerCE")


def step_table(left_out: Sequence[str] = _STEP_DETAILS, kind: str = "step") -> str:
    """Whole optimiser steps: one table per model, with all processors or GPUs that have figures for it."""
    cpus = sorted(RESULTS.glob(f"{kind}-cpu-*.csv"))
    gpus = sorted(set(RESULTS.glob(f"{kind}-*.csv")) - set(cpus))
    if not cpus and not gpus:
        return NOT_MEASURED
    rows = [
        row for path in (*cpus, *gpus) for row in read(path.name) if not {row["provider"], row["loss"]} & set(left_out)
    ]
    cases = dict.fromkeys(row["case"] for row in rows)
    parts = [_step_part(case, [row for row in rows if row["case"] == case]) for case in cases]
    return "\n\n".join(parts if gpus else [*parts, NOT_ON_A_GPU])


def _step_part(case: str, rows: list[dict[str, str]]) -> str:
    """One model's table. Ratios that hold on other machines come first, the ratio to the official scheme last."""
    devices = list(dict.fromkeys(row["device"] for row in rows))
    cells = {(row["device"], row["loss"], row["provider"], row["metric"]): row for row in rows}
    first, *others = map(short_name, devices)
    columns = [case, f"time per example, {first}", *others, "tokens computed per example", "peak memory", "of the step"]
    columns += [f"examples/s, {first}", *others]
    lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    for entrant in dict.fromkeys((row["loss"], row["provider"]) for row in rows):
        time, ratio = (
            [_factor(*(cells.get((device, *entrant, metric)) for metric in ("status", name))) for device in devices]
            for name in ("time", "examples")
        )
        computed = _number(cells.get((devices[0], *entrant, "computed")))
        memory = [_mebibytes(cells, devices[0], *entrant, metric=metric) for metric in ("peak", "step_peak")]
        lines.append("| " + " | ".join([", ".join(entrant), *time, computed, *memory, *ratio]) + " |")
    note = _STEP_NOTE + (f" Memory and tokens are those of the {first}." if others else "")
    times = [row for row in rows if row["metric"] == "time"]
    return "\n".join([*lines, "", f"{note} {_footnote(times, what='Median')}"])


_STEP_NOTE = (
    "Times are multiples of those of unpadded SFT, examples/s of the official scheme's. Memory of the step leaves out "
    "libraries, weights and AdamW's state."
)


def _factor(status: dict[str, str] | None, ratio: dict[str, str] | None) -> str:
    """A ratio, or the reason why it is missing."""
    if status is not None:
        return status["note"]
    return "–" if ratio is None else f"{float(ratio['value']):.3g}×"


def _number(row: dict[str, str] | None) -> str:
    return "–" if row is None else f"{float(row['value']):.0f}"


#: The losses of suite `head` in the README, forward and backward, with a trainable head.
HEAD_LOSSES = ("NextQuill",)


def head_table() -> str:
    """The loss alone: one table for the CPU, and one for each GPU with figures."""
    gpus = sorted(RESULTS.glob("head-*.csv"))
    parts = [_head_part(read("head.csv")), *(_head_part(read(path.name), rates=True) for path in gpus)]
    return "\n\n".join(parts if gpus else [*parts, NOT_ON_A_GPU])


def _head_part(rows: list[dict[str, str]], rates: bool = False) -> str:
    """Time over plain PyTorch's and peak memory, one row per shape and loss, one column per provider."""
    rows = [row for row in rows if row["mode"] == "forward+backward" and row["head"] == "trainable"]
    cells = {(row["case"], row["loss"], row["provider"], row["metric"]): row for row in rows}
    timed = list(dict.fromkeys(row["provider"] for row in rows if row["metric"] == "time"))
    ours = [name for name in timed if name.startswith("ours")]
    others = [name for name in timed if name not in ours and name != BASELINE]
    columns = [*(f"time, {name}" for name in (*ours, *others)), "peak memory, ours", "plain"]
    columns += ["TFLOP/s, ours (of GEMM)"] if rates else []
    lines = [
        "| " + " | ".join(["head, forward and backward", "loss", *columns]) + " |",
        "|---" * (len(columns) + 2) + "|",
    ]
    for case in dict.fromkeys(row["case"] for row in rows):
        for loss in HEAD_LOSSES:
            own = [name for name in ours if (case, loss, name, "time") in cells]
            if not own:
                continue
            best = min(own, key=lambda name: _value(cells, case, loss, name, "time") or 0)
            values = [_cell(cells.get((case, loss, name, "time"))) for name in (*ours, *others)]
            values += [_mebibytes(cells, case, loss, name) for name in (best, BASELINE)]
            if rates:
                rate, fraction = (
                    _value(cells, case, loss, best, metric) or 0 for metric in ("tflops", "gemm_fraction")
                )
                values.append(f"{rate:.0f} ({100 * fraction:.0f}%)")
            lines.append("| " + " | ".join([case, loss, *values]) + " |")
    times = [row for row in rows if row["metric"] == "time"]
    return "\n".join([*lines, "", f"Times are multiples of plain PyTorch's. {_footnote(times, of='at least')}"])


def _value(cells: dict[Any, dict[str, str]], *key: str) -> float | None:
    return float(cells[key]["value"]) if key in cells else None


def _cell(row: dict[str, str] | None) -> str:
    return "–" if row is None else _ratio(row)


def _mebibytes(cells: dict[Any, dict[str, str]], *key: str, metric: str = "peak") -> str:
    value = _value(cells, *key, metric)
    return "–" if value is None else f"{value:.0f} MiB" if value < 10240 else f"{value / 1024:.1f} GiB"


def native_table() -> str:
    """The C++ extension's speed-up over its plain PyTorch twin: chunk kernels in rows, whole losses in one sentence."""
    rows = [row for row in read("native.csv") if row["metric"] == "time"]
    chunks = [row for row in rows if row["mode"] == "chunk kernels"]
    losses = [row for row in rows if row["mode"] != "chunk kernels"]
    counts = sorted({row["threads"] for row in rows}, key=int)
    columns = [(kind, count) for kind in dict.fromkeys(row["loss"] for row in chunks) for count in counts]
    cells = {(row["case"], row["loss"], row["threads"]): f"{1 / float(row['value']):.1f}×" for row in chunks}
    lines = [
        "| chunk kernels, native | " + " | ".join(f"{kind}, {_threads(count)}" for kind, count in columns) + " |",
        "|---" * (len(columns) + 1) + "|",
    ]
    lines += [
        f"| {case} | " + " | ".join(cells.get((case, *column), "–") for column in columns) + " |"
        for case in dict.fromkeys(row["case"] for row in chunks)
    ]
    foot = _footnote(rows, of="at least", what="Medians", threads=" and ".join(counts))
    return "\n".join([*lines, "", f"Speed-up over the same kernels in plain PyTorch. {_whole_losses(losses)} {foot}"])


def _whole_losses(rows: list[dict[str, str]]) -> str:
    values = sorted(float(row["value"]) for row in rows)
    names, cases = (list(dict.fromkeys(row[column] for row in rows)) for column in ("loss", "case"))
    found = f"{values[0]:.2f}, {median(values):.2f} and {values[-1]:.2f}"
    return (
        f"Whole losses ({', '.join(names)}; forward and backward, "
        f"{len(cases)} sizes) take {found} times as long as with those: smallest, median and largest of {len(values)}."
    )


def prepare_table() -> str:
    """Preparing and packing records against the tokenizer alone, and the memory for a stream of records."""
    rows = read("prepare.csv")
    rates = [row for row in rows if row["unit"] == "x"]
    cells = {(row["case"], row["provider"], row["metric"]): _ratio(row) for row in rates}
    lines = ["| records | prepared | per CPU second | prepared and packed | per CPU second |", "|---|---|---|---|---|"]
    for case in dict.fromkeys(row["case"] for row in rates):
        found = (cells[(case, *key)] for key in product(("prepare", "packed"), ("throughput", "per_cpu_second")))
        lines.append(f"| {case} | {' | '.join(found)} |")
    peaks = [row for row in rows if row["metric"] == "peak" and row["provider"] == "prepare"]
    peak = ", ".join(f"{float(row['value']):.0f} MiB with {row['case']}" for row in peaks)
    return "\n".join([*lines, "", f"Peak memory of the process: {peak}. {_footnote(rates)}"])


def popi_table() -> str:
    """A step of POPI with shared prefixes against a row per prompt."""
    rows = read("popi.csv")
    cells = {(row["case"], row["provider"], row["metric"]): row for row in rows}
    lines = ["| group | tokens with gradient, a row per prompt | with shared prefixes | time |", "|---|---|---|---|"]
    for case in dict.fromkeys(row["case"] for row in rows):
        apart, shared = (
            f"{float(cells[case, name, 'tokens']['value']):.0f}" for name in ("a row per prompt", "shared prefixes")
        )
        lines.append(f"| {case} | {apart} | {shared} | {_ratio(cells[case, 'shared prefixes', 'time'])} |")
    return "\n".join([*lines, "", _footnote([row for row in rows if row["unit"] == "x"])])


def mirror_table() -> str:
    """A step of MIRROR against compositions with a row per branch, and its divergence against the pair losses."""
    rows = [row for row in read("mirror.csv") if row["metric"] == "time"]
    tokens = {(r["loss"], r["provider"]): float(r["value"]) for r in read("mirror.csv") if r["metric"] == "tokens"}
    lines = ["| step | way | tokens through the model | CPU time |", "|---|---|---|---|"]
    for row in rows:
        if not row["head"]:
            count = tokens[row["loss"], row["provider"]]
            lines.append(f"| {row['loss']} | {row['provider']} | {count:.0f} | {_ratio(row)} |")
    lines += ["", "| loss on the same rows | kernels | head | CPU time |", "|---|---|---|---|"]
    lines += [f"| {r['provider']} | {r['loss']} | {r['head']} | {_ratio(r)} |" for r in rows if r["head"]]
    return "\n".join([*lines, "", _footnote(rows, of="at least", what="Median [p20, p80]")])


def generate_table() -> str:
    """A token of one response, and the responses to several queries, against transformers."""
    rows = read("generate.csv")
    lines = ["| case | way | measure | ratio | to |", "|---|---|---|---|---|"]
    lines += [
        f"| {row['case']} | {row['provider']} | {row['metric']} | {_ratio(row)} | {row['baseline']} |"
        for row in rows
        if row["provider"] != row["baseline"]
    ]
    return "\n".join([*lines, "", _footnote(rows)])


#: How an architecture runs with attention="auto", from best to worst.
_WAYS = {
    ("exact", "kernels"): "one row of trees, by our kernels",
    ("exact", "mask"): "one row of trees, by a whole mask",
    ("padded", "padded"): "a padded row per branch",
    ("refused", ""): "refused",
    ("not built", ""): "not checked: transformers fails",
}


def architectures_table() -> str:
    """Every architecture of transformers by the attention that "auto" takes, and the reason."""
    rows = read("architectures/transformers.csv")
    groups: dict[tuple[str, str], list[str]] = {}
    for way in _WAYS:
        for row in (row for row in rows if (row["result"], row["attention"]) == way):
            # What stands in parentheses is the error of a library.
            reason = re.sub(r" \(.*\)$", "", row["reason"])
            groups.setdefault((_WAYS[way], reason), []).append(row["architecture"])
    order = list(_WAYS.values())
    largest = sorted(groups.items(), key=lambda group: (order.index(group[0][0]), -len(group[1])))
    lines = ["| how | why | number | `model_type` |", "|---|---|---|---|"]
    lines += [f"| {how} | {why} | {len(names)} | {', '.join(names)} |" for (how, why), names in largest]
    shown = sum(map(len, groups.values()))
    assert shown == len(rows), "a result without a place in the table"
    exact = sum(row["result"] == "exact" for row in rows)
    lines += ["", f"Exact over trees: {exact} of {len(rows)}, with transformers {rows[0]['transformers']}."]
    return "\n".join(lines)


def _threads(count: str) -> str:
    return f"{count} thread{'' if count == '1' else 's'}"


def study_table() -> str:
    """All tables of the study on a CPU."""
    from benchmarks.study.tables import Results, markdown

    return markdown(Results(RESULTS / "study-cpu"))


def study_answer() -> str:
    """All methods of the study against SFT."""
    from benchmarks.study.tables import Results, answer

    return answer(Results(RESULTS / "study-cpu"))


def study_short_answer() -> str:
    """The study's main methods, for the README."""
    from benchmarks.study.tables import Results, answer

    return answer(Results(RESULTS / "study-cpu"), brief=True)


def study_methods_table() -> str:
    """The study's methods."""
    from benchmarks.study.tables import methods_table

    return methods_table()


def roofline_table() -> str:
    """What a loss should take on a GPU."""
    from benchmarks.roofline import table

    return table()


def scale_table(name: str) -> str:
    """What an epoch over a million users should cost."""
    from benchmarks import scale

    table: Callable[[], str] = getattr(scale, f"{name}_table")
    return table()


def study_popi_table() -> str:
    """All tables of POPI on the real model."""
    from benchmarks.study.popi import markdown

    return markdown(RESULTS / "study-popi-cpu")


def study_best_of_table() -> str:
    """The best of n samples against guidance, on the real model."""
    from benchmarks.study.best_of import markdown

    return markdown(RESULTS / "study-best-of-cpu")


TABLES: dict[str, Callable[[], str]] = {
    "step": step_table,
    "step_all": partial(step_table, ()),
    "real_step": partial(step_table, (), "real-step"),
    "head": head_table,
    "native": native_table,
    "prepare": prepare_table,
    "popi": popi_table,
    "mirror": mirror_table,
    "generate": generate_table,
    "study": study_table,
    "study_answer": study_answer,
    "study_short_answer": study_short_answer,
    "study_methods": study_methods_table,
    "study_popi": study_popi_table,
    "study_best_of": study_best_of_table,
    "roofline": roofline_table,
    **{f"scale_{name}": partial(scale_table, name) for name in ("epoch", "memory", "waiting")},
    "architectures": architectures_table,
}


def read(name: str) -> list[dict[str, str]]:
    """The rows of a results file."""
    with (RESULTS / name).open(newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def fill(text: str) -> str:
    """The text with every table block replaced by its table."""
    return _BLOCK.sub(lambda match: f"{match[1]}{TABLES[match[2]]()}\n{match[4]}", text)


def _ratio(row: dict[str, str]) -> str:
    return f"{float(row['value']):.2f} [{float(row['p20']):.2f}, {float(row['p80']):.2f}]"


def _footnote(
    rows: list[dict[str, str]], of: str = "", what: str = "Median [20th, 80th percentile]", threads: str = ""
) -> str:
    counts = {int(row["rounds"]) for row in rows}
    rounds = f"{of} {min(counts)}" if of and len(counts) > 1 else str(min(counts))
    machines = list({row["device"]: _machine(row, threads) for row in rows}.values())
    return f"{what} of {rounds} rounds in one run{' each' if len(machines) > 1 else ''}; {'; '.join(machines)}."


def _machine(row: dict[str, str], threads: str) -> str:
    triton = f", triton {row['triton']}" if row.get("triton") and "NVIDIA" in row["device"] else ""
    return (
        f"{short_name(row['device'])}, {_threads(threads or row['threads'])}, torch {row['torch']}{triton}, "
        f"{row['dtype'] or 'float32'}, {row['time'][:10]}"
    )


def main() -> int:
    """Rewrite the pages, or print whether they are up to date."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 if a table is out of date")
    check, stale = parser.parse_args().check, 0
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        filled = fill(text)
        if check:
            print(f"tables of {page.name} are {'up to date' if filled == text else 'out of date'}")
            stale |= filled != text
            continue
        temporary = page.with_name(f".{page.name}.tmp")
        temporary.write_text(filled, encoding="utf-8")
        os.replace(temporary, page)
    return int(stale)


if __name__ == "__main__":
    sys.exit(main())
