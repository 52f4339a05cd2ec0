"""`nextquill popi summaries`: what is kept of users, to be read, corrected and deleted."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from nextquill.cli.flags import option
from nextquill.cli.main import OK
from nextquill.cli.parsing import UsageError, parse
from nextquill.cli.popi_options import naming
from nextquill.errors import ArgumentError, RecordError
from nextquill.popi.summaries import Summary, SummaryFile

DESCRIPTION = (
    "Show the summaries in a file, or one user's; or edit or delete it. An edited summary is used as it is, and "
    "summarize leaves it alone."
)


@dataclass
class PopiSummariesOptions:
    """Which summary, and what becomes of it."""

    summaries: str = option("The file of summaries.", metavar="FILE")
    show: str | None = option("Show this user's summary only.", None, metavar="USER")
    edit: list[str] | None = field(
        default=None,
        metadata={"help": "Put this text, in quotation marks, in the place of the user's.", "metavar": "USER TEXT"},
    )
    delete: str | None = option("Delete this user's summary.", None, metavar="USER")


def run(arguments: Sequence[str]) -> int:
    (options,) = parse("popi summaries", DESCRIPTION, (PopiSummariesOptions,), arguments)
    asked = [name for name in ("show", "edit", "delete") if getattr(options, name) is not None]
    if len(asked) > 1:
        raise UsageError(
            f"expected one of --show, --edit and --delete, got {' and '.join(f'--{name}' for name in asked)}"
        )
    if options.edit is not None and len(options.edit) != 2:
        raise UsageError(f"--edit: expected a user and a text in quotation marks, got {len(options.edit)} values")
    if not Path(options.summaries).is_file():
        raise RecordError(f"--summaries: there is no file {options.summaries}")
    file = SummaryFile(options.summaries)
    with naming("summaries"):
        known = file.read()
    named = {"show": options.show, "delete": options.delete, "edit": (options.edit or [None])[0]}
    for flag in asked:
        if named[flag] not in known:
            raise ArgumentError(f"--{flag}: expected one of the {len(known)} users in {file.path}, got {named[flag]!r}")
    if options.edit is not None:
        _print(file.edit(*options.edit))
    elif options.delete is not None:
        file.delete(options.delete)
        print(f"nextquill: deleted the summary of {options.delete!r}", file=sys.stderr)
    else:
        for summary in known.values() if options.show is None else [known[options.show]]:
            _print(summary)
    return OK


def _print(summary: Summary) -> None:
    made = "edited by a person" if summary.edited else f"by {summary.model}"
    size = "" if summary.tokens is None else f", {summary.tokens} tokens"
    print(_shown(f"{summary.user_id}  ({made}, {summary.created}{size})"))
    for line in (summary.summary or "(empty)").splitlines():
        print(f"  {_shown(line)}")


def _shown(text: str) -> str:
    """A line with what a terminal would obey, or not show, as its escape: summaries are models' texts of users'."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
