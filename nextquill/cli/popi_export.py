"""`nextquill popi export`: prompts with summaries in them, for a generator behind an API."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from nextquill.cli.flags import claim_output_file, option
from nextquill.cli.main import OK
from nextquill.cli.parsing import parse
from nextquill.cli.popi_options import check_not_read, naming
from nextquill.data.lines import json_lines
from nextquill.data.records import check_text, check_user_id
from nextquill.errors import RecordError
from nextquill.popi.export import FORMATS, Query, write_export
from nextquill.popi.summaries import Summary, SummaryFile

DESCRIPTION = (
    "Write a prompt for every query: chat messages, with the user's summary in the system message, or the plain text "
    "that the generator was trained with. Who has no summary gets a prompt without one."
)


@dataclass
class PopiExportOptions:
    """What is asked, with which summaries, and where it goes."""

    queries_file: list[str] = field(
        metadata={"help": "Queries, JSONL: user_id and query; other fields are left aside.", "metavar": "PATH"}
    )
    summaries: str = option("The file of summaries.", metavar="FILE")
    output_file: str = option("Where the prompts go, JSONL.", metavar="FILE")
    format: str = option("Chat messages, or plain text.", "chat", choices=list(FORMATS))
    model: str | None = option(
        "The output folder of popi train, whose wording is used (the library's).", None, metavar="DIR"
    )
    overwrite: bool = option("Replace an existing output file.", False)


def run(arguments: Sequence[str]) -> int:
    (options,) = parse("popi export", DESCRIPTION, (PopiExportOptions,), arguments)
    target = claim_output_file(options.output_file, overwrite=options.overwrite)
    check_not_read(target, [options.summaries, *options.queries_file])
    if not Path(options.summaries).is_file():
        raise RecordError(f"--summaries: there is no file {options.summaries}")
    with naming("summaries"):
        known = SummaryFile(options.summaries).read()
    templates = None
    if options.model is not None:
        from nextquill.popi.saved_run import saved_settings

        with naming("model"):
            templates = saved_settings(options.model).templates
    with naming("queries_file"):
        queries = list(_queries(options.queries_file, known))
        count = write_export(target, queries, format=options.format, templates=templates)
    bare = [query.user_id for query in queries if not (query.summary or "").strip()]
    print(f"nextquill: {target}: {count} prompts", file=sys.stderr)
    if bare:
        print(f"nextquill: {len(bare)} of them without a summary, such as that of {bare[0]!r}", file=sys.stderr)
    return OK


def _queries(paths: Sequence[str], known: Mapping[str, Summary]) -> Iterator[Query]:
    for path in paths:
        for where, raw in json_lines(path):
            if not isinstance(raw, Mapping):
                raise RecordError(f"{where}: expected an object with user_id and query, got {type(raw).__name__}")
            user = check_user_id(raw.get("user_id"), where)
            summary = known.get(user)
            query = check_text(raw.get("query"), where, "query")
            yield Query(user, query, None if summary is None else summary.summary)
