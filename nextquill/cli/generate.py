"""`nextquill generate`: writes as a user would, from the user's texts and one or many queries."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from nextquill.cli.flags import check_file, claim_output_file, option
from nextquill.cli.load_and_score import Loaded, read_records
from nextquill.cli.main import OK
from nextquill.cli.options import DecodingOptions, ModelOptions, PromptOptions
from nextquill.cli.parsing import parse
from nextquill.cli.terminal import bar, say
from nextquill.data import HistoryItem, Record
from nextquill.data.lines import json_lines, parsed_json
from nextquill.data.records import check_text
from nextquill.errors import ArgumentError, RecordError, naming
from nextquill.generation import GenerationOptions
from nextquill.report.text import plain
from nextquill.storage.atomic_files import write_whole

if TYPE_CHECKING:
    from nextquill.generation.writer import Writer

DESCRIPTION = (
    "Write responses as a user would. The user's history comes from a file of texts, or from a file of records. The "
    "prompt has the order and the wording that the model was trained with."
)
OWN = "own history"
#: The histories to write with, by what they are called on the screen.
Histories = dict[str, tuple[HistoryItem, ...]]


@dataclass
class HistoryOptions:
    """History: the user's texts."""

    history_file: str | None = option(
        "The user's texts, oldest first, JSONL: strings, or objects with text and optionally title and timestamp; '-' "
        "reads standard input.", None, metavar="FILE",
    )  # fmt: skip
    records_file: str | None = option(
        "Instead of --history_file: records; the last one of --user_id has the history.", None, metavar="FILE"
    )
    user_id: str | None = option("The user to write as, in --records_file.", None, metavar="USER")
    other_user_id: str | None = option(
        "Another user in --records_file, for --compare_history and --guidance_against placebo (default: the next one "
        "in the file).", None, metavar="USER",
    )  # fmt: skip

    def check(self) -> None:
        """Raise ArgumentError or RecordError for flags that do not go together, and for a file that is not there."""
        if (self.history_file is None) == (self.records_file is None):
            raise ArgumentError("history_file: expected either this flag or --records_file with --user_id")
        if (self.records_file is None) != (self.user_id is None):
            raise ArgumentError("user_id: expected together with --records_file, and only then")
        if self.other_user_id is not None and self.records_file is None:
            raise ArgumentError("other_user_id: expected --records_file with it")
        if self.history_file not in (None, "-"):
            check_file("history_file", str(self.history_file))

    def read(self) -> Histories:
        """The user's own history and, from records of several users, another's."""
        if self.history_file is not None:
            with naming("history_file"):
                return {OWN: _texts(self.history_file)}
        last = {record.user_id: record for record in read_records("records_file", str(self.records_file))}
        users, own = list(last), self._known("user_id", last)
        others = users[users.index(own) + 1 :] + users[: users.index(own)]
        other = others[0] if self.other_user_id is None and others else self._known("other_user_id", last, own)
        found: Histories = {OWN: last[own].history}
        return found if other == own else {**found, f"history of {other}": last[other].history}

    def _known(self, flag: str, last: Mapping[str, Record], default: str = "") -> str:
        user = str(getattr(self, flag) or default)
        if user not in last:
            some = ", ".join(list(last)[:3])
            raise ArgumentError(f"{flag}: {self.records_file} has no user {user!r}; it has {len(last)}, such as {some}")
        return user


@dataclass
class WritingOptions(DecodingOptions):
    """Writing: how the next token is chosen."""

    seed: int = option("Seed of the samples.", 0)
    batch_size: int = option("Queries at a time.", 8)
    engine: str = option(
        "Compute shared prefixes once (tree), or use transformers' generate (hf); auto: tree if the model allows it.",
        "auto", choices=["auto", "tree", "hf"],
    )  # fmt: skip
    draft_tokens: int = option(
        "Guess up to INT next tokens from the prompt and the text so far, and confirm them in one forward pass. The "
        "text stays the same; phrases of the history take fewer passes. 0: off; try 3 on a CPU.", 0,
    )  # fmt: skip

    def options(self) -> dict[str, Any]:
        """The flags as options of `Writer.write`; ArgumentError if a value is out of range."""
        values = {name: value for name, value in vars(self).items() if name != "guidance_against"}
        GenerationOptions(**values)
        return values


@dataclass
class GenerateOptions:
    """Queries and output."""

    query: list[str] | None = option("What to write: one or more requests.", None, metavar="TEXT")
    queries_file: str | None = option("Queries, JSONL: strings, or objects with query.", None, metavar="FILE")
    compare_history: bool = option(
        "Also write without history and, with --records_file, with another user's; shown side by side.", False
    )
    output_file: str | None = option("Also write the responses here, JSONL.", None, metavar="FILE")
    overwrite: bool = option("Replace an existing output file.", False)

    def read(self) -> list[str]:
        """The queries; ArgumentError for neither flag or both, RecordError for a line that is not a query."""
        if (self.query is None) == (self.queries_file is None):
            raise ArgumentError("query: expected either this flag or --queries_file")
        if self.query is not None:
            return self.query
        with naming("queries_file"):
            queries = [
                check_text(raw.get("query") if isinstance(raw, Mapping) else raw, where, "query")
                for where, raw in json_lines(str(self.queries_file))
            ]
            if not queries:
                raise RecordError(f"{self.queries_file}: no queries, the file is empty")
        return queries


