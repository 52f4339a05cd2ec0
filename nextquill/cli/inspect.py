"""`nextquill inspect`: shows a record token by token, as training would see it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from nextquill.cli.flags import check_positive, option
from nextquill.cli.load_and_score import read_records
from nextquill.cli.main import OK
from nextquill.cli.options import PromptOptions
from nextquill.cli.parsing import parse
from nextquill.data import Record, assign_placebo_histories
from nextquill.data.placebo import COUNTERFACTUAL
from nextquill.errors import ArgumentError, UnsupportedModelError
from nextquill.models.border import check_config, first_line
from nextquill.models.configs import context_length
from nextquill.models.gguf import gguf_arguments
from nextquill.models.loading import PromptSettings, find_tokenizer
from nextquill.models.pretrained import from_pretrained
from nextquill.models.tiny_models import SCRATCH_SIZES, build_tokenizer, is_new, training_texts
from nextquill.report.numbers import counted
from nextquill.report.text import plain, plain_json

if TYPE_CHECKING:
    from nextquill.data import EncodedExample, ExampleEncoder
    from nextquill.tree import PrefixTree

DESCRIPTION = (
    "Show records as training sees them: the tokens that the prompts with and without history share, those that "
    "differ, those that are supervised, the history items that the token budget drops, and what sharing prefixes "
    "saves. Needs only a tokenizer, no weights."
)
DEFAULT_LENGTH = 2048
_DROPPED_SHOWN = 5
# Each kind of section: the mark of its lines, their colour on a terminal, and its heading.
_SECTIONS = {
    "shared": ("=", "dim", "shared by both prompts"),
    "factual": ("+", "green", "with history only"),
    "counterfactual": ("-", "yellow", "without history only"),
    "response": (">", "bold", "response, supervised in both"),
}


@dataclass
class InspectFiles:
    """Data: the records, and a tokenizer."""

    records_file: str = option(
        "Records, in the form that train takes.", aliases=["train_file", "eval_file"], metavar="FILE"
    )
    model: str = option(
        "The source of the tokenizer and the prompt settings: a model folder, a folder with only a tokenizer, a name "
        "on the Hugging Face hub, or 'tiny' / 'small' for the tokenizer that train would build from the records.",
        aliases=["model_name_or_path"],
        metavar="MODEL",
    )
    index: list[int] | None = option("Records to show, counted from 0 (default: only the first).", None)
    user_id: str | None = option("Show the records of this user instead, at most --limit.", None)
    limit: int = option("With --user_id: the most records to show.", 4)


@dataclass
class InspectOptions:
    """Output: its form and length."""

    format: str = option("text for people, json for programs.", "text", choices=["text", "json"])
    max_shown: int = option("Most tokens of a section; a longer one is shown without its middle. 0 shows all.", 160)
    seed: int = option("Seed that decides whose history --counterfactual placebo takes; as in train by default.", 42)


@dataclass(frozen=True)
class Inspected:
    """One record: the ids and the texts of its tokens, divided as `_SECTIONS` says, and what did not fit.

    `dropped` has the history items' titles or texts, oldest first, and their sizes in tokens.
    """

    example: EncodedExample
    sections: dict[str, tuple[list[int], list[str]]]
    dropped: list[tuple[str, int]]


OPTIONS = (InspectFiles, PromptOptions, InspectOptions)


def run(arguments: Sequence[str]) -> int:
    """Run the command; its exit code."""
    files, prompt_options, options = parse("inspect", DESCRIPTION, OPTIONS, arguments)
    from nextquill.data import ExampleEncoder
    from nextquill.tree import build_prefix_tree

    check_positive(files, ("limit",))
    if options.max_shown < 0:
        raise ArgumentError(f"max_shown: expected 0 or more, got {options.max_shown}")
    records = read_records("records_file", files.records_file)
    chosen = choose(records, files)
    tokenizer, settings = prepare(files.model, prompt_options, records)
    encoder = ExampleEncoder(tokenizer, settings.template, settings.max_length, settings.max_response_length)
    others: Sequence[Any] = [None] * len(records)
    if settings.template.counterfactual == "placebo":
        others = assign_placebo_histories(records, options.seed, COUNTERFACTUAL)
    found = [inspect(encoder, records[index], index, others[index]) for index in chosen]
    branches = [branch for each in found for branch in (each.example.factual, each.example.counterfactual)]
    tree = build_prefix_tree([branch.input_ids for branch in branches])
    if options.format == "json":
        print(plain_json(json.dumps(as_json(found, tree, encoder, settings), ensure_ascii=False, indent=2)))
    else:
        show(found, tree, encoder, options.max_shown)
    return OK


def choose(records: Sequence[Record], files: InspectFiles) -> list[int]:
    """The positions of the records to show."""
    if files.index is not None and files.user_id is not None:
        raise ArgumentError("user_id: expected none beside --index")
    if files.user_id is not None:
        found = [position for position, record in enumerate(records) if record.user_id == files.user_id]
        if not found:
            raise ArgumentError(f"user_id: expected a user of {files.records_file}, got {files.user_id!r}")
        return found[: files.limit]
    chosen = [0] if files.index is None else files.index
    for index in chosen:
        if not 0 <= index < len(records):
            raise ArgumentError(f"index: expected 0 to {len(records) - 1}, got {index}")
    return chosen


def prepare(name: str, prompt_options: PromptOptions, records: Sequence[Record]) -> tuple[Any, PromptSettings]:
    """The tokenizer, and the prompt settings that train would use."""
    if is_new(name):
        from nextquill.cli.train import SCRATCH_MAX_LENGTH

        tokenizer = build_tokenizer(training_texts(records), SCRATCH_SIZES[name].vocabulary)
        return tokenizer, prompt_options.settings(
            prompt_options.stored(name), SCRATCH_MAX_LENGTH, SCRATCH_SIZES[name].positions
        )
    tokenizer, context = find_tokenizer(name), _context(name)
    length = DEFAULT_LENGTH if context is None else min(DEFAULT_LENGTH, context)
    return tokenizer, prompt_options.settings(prompt_options.stored(name), length, context)


def _context(name: str) -> int | None:
    """The model's number of positions, if there is a config."""
    from transformers import AutoConfig

    check_config(name)
    try:
        config = from_pretrained(AutoConfig, **gguf_arguments(name), local_files_only=True)
        return context_length(SimpleNamespace(config=config))
    # A folder with only a tokenizer has no config, and that of an unknown architecture cannot be read.
    except (OSError, ValueError, KeyError):
        return None
    except Exception as error:
        message = f"model: {name}/config.json: {first_line(error)}"
        raise UnsupportedModelError(message) from error


