"""Flags that several `nextquill popi` commands share, and what they stand for."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from transformers.utils import logging as transformers_logging

from nextquill.cli.flags import check_positive, option
from nextquill.cli.load_and_score import device
from nextquill.data import Record, read_jsonl
from nextquill.data.loaders import FORMATS, load
from nextquill.errors import ArgumentError, NextQuillError, RecordError
from nextquill.popi.users import User, users_from_records

if TYPE_CHECKING:
    from nextquill.popi.config import POPIConfig
    from nextquill.popi.saved_run import SavedRun, SavedSettings
    from nextquill.popi.summarizing import HeldOut

#: The library's own records, besides the data sets that `convert` knows.
RECORDS = "records"


@dataclass
class PopiRunOptions:
    """Which trained models are used."""

    model: str = option("The output folder of popi train, or a checkpoint in it.", metavar="DIR")
    dtype: str = option(
        "Precision the weights are loaded in.", "auto", choices=["auto", "float32", "bfloat16", "float16"]
    )


@dataclass
class PopiFormat:
    """What the rows of files are."""

    format: str = option(
        "What the rows are: records of this library with chosen and rejected, or a format of convert, such as "
        "preferences.", RECORDS, choices=[RECORDS, *FORMATS],
    )  # fmt: skip
    limit: int | None = option("Only the first so many users.", None)

    def users(self, flag: str, paths: list[str], *, need_pairs: bool = True) -> list[User]:
        """The users of these files; a mistake in them names the flag.

        Raises:
            RecordError: a row is malformed, or there are no pairs where they are needed.
        """
        check_positive(self, ("limit",))
        with naming(flag):
            return users_from_records(self._records(paths), need_pairs=need_pairs)[: self.limit]

    def _records(self, paths: list[str]) -> Iterator[Record]:
        if self.format != RECORDS:
            yield from load(self.format, paths if len(paths) > 1 else paths[0])
            return
        for path in paths:
            yield from read_jsonl(path)


@contextmanager
def naming(flag: str) -> Iterator[None]:
    """Name the flag that a mistake was given by."""
    try:
        yield
    except NextQuillError as error:
        kind = RecordError if isinstance(error, RecordError) else type(error)  # some of those take more arguments
        raise kind(f"--{flag}: {str(error).removeprefix('model_name_or_path: ')}") from error


def check_not_read(target: Path, inputs: Sequence[str]) -> None:
    """Raise ArgumentError where the output file would take the place of a file that is read."""
    if target.resolve() in {Path(path).resolve() for path in inputs}:
        raise ArgumentError(f"--output_file: expected a file of its own, got {target}, which is read")


@dataclass
class PopiSignals:
    """What of a user is shown to the inference model."""

    signals_per_user: int | None = option("Most signals of a user, the newest (as in training).", None)
    max_pairs: int | None = option(
        "Most pairs of a user that are held out, the earliest after the signals (all).", None
    )

    def check(self) -> None:
        """Raise ArgumentError for a number below 1."""
        check_positive(self, ("signals_per_user", "max_pairs"))

    def hold_out(self, flag: str, users: list[User], config: POPIConfig) -> HeldOut:
        """First signals, then pairs of every user; who cannot be evaluated is named on stderr."""
        from nextquill.popi.summarizing import hold_out

        with naming(flag):
            found = hold_out(
                users, num_signals=self.signals_per_user or config.signals_per_user, max_pairs=self.max_pairs
            )
        print(f"nextquill: {found}", file=sys.stderr)
        return found


def loaded_run(options: PopiRunOptions) -> SavedRun:
    """The run, on its device; a mistake in its folder names the flag."""
    from nextquill.popi.saved_run import SavedRun

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    with naming("model"):
        run = SavedRun(options.model, dtype=options.dtype)
    run.roles.to(device())
    return run


def read_settings(options: PopiRunOptions) -> SavedSettings:
    """How the run was trained, read before anything that takes time."""
    from nextquill.popi.saved_run import saved_settings

    with naming("model"):
        return saved_settings(options.model)
