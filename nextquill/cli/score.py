"""`nextquill score`: every response token's effect, as JSONL and, for a few responses, in colour."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import sys
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from nextquill.cli.main import OK
from nextquill.cli.options import ModelOptions, PromptOptions, ScoreFiles, ScoreOptions
from nextquill.cli.parsing import parse
from nextquill.cli.partial_file import PartialFile
from nextquill.cli.scored import Scored, claim_output_file
from nextquill.integrations.scoring import ExampleScores, token_texts
from nextquill.report.terminal import effect_legend, effect_text

DESCRIPTION = (
    "Score records without gradient and write one JSON line per record: tokens, nll_factual, nll_counterfactual, "
    "nll_placebo (nats), effect_logprob (nats) and effect_prob. Lines are collected in FILE.partial as they are "
    "computed, and FILE appears, in the records' order, when all are there. A run that was stopped goes on where it "
    "was when the same command is given again. Of the training records the file is what train takes as --effects_file."
)
# Values of each weight that tell models apart: of a trained one nearly all differ from what they were.
_SAMPLED_VALUES = 64


def run(arguments: Sequence[str]) -> int:
    kinds = (ModelOptions, ScoreFiles, PromptOptions, ScoreOptions)
    model_options, files, prompt_options, options = parse("score", DESCRIPTION, kinds, arguments)
    target = claim_output_file(options.output_file, overwrite=options.overwrite)
    scored = Scored(model_options, prompt_options, files)
    total = len(scored.examples)
    with PartialFile(target, identity(scored, files), overwrite=options.overwrite) as partial:
        if len(partial):
            print(f"nextquill: {len(partial)} of {total} records are in {partial.path} already", file=sys.stderr)
        try:
            for scores in scored.scores(skip=len(partial)):
                partial.write(line(scores, scored.tokenizer))
        except KeyboardInterrupt:
            if len(partial):
                print(
                    f"nextquill: {len(partial)} of {total} records are in {partial.path}; the same command goes on "
                    "from there",
                    file=sys.stderr,
                )
            raise
        partial.finish(total)
    _print(target, options.show, scored)
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


def identity(scored: Scored, files: ScoreFiles) -> dict[str, Any]:
    """What the figures depend on: a run goes on with another's lines only where all of it agrees."""
    settings = dataclasses.asdict(scored.settings)
    template = settings.pop("template")
    weights = hashlib.sha256()
    for name, tensor in scored.model.state_dict().items():
        values = tensor.detach().reshape(-1)
        sample = values[:: max(1, values.numel() // _SAMPLED_VALUES)][:_SAMPLED_VALUES]
        weights.update(f"{name} {list(tensor.shape)} {sample.double().tolist()}".encode())
    records = hashlib.sha256()
    for record in scored.records:
        records.update(repr(record).encode())
    return {
        "content of --eval_file": records.hexdigest()[:16],
        "dtype": str(scored.model.dtype),
        "device": next(scored.model.parameters()).device.type,
        "model": weights.hexdigest()[:16],
        "tokenizer": _tokenizer_digest(scored.tokenizer),
        **{f"--{name}": getattr(files, name) for name in ("seed", "batch_size", "attention", "max_tokens")},
        **settings,
        **{f"template {name}": value for name, value in template.items()},
    }


def _tokenizer_digest(tokenizer: Any) -> str:
    fast = getattr(tokenizer, "backend_tokenizer", None)
    text = json.dumps(sorted(tokenizer.get_vocab().items())) if fast is None else fast.to_str()
    return hashlib.sha256(f"{text} {getattr(tokenizer, 'chat_template', None)}".encode()).hexdigest()[:16]


def _rounded(values: Any) -> list[float]:
    return [round(value, 6) for value in values.tolist()]


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
