"""The best of n samples against guidance: `python -m benchmarks.study.best_of --preset cpu --model DIR --data …`.

On the first texts of the study's test people, one rule of five left the people as recognisable as guidance does, at the
same ROUGE-L, and copied less: the best of eight samples by the sum of log p1 - log p0. That is a lead, as the rule was
chosen on these texts. Here it meets the other texts of the test people, which no method of the study has written, on
all data sets and after two losses. Expected before the first run, against γ = 1 of the same model, greedy:

    copied                     fewer phrases
    right person, ROUGE-L      not shown to differ

Both kinds of the right person count, also the one by what is not copied. Samples might copy less by themselves, so
γ = 1 is also sampled as they are. Expected of that before its first run: the same. A run trains a method again as the
study did, at the rate that the study chose. Its result is `runs/NAME.json`; tables follow from these files.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure import RESULTS, commit, device_name, short_name
from benchmarks.study.__main__ import add_driver_flags, add_study_flags, drive, make_one
from benchmarks.study.__main__ import study_of as losses_of
from benchmarks.study.folder import RUNS, RunFolder, Study
from benchmarks.study.methods import METHODS
from benchmarks.study.people import TEST
from benchmarks.study.plan import BestOf, Decoding, Run
from benchmarks.study.run import Worker
from benchmarks.study.tables import TEXT_MEASURES, Result, Results, compared, number, table
from nextquill.errors import ArgumentError
from nextquill.storage.json_files import json_object

VERSION = 2
#: The last one, a single sample, was added when the first run was known.
RIVALS = ("γ=1", "γ=1, T=0.8", "γ=0, T=0.8")
#: What the rule is compared by, decided before its first run.
MEASURES = ("copied", "right_person", "right_person_uncopied", "rouge_l")
_ONLY = "only"


@dataclass(frozen=True)
class Rule:
    """A rule, which comes last among the decodings, and what it is compared with."""

    decodings: Sequence[Decoding] = (
        Decoding(0.0), Decoding(0.5), Decoding(1.0), Decoding(0.0, 0.8, 0.95), Decoding(1.0, 0.8, 0.95),
        BestOf(0.0, 0.8, 0.95),
    )  # fmt: skip
    methods: Sequence[str] = ("sft", "perce")
    seed: int = 1


@dataclass(frozen=True)
class BestOfRun:
    """One run: a method on a data set, at the rate that the study chose."""

    data: str
    method: str
    rate: float
    needs: tuple[str, ...] = field(default=(), compare=False)

    @property
    def name(self) -> str:
        """Its name in results and as a file."""
        return f"{self.data}-{self.method}"


@dataclass(frozen=True)
class BestOfStudy(RunFolder):
    """The study of one rule.

    Args:
        losses: the study of losses, with finished runs of all methods on all data sets.
        rule: the rule.
    """

    losses: Study
    rule: Rule = Rule()

    def runs(self) -> list[BestOfRun]:
        """See `RunFolder`.

        Raises:
            ArgumentError: the study of losses has no finished run of a method.
        """
        results, found = Results(self.losses.folder), list[BestOfRun]()
        for data in self.losses.data:
            for method in self.rule.methods:
                rate = results.rate(data, method)
                if rate is None:
                    raise ArgumentError(
                        f"losses: expected a finished run of {method} on {data} in {self.losses.folder}"
                    )
                found.append(BestOfRun(data, method, rate))
        return found

    def settings(self) -> dict[str, Any]:
        """See `RunFolder`."""
        return {**self.losses.settings(), "version": VERSION, "rule": asdict(self.rule)}


@dataclass
class BestOfWorker:
    """Makes one run."""

    study: BestOfStudy
    run: BestOfRun

    def __post_init__(self) -> None:
        self.rule = self.study.rule
        run = Run(self.run.data, self.run.method, self.rule.seed, self.run.rate)
        self.worker = Worker(self.study.losses, run)
        self.worker.folder = self.study.work / self.run.name
        self.worker.preset = replace(self.worker.preset, decodings=self.rule.decodings)

    def perform(self) -> dict[str, Any]:
        """The run's result, as JSON, in the form of the study's."""
        model, tokenizer = self.worker.start()
        model, costs = self.worker.train(model, tokenizer)
        model.to(torch.bfloat16)
        everyone = self.worker.people.sets[TEST]
        records = everyone[self.worker.preset.generated :]
        if not records:
            raise ArgumentError(f"data: expected texts of {self.run.data} beside those that the study wrote, got none")
        texts = self.worker.texts(model, tokenizer, records)
        return {
            "run": {**asdict(self.run), "seed": self.rule.seed},
            "commit": commit(),
            "processor": short_name(device_name()),
            "torch": torch.__version__,
            **costs,
            "texts": {
                "users": [record.user_id for record in records],
                "decodings": self.worker.measured(texts, records, texts),
            },
        }


# ---- tables ----------------------------------------------------------------------------------------


def markdown(folder: Path) -> str:
    """The measures of every decoding, and the best of n minus each rival, from the files of the runs."""
    results = [Result(json_object(path)) for path in sorted((folder / RUNS).glob("*.json"))]
    if not results:
        return "Not run yet.\n"
    rows = [
        [_label(each), decoding, *(number(each.value(name, decoding), decimals) for name, _, decimals in TEXT_MEASURES)]
        for each in results
        for decoding in each.raw["texts"]["decodings"]
    ]
    heads = ["model, data", "decoding", *(each.heading for each in TEXT_MEASURES)]
    best = [*results[0].raw["texts"]["decodings"]][-1]
    minus = [
        compared(
            f"{best}, minus {rival}",
            {_label(each): ([_only(each, best)], [_only(each, rival)]) for each in results},
            MEASURES,
            _ONLY,
        )
        for rival in RIVALS
    ]
    texts, people = (len(kind(results[0].raw["texts"]["users"])) for kind in (list, set))
    return "\n\n".join([
        f"Finished runs: {len(results)}. {results[0].key[0]}: {texts} texts of {people} people.",
        table(heads, rows),
        *minus,
    ]) + "\n"  # fmt: skip


def _label(result: Result) -> str:
    data, method, _ = result.key
    return f"{METHODS[method].label}, {data}"


def _only(result: Result, decoding: str) -> Result:
    """A result in which `_ONLY` is this decoding."""
    texts = result.raw["texts"]
    return Result({**result.raw, "texts": {**texts, "decodings": {_ONLY: texts["decodings"][decoding]}}})


# ---- command ---------------------------------------------------------------------------------------


def study_of(chosen: argparse.Namespace) -> BestOfStudy:
    """The study that the flags describe."""
    out = chosen.out or RESULTS / f"study-best-of-{chosen.preset}"
    losses = argparse.Namespace(**{**vars(chosen), "out": chosen.losses})
    study = BestOfStudy(out, losses_of(losses))
    study.runs()  # refuses, before any file is written, a study of losses without the runs that are needed
    return study


def main(arguments: Sequence[str] | None = None) -> int:
    """Make the runs that are left, or with `--run` one of them; 0 when that is done."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.study.best_of", allow_abbrev=False)
    add_study_flags(parser)
    add_driver_flags(parser)
    parser.add_argument(
        "--losses", type=Path, help="the folder of the finished study (benchmarks/results/study-PRESET)"
    )
    parser.add_argument("--run", help="make this run alone, in this process")
    chosen = parser.parse_args(arguments)
    if chosen.run is None:
        return drive("benchmarks.study.best_of", study_of, chosen)
    return make_one(study_of(chosen), chosen.run, BestOfWorker, parser)


if __name__ == "__main__":
    sys.exit(main())
