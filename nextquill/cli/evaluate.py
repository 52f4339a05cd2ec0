"""`nextquill evaluate`: does the model use the history, of the right user, and does its text get closer?"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence

import torch

from nextquill.cli.main import OK
from nextquill.cli.options import EvaluateOptions, ModelOptions, PromptOptions, ScoreFiles, check_positive
from nextquill.cli.parsing import parse
from nextquill.cli.progress import bar
from nextquill.cli.scored import Scored, claim_output_file
from nextquill.integrations.generation import greedy_responses, rouge_l
from nextquill.integrations.scoring import ExampleScores
from nextquill.losses import DEFAULT_THRESHOLD
from nextquill.report.files import write_whole

DESCRIPTION = (
    "Measure a model on records: nll of the responses with the user's history, without it and under another user's "
    "(placebo), the effects between them, and ROUGE-L of greedy generation with and without history."
)

_ROWS = (
    ("nll_factual", "nll with the user's history", "nats per token"),
    ("nll_counterfactual", "nll without history", "nats per token"),
    ("nll_placebo", "nll under another user's history", "nats per token"),
    ("effect_logprob", "effect of the history (without - with)", "nats per token"),
    ("effect_placebo", "effect against the placebo (another's - own)", "nats per token"),
    ("effect_prob", "mean probability effect", ""),
    ("share_above_threshold", f"share of tokens with effect above {DEFAULT_THRESHOLD}", ""),
    ("rouge_l", "ROUGE-L, generated with history", "F1"),
    ("rouge_l_without", "ROUGE-L, generated without history", "F1"),
    ("examples", "examples", ""),
    ("tokens", "response tokens", ""),
)


def run(arguments: Sequence[str]) -> int:
    kinds = (ModelOptions, ScoreFiles, PromptOptions, EvaluateOptions)
    model_options, files, prompt_options, options = parse("evaluate", DESCRIPTION, kinds, arguments)
    check_positive(options, ("max_new_tokens", "generate_limit"))
    target = None
    if options.output_file is not None:
        target = claim_output_file(options.output_file, overwrite=options.overwrite)
    scored = Scored(model_options, prompt_options, files)
    metrics = summarise(scored.scores())
    if options.generate:
        metrics |= rouge(scored, options)
    _print(metrics)
    if target is not None:
        write_whole(target, json.dumps(metrics, indent=2) + "\n")
    return OK


def summarise(scores: Iterable[ExampleScores]) -> dict[str, float]:
    """Means over all response tokens; effects as differences of those means."""
    parts = list(scores)
    factual, counterfactual, effect = (
        torch.cat([getattr(part, name) for part in parts]).double()
        for name in ("nll_factual", "nll_counterfactual", "effect_prob")
    )
    metrics = {
        "nll_factual": float(factual.mean()),
        "nll_counterfactual": float(counterfactual.mean()),
        "effect_logprob": float((counterfactual - factual).mean()),
        "effect_prob": float(effect.mean()),
        "share_above_threshold": float((effect > DEFAULT_THRESHOLD).double().mean()),
        "examples": float(len(parts)),
        "tokens": float(factual.numel()),
    }
    placebos = [part.nll_placebo for part in parts if part.nll_placebo is not None]
    if placebos:
        metrics["nll_placebo"] = float(torch.cat(placebos).double().mean())
        metrics["effect_placebo"] = metrics["nll_placebo"] - metrics["nll_factual"]
    return metrics


def rouge(scored: Scored, options: EvaluateOptions) -> dict[str, float]:
    """ROUGE-L F1 of greedy responses against the records' own."""
    examples = scored.examples[: options.generate_limit]
    references = [scored.records[example.index].response for example in examples]
    metrics = {}
    for branch, name, what in (("factual", "rouge_l", "with"), ("counterfactual", "rouge_l_without", "without")):
        texts = greedy_responses(
            scored.model,
            scored.tokenizer,
            examples,
            branch=branch,
            max_new_tokens=options.max_new_tokens,
            batch_size=scored.batch_size,
        )
        texts = bar(texts, total=len(examples), desc=f"Generating {what} history")
        metrics[name] = rouge_l(references, list(texts))
    return metrics


def _print(metrics: dict[str, float]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("measure")
    table.add_column("value", justify="right", no_wrap=True)
    table.add_column("unit")
    for name, label, unit in _ROWS:
        if name in metrics:
            value = round(metrics[name], 4) + 0.0  # never -0.0000
            table.add_row(label, f"{value:.0f}" if name in ("examples", "tokens") else f"{value:.4f}", unit)
    Console().print(table)
