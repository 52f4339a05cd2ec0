"""`nextquill prepare`: turns records into a folder of token ids that training reads from disk."""

from __future__ import annotations

import gc
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from nextquill.cli.flags import UsageError, check_file, dry_run_option, option
from nextquill.cli.inspect import prepare as load_prompts
from nextquill.cli.load_and_score import history_notes, quieten_transformers
from nextquill.cli.main import OK
from nextquill.cli.options import PromptOptions
from nextquill.cli.parsing import parse
from nextquill.cli.terminal import bar, say
from nextquill.data.lines import HUB
from nextquill.data.records import iter_records
from nextquill.errors import BudgetError, RecordError, naming
from nextquill.models.tiny_models import is_new
from nextquill.report.text import plain

if TYPE_CHECKING:
    from nextquill.data import ExampleEncoder, PreparedDataset

DESCRIPTION = (
    "Tokenise records once, into a folder that train takes as --train_file or --eval_file and reads from disk. The "
    "file may be larger than memory. DIR appears when it is complete; until then finished parts are in DIR.partial, "
    "and the same command resumes a stopped run."
)
_SHOWN = 10


@dataclass
class PrepareOptions:
    """Output: what is read and written; no weights are loaded."""

    records_file: str = option(
        "Records, in the form that train takes.", aliases=["train_file", "eval_file"], metavar="FILE"
    )
    model: str = option(
        "The source of the tokenizer and the prompt settings: a model folder, a folder with only a tokenizer, or a "
        "name on the Hugging Face hub.",
        aliases=["model_name_or_path"],
        metavar="MODEL",
    )
    output_dir: str = option("The folder to make.", metavar="DIR")
    placebo: bool = option(
        "Add the prompt with another user's history, which an --eval_file needs for effect_placebo.", False
    )
    seed: int = option("With --placebo: the seed that decides which other user.", 42)
    skip_bad: bool = option("Leave out and list records that do not fit the budget, instead of stopping.", False)
    num_workers: int = option("Processes that encode; 1: threads of this one.", 1)
    overwrite: bool = option("Replace an earlier folder, or the parts of a run with other flags.", False)
    dry_run: bool = dry_run_option()


OPTIONS = (PrepareOptions, PromptOptions)
FLAGS = {"folder": "output_dir", "workers": "num_workers", "records": "records_file", "source": "records_file"}


def run(arguments: Sequence[str]) -> int:
    """Run the command; its exit code."""
    options, prompt_options = parse("prepare", DESCRIPTION, OPTIONS, arguments)
    from nextquill.data import ExampleEncoder

    name = options.model
    if is_new(name):
        raise UsageError(
            f"model: a new {name!r} model takes its tokenizer from the text when it is trained; give a "
            "model that has a tokenizer"
        )
    if not options.records_file.startswith(HUB):
        check_file("records_file", options.records_file)
    quieten_transformers()
    tokenizer, settings = load_prompts(name, prompt_options, ())
    encoder = ExampleEncoder(tokenizer, settings.template, settings.max_length, settings.max_response_length)
    if options.dry_run:
        from nextquill.cli import dry_run

        with naming("records_file", "source"):
            dry_run.show([("tokenizer", name), *dry_run.preparation_rows(encoder, settings, options)])
        return OK
    prepared = _prepare(options, encoder)
    print(plain(summary(prepared)), file=sys.stderr)
    return OK


def _prepare(options: PrepareOptions, encoder: ExampleEncoder) -> PreparedDataset:
    """Encode with a bar; when it stops early, say which part is done."""
    from nextquill.data import prepare

    gc.freeze()  # imported modules stay in memory: scanning them again and again took a tenth of the time
    with bar(total=_lines(options.records_file), desc="Preparing", unit=" records") as shown:
        try:
            return prepare(
                iter_records(options.records_file),
                encoder,
                options.output_dir,
                progress=shown.update,
                workers=options.num_workers,
                **{name: getattr(options, name) for name in ("placebo", "seed", "skip_bad", "overwrite")},
            )
        except (BudgetError, RecordError) as error:
            hint = "; --skip_bad leaves such records out" if isinstance(error, BudgetError) else ""
            raise RecordError(f"records_file: {error.message}{hint}{_what_is_there(options)}") from error
        except KeyboardInterrupt:
            if there := _what_is_there(options):
                say(f"stopped{there}")
            raise
        finally:
            gc.unfreeze()


def _what_is_there(options: PrepareOptions) -> str:
    partial = Path(f"{options.output_dir}.partial")
    return f"; the finished parts are in {partial}, and the same command resumes" if partial.is_dir() else ""


def _lines(path: str) -> int | None:
    """The number of lines, for the bar; None where there is no terminal, or the file is compressed or on the hub."""
    if not sys.stderr.isatty() or path.endswith(".gz") or path.startswith(HUB):
        return None
    with Path(path).open("rb") as file:
        return sum(block.count(b"\n") for block in iter(lambda: file.read(1 << 20), b""))


def summary(prepared: PreparedDataset) -> str:
    """A report: what is in the folder, what the budget dropped, and which records were left out."""
    stats = prepared.stats
    tokens = f"{stats.prompt_tokens} prompt tokens, {stats.response_tokens} supervised tokens"
    lines = [f"Wrote {stats.examples} examples to {prepared.folder}: {tokens}"]
    lines += history_notes(stats, prepared.settings["max_length"])
    if prepared.skipped:
        lines.append(f"{len(prepared.skipped)} records left out, listed in {prepared.folder / 'header.json'}:")
        lines += [f"  {skipped['error']}" for skipped in prepared.skipped[:_SHOWN]]
        if len(prepared.skipped) > _SHOWN:
            lines.append(f"  and {len(prepared.skipped) - _SHOWN} more")
    return "\n".join(lines)
