"""Write the README's tables from measured files: `python -m benchmarks.table` (`--check` only compares).

A table stands between `<!-- table: NAME -->` and `<!-- end table -->`; nothing in it is typed.
"""

from __future__ import annotations

import argparse
import csv
import os
import re
import sys
from collections.abc import Callable

from benchmarks.measure import RESULTS

README = RESULTS.parent.parent / "README.md"
_BLOCK = re.compile(r"(<!-- table: (\w+) -->\n)(.*?)(<!-- end table -->)", re.DOTALL)


def step_table() -> str:
    """Ratios of a training step to our SFT step, one column per case."""
    rows = [row for row in read("step.csv") if row["metric"] == "time"]
    cases = list(dict.fromkeys(row["case"] for row in rows))
    cells = {(row["provider"], row["case"]): row for row in rows}
    providers = list(dict.fromkeys(row["provider"] for row in rows))
    lines = ["| step | " + " | ".join(cases) + " |", "|---|" + "---|" * len(cases)]
    lines += [
        f"| {provider} | " + " | ".join(_ratio(cells[provider, case]) for case in cases) + " |"
        for provider in providers
    ]
    return "\n".join([*lines, "", _footnote(rows)])


def head_table() -> str:
    """Time against plain PyTorch and peak memory of the loss alone."""
    rows = read("head.csv")
    cells = {(row["case"], row["provider"], row["metric"]): row for row in rows}
    lines = [
        "| loss, forward and backward | shape | time, ours / plain | memory, ours | memory, plain |",
        "|---|---|---|---|---|",
    ]
    for case in dict.fromkeys(row["case"] for row in rows):
        for provider in dict.fromkeys(row["provider"] for row in rows if row["provider"].endswith("(ours)")):
            name = provider.removesuffix(" (ours)")
            own, plain = (cells[case, f"{name} ({kind})", "memory"]["value"] for kind in ("ours", "plain"))
            ratio = _ratio(cells[case, provider, "time"])
            lines.append(f"| {name} | {case} | {ratio} | {float(own):.0f} MiB | {float(plain):.0f} MiB |")
    return "\n".join([*lines, "", _footnote(rows)])


TABLES: dict[str, Callable[[], str]] = {"step": step_table, "head": head_table}


def read(name: str) -> list[dict[str, str]]:
    """The rows of a results file."""
    with (RESULTS / name).open(newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def fill(text: str) -> str:
    """The text with every table block replaced by its table."""
    return _BLOCK.sub(lambda match: f"{match[1]}{TABLES[match[2]]()}\n{match[4]}", text)


def _ratio(row: dict[str, str]) -> str:
    return f"{float(row['value']):.2f} [{float(row['p20']):.2f}, {float(row['p80']):.2f}]"


def _footnote(rows: list[dict[str, str]]) -> str:
    first = rows[0]
    return (
        f"Median [20th, 80th percentile] of {first['rounds']} rounds in one run; {first['device']}, {first['threads']} "
        f"threads, torch {first['torch']}, {first['time'][:10]}."
    )


def main() -> int:
    """Rewrite README.md, or say whether it is up to date."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 if a table is out of date")
    check = parser.parse_args().check
    text = README.read_text(encoding="utf-8")
    filled = fill(text)
    if check:
        print("README tables are up to date" if filled == text else "README tables are out of date")
        return int(filled != text)
    temporary = README.with_name(".README.md.tmp")
    temporary.write_text(filled, encoding="utf-8")
    os.replace(temporary, README)
    return 0


if __name__ == "__main__":
    sys.exit(main())