OPTIONS = (ModelOptions, HistoryOptions, GenerateOptions, WritingOptions, PromptOptions)


def run(arguments: Sequence[str]) -> int:
    """Run the command; its exit code."""
    model_options, history, options, writing, prompt_options = parse("generate", DESCRIPTION, OPTIONS, arguments)
    chosen = writing.options()
    history.check()
    queries = options.read()
    target = None
    if options.output_file is not None:
        target = claim_output_file(options.output_file, overwrite=options.overwrite)
    histories = history.read()
    against = contrast(writing, histories)
    writer = load_writer(model_options, prompt_options)
    say_history(writer, queries[0], histories[OWN], chosen)
    stream = writer.stream(queries, histories[OWN], against=against, **chosen)
    if len(queries) == 1 and not options.compare_history:
        texts = {OWN: [print_stream(stream)]}
    else:
        shown = histories if options.compare_history else {}
        texts = compared(writer, stream, queries, shown, chosen)
        print_side_by_side(queries, texts)
    if target is not None:
        guidance = {name: chosen["guidance"] if name == OWN else 0.0 for name in texts}
        lines = [
            {"query": query, "history": name, "guidance": guidance[name], "text": text}
            for name, found in texts.items()
            for query, text in zip(queries, found, strict=True)
        ]
        write_whole(target, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    return OK


def load_writer(model_options: ModelOptions, prompt_options: PromptOptions) -> Writer:
    """The model with its prompt settings, or those of the flags; it keeps the history that it has computed."""
    from nextquill.generation.writer import Writer

    loaded = Loaded(model_options, prompt_options, [])
    return Writer(loaded.model, loaded.tokenizer, loaded.settings, keep_history=True)


def contrast(writing: WritingOptions, histories: Histories) -> tuple[HistoryItem, ...]:
    """The history that guidance moves away from; ArgumentError if another user's is asked for, and there is none."""
    if not GenerationOptions(**writing.options()).needs_against or writing.guidance_against == "counterfactual":
        return ()
    others = [texts for name, texts in histories.items() if name != OWN]
    if not others:
        raise ArgumentError("guidance_against: placebo needs --records_file with another user")
    return others[0]


def say_history(writer: Writer, query: str, texts: Sequence[HistoryItem], chosen: Mapping[str, Any]) -> None:
    """Say how much of the history the prompt holds, and whether guidance can do anything."""
    from nextquill.generation.writer import user_prompt

    prompt = user_prompt(writer.encoder, query, texts, chosen["max_new_tokens"])
    dropped = f", the newest of {prompt.history_total}" if prompt.history_kept < prompt.history_total else ""
    say(f"{prompt.history_kept} texts of the user in the prompt{dropped}; {len(prompt.ids)} tokens")
    if GenerationOptions(**chosen).needs_against and not texts:
        say("the history is empty, so --guidance and --best_of change nothing")


def print_stream(stream: Iterable[tuple[int, str]]) -> str:
    """Print the only response as it is written, and return it."""
    text = ""
    for _, piece in stream:
        text += piece
        print(plain(piece), end="", flush=True)
    print()
    return text


def compared(
    writer: Writer,
    own: Iterable[tuple[int, str]],
    queries: Sequence[str],
    histories: Histories,
    chosen: Mapping[str, Any],
) -> dict[str, list[str]]:
    """The responses of a stream; with `histories`, also plain ones without a history and with another user's."""
    texts = {OWN: _joined(own, len(queries), OWN)}
    others = {"no history": (), **histories} if histories else {}
    for name, history in others.items():
        if name != OWN:
            stream = writer.stream(queries, history, **{**chosen, "guidance": 0.0, "best_of": 1})
            texts[name] = _joined(stream, len(queries), name)
    return texts


def _joined(stream: Iterable[tuple[int, str]], count: int, name: str) -> list[str]:
    """The responses, with a bar that counts pieces of text."""
    texts = [""] * count
    for index, piece in bar(stream, desc=f"Writing with {name}", unit=" pieces", leave=False):
        texts[index] += piece
    return texts


def print_side_by_side(queries: Sequence[str], texts: Mapping[str, Sequence[str]]) -> None:
    """Print the responses to each query, a column for each history."""
    from rich.console import Console
    from rich.table import Column, Table
    from rich.text import Text

    console = Console(highlight=False)
    for index, query in enumerate(queries):
        console.print(Text(plain(query), "bold"), soft_wrap=True)
        if len(texts) == 1:
            console.print(Text(plain(texts[OWN][index])), soft_wrap=True)
        else:
            table = Table(*(Column(Text(plain(name))) for name in texts), expand=True, show_lines=False)
            table.add_row(*(Text(plain(found[index])) for found in texts.values()))
            console.print(table)
        console.print()


def _texts(path: str) -> tuple[HistoryItem, ...]:
    """The items of a JSONL file, or of standard input."""
    from nextquill.generation.writer import history_items

    if path == "-":
        lines = ((number, line) for number, line in enumerate(sys.stdin, 1) if line.strip())
        raw: list[Any] = [parsed_json(f"standard input line {number}", line) for number, line in lines]
    else:
        raw = [value for _, value in json_lines(path)]
    return history_items(raw)
