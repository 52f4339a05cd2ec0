"""Flags that several `nextquill popi` commands share."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from nextquill.cli.flags import check_positive, option
from nextquill.cli.load_and_score import device, quieten_transformers
from nextquill.cli.options import SavedModelOptions
from nextquill.cli.terminal import say
from nextquill.data import Record, load_records
from nextquill.data.loaders import FORMATS, load
from nextquill.data.records import RECORD_FIELDS
from nextquill.data.skipped import PlacedError
from nextquill.errors import ArgumentError, naming
from nextquill.popi.users import User, users_from_records
from nextquill.storage.input_files import real_path

if TYPE_CHECKING:
    from nextquill.popi.config import POPIConfig
    from nextquill.popi.prompts import PopiTemplates
    from nextquill.popi.saved_run import SavedRun
    from nextquill.popi.summaries import HeldOut

#: The format of nextquill's own records; the others are those of `convert`.
RECORDS = "records"


@dataclass
class PopiRunOptions(SavedModelOptions):
    """Models: the trained run."""

    model: str = option(
        "The output folder of popi train, or a checkpoint in it.", aliases=["model_name_or_path"], metavar="DIR"
    )


@dataclass
class PopiFormat:
    """Rows: their format and number."""

    format: str = option(
        "The format of the rows: records (nextquill's own, with chosen and rejected), or a format of convert.",
        RECORDS, choices=[RECORDS, *FORMATS],
    )  # fmt: skip
    limit: int | None = option("Use only the first INT users.", None)

    def users(self, flag: str, paths: list[str], *, need_pairs: bool = True) -> list[User]:
        """Read the users in these files; an error in them names the flag."""
        check_positive(self, ("limit",))
        with naming(flag):
            return users_from_records(self._records(paths), need_pairs=need_pairs)[: self.limit]

    def _records(self, paths: list[str]) -> Iterator[Record]:
        if self.format != RECORDS:
            yield from load(self.format, paths)
            return
        try:
            for path in paths:
                yield from load_records(path)
        except PlacedError as error:
            if error.field in RECORD_FIELDS:
                error.problem += "; --format preferences reads rows of prompt, chosen and rejected"
            raise


def check_not_read(target: Path, inputs: Sequence[str]) -> None:
    """Raise ArgumentError if the output file would replace an input."""
    if real_path(target) in {real_path(path) for path in inputs}:
        raise ArgumentError(f"output_file: expected a file of its own, got {target}, which is read")


@dataclass
class PopiSignals:
    """Signals: the texts of a user that the inference model reads."""

    signals_per_user: int | None = option("Most signals of a user, the newest ones (default: as in training).", None)
    max_pairs: int | None = option("Most held-out pairs of a user, the first after the signals (default: all).", None)

    def check(self) -> None:
        """Raise ArgumentError for a number below 1."""
        check_positive(self, ("signals_per_user", "max_pairs"))

    def hold_out(self, flag: str, users: list[User], config: POPIConfig) -> HeldOut:
        """Return the signals and the held-out pairs of every user; name users who cannot be evaluated on stderr."""
        from nextquill.popi.summaries import hold_out

        most = self.signals_per_user or config.signals_per_user
        with naming(flag):
            found = hold_out(users, num_signals=most, max_pairs=self.max_pairs)
        say(str(found))
        return found


def loaded_run(options: PopiRunOptions) -> SavedRun:
    """Load the run onto the device; an error in its folder names the flag."""
    from nextquill.popi.saved_run import SavedRun

    quieten_transformers()
    with naming("model", "model_name_or_path"):
        run = SavedRun(options.model, **options.loading())
    run.roles.to(device())
    return run


def read_settings(folder: str) -> tuple[POPIConfig, PopiTemplates]:
    """Read the settings of the run in a folder, before anything that takes time."""
    from nextquill.popi.saved_run import saved_settings

    with naming("model", "model_name_or_path"):
        return saved_settings(folder)
