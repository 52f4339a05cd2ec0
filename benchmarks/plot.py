"""Draw suite `head` as a picture: `python -m benchmarks.plot [--csv FILE] [--out FILE]`; needs matplotlib.

One panel shows time, and one shows memory. Each shape and loss (forward and backward, trainable head) has a group of
bars, with a bar per provider. All values are multiples of plain PyTorch's in the same run. A provider that ran out of
memory is named in place of its bar.
"""

from __future__ import annotations

import argparse
import csv
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.measure import RESULTS

PICTURE = RESULTS.parent.parent / "docs" / "bench-head.png"
BASELINE, OUT_OF_MEMORY = "plain", "out of memory"
LOSSES = ("NextQuill", "NextQuill detached")
# Okabe and Ito's colours, which people with any colour vision can tell apart. Ours are the two blues and the green.
_COLOURS = {
    "ours, torch": "#56B4E9",
    "ours, native": "#009E73",
    "ours, triton": "#0072B2",
    "torch linear_cross_entropy": "#E69F00",
    "Liger": "#D55E00",
    "CCE": "#CC79A7",
}
_PANELS = {"time": "Time of forward and backward", "peak": "Peak memory beyond the inputs"}
_WHITE = {"facecolor": "white", "edgecolor": "none", "pad": 0.6}
_MOST = 4.0  # a longer bar ends here, with its number


def main(arguments: Sequence[str] | None = None) -> int:
    """Read the figures, draw the picture, and write it."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plot", description="Draw suite `head`.")
    parser.add_argument("--csv", type=Path, help="by default a GPU's file in benchmarks/results, else the CPU's")
    parser.add_argument("--out", type=Path, default=PICTURE)
    options = parser.parse_args(arguments)
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        print("plot: needs matplotlib: pip install matplotlib", file=sys.stderr)
        return 1
    source = options.csv or max(RESULTS.glob("head-*.csv"), default=RESULTS / "head.csv")
    with source.open(newline="", encoding="utf-8") as stream:
        draw(list(csv.DictReader(stream)), options.out)
    print(f"wrote {options.out} from {source}")
    return 0


def draw(rows: list[dict[str, str]], path: Path) -> None:
    """Draw the rows of a file and write the picture.

    Raises:
        ValueError: the rows hold no training step with a trainable head.
    """
    from matplotlib.figure import Figure

    rows = [row for row in rows if row["mode"] == "forward+backward" and row["head"] == "trainable"]
    ratios, failed = relative(rows), _failed(rows)
    layout = _Layout(rows, ratios, failed)
    if not layout.bars:
        raise ValueError("expected rows of suite `head`, forward and backward with a trainable head; found none")
    figure = Figure(figsize=(9.6, 0.17 * layout.height + 1.2), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    for axis, metric in zip(axes, _PANELS, strict=True):
        _panel(axis, metric, ratios, failed, layout)
    for place, case in layout.titles.items():
        axes[0].text(0, place, case, va="center", fontsize=8.5, fontweight="bold", zorder=4, bbox=_WHITE)
    axes[0].set_yticks(list(layout.names), list(layout.names.values()), fontsize=8.5)
    figure.suptitle("The loss alone, as a multiple of plain PyTorch: shorter is better", x=0.01, ha="left", fontsize=13)
    handles = {name: handle for axis in axes for handle, name in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(
        handles.values(), handles, loc="outside lower left", ncols=len(handles), frameon=False, fontsize=9,
        handlelength=1.2, columnspacing=1.5,
    )  # fmt: skip
    first = rows[0]
    device = f"{first['device']}, {first['dtype']}, torch {first['torch']}, {first['time'][:10]}"
    figure.text(0.995, 0.985, device, ha="right", va="top", fontsize=7, color="#555555")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    figure.savefig(temporary, dpi=150, format="png")
    os.replace(temporary, path)


class _Layout:
    """The vertical places of titles, names of losses and bars, from the top down in units of a bar."""

    def __init__(self, rows: list[dict[str, str]], ratios: dict[Any, float], failed: dict[Any, str]) -> None:
        self.titles: dict[float, str] = {}
        self.names: dict[float, str] = {}
        self.bars: dict[float, tuple[str, str, str]] = {}
        place = 0.0
        for case in dict.fromkeys(row["case"] for row in rows):
            for loss in LOSSES:
                keys = [(case, loss, name) for name in _COLOURS]
                keys = [key for key in keys if (*key, "time") in ratios or key in failed]
                if not keys:
                    continue
                if case not in self.titles.values():
                    self.titles[place] = case
                    place -= 1.3
                self.names[place - (len(keys) - 1) / 2] = loss
                for key in keys:
                    self.bars[place] = key
                    place -= 1
                place -= 0.5
            place -= 0.5
        self.height = -place


def relative(rows: list[dict[str, str]]) -> dict[tuple[str, str, str, str], float]:
    """Time and peak as multiples of plain PyTorch's, by (case, loss, provider, metric)."""
    values = {
        (row["case"], row["loss"], row["provider"], row["metric"]): float(row["value"])
        for row in rows
        if row["metric"] in _PANELS
    }
    found = {}
    for (case, loss, provider, metric), value in values.items():
        base = values.get((case, loss, BASELINE, metric))
        if base:
            found[case, loss, provider, metric] = value / base
    return found


def _failed(rows: list[dict[str, str]]) -> dict[tuple[str, str, str], str]:
    """The providers without a bar because memory ran out, with their notes."""
    notes = {(row["case"], row["loss"], row["provider"]): row["note"] for row in rows if row["metric"] == "status"}
    return {key: note for key, note in notes.items() if note == OUT_OF_MEMORY}


def _panel(axis: Any, metric: str, ratios: dict[Any, float], failed: dict[Any, str], layout: _Layout) -> None:
    values = {place: ratios[(*key, metric)] for place, key in layout.bars.items() if (*key, metric) in ratios}
    longest = min(_MOST, max(1.1, *values.values()))
    axis.axvline(1, color="black", linewidth=1, label="plain PyTorch", zorder=3)
    for name, colour in _COLOURS.items():
        own = [place for place in values if layout.bars[place][2] == name]
        if own:
            axis.barh(own, [min(values[place], longest) for place in own], height=0.86, color=colour, label=name)
    for place, key in layout.bars.items():
        text = f"{values[place]:.2f}" if place in values else failed.get(key, "")
        where = min(values.get(place, 0), longest) + 0.015 * longest
        axis.text(where, place, text, va="center", fontsize=7.5, zorder=4, bbox=_WHITE if text else None)
    axis.set_xlim(0, 1.12 * longest)
    axis.set_ylim(-layout.height + 0.5, 0.8)
    axis.set_title(_PANELS[metric], loc="left", fontsize=10)
    axis.tick_params(axis="x", labelsize=8)
    axis.tick_params(axis="y", length=0)
    axis.spines[["top", "right", "left"]].set_visible(False)


if __name__ == "__main__":
    sys.exit(main())
