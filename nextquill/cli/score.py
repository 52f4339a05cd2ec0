"""`nextquill score`: every response token's effect, as JSONL and, for a few responses, in colour."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from nextquill.cli.flags import claim_output_file
from nextquill.cli.load_and_score import Loaded, check_files, encode_records, eval_records
from nextquill.cli.main import OK
from nextquill.cli.options import ModelOptions, PromptOptions, ScoreFiles, ScoreOptions
from nextquill.cli.parsing import parse
from nextquill.cli.terminal import bar, say
from nextquill.evaluation.identity import model_identity, records_digest
from nextquill.ranks import is_first, partial_file
from nextquill.report.terminal import effect_legend, effect_text
from nextquill.report.text import plain

DESCRIPTION = (
    "Score records without gradient and write one JSON line per record: tokens, nll_factual, nll_counterfactual, "
    "nll_placebo (nats), effect_logprob (nats) and effect_prob. FILE appears when all lines are there, in the records' "
    "order; until then they are in FILE.partial, and the same command resumes a stopped run. train takes the file of "
    "its training records as --effects_file."
)
OPTIONS = (ModelOptions, ScoreFiles, PromptOptions, ScoreOptions)


def run(arguments: Sequence[str]) -> int:
    """Run the command; its exit code."""
    model_options, files, prompt_options, options = parse("score", DESCRIPTION, OPTIONS, arguments)
    from nextquill.data import ExampleEncoder
    from nextquill.evaluation.scoring import effect_line, pad_token, score_examples

    target = claim_output_file(options.output_file, overwrite=options.overwrite)
    check_files(files)
    loaded = Loaded(model_options, prompt_options, eval_records(files))
    encoder = ExampleEncoder(loaded.tokenizer, **vars(loaded.settings))
    examples = encode_records("eval_file", encoder, loaded.records, placebo=True, seed=files.seed)
    total = len(examples)
    with partial_file(target, identity(loaded, files), overwrite=options.overwrite) as partial:
        if len(partial):
            say(f"{len(partial)} of {total} records are already in {target}.partial")
        try:
            scored = score_examples(
                loaded.model,
                examples,
                pad_token(loaded.tokenizer),
                files.batch_size,
                attention=files.attention,
                max_tokens=files.max_tokens,
                skip=len(partial),
            )
            for scores in bar(scored, total=total, initial=len(partial), desc="Scoring"):
                partial.write(effect_line(scores, loaded.tokenizer))
        except KeyboardInterrupt:
            if len(partial):
                say(f"{len(partial)} of {total} records are in {target}.partial; the same command resumes")
            raise
        partial.finish(range(total))
    if is_first():
        _print(target, options.show, loaded)
    return OK


def identity(loaded: Loaded, files: ScoreFiles) -> dict[str, Any]:
    """Everything that the figures depend on: a run resumes from a partial file only if all of it agrees."""
    return {
        "content of --eval_file": records_digest(loaded.records),
        **model_identity(loaded.model, loaded.tokenizer, loaded.settings),
        **{f"--{name}": getattr(files, name) for name in ("seed", "batch_size", "attention", "max_tokens")},
    }


def _print(file: Path, count: int, loaded: Loaded) -> None:
    """The first lines of a finished file, coloured."""
    if count < 1:
        return
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False)
    with file.open(encoding="utf-8") as stream:
        for found in map(json.loads, islice(stream, count)):
            query = loaded.records[found["index"]].query
            console.print()
            console.print(Text.assemble((plain(found["user_id"]), "bold"), "  ", plain(query)), soft_wrap=True)
            console.print(effect_text(found["tokens"], found["effect_prob"]), soft_wrap=True)
    console.print()
    console.print(effect_legend(), soft_wrap=True)
