"""`nextquill popi summaries`: shows, edits and deletes the summaries of users."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from nextquill.cli.flags import UsageError, check_file, option
from nextquill.cli.main import OK
from nextquill.cli.parsing import parse
from nextquill.cli.terminal import say
from nextquill.errors import ArgumentError, naming
from nextquill.popi.summaries import Summary, SummaryFile
from nextquill.report.text import plain

DESCRIPTION = (
    "Show all summaries in a file, or show, edit or delete one user's. summarize does not replace an edited summary."
)


@dataclass
class PopiSummariesOptions:
    """Options."""

    summaries_file: str = option("The file with the summaries.", aliases=["summaries"], metavar="FILE")
    show: str | None = option("Show only this user's summary.", None, metavar="USER")
    edit: list[str] | None = option(
        "Replace the user's summary with this text, in quotation marks.", None, metavar="USER TEXT"
    )
    delete: str | None = option("Delete this user's summary.", None, metavar="USER")


OPTIONS = (PopiSummariesOptions,)


def run(arguments: Sequence[str]) -> int:
    """Run the command; its exit code."""
    (options,) = parse("popi summaries", DESCRIPTION, OPTIONS, arguments)
    asked = [name for name in ("show", "edit", "delete") if getattr(options, name) is not None]
    if len(asked) > 1:
        raise UsageError(
            f"expected one of --show, --edit and --delete, got {' and '.join(f'--{name}' for name in asked)}"
        )
    if options.edit is not None and len(options.edit) != 2:
        raise UsageError(f"edit: expected a user and a text in quotation marks, got {len(options.edit)} values")
    check_file("summaries_file", options.summaries_file)
    file = SummaryFile(options.summaries_file)
    with naming("summaries_file"):
        known = file.read()
    named = {"show": options.show, "delete": options.delete, "edit": (options.edit or [None])[0]}
    for flag in asked:
        if named[flag] not in known:
            raise ArgumentError(f"{flag}: expected one of the {len(known)} users in {file.path}, got {named[flag]!r}")
    if options.edit is not None:
        _print(file.edit(*options.edit))
    elif options.delete is not None:
        file.delete(options.delete)
        say(f"deleted the summary of {options.delete!r}")
    else:
        for summary in known.values() if options.show is None else [known[options.show]]:
            _print(summary)
    return OK


def _print(summary: Summary) -> None:
    made = "edited by a person" if summary.edited else f"by {summary.model}"
    size = "" if summary.tokens is None else f", {summary.tokens} tokens{', cut at the limit' if summary.cut else ''}"
    print(plain(f"{summary.user_id}  ({made}, {summary.created}{size})"))
    for line in (summary.summary or "(empty)").splitlines():
        print(f"  {plain(line)}")
