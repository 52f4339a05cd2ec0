"""Tables, figures and the picture of the study: `python -m benchmarks.study.tables --out DIR`.

Everything follows from the files in `runs/`. A difference from SFT is paired by text, with whole people drawn, and over
seeds where there are several (`paired_over_seeds`); p-values of a measure are corrected for all methods (Holm).
"""

from __future__ import annotations

import argparse
import csv
import io
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import mean
from textwrap import fill
from typing import Any, NamedTuple

import numpy as np

from benchmarks.measure import RESULTS
from benchmarks.study.folder import RUNS
from benchmarks.study.methods import METHODS, REPEATED, SFT
from nextquill.evaluation.bootstrap import SeedsResult, paired_over_seeds
from nextquill.evaluation.metrics import MetricScores
from nextquill.evaluation.metrics.scores import ratio
from nextquill.evaluation.permutation import holm
from nextquill.storage.atomic_files import write_whole
from nextquill.storage.json_files import json_object

#: The people's own texts, where a decoding stands for generated ones.
OWN = ""
#: The difference that four of five studies like this one would detect, in standard errors.
_DETECTABLE = 1.96 + 0.84
#: Corrected p-values below this are taken for a difference.
_LEVEL = 0.05
_TABLE = "study.csv"
_COLUMNS = ("data", "method", "rate", "seed", "set", "decoding", "measure", "value", "texts", "people",
            "seconds", "commit", "processor", "torch")  # fmt: skip


class Measure(NamedTuple):
    """A measure in a table: its name, its heading, and its decimals."""

    name: str
    heading: str
    decimals: int = 2


NLL_MEASURES = (
    Measure("nll_factual", "nll"),
    Measure("nll_at_temperature", "nll at its temperature"),
    Measure("temperature", "temperature"),
    Measure("ece", "ECE", 3),
    Measure("top1", "first token right", 3),
    Measure("nll_personal", "nll, personal tokens"),
    Measure("nll_generic", "nll, generic tokens"),
    Measure("effect_placebo", "effect against another's history", 3),
    Measure("nll_prose", "nll of general prose"),
)
TEXT_MEASURES = (
    Measure("rouge_l", "ROUGE-L", 3),
    Measure("meteor_exact_stem", "METEOR", 3),
    Measure("chrf", "chrF", 1),
    Measure("right_person", "right person"),
    Measure("right_person_lm", "by the language model"),
    Measure("right_person_uncopied", "by what is not copied"),
    Measure("copied", "copied"),
    Measure("distinct", "distinct"),
    Measure("length_ratio", "length"),
)
#: How well effects find the tokens that the records name as personal.
FOUND_MEASURES = (
    Measure("auc_effect_prob", "AUC, probability"),
    Measure("auc_effect_logprob", "AUC, log-probability"),
    Measure("auc_effect_prob_placebo", "AUC, probability, against another's"),
    Measure("auc_effect_logprob_placebo", "AUC, log-probability, against another's"),
    Measure("precision_effect_prob", "precision"),
    Measure("recall_effect_prob", "recall"),
    Measure("f1_effect_prob", "F1"),
    Measure("precision_effect_prob_placebo", "precision, against another's"),
    Measure("recall_effect_prob_placebo", "recall, against another's"),
    Measure("f1_effect_prob_placebo", "F1, against another's"),
)
#: Measures of being personal whose frontier with ROUGE-L is compared.
FRONTIERS = ("right_person", "right_person_uncopied")
#: What methods are compared by, decided before the study.
PRIMARY = ("nll_at_temperature", "rouge_l", "right_person", "right_person_uncopied", "copied")


@dataclass(frozen=True)
class Result:
    """A finished run."""

    raw: Mapping[str, Any]

    @property
    def key(self) -> tuple[str, str, float]:
        """Data set, method and learning rate."""
        run = self.raw["run"]
        return run["data"], run["method"], run["rate"]

    def value(self, measure: str, decoding: str = OWN, of: str = "test") -> float | None:
        """A measure of the people's own texts in a set, or of texts generated in one way."""
        places = self.raw["sets"][of] if decoding == OWN else self.raw["texts"]["decodings"].get(decoding, {})
        found: float | None = places.get("values", {}).get(measure)
        return found

    def scores(self, measure: str, decoding: str = OWN) -> tuple[list[Any], list[str]]:
        """Every text's statistics (None where it has none), and the person of each."""
        place = self.raw["sets"]["test"] if decoding == OWN else self.raw["texts"]["decodings"][decoding]
        users = self.raw["sets"]["test"]["users"] if decoding == OWN else self.raw["texts"]["users"]
        return place["rows"][measure], users


