"""`nextquill score`: every response token's effect, as JSONL and, for a few responses, in colour."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from nextquill.cli.main import OK
from nextquill.cli.options import ModelOptions, PromptOptions, ScoreFiles, ScoreOptions
from nextquill.cli.parsing import parse
from nextquill.cli.scored import Scored, claim_output_file
from nextquill.integrations.scoring import ExampleScores, token_texts
from nextquill.report.terminal import effect_legend, effect_text

DESCRIPTION = (
    "Score records without gradient and write one JSON line per record: tokens, nll_factual, nll_counterfactual, "
    "nll_placebo (nats), effect_logprob (nats) and effect_prob. The file appears under its name when it is complete."
)


def run(arguments: Sequence[str]) -> int:
    kinds = (ModelOptions, ScoreFiles, PromptOptions, ScoreOptions)
    model_options, files, prompt_options, options = parse("score", DESCRIPTION, kinds, arguments)
    target = claim_output_file(options.output_file, overwrite=options.overwrite)
    scored = Scored(model_options, prompt_options, files)
    shown: list[ExampleScores] = []
    with _complete_or_absent(target) as stream:
        for scores in scored.scores():
            stream.write(json.dumps(line(scores, scored.tokenizer), ensure_ascii=False) + "\n")
            if len(shown) < options.show:
                shown.append(scores)
    _print(shown, scored)
    return OK


def line(scores: ExampleScores, tokenizer: Any) -> dict[str, Any]:
    """One record's line of the output file."""
    result = {
        "index": scores.example.index,
        "user_id": scores.example.user_id,
        "history_kept": scores.example.history_kept,
        "tokens": token_texts(tokenizer, scores.token_ids),
        "token_ids": scores.token_ids,
        "nll_factual": _rounded(scores.nll_factual),
        "nll_counterfactual": _rounded(scores.nll_counterfactual),
        "effect_logprob": _rounded(scores.effect_logprob),
        "effect_prob": _rounded(scores.effect_prob),
    }
    if scores.nll_placebo is not None:
        result["nll_placebo"] = _rounded(scores.nll_placebo)
    return result


def _rounded(values: Any) -> list[float]:
    return [round(value, 6) for value in values.tolist()]


@contextmanager
def _complete_or_absent(target: Path) -> Iterator[IO[str]]:
    """A text file that gets its name when the block ends without an exception."""
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("w", encoding="utf-8") as stream:
            yield stream
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def _print(shown: Sequence[ExampleScores], scored: Scored) -> None:
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False)
    for scores in shown:
        query = scored.records[scores.example.index].query
        console.print()
        console.print(Text.assemble((scores.example.user_id, "bold"), "  ", query), soft_wrap=True)
        effects = scores.effect_prob.tolist()
        console.print(effect_text(token_texts(scored.tokenizer, scores.token_ids), effects), soft_wrap=True)
    if shown:
        console.print()
        console.print(effect_legend(), soft_wrap=True)