def inspect(encoder: ExampleEncoder, record: Record, index: int, other: Any) -> Inspected:
    """Encode a record and divide its tokens into sections.

    `other` is another user's history, if the template's prompt without history takes one.
    """
    from nextquill.evaluation.scoring import token_texts
    from nextquill.tree import build_prefix_tree

    example = encoder.encode(record, index, counterfactual_history=other)
    factual, counterfactual = example.factual.prompt_ids, example.counterfactual.prompt_ids
    rows, others = build_prefix_tree([factual, counterfactual]).branch_rows
    both = min(len(rows), len(others))
    shared = int((rows[:both] == others[:both]).long().cumprod(0).sum())
    parts = {
        "shared": (factual, slice(shared)),
        "factual": (factual, slice(shared, None)),
        "counterfactual": (counterfactual, slice(shared, None)),
        "response": (example.factual.response_ids, slice(None)),
    }
    tokenizer: Any = encoder.renderer.tokenizer
    # Decoded as a whole and cut afterwards, as a character may span two sections.
    sections = {name: (ids[part], token_texts(tokenizer, ids)[part]) for name, (ids, part) in parts.items()}
    dropped = [
        (item.title or item.text, len(encoder.renderer.encode(encoder.template.render_item(item))))
        for item in record.history[: example.history_total - example.history_kept]
    ]
    return Inspected(example, sections, dropped)


# ---- for programs ----------------------------------------------------------------------------------


def as_json(
    found: Sequence[Inspected], tree: PrefixTree, encoder: ExampleEncoder, settings: PromptSettings
) -> dict[str, Any]:
    """Everything that is shown, without abbreviation."""
    return {
        "settings": dataclasses.asdict(settings),
        "examples": [
            {
                "index": each.example.index,
                "user_id": each.example.user_id,
                "history_kept": each.example.history_kept,
                "history_total": each.example.history_total,
                "dropped": [{"begins": _excerpt(text, 60), "tokens": size} for text, size in each.dropped],
                "sections": {n: {"token_ids": ids, "tokens": texts} for n, (ids, texts) in each.sections.items()},
            }
            for each in found
        ],
        "branches": len(tree.branch_rows),
        "branch_tokens": tree.num_branch_tokens,
        "row_tokens": len(tree),
        "sharing_factor": round(tree.sharing_factor, 3),
        "texts_changed": encoder.renderer.user_text.changed,
    }