class Results:
    """The results of a study, by data set, method and rate."""

    def __init__(self, folder: Path) -> None:
        self.all = [Result(json_object(path)) for path in sorted((folder / RUNS).glob("*.json"))]

    @cached_property
    def data(self) -> list[str]:
        """The data sets; the one with most runs first."""
        names = [result.key[0] for result in self.all]
        return sorted(set(names), key=lambda name: (-names.count(name), name))

    def methods(self, data: str) -> dict[str, list[Result]]:
        """The runs of each method at the rate that the study chose, in the order of `METHODS`."""
        found = dict[str, list[Result]]()
        for name in METHODS:
            rate = self.rate(data, name)
            runs = [result for result in self.all if result.key == (data, name, rate)]
            if runs:
                found[name] = sorted(runs, key=lambda result: int(result.raw["run"]["seed"]))
        return found

    def rate(self, data: str, method: str) -> float | None:
        """The chosen rate: that with most seeds, and among equals the lowest nll on development people."""
        rates = dict[float, list[float]]()
        for result in self.all:
            if result.key[:2] == (data, method):
                rates.setdefault(result.key[2], []).append(result.raw["dev_score"])
        return min(rates, key=lambda rate: (-len(rates[rate]), mean(rates[rate]))) if rates else None

    def cost(self, data: str, method: str) -> float | None:
        """A method's training time as a multiple of SFT's on the same processor; None where that is not known."""
        times = dict[tuple[str, str], list[float]]()
        for result in self.all:
            if result.key[0] == data and "seconds" in result.raw:
                times.setdefault((result.key[1], result.raw["processor"]), []).append(result.raw["seconds"])
        ratios = [
            mean(seconds) / mean(times[SFT, processor])
            for (name, processor), seconds in times.items()
            if name == method and (SFT, processor) in times
        ]
        return mean(ratios) if ratios else None

    def tried(self, data: str) -> dict[str, dict[float, float]]:
        """nll on development people of the first seed, by method and rate, of the methods with several rates."""
        found = dict[str, dict[float, float]]()
        for result in sorted(self.all, key=lambda each: int(each.raw["run"]["seed"]), reverse=True):
            if result.key[0] == data:
                found.setdefault(result.key[1], {})[result.key[2]] = result.raw["dev_score"]
        return {method: dict(sorted(rates.items())) for method, rates in found.items() if len(rates) > 1}


def rebuilt(rows: Sequence[Any]) -> MetricScores:
    """A measure's scores from the two sums of each text."""
    return MetricScores(np.asarray(rows, dtype=np.float64), ratio)


def difference(ours: Sequence[Result], others: Sequence[Result], measure: str, decoding: str) -> SeedsResult | None:
    """The mean of one method's runs minus another's, on the texts that have the measure in all of them."""
    runs = [[result.scores(measure, decoding)[0] for result in side] for side in (ours, others)]
    users = ours[0].scores(measure, decoding)[1]
    held = [at for at in range(len(users)) if all(rows[at] is not None for side in runs for rows in side)]
    if not held:
        return None
    sides = [[rebuilt([rows[at] for at in held]) for rows in side] for side in runs]
    return paired_over_seeds(*sides, [users[at] for at in held], matched=_matched(ours, others))


def _matched(ours: Sequence[Result], others: Sequence[Result]) -> bool:
    first, second = ([run.raw["run"]["seed"] for run in side] for side in (ours, others))
    return first == second


def table_rows(results: Results) -> Iterator[dict[str, Any]]:
    """Every value of every run."""
    for result in results.all:
        raw = result.raw
        run = raw["run"]
        shared = {**run, **{name: raw[name] for name in ("commit", "processor", "torch")}}
        shared["seconds"] = round(raw.get("seconds") or 0)
        for name, part in raw["sets"].items():
            people = {"texts": int(part["values"]["examples"]), "people": int(part["values"]["users"])}
            for measure, value in part["values"].items():
                yield {**shared, **people, "set": name, "decoding": "", "measure": measure, "value": f"{value:.6g}"}
        written = raw["texts"]["users"]
        people = {"texts": len(written), "people": len(set(written))}
        for name, part in raw["texts"]["decodings"].items():
            for measure, value in part["values"].items():
                yield {**shared, **people, "set": "test", "decoding": name, "measure": measure, "value": f"{value:.6g}"}


