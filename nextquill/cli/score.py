"""`nextquill score`: every response token's effect, as JSONL and, for a few responses, in colour."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from nextquill.cli.flags import claim_output_file
from nextquill.cli.load_and_score import Scored
from nextquill.cli.main import OK
from nextquill.cli.options import ModelOptions, PromptOptions, ScoreFiles, ScoreOptions
from nextquill.cli.parsing import parse
from nextquill.cli.terminal import say
from nextquill.evaluation.identity import model_identity, records_digest
from nextquill.report.terminal import effect_legend, effect_text
from nextquill.storage.resumable_jsonl import PartialFile

DESCRIPTION = (
    "Score records without gradient and write one JSON line per record: tokens, nll_factual, nll_counterfactual, "
    "nll_placebo (nats), effect_logprob (nats) and effect_prob. FILE appears when all lines are there, in the records' "
    "order; until then they are in FILE.partial, and the same command resumes a stopped run. train takes the file of "
    "its training records as --effects_file."
)
OPTIONS = (ModelOptions, ScoreFiles, PromptOptions, ScoreOptions)


def run(arguments: Sequence[str]) -> int:
    model_options, files, prompt_options, options = parse("score", DESCRIPTION, OPTIONS, arguments)
    from nextquill.evaluation.scoring import effect_line

    target = claim_output_file(options.output_file, overwrite=options.overwrite)
    scored = Scored(model_options, prompt_options, files)
    total = len(scored.examples)
    with PartialFile(target, identity(scored, files), overwrite=options.overwrite) as partial:
        if len(partial):
            say(f"{len(partial)} of {total} records are already in {partial.path}")
        try:
            for scores in scored.scores(skip=len(partial)):
                partial.write(effect_line(scores, scored.tokenizer))
        except KeyboardInterrupt:
            if len(partial):
                say(f"{len(partial)} of {total} records are in {partial.path}; the same command resumes")
            raise
        partial.finish(range(total))
    _print(target, options.show, scored)
    return OK


def identity(scored: Scored, files: ScoreFiles) -> dict[str, Any]:
    """Everything that the figures depend on: a run resumes from a partial file only if all of it agrees."""
    return {
        "content of --eval_file": records_digest(scored.records),
        **model_identity(scored.model, scored.tokenizer, scored.settings),
        **{f"--{name}": getattr(files, name) for name in ("seed", "batch_size", "attention", "max_tokens")},
    }


def _print(file: Path, count: int, scored: Scored) -> None:
    """The first lines of a finished file, coloured."""
    if count < 1:
        return
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False)
    with file.open(encoding="utf-8") as stream:
        for found in map(json.loads, islice(stream, count)):
            query = scored.records[found["index"]].query
            console.print()
            console.print(Text.assemble((found["user_id"], "bold"), "  ", query), soft_wrap=True)
            console.print(effect_text(found["tokens"], found["effect_prob"]), soft_wrap=True)
    console.print()
    console.print(effect_legend(), soft_wrap=True)