# ---- for people ------------------------------------------------------------------------------------


def show(found: Sequence[Inspected], tree: PrefixTree, encoder: ExampleEncoder, max_shown: int) -> None:
    """Print the sections, marked by the first character of their lines and, on a terminal, by colour."""
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False)

    def line(text: str, style: str = "") -> None:
        console.print(Text(plain(text), style))

    for each in found:
        placebo = encoder.template.counterfactual == "placebo"
        for text in _heading(each, "under another user's" if placebo else "without"):
            line(text, "bold" if text.startswith("record") else "")
        for name, (_, tokens) in each.sections.items():
            mark, style, meaning = _SECTIONS[name]
            if placebo and name == "counterfactual":
                meaning = "under another user's history only"
            if not tokens:
                continue
            line("")
            line(f"{mark} {meaning}: {counted(len(tokens), 'token')}", "bold")
            for text in _lines(tokens, max_shown, max(20, console.width) - 2):
                line(f"{mark} {text}", style)
        line("")
    for text in _summary(found, tree, encoder):
        line(text)


def _heading(each: Inspected, otherwise: str) -> Iterator[str]:
    example = each.example
    yield f"record {example.index}, user {example.user_id}"
    factual, counterfactual = example.factual, example.counterfactual
    sizes = f"{factual.prompt_length} tokens, {otherwise} {counterfactual.prompt_length}"
    yield f"  prompt with history {sizes}, response {factual.response_length}"
    yield f"  {example.history_kept} of {counted(example.history_total, 'history item')} in the prompt"
    for text, size in each.dropped[:_DROPPED_SHOWN]:
        yield f"    dropped {size:6d} tokens: {_excerpt(text, 50)}"
    if len(each.dropped) > _DROPPED_SHOWN:
        rest = each.dropped[_DROPPED_SHOWN:]
        yield f"    dropped {sum(size for _, size in rest):6d} tokens: {counted(len(rest), 'more item')}"


def _summary(found: Sequence[Inspected], tree: PrefixTree, encoder: ExampleEncoder) -> Iterator[str]:
    yield (
        f"{counted(len(found), 'record')}, {counted(len(tree.branch_rows), 'branch', 'branches')}: "
        f"{tree.num_branch_tokens} tokens apart, {len(tree)} in one row, sharing factor {tree.sharing_factor:.2f}"
    )
    changed = encoder.renderer.user_text.changed
    if changed:
        yield (
            f"{counted(changed, 'text')} contained a control token or a line like those of the prompt, now split or "
            "quoted"
        )


def _lines(tokens: Sequence[str], most: int, width: int) -> Iterator[str]:
    """The lines of a section, without the middle of a long one."""
    if most == 0 or len(tokens) <= most:
        yield from _wrapped(tokens, width)
        return
    half = max(1, most // 2)
    yield from _wrapped(tokens[:half], width)
    yield f"... {len(tokens) - 2 * half:,} more tokens ..."
    yield from _wrapped(tokens[len(tokens) - half :], width)


def _wrapped(tokens: Sequence[str], width: int) -> Iterator[str]:
    """Lines of tokens with spaces between them; a line of the prompt ends a line here too."""
    from rich.console import Console
    from rich.text import Text

    words = (_visible(token) + ("\n" if token.endswith("\n") else " ") for token in tokens)
    lines = (line.plain.strip() for line in Text("".join(words)).wrap(Console(), width))
    yield from filter(None, lines)  # a token that fills its line may leave its space alone on the next one


def _visible(token: str) -> str:
    """A token as one word: spaces become dots, and an empty token, which is part of a character, a small square."""
    marks = {" ": "·", "\n": "⏎", "\t": "⇥", "\r": "␍"}
    shown = (marks.get(c) or (c if c.isprintable() else c.encode("unicode_escape").decode()) for c in token)
    return "".join(shown) or "▫"


def _excerpt(text: str, length: int) -> str:
    words = " ".join(text.split())
    return words if len(words) <= length else f"{words[: length - 3]}..."