def as_csv(results: Results) -> str:
    """The text of `study.csv`."""
    stream = io.StringIO()
    writer = csv.DictWriter(stream, _COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(table_rows(results))
    return stream.getvalue()


def methods_table() -> str:
    """The methods, and what was expected of each before its first run."""
    rows = [[f"`{name}`", method.label, method.hypothesis] for name, method in METHODS.items()]
    return table(["method", "", "expected before its first run"], rows)


def markdown(results: Results) -> str:
    """All tables."""
    if not results.all:
        return "No run is finished yet.\n"
    machines = sorted({f"{raw['processor']}, torch {raw['torch']}" for raw in (each.raw for each in results.all)})
    parts = [f"Finished runs: {len(results.all)} ({'; '.join(machines)})."]
    for data in results.data:
        parts += [f"### {data}", rates_table(results, data), own_table(results, data), found_table(results, data),
                  texts_table(results, data), differences_table(results, data),
                  variants_table(results, data), frontiers_table(results, data)]  # fmt: skip
    return "\n\n".join(part for part in parts if part) + "\n"


def answer(results: Results, *, brief: bool = False) -> str:
    """What the finished runs say of each method against SFT: a table for each data set, and one sentence on all.

    Args:
        brief: only the first data set, and only methods without a parent and repeated ones.
    """
    if not results.all or SFT not in results.methods(results.data[0]):
        return "No run of SFT is finished yet.\n"
    tables, moved = list[str](), list[str]()
    for data in results.data[: 1 if brief else None]:
        nlls, areas = _from_sft(results, data, "nll_at_temperature"), _frontiers(results, data, FRONTIERS[0])
        rows = list[list[str]]()
        for name, runs in results.methods(data).items():
            found = [number(_mean(runs, FRONTIERS[0], decoding), 2) for decoding in ("γ=0", "γ=1")]
            cells = [METHODS[name].label, str(len(runs)), *found, number(_mean(runs, "rouge_l", "γ=0"), 3)]
            if name in nlls:
                cost = results.cost(data, name)
                cells += [_interval(nlls[name], 2), _interval(areas[name], 3), f"{cost:.2f}×" if cost else "–"]
                if _shown(areas[name]) and areas[name][0].difference > 0:
                    moved.append(f"{METHODS[name].label} ({data})")
            else:
                cells += ["–", "–", "1×" if name == SFT else "–"]
            if not brief or METHODS[name].parent is None or name in REPEATED:
                rows.append(cells)
        heads = [
            "seeds",
            "author found",
            "with γ=1",
            "ROUGE-L",
            "nll − SFT's (bold: shown)",
            "area − SFT's",
            "training time",
        ]
        tables.append(table([data, *heads], rows))
    verdict = (
        f"More personal at the same ROUGE-L than SFT under some guidance: {', '.join(moved)}."
        if moved
        else "No loss is shown to be more personal at the same ROUGE-L than SFT with guidance, which needs no training."
    )
    return "\n\n".join([*tables, fill(verdict, 120)])


def _interval(found: tuple[SeedsResult, float], decimals: int) -> str:
    """A difference with its interval, in bold if it is shown."""
    result, _ = found
    text = f"{result.difference:+.{decimals}f} [{result.low:+.{decimals}f}, {result.high:+.{decimals}f}]"
    return f"**{text}**" if _shown(found) else text


def _shown(found: tuple[SeedsResult, float]) -> bool:
    """Whether the interval leaves out zero, and the corrected p-value is small enough."""
    result, p = found
    return result.excludes_zero and p < _LEVEL


def rates_table(results: Results, data: str) -> str:
    """nll on development people by method and learning rate."""
    tried = results.tried(data)
    rates = sorted({rate for each in tried.values() for rate in each})
    rows = [[METHODS[name].label, *(number(each.get(rate), 3) for rate in rates)] for name, each in tried.items()]
    return table([f"nll on development people, {data}", *(f"{rate:g}" for rate in rates)], rows) if rows else ""


def own_table(results: Results, data: str) -> str:
    """Measures of the people's own texts."""
    rows = []
    for name, runs in results.methods(data).items():
        values = [number(_mean(runs, each.name), each.decimals) for each in NLL_MEASURES]
        seen = number(_mean(runs, "nll_at_temperature", of="seen"), 2)
        rate = f"{runs[0].key[2]:g}" if runs[0].key[2] else "–"
        rows.append([METHODS[name].label, rate, str(len(runs)), number(results.cost(data, name), 2), *values, seen])
    heads = [f"the people's own texts, {data}", "rate", "seeds", "training time"]
    heads += [each.heading for each in NLL_MEASURES]
    return table([*heads, "nll, people of the training"], rows)


def found_table(results: Results, data: str) -> str:
    """How well the effects of each method's model find known personal tokens; empty where none are known."""
    rows = []
    for name, runs in results.methods(data).items():
        values = [_mean(runs, each.name) for each in FOUND_MEASURES]
        if any(value is not None for value in values):
            rows.append([METHODS[name].label, *(number(value, 2) for value in values)])
    heads = [f"known personal tokens found, {data}", *(each.heading for each in FOUND_MEASURES)]
    return table(heads, rows) if rows else ""


def texts_table(results: Results, data: str) -> str:
    """Measures of generated texts, by method and decoding."""
    rows = []
    for name, runs in results.methods(data).items():
        for decoding in runs[0].raw["texts"]["decodings"]:
            if decoding == "reference":
                continue
            values = [number(_mean(runs, each.name, decoding), each.decimals) for each in TEXT_MEASURES]
            rows.append([METHODS[name].label, decoding, *values])
    first = next(iter(results.methods(data).values()), None)
    if first is not None:
        decoding = next(iter(first[0].raw["texts"]["decodings"]))
        own = [number(_ceiling(first[0], each.name, decoding), each.decimals) for each in TEXT_MEASURES]
        rows.append(["the people's own", "", *own])
    return table([f"generated texts, {data}", "decoding", *(each.heading for each in TEXT_MEASURES)], rows)


def _ceiling(result: Result, measure: str, decoding: str) -> float | None:
    if measure == "right_person_lm":
        return result.value(measure, "reference")
    return result.value(f"{measure}_reference", decoding)


def frontiers_table(results: Results, data: str) -> str:
    """The area under every method's frontier, and its difference from SFT's."""
    methods = results.methods(data)
    if SFT not in methods:
        return ""
    columns: list[list[str]] = []
    for measure in FRONTIERS:
        found = _frontiers(results, data, measure)
        areas = {name: mean(frontier(run, measure).value for run in runs) for name, runs in methods.items()}
        columns.append([number(areas[name], 3) for name in methods])
        columns.append(["–" if name == SFT else _difference(*found[name], decimals=3) for name in methods])
    rows = [[METHODS[name].label, *(column[at] for column in columns)] for at, name in enumerate(methods)]
    headings = {each.name: each.heading for each in TEXT_MEASURES}
    pairs = [(f"area, {headings[name]}", "minus SFT") for name in FRONTIERS]
    return table([f"frontier over γ, {data}", *(head for pair in pairs for head in pair)], rows)


def _frontiers(results: Results, data: str, measure: str) -> dict[str, tuple[SeedsResult, float]]:
    """The area under each method's frontier minus that under SFT's, with p-values corrected for all methods."""
    methods = results.methods(data)
    areas = {name: [frontier(run, measure) for run in runs] for name, runs in methods.items()}
    users = methods[SFT][0].raw["texts"]["users"]
    found = {
        name: paired_over_seeds(areas[name], areas[SFT], users, matched=_matched(methods[name], methods[SFT]))
        for name in methods
        if name != SFT
    }
    return _corrected(found)


def _from_sft(results: Results, data: str, measure: str) -> dict[str, tuple[SeedsResult, float]]:
    """Each method minus SFT in a measure of the people's own texts, with p-values corrected for all methods."""
    methods = results.methods(data)
    found = {name: difference(runs, methods[SFT], measure, OWN) for name, runs in methods.items() if name != SFT}
    return _corrected({name: each for name, each in found.items() if each is not None})


def _corrected(found: Mapping[str, SeedsResult]) -> dict[str, tuple[SeedsResult, float]]:
    adjusted = holm([each.p_value for each in found.values()])
    return {name: (each, p) for (name, each), p in zip(found.items(), adjusted, strict=True)}


def frontier(result: Result, measure: str) -> MetricScores:
    """The area under a run's frontier of ROUGE-L over a measure of being personal, as scores of its texts.

    Over all levels t from 0 to 1: the best ROUGE-L of a γ whose texts reach the level, 0 where none does.

        area = ∫ max{ROUGE-L(γ) : measure(γ) ≥ t} dt
    """
    greedy = [name for name in result.raw["texts"]["decodings"] if name.startswith("γ=") and "T=" not in name]
    rows = [result.scores(each, name)[0] for name in greedy for each in ("rouge_l", measure)]
    return MetricScores(np.concatenate([np.asarray(each, dtype=np.float64) for each in rows], axis=1), _area)


def _area(sums: Any) -> Any:
    """[..., 4 · decodings] -> [...], from the two sums of ROUGE-L and the two of the measure for each decoding."""
    pairs = sums.reshape(*sums.shape[:-1], -1, 2, 2)
    faithful, personal = (pairs[..., at, 0] / np.maximum(pairs[..., at, 1], 1e-12) for at in (0, 1))
    order = np.argsort(personal, axis=-1)
    levels = np.take_along_axis(personal, order, axis=-1)
    best = np.maximum.accumulate(np.take_along_axis(faithful, order, axis=-1)[..., ::-1], axis=-1)[..., ::-1]
    return (np.diff(levels, axis=-1, prepend=0.0) * best).sum(axis=-1)


def differences_table(results: Results, data: str, decoding: str = "γ=0") -> str:
    """Every method minus SFT in the primary measures, with intervals, corrected p-values and detectable differences."""
    methods = results.methods(data)
    if SFT not in methods:
        return ""
    pairs = {METHODS[name].label: (runs, methods[SFT]) for name, runs in methods.items() if name != SFT}
    return compared(f"minus SFT, {data}, {decoding}", pairs, PRIMARY, decoding)


def variants_table(results: Results, data: str, decoding: str = "γ=0") -> str:
    """Every variant minus its parent, from the same seeds; as `differences_table`."""
    methods, pairs = results.methods(data), dict[str, tuple[Sequence[Result], Sequence[Result]]]()
    for name, runs in methods.items():
        parent, seeds = METHODS[name].parent, {run.raw["run"]["seed"] for run in runs}
        same = [run for run in methods.get(parent or "", ()) if run.raw["run"]["seed"] in seeds]
        if parent not in (None, SFT) and len(same) == len(runs):
            pairs[f"{METHODS[name].label}, minus {METHODS[parent].label}"] = runs, same
    return (
        compared(f"minus its parent, {data}, {decoding}", pairs, ("nll_factual", *PRIMARY), decoding) if pairs else ""
    )


def compared(
    heading: str, pairs: Mapping[str, tuple[Sequence[Result], Sequence[Result]]], measures: Sequence[str], decoding: str
) -> str:
    """The differences of runs, by label, in some measures; p-values are corrected for the number of labels."""
    columns: list[list[str]] = []
    for measure in measures:
        where = OWN if measure in NLL_NAMES else decoding
        found = [difference(*both, measure, where) for both in pairs.values()]
        adjusted = iter(holm([each.p_value for each in found if each is not None]))
        columns.append([_difference(each, None if each is None else next(adjusted)) for each in found])
    headings = {each.name: each.heading for each in (*NLL_MEASURES, *TEXT_MEASURES)}
    rows = [[label, *(column[at] for column in columns)] for at, label in enumerate(pairs)]
    return table([heading, *(headings[name] for name in measures)], rows)


NLL_NAMES = {each.name for each in NLL_MEASURES}


def _difference(found: SeedsResult | None, p: float | None, decimals: int = 2) -> str:
    if found is None or p is None:
        return "–"
    seen = _DETECTABLE * (found.high - found.low) / (2 * 1.96)
    own, low, high = (f"{each:+.{decimals}f}" for each in (found.difference, found.low, found.high))
    return f"{own} [{low}, {high}], p {p:.2g}, detectable {seen:.{decimals}f}"


def _mean(runs: Sequence[Result], measure: str, decoding: str = OWN, of: str = "test") -> float | None:
    values = [run.value(measure, decoding, of) for run in runs]
    known = [value for value in values if value is not None]
    return mean(known) if known else None


def number(value: float | None, decimals: int) -> str:
    return "–" if value is None else f"{value:.{decimals}f}"


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the tables, and write all values as CSV."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.study.tables", allow_abbrev=False)
    parser.add_argument("--out", type=Path, default=RESULTS / "study-cpu", help="the study's folder")
    chosen = parser.parse_args(arguments)
    results = Results(chosen.out)
    if not results.all:
        print(f"tables: no finished run in {chosen.out / RUNS}", file=sys.stderr)
        return 1
    write_whole(chosen.out / _TABLE, as_csv(results))
    print(markdown(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
