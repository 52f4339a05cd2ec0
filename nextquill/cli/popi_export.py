"""`nextquill popi export`: writes prompts with summaries, for a generator behind an API."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from nextquill.cli.flags import check_file, claim_output_file, option
from nextquill.cli.main import OK
from nextquill.cli.parsing import parse
from nextquill.cli.popi_options import check_not_read, read_settings
from nextquill.cli.terminal import say
from nextquill.data.lines import json_lines
from nextquill.data.records import check_text, check_user_id
from nextquill.errors import RecordError, naming
from nextquill.popi.export import FORMATS, Query, write_export
from nextquill.popi.summaries import Summary, SummaryFile
from nextquill.report.numbers import counted

DESCRIPTION = (
    "Write a prompt for every query: chat messages with the user's summary in the system message, or the plain text "
    "that the generator was trained with. A user without a summary gets a prompt without one."
)


@dataclass
class PopiExportOptions:
    """Options."""

    queries_file: list[str] = option("Queries, JSONL: user_id and query; other fields are ignored.", metavar="PATH")
    summaries_file: str = option("The file with the summaries.", aliases=["summaries"], metavar="FILE")
    output_file: str = option("Where to write the prompts, JSONL.", metavar="FILE")
    format: str = option("Chat messages, or plain text.", "chat", choices=list(FORMATS))
    model: str | None = option(
        "An output folder of popi train, for its wording of prompts (default: nextquill's).",
        None,
        ["model_name_or_path"],
        metavar="DIR",
    )
    overwrite: bool = option("Replace an existing output file.", False)


OPTIONS = (PopiExportOptions,)


def run(arguments: Sequence[str]) -> int:
    """Run the command; its exit code."""
    (options,) = parse("popi export", DESCRIPTION, OPTIONS, arguments)
    target = claim_output_file(options.output_file, overwrite=options.overwrite)
    check_not_read(target, [options.summaries_file, *options.queries_file])
    check_file("summaries_file", options.summaries_file)
    with naming("summaries_file"):
        known = SummaryFile(options.summaries_file).read()
    templates = None if options.model is None else read_settings(options.model)[1]
    with naming("queries_file"):
        queries = list(_queries(options.queries_file, known))
        count = write_export(target, queries, format=options.format, templates=templates)
    bare = [query.user_id for query in queries if not (query.summary or "").strip()]
    say(f"{target}: {counted(count, 'prompt')}")
    if bare:
        say(f"{len(bare)} of them without a summary, such as that of {bare[0]!r}")
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
