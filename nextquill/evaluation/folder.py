"""The folder of an evaluation while it is written. The same evaluation, started again, resumes from its lines.

    evaluation.json.partial   says which evaluation writes here; one process at a time holds it
    NAME.partial              lines of an unfinished stage
    NAME                      a finished stage
    evaluation.json           appears last

A stage is a file of JSON lines. The results follow from these lines alone, so a killed and resumed evaluation gives the
same bytes as an uninterrupted one.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from nextquill.errors import OutputExistsError
from nextquill.evaluation.results import (
    EFFECTS_FILE,
    EVALUATION_FILE,
    EXAMPLES_FILE,
    ITEM_EFFECTS_FILE,
    EvaluatedExample,
    Evaluation,
)
from nextquill.storage.atomic_files import write_whole
from nextquill.storage.json_files import json_objects
from nextquill.storage.resumable_jsonl import BegunFile, PartialFile

PREFERENCES_FILE, GENERATED_FILE, PREDICTIONS_FILE = "preferences.jsonl", "generated.jsonl", "predictions.json"
# Stages whose content ends up in the examples' file.
_PROGRESS = (PREFERENCES_FILE, GENERATED_FILE)
# All files but `evaluation.json`.
_FILES = (EFFECTS_FILE, ITEM_EFFECTS_FILE, *_PROGRESS, EXAMPLES_FILE, PREDICTIONS_FILE)

Progress = Callable[..., Iterable[Any]]


def check_folder(folder: Path, *, overwrite: bool = False) -> None:
    """Refuse a folder that cannot be written into, before any work.

    Raises:
        OutputExistsError: it holds a finished evaluation, or is not a folder.
    """
    if (folder / EVALUATION_FILE).exists() and not overwrite:
        raise OutputExistsError(f"folder: {folder} holds a finished evaluation; give another, or overwrite=True")
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not existing.is_dir():
        raise OutputExistsError(f"folder: expected a folder, {existing} is a file")


class EvaluationFolder:
    """A folder that one evaluation writes into. A context manager; a folder without any line is left as it was.

    Args:
        folder: created if it is missing.
        run: the settings that must agree for an evaluation to resume, by name; JSON.
        overwrite: delete the evaluation that is there, finished or not.

    Raises:
        OutputExistsError: the folder holds a finished evaluation or a file in the way, or another process writes there.
        CheckpointError: another evaluation was started there; the message names the setting that differs.
    """

    def __init__(self, folder: Path, run: Mapping[str, Any], *, overwrite: bool = False) -> None:
        check_folder(folder, overwrite=overwrite)
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self._begun = BegunFile(folder / EVALUATION_FILE, run, overwrite=overwrite, argument="folder")
        try:
            (folder / EVALUATION_FILE).unlink(missing_ok=True)
            if self._begun.is_new:
                self._clear(overwrite)  # first: files beside a partial file of ours would be taken for ours
                self._begun.begin()
        except BaseException:
            self._begun.close(remove=self._begun.is_new)
            raise

    def __enter__(self) -> EvaluationFolder:
        return self

    def __exit__(self, *error: object) -> None:
        finished = (self.folder / EVALUATION_FILE).exists()
        self._begun.close(remove=finished or not list(self._present()))

    def stage(
        self,
        name: str,
        indices: Sequence[int],
        make: Callable[[PartialFile], Iterable[Mapping[str, Any]]],
        desc: str,
        progress: Progress | None = None,
    ) -> list[dict[str, Any]]:
        """The lines of a stage: those already written, and those that `make` yields.

        Args:
            name: the stage's file.
            indices: the indices of all its lines, in the order of the file.
            make: called with the lines already written; yields the other lines, in any order.
            desc: the text of the progress bar.
            progress: `progress(lines, total=..., initial=..., desc=...)` is iterated instead of the lines; `tqdm` fits.
        """
        path = self.folder / name
        if not path.exists() and indices:
            with PartialFile(path, {}, argument="folder") as partial:
                lines = make(partial)
                if progress is not None:
                    lines = progress(lines, total=len(indices), initial=len(partial), desc=desc)
                for line in lines:
                    partial.write(line)
                partial.finish(indices)
        return [value for _, value in json_objects(path)] if indices else []

    def finish(self, evaluation: Evaluation, examples: Iterable[EvaluatedExample]) -> None:
        """Write the results; the evaluation itself last."""
        lines = [json.dumps(example.to_dict(), ensure_ascii=False) + "\n" for example in examples]
        write_whole(self.folder / EXAMPLES_FILE, "".join(lines))
        write_whole(self.folder / EVALUATION_FILE, evaluation.to_json())
        for name in _PROGRESS:
            (self.folder / name).unlink(missing_ok=True)

    def _present(self) -> Iterator[Path]:
        """The files an evaluation has written here, without `evaluation.json` and `evaluation.json.partial`."""
        for name in _FILES:
            for path in (self.folder / name, self.folder / f"{name}.partial"):
                if path.exists():
                    yield path

    def _clear(self, overwrite: bool) -> None:
        for path in list(self._present()):
            if not overwrite:
                raise OutputExistsError(f"folder: {path} exists; give another folder, or overwrite=True")
            path.unlink()
