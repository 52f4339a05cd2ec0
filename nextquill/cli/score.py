"""`nextquill score`: every response token's effect, as JSONL and, for a few responses, in colour."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from nextquill.cli.main import OK
from nextquill.cli.options import ModelOptions, PromptOptions, ScoreFiles, ScoreOptions
from nextquill.cli.parsing import parse
from nextquill.cli.scored import Scored
from nextquill.errors import OutputExistsError
from nextquill.integrations.scoring import ExampleScores
from nextquill.report.terminal import effect_legend, effect_text

DESCRIPTION = (
    "Score records without gradient and write one JSON line per record: tokens, nll_factual, nll_counterfactual, "
    "nll_placebo (nats), effect_logprob (nats) and effect_prob. The file appears under its name when it is complete."
)


def run(arguments: Sequence[str]) -> int:
    kinds = (ModelOptions, ScoreFiles, PromptOptions, ScoreOptions)
    model_options, files, prompt_options, options = parse("score", DESCRIPTION, kinds, arguments)
    target = Path(options.output_file)
    if target.exists() and not options.overwrite:
        raise OutputExistsError(f"--output_file: {target} exists; give another name or --overwrite")
    scored = Scored(model_options, prompt_options, files)
    target.parent.mkdir(parents=True, exist_ok=True)
    shown = []
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


def token_texts(tokenizer: Any, token_ids: Sequence[int]) -> list[str]:
    """The piece of text each token adds; they join to the decoded text.

    A token that ends inside a character adds nothing, and the one that completes it adds the character.
    """
    pieces, text = [], ""
    for end in range(1, len(token_ids) + 1):
        longer = tokenizer.decode(token_ids[:end])
        if longer.endswith("\ufffd"):
            longer = text
        pieces.append(longer[len(text) :])
        text = longer
    return pieces


def _rounded(values: Any) -> list[float]:
    return [round(value, 6) for value in values.tolist()]


class _complete_or_absent:
    """A text file that gets its name when the block ends without an exception."""

    def __init__(self, target: Path) -> None:
        self.target, self.temporary = target, target.with_name(f".{target.name}.tmp")

    def __enter__(self) -> IO[str]:
        self.stream = self.temporary.open("w", encoding="utf-8")
        return self.stream

    def __exit__(self, kind: Any, *_: Any) -> None:
        self.stream.close()
        if kind is None:
            os.replace(self.temporary, self.target)
        else:
            self.temporary.unlink()


def _print(shown: Sequence[ExampleScores], scored: Scored) -> None:
    from rich.console import Console

    console = Console(highlight=False)
    for scores in shown:
        query = scored.records[scores.example.index].query
        console.print(f"\n[bold]{scores.example.user_id}[/bold]  {query}", soft_wrap=True)
        effects = scores.effect_prob.tolist()
        console.print(effect_text(token_texts(scored.tokenizer, scores.token_ids), effects), soft_wrap=True)
    if shown:
        console.print()
        console.print(effect_legend(), soft_wrap=True)
