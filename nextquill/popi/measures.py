"""Scores of pairs under several contexts as measures with intervals, and what a summary makes of them.

Intervals draw whole users. Differences are paired: the same pairs under either context.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from nextquill.evaluation.bootstrap import Interval, PairedResult, bootstrap_interval, paired_difference
from nextquill.evaluation.results import finite
from nextquill.popi.evaluation import PairScore

MEASURES = ("accuracy", "logprob_accuracy", "margin", "loss")
#: What a summary is held against.
BASELINES = ("none", "signals", "placebo")


@dataclass(frozen=True)
class ContextMeasures:
    """All pairs under one context.

    Args:
        measures: accuracy (share of pairs with r above 0, a half where it is 0), the same of plain log-probabilities,
            margin r (nats) and the objective's loss, each with its interval.
        context_tokens: mean tokens that the context adds to a prompt.
    """

    measures: Mapping[str, Interval]
    context_tokens: float


@dataclass(frozen=True)
class PairMeasures:
    """One generator on the pairs of some users.

    Args:
        pairs, users: how many.
        contexts: by name, in the order of `CONTEXTS`.
        differences: accuracy and margin under the summary minus those under another context, by that context's name.
        token_ratio: tokens of the signals by tokens of the summary, means over pairs; None where a summary adds none,
            or there is none.
    """

    pairs: int
    users: int
    contexts: Mapping[str, ContextMeasures]
    differences: Mapping[str, Mapping[str, PairedResult]]
    token_ratio: float | None

    def to_dict(self) -> dict[str, Any]:
        """All of it, ready for JSON; a bound that a single user leaves open is None."""
        return {
            "pairs": self.pairs,
            "users": self.users,
            "contexts": {
                name: {
                    **{measure: _bounds(value._asdict()) for measure, value in each.measures.items()},
                    "context_tokens": each.context_tokens,
                }
                for name, each in self.contexts.items()
            },
            "summary_minus": {
                name: {measure: _bounds(asdict(value)) for measure, value in each.items()}
                for name, each in self.differences.items()
            },
            "signals_tokens_by_summary_tokens": self.token_ratio,
        }


@dataclass(frozen=True)
class PairEvaluation:
    """What `nextquill popi evaluate` found.

    Args:
        model: the folder.
        generator: the trained generator.
        transfer: other, frozen generators that read the same summaries, by name.
        empty_summaries: users whose summary is empty, which is the same as none.
        left_out: users without what is needed, and why, as counts.
        settings: how it was measured.
    """

    model: str
    generator: PairMeasures
    transfer: Mapping[str, PairMeasures] = field(default_factory=dict)
    empty_summaries: int = 0
    left_out: Mapping[str, int] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> str:
        """All of it as JSON."""
        content = {
            "model": self.model,
            "settings": dict(self.settings),
            "left_out": dict(self.left_out),
            "empty_summaries": self.empty_summaries,
            "generator": self.generator.to_dict(),
            "transfer": {name: each.to_dict() for name, each in self.transfer.items()},
        }
        return json.dumps(content, indent=2, ensure_ascii=False) + "\n"


def measure(
    scores: Mapping[str, Sequence[PairScore]], *, level: float = 0.95, resamples: int = 2000, seed: int = 0
) -> PairMeasures:
    """The measures of `score_pairs`' scores.

    Args:
        scores: by context, of the same pairs in the same order.
        level, resamples, seed: of the intervals, as `bootstrap_interval` takes them.

    Raises:
        ArgumentError: there are no scores, or the contexts are of different pairs.
    """
    options: dict[str, Any] = {"level": level, "resamples": resamples, "seed": seed}
    users = [score.user_id for score in next(iter(scores.values()))]

    def column(context: str, name: str) -> list[float]:
        return [getattr(score, name) for score in scores[context]]

    contexts = {
        context: ContextMeasures(
            {name: bootstrap_interval(column(context, name), users, **options) for name in MEASURES},
            sum(column(context, "context_tokens")) / len(users),
        )
        for context in scores
    }
    differences = {
        other: {
            name: paired_difference(column("summary", name), column(other, name), users, **options)
            for name in ("accuracy", "margin")
        }
        for other in (BASELINES if "summary" in scores else ())
        if other in scores
    }
    return PairMeasures(len(users), len(set(users)), contexts, differences, _token_ratio(contexts))


def _token_ratio(contexts: Mapping[str, ContextMeasures]) -> float | None:
    if not {"signals", "summary"} <= contexts.keys() or not contexts["summary"].context_tokens:
        return None
    return contexts["signals"].context_tokens / contexts["summary"].context_tokens


def _bounds(values: dict[str, Any]) -> dict[str, Any]:
    return {name: finite(value) if isinstance(value, float) else value for name, value in values.items()}
