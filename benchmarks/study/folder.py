"""The study's folder: its settings, the results of its runs, and the files of runs under way.

study.json          the settings; a study with other settings is refused
runs/NAME.json      the result of a finished run
work/               checkpoints and evaluations of runs under way, on this machine only
"""

from __future__ import annotations

import json
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from benchmarks.study.people import People, read_people
from benchmarks.study.plan import PRESETS, Preset, Run, planned
from nextquill.errors import ArgumentError, OutputExistsError
from nextquill.storage.atomic_files import write_whole
from nextquill.storage.fingerprints import fingerprint
from nextquill.storage.json_files import json_object
from nextquill.storage.locks import try_lock

SETTINGS, RUNS, WORK = "study.json", "runs", "work"
#: Raised when results of older code can no longer stand beside new ones.
VERSION = 1


@dataclass(frozen=True)
class RunFolder(ABC):
    """The folder of runs with small files as results; see `Driver` for what starts them.

    Args:
        folder: where its files are.
    """

    folder: Path

    @property
    def work(self) -> Path:
        """The folder of the runs under way."""
        return self.folder / WORK

    def path(self, name: str) -> Path:
        """The file of a run's result."""
        return self.folder / RUNS / f"{name}.json"

    def result(self, name: str) -> dict[str, Any]:
        """The result of a finished run."""
        return json_object(self.path(name))

    @abstractmethod
    def runs(self) -> Sequence[Any]:
        """The runs in their order, as far as the finished ones decide them, each with a `name` and `needs`."""

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """What must agree for the runs to resume, as JSON; folders may differ between machines."""

    def open(self) -> None:
        """Write the settings, or compare them with those that are there.

        Raises:
            OutputExistsError: the folder holds a study with other settings; the message names the first that differs.
        """
        path, given = self.folder / SETTINGS, json.loads(json.dumps(self.settings()))
        if path.is_file():
            there = json_object(path)
            for name, value in given.items():
                if there.get(name) != value:
                    raise OutputExistsError(
                        f"folder: {self.folder} holds a study with another {name}: there {there.get(name)!r:.300}, "
                        f"here {value!r:.300}; choose another folder"
                    )
        (self.folder / RUNS).mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps(given, indent=1) + "\n")


@dataclass(frozen=True)
class Study(RunFolder):
    """A study of losses.

    Args:
        preset: its settings.
        model: the folder or name of the pretrained model.
        data: the folders of its data sets by name, in their order.
        prose: a file of general prose, to see what training forgets.
    """

    preset: Preset
    model: str
    data: Mapping[str, Path]
    prose: str | None = None

    @cached_property
    def _people(self) -> dict[str, People]:
        return {}

    def people(self, name: str) -> People:
        """A data set, divided."""
        if name not in self._people:
            self._people[name] = read_people(name, self.data[name], self.preset.sizes)
        return self._people[name]

    def runs(self) -> list[Run]:
        """See `RunFolder`."""
        return list(planned(self.preset, list(self.data), self._score))

    def _score(self, name: str) -> float | None:
        return self.result(name)["dev_score"] if self.path(name).is_file() else None

    def settings(self) -> dict[str, Any]:
        """See `RunFolder`."""
        prose = None if self.prose is None else fingerprint([Path(self.prose).read_bytes()])
        return {
            "version": VERSION,
            "preset": self.preset.to_dict(),
            "model": model_name(self.model),
            "data": {name: self.people(name).digest() for name in self.data},
            "prose": prose,
        }


def make_study(folder: Path, preset: str, model: str, data: Mapping[str, Path], prose: str | None) -> Study:
    """A study with these settings.

    Raises:
        ArgumentError: there is no such preset, or no data set.
    """
    if preset not in PRESETS:
        raise ArgumentError(f"preset: expected one of {', '.join(PRESETS)}, got {preset!r}")
    if not data:
        raise ArgumentError("data: expected at least one data set, NAME=FOLDER, got none")
    return Study(folder, PRESETS[preset], model, data, prose)


def model_name(given: str) -> dict[str, str]:
    """A pretrained model's name and a digest of its weights.

    Raises:
        ArgumentError: the model has no chat template, which all prompts of a study use.
    """
    from nextquill.evaluation.identity import model_digest
    from nextquill.models.loading import load_model

    model, tokenizer = load_model(given, dtype="float32")
    if not tokenizer.chat_template:
        raise ArgumentError(f"model: expected a tokenizer with a chat template, got none in {given}")
    return {"name": Path(given).name, "weights": model_digest(model)}


@contextmanager
def alone(path: Path) -> Iterator[None]:
    """Wait until no other process is inside with the same path; a process that dies is outside."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as lock:
        while not try_lock(lock):
            time.sleep(1)
        yield
