"""POPI on the real model and real people: `python -m benchmarks.study.popi --model DIR --data reasons=DIR`.

Pairs hold a person's own reason and another's for the same verdict, so what is preferred is a manner, not a fact. The
first run measures the untrained model. The others train POPI, one for each seed, and measure it on people who were not
trained on:

    none       no context
    signals    the person's own texts
    before     the summary that the untrained model writes of them
    summary    the summary that the trained model writes of them; in the first run, the untrained
    placebo    another person's such summary

A run is a process, its result `runs/NAME.json`, and a stopped study resumes exactly, as that of losses does. Tables and
texts follow from these files: `python -m benchmarks.table`.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, astuple, dataclass, field, replace
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks.measure import RESULTS, commit, device_name, short_name
from benchmarks.study.__main__ import add_driver_flags, add_run_flags, data_of, drive, make_one
from benchmarks.study.folder import RUNS, RunFolder, model_name
from benchmarks.study.people import Size, check_apart, drawn, first_texts
from benchmarks.study.tables import table
from nextquill.data import PromptTemplate, Record, load_records
from nextquill.errors import ArgumentError
from nextquill.popi import POPIConfig, PopiTemplates, User, users_from_records
from nextquill.storage.fingerprints import fingerprint
from nextquill.storage.json_files import json_object, json_objects

VERSION = 1
BASE = "base"
FILES = "preferences_"
#: Summaries kept with the signals they were written from.
_SHOWN = 12
#: The wording was chosen on the untrained model's summaries of five people, see docs/evidence.md.
TEMPLATES = replace(
    PopiTemplates(),
    instruction="In one short sentence, describe the style of the reasons that this person gives. Quote nothing.",
    opening="This person's reasons are",
    inference=PromptTemplate(
        order="history_first", history_heading="[What the person wrote]:", query_heading="[Task]:",
        closing_cue="[Summary]:",
    ),
)  # fmt: skip


@dataclass(frozen=True)
class PopiPreset:
    """The settings of all runs.

    Args:
        name: on the command line.
        seeds: one training each.
        steps, users: optimiser steps, and people in each.
        rate, warmup_steps: of AdamW with a linear decay.
        lora_r, lora_layers: rank of both adapters, and the share of the model's last layers that get them.
        train, test: the most people and pairs to train on and to measure on.
        least: fewer test people are refused.
        config: POPI's own settings.
        save_steps: steps between checkpoints.
    """

    name: str
    seeds: Sequence[int]
    steps: int
    users: int
    rate: float
    warmup_steps: int
    lora_r: int
    lora_layers: float
    train: Size
    test: Size
    least: int
    config: POPIConfig
    save_steps: int


PRESETS: Mapping[str, PopiPreset] = {
    preset.name: preset
    for preset in (
        PopiPreset(
            "cpu", (1, 2, 3), steps=60, users=4, rate=5e-4, warmup_steps=6, lora_r=16, lora_layers=0.4,
            train=Size(120, 1440), test=Size(96, 192), least=10, save_steps=5,
            config=POPIConfig(group_size=4, pairs_per_user=2, signals_per_user=8, max_summary_tokens=48,
                              temperature=0.7, max_signal_tokens=768, max_length=768),
        ),
        PopiPreset(
            "smoke", (1,), steps=2, users=2, rate=1e-2, warmup_steps=1, lora_r=2, lora_layers=1.0,
            train=Size(8, 16), test=Size(4, 8), least=2, save_steps=1,
            config=POPIConfig(group_size=2, pairs_per_user=2, signals_per_user=3, max_summary_tokens=6,
                              max_signal_tokens=1024, max_length=1024),
        ),
    )
}  # fmt: skip


@dataclass(frozen=True)
class PopiRun:
    """One run: of the untrained model without a seed, which the others need for the summaries before training."""

    seed: int | None
    needs: tuple[str, ...] = field(default=(), compare=False)

    @property
    def name(self) -> str:
        """Its name in results and as a file."""
        return BASE if self.seed is None else f"popi-seed{self.seed}"


@dataclass(frozen=True)
class PopiStudy(RunFolder):
    """The study.

    Args:
        preset: its settings.
        model: the folder or name of the pretrained model.
        name, data: the data set's name and folder.
    """

    preset: PopiPreset
    model: str
    name: str
    data: Path

    def runs(self) -> list[PopiRun]:
        """See `RunFolder`."""
        return [PopiRun(None), *(PopiRun(seed, (BASE,)) for seed in self.preset.seeds)]

    def settings(self) -> dict[str, Any]:
        """See `RunFolder`."""
        train, test = self.users()
        users = {"train": fingerprint(map(repr, train)), "test": fingerprint(map(repr, test))}
        settings = {"preset": asdict(self.preset), "templates": TEMPLATES.to_dict(), "data": {self.name: users}}
        return {"version": VERSION, "model": model_name(self.model), **settings}

    def users(self) -> tuple[list[User], list[User]]:
        """People to train on and to measure on.

        A user to train on is a person's texts with as many pairs as a step draws. So all signals are texts of the
        person, as in the measurement, and none is a pair with its long query. A person has several such users.

        Raises:
            ArgumentError: a file is missing, a person is in both, or there are too few people.
        """
        sizes, chosen = {"train": self.preset.train, "test_unseen": self.preset.test}, list[list[Record]]()
        records = {stem: _records(self.name, self.data / f"{FILES}{stem}.jsonl") for stem in sizes}
        people = {stem: {record.user_id for record in records[stem]} for stem in sizes}
        check_apart(self.name, people["train"], people["test_unseen"], FILES)
        for stem, size in sizes.items():
            chosen.append(first_texts(records[stem], drawn(self.name, stem, people[stem], size.people), size.texts))
        train, test = map(users_from_records, chosen)
        if len(test) < self.preset.least:
            raise ArgumentError(
                f"data: expected at least {self.preset.least} test people in {self.name}, got {len(test)}"
            )
        size = self.preset.config.pairs_per_user
        parts = [
            User(f"{user.user_id} {start}", user.pairs[start : start + size], user.items)
            for user in train
            for start in range(0, len(user.pairs), size)
        ]
        return parts, test


def _records(name: str, path: Path) -> list[Record]:
    if not path.is_file():
        raise ArgumentError(f"data: expected {name}={path.parent} to hold {path.name}, which is not there")
    rows = [row for _, row in json_objects(path)]
    return load_records([{"query": row.get("prompt", ""), **row, "response": row.get("chosen")} for row in rows])


# ---- one run ---------------------------------------------------------------------------------------


@dataclass
class PopiWorker:
    """Makes one run."""

    study: PopiStudy
    run: PopiRun

    def __post_init__(self) -> None:
        self.preset = self.study.preset
        self.folder = self.study.work / self.run.name
        self.train_users, self.test_users = self.study.users()

    def perform(self) -> dict[str, Any]:
        """The run's result, as JSON."""
        import torch

        from nextquill.popi.summaries import hold_out

        clock = time.process_time
        began = clock()
        self.draws = hold_out(self.test_users, num_signals=self.preset.config.signals_per_user).draws
        roles, prompts, costs = self.untrained() if self.run.seed is None else self.trained(self.run.seed)
        trained_at = clock()
        device = next(roles[0].model.parameters()).device.type
        with torch.autocast(device, torch.bfloat16):
            summaries, written = self.write(roles[0], prompts[0])
            scores = self.score(roles[1], prompts[1], summaries)
            if self.run.needs:
                before = self.study.result(BASE)["summaries"]
                bare = [replace(draw, signals=()) for draw in self.draws]  # the signals are scored already
                scores["before"] = self.score(roles[1], prompts[1], before, bare)["summary"]
        return {
            "run": {"data": self.study.name, "seed": self.run.seed},
            "commit": commit(),
            "processor": short_name(device_name()),
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
            **costs,
            "seconds_measuring": clock() - trained_at,
            "seconds_process": clock() - began,
            "scores": {name: [astuple(score) for score in rows] for name, rows in scores.items()},
            "summaries": summaries,
            "written": written,
            "samples": [
                {"user_id": draw.user_id, "signals": [item.text for item in draw.signals],
                 "summary": summaries[draw.user_id]} for draw in self.draws[:_SHOWN]
            ],
        }  # fmt: skip

    def untrained(self) -> tuple[Any, Any, dict[str, Any]]:
        """The untrained model in both roles, and the prompts."""
        from nextquill.models.loading import load_model
        from nextquill.popi.prompts import GeneratorPrompts, InferencePrompts
        from nextquill.popi.roles import ROLES, Role

        model, tokenizer = load_model(self.study.model, dtype="float32")
        config = self.preset.config
        infer = InferencePrompts(tokenizer, TEMPLATES, max_prompt_tokens=config.max_signal_tokens)
        generate = GeneratorPrompts(tokenizer, TEMPLATES, max_length=config.max_length)
        return [Role.untrained(name, model, tokenizer) for name in ROLES], (infer, generate), {}

    def trained(self, seed: int) -> tuple[Any, Any, dict[str, Any]]:
        """Both roles after the training, the prompts, and what the training cost and logged."""
        import torch
        from transformers import TrainingArguments, set_seed

        from benchmarks.study.run import adapter
        from nextquill.comparison.measuring import RunMeter
        from nextquill.models.loading import load_model
        from nextquill.popi import POPITrainer
        from nextquill.storage import checkpoints

        preset, folder = self.preset, self.folder / "training"
        model, tokenizer = load_model(self.study.model, dtype="float32")
        set_seed(seed)  # of the adapters
        meter = RunMeter(clock=time.process_time)
        args = TrainingArguments(
            str(folder), per_device_train_batch_size=preset.users, learning_rate=preset.rate, max_steps=preset.steps,
            warmup_steps=preset.warmup_steps, seed=seed, save_steps=preset.save_steps, save_total_limit=1,
            logging_steps=max(1, preset.steps // 12), report_to="none", disable_tqdm=True, bf16=True,
            use_cpu=not torch.accelerator.is_available(),
        )  # fmt: skip
        trainer = POPITrainer(
            model, args, config=preset.config, train_dataset=self.train_users, processing_class=tokenizer,
            peft_config=adapter(model, preset.lora_r, preset.lora_layers), templates=TEMPLATES, callbacks=[meter],
        )  # fmt: skip
        last = checkpoints.last_checkpoint(folder)
        trainer.train(resume_from_checkpoint=None if last is None else str(last))
        costs = {"seconds": meter.first_seconds + meter.later_seconds, "sessions": meter.sessions,
                 "steps": trainer.state.global_step, "logs": trainer.state.log_history}  # fmt: skip
        return tuple(trainer.roles), (trainer.inference_prompts, trainer.generator_prompts), costs

    def write(self, role: Any, prompts: Any) -> tuple[dict[str, str], dict[str, float]]:
        """The likeliest summary of each test person; their mean tokens, and the shares that ended and are distinct."""
        from nextquill.popi.summaries import summarize

        signals = {draw.user_id: draw.signals for draw in self.draws}
        found = {each.user_id: each for each in summarize(
            role, prompts, signals, max_new_tokens=self.preset.config.max_summary_tokens
        )}  # fmt: skip
        texts = {user: found[user].text for user in signals}
        return texts, {
            "tokens": fmean(each.tokens for each in found.values()),
            "ended": fmean(each.ended for each in found.values()),
            "distinct": len(set(texts.values())) / len(texts),
        }

    def score(self, role: Any, prompts: Any, summaries: Mapping[str, str], draws: Any = None) -> dict[str, Any]:
        """The library's scores of all pairs, by context."""
        from nextquill.popi.evaluation import score_pairs

        loss, seed = self.preset.config.loss, self.run.seed or 0
        return score_pairs(role, prompts, self.draws if draws is None else draws, summaries, loss=loss, seed=seed)


# ---- tables ----------------------------------------------------------------------------------------

_NAMES = {
    "none": "no context", "signals": "own texts", "before": "own summary before training",
    "summary": "own summary", "placebo": "another's summary",
}  # fmt: skip


def markdown(folder: Path) -> str:
    """All tables, from the files of the runs."""
    from nextquill.popi.evaluation import PairScore, measure

    results = [json_object(path) for path in sorted((folder / RUNS).glob("*.json"))]
    if not results:
        return "Not run yet.\n"
    base = [each for each in results if each["run"]["seed"] is None]
    trained = [each for each in results if each["run"]["seed"] is not None]
    accuracy, minus = list[list[str]](), list[list[str]]()
    for label, runs in (("untrained", base), (f"POPI, {len(trained)} seed{'s'[len(trained) == 1 :]}", trained)):
        if not runs:
            continue
        rows = {name: [PairScore(*row) for each in runs for row in each["scores"][name]] for name in runs[0]["scores"]}
        found = measure(rows)
        for name in (name for name in _NAMES if name in rows):
            context = found.contexts[name]
            shares = [_interval(*context.measures[each]) for each in ("accuracy", "logprob_accuracy")]
            accuracy.append([label, _NAMES[name], *shares, f"{context.context_tokens:.0f}"])
            if name in found.differences:
                difference = found.differences[name]["accuracy"]
                shown = _interval(difference.difference, difference.low, difference.high, "+")
                minus.append([label, _NAMES[name], shown, f"{difference.p_value:.2g}"])
    written = [["untrained" if each in base else f"seed {each['run']['seed']}",
                *(f"{each['written'][name]:.2f}" for name in ("tokens", "ended", "distinct")),
                f"{each.get('seconds', 0) / 60:.0f}", f"{each['seconds_measuring'] / 60:.0f}"]
               for each in [*base, *trained]]  # fmt: skip
    samples = [[*(sample["user_id"] for sample in same[:1]), *(_cell(sample["summary"]) for sample in same)]
               for same in zip(*(each["samples"] for each in [*base, *trained[:1]]), strict=True)]  # fmt: skip
    some = results[0]
    pairs, people = len(some["scores"]["none"]), len({row[0] for row in some["scores"]["none"]})
    heads = ["person", *(["untrained"] if base else []), *(["trained"] if trained else [])]
    machine = f"{some['processor']}, torch {some['torch']}"
    return "\n\n".join([
        f"{len(results)} runs are finished: {pairs} pairs of {people} people ({machine}).",
        table(["model", "context", "pairs judged right", "by log-probability alone", "tokens added"], accuracy),
        table(["model", "own summary minus", "pairs judged right", "p"], minus),
        table(["summaries", "tokens", "ended", "distinct", "CPU minutes of training", "of measuring"], written),
        table(heads, samples),
    ]) + "\n"  # fmt: skip


def _interval(value: float, low: float, high: float, sign: str = "") -> str:
    return f"{value:{sign}.2f} [{low:{sign}.2f}, {high:{sign}.2f}]"


def _cell(text: str) -> str:
    """A model's text in a cell of a table."""
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


# ---- command ---------------------------------------------------------------------------------------


def study_of(chosen: argparse.Namespace) -> PopiStudy:
    """The study that the flags describe; ArgumentError unless there is one data set."""
    data = data_of(chosen)
    if len(data) != 1:
        raise ArgumentError(f"data: expected one data set, NAME=FOLDER, got {len(data)}")
    ((name, folder),) = data.items()
    out = chosen.out or RESULTS / f"study-popi-{chosen.preset}"
    return PopiStudy(out, PRESETS[chosen.preset], chosen.model, name, folder)


def main(arguments: Sequence[str] | None = None) -> int:
    """Make the runs that are left, or with `--run` one of them; 0 when that is done."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.study.popi", description=__doc__, allow_abbrev=False)
    add_run_flags(parser, PRESETS, "study-popi-PRESET")
    add_driver_flags(parser)
    parser.add_argument("--run", help="make this run alone, in this process")
    chosen = parser.parse_args(arguments)
    if chosen.run is None:
        return drive("benchmarks.study.popi", study_of, chosen)
    return make_one(study_of(chosen), chosen.run, PopiWorker, parser)


if __name__ == "__main__":
    sys.exit(main())
