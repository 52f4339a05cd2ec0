"""Measures of response tokens that are functions of sums over examples, but neither means of tokens nor of examples.

Each example has a row of statistics for each of them. A measure is computed from the sum of these rows, so splitting
the records changes nothing, and intervals and paired differences add up rows again.

    ece                 expected calibration error, Σ_b n_b / n · |share right_b - mean confidence_b|, over equal bins b
    temperature         the temperature of `TEMPERATURES` with the lowest nll on these records
    nll_at_temperature  the nll at this temperature, or at one that was chosen on other records
    nll_personal        the nll of the tokens that another model marks as personal; nll_generic is that of the others
    top1_personal       the share of them that is predicted first; likewise top1_generic
    share_personal      the share of tokens that are personal
    auc_EFFECT          how well an effect ranks known personal tokens above others: the area under its ROC curve
    precision_EFFECT    the share of known ones among tokens with an effect above 0.05; likewise recall, and F1 of both
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from nextquill.defaults import DEFAULT_THRESHOLD
from nextquill.evaluation.metrics.scores import Floats, MetricScores, ratio

#: The temperatures that NLLs are measured at: softmax(z / T).
TEMPERATURES = (0.7, 0.8, 0.9, 1.0, 1.1, 1.25, 1.4, 1.6, 1.8, 2.0, 2.5)
#: Equal bins of confidence of the calibration error: (0, 1/15], (1/15, 2/15], …
CONFIDENCE_BINS = 15
#: Bins of an effect, of equal width in asinh(effect / scale), so that small effects are told apart as well. The area
#: under the curve counts effects in one bin as equal; on realistic effects of 3,600 tokens that changes it by 2e-4.
EFFECT_BINS = 1024
#: Effects that are to find known personal tokens: limit and scale of their bins.
EFFECTS = {
    "effect_prob": (1.0, 1e-4),
    "effect_prob_placebo": (1.0, 1e-4),
    "effect_logprob": (50.0, 1e-3),
    "effect_logprob_placebo": (50.0, 1e-3),
}

Bools = NDArray[np.bool_]
#: A row of statistics as JSON holds it: its values other than 0 by column.
Row = Mapping[str, float]


class SumMeasure(NamedTuple):
    """A measure that is a function of summed statistics.

    Attributes:
        label, unit, higher_is_better: as in `MetricValue`.
        place: its table, and the headings of its row and column.
        columns: of a row of statistics.
        from_sums: [..., columns] -> [...]; 0 where nothing was counted.
    """

    label: str
    unit: str
    higher_is_better: bool | None
    place: tuple[str, str, str]
    columns: int = 2
    from_sums: Callable[[Floats], Floats] = ratio

    def scores(self, rows: Sequence[Row]) -> MetricScores:
        """The scores of the examples with these rows."""
        statistics = np.zeros((len(rows), self.columns))
        for at, row in enumerate(rows):
            statistics[at, [int(column) for column in row]] = list(row.values())
        return MetricScores(statistics, self.from_sums)

    def is_defined(self, sums: Floats) -> bool:
        """Whether anything was counted; for an area, both known personal tokens and others."""
        counts = np.split(sums, 2) if self.from_sums is _area else [sums[-1:]]
        return all(count.any() for count in counts)


def _calibration_error(sums: Floats) -> Floats:
    return ratio(np.stack([np.abs(sums[..., :-1]).sum(axis=-1), sums[..., -1]], axis=-1))


def _best_temperature(sums: Floats) -> Floats:
    return np.where(sums[..., -1] > 0, np.take(TEMPERATURES, sums[..., :-1].argmin(axis=-1)), 0.0)


def _least_nll(sums: Floats) -> Floats:
    return ratio(np.stack([sums[..., :-1].min(axis=-1), sums[..., -1]], axis=-1))


def _area(sums: Floats) -> Floats:
    personal, other = sums[..., :EFFECT_BINS], sums[..., EFFECT_BINS:]
    below = other.cumsum(axis=-1) - other / 2
    pairs = personal.sum(axis=-1) * other.sum(axis=-1)
    return ratio(np.stack([(personal * below).sum(axis=-1), pairs], axis=-1))


_NATS = "nats per token"
_WHOSE = ("personal", "generic")
_TEMPERATURE_COLUMNS = len(TEMPERATURES) + 1


def _calibration(label: str, unit: str, better: bool | None, row: str, columns: int, from_sums: Any) -> SumMeasure:
    return SumMeasure(label, unit, better, ("calibration", row, "all tokens"), columns, from_sums)


def _of_marked(label: str, unit: str, better: bool | None, row: str, whose: str) -> SumMeasure:
    return SumMeasure(f"{label}, {whose} tokens", unit, better, ("personal", row, whose))


def _of_known(kind: str, effect: str) -> SumMeasure:
    scale = "log-prob" if "log" in effect else "prob"
    against = "another's" if effect.endswith("placebo") else "no history"
    area = (2 * EFFECT_BINS, _area) if kind == "AUC" else ()
    label = f"{kind} of the {scale} effect against {against}, known personal tokens"
    return SumMeasure(label, "", True, ("known", f"{kind}, {scale} effect", f"against {against}"), *area)


#: The measures by name, in the order of tables.
SUM_MEASURES = {
    "ece": _calibration(
        "calibration error", "", False, "calibration error (ECE)", CONFIDENCE_BINS + 1, _calibration_error
    ),
    "temperature": _calibration(
        "best temperature", "", None, "best temperature", _TEMPERATURE_COLUMNS, _best_temperature
    ),
    "nll_at_temperature": _calibration(
        "nll at the best temperature", _NATS, False, "nll at a temperature", _TEMPERATURE_COLUMNS, _least_nll
    ),
    **{f"nll_{each}": _of_marked("nll", _NATS, False, "nll with history", each) for each in _WHOSE},
    **{f"top1_{each}": _of_marked("predicted first", "", True, "predicted first", each) for each in _WHOSE},
    "share_personal": SumMeasure("personal tokens", "", None, ("personal", "share of tokens", "personal")),
    **{f"auc_{effect}": _of_known("AUC", effect) for effect in EFFECTS},
    **{
        f"{kind.lower()}_{effect}": _of_known(kind, effect)
        for effect in EFFECTS
        if "log" not in effect
        for kind in ("precision", "recall", "F1")
    },
}


def token_statistics(
    line: Mapping[str, Any],
    values: Mapping[str, Floats],
    temperature: float | None = None,
    marked: Bools | None = None,
    known: Bools | None = None,
) -> dict[str, Row]:
    """An example's row of each measure, by name.

    Args:
        line: its line of `effects.jsonl`.
        values: its tokens' values by name, each [tokens].
        temperature: the one of `nll_at_temperature`; None for the best on all records.
        marked: bool [tokens], whether another model marks a token as personal; None if no model does.
        known: bool [tokens], whether a token is known to be personal; None where the record does not say.
    """
    rows: dict[str, Sequence[float] | NDArray[Any]] = {}
    if "confidence" in line:
        confidence, nlls = np.asarray(line["confidence"], dtype=np.float64), line["nll_by_temperature"]
        bins = np.clip(np.ceil(confidence * CONFIDENCE_BINS), 1, CONFIDENCE_BINS).astype(int) - 1
        gaps = np.bincount(bins, values["top1"] - confidence, CONFIDENCE_BINS)
        rows["ece"] = [*gaps, len(bins)]
        rows["temperature"] = [*nlls, len(bins)]
        # The least of equal sums is the nll at the chosen temperature.
        chosen = nlls if temperature is None else [nlls[TEMPERATURES.index(temperature)]] * len(nlls)
        rows["nll_at_temperature"] = [*chosen, len(bins)]
    if marked is not None:
        rows["share_personal"] = [marked.sum(), len(marked)]
        for whose, chosen in zip(_WHOSE, (marked, ~marked), strict=True):
            if chosen.any():
                own = {"nll": values["nll_factual"], "top1": values["top1"]}
                rows |= {f"{kind}_{whose}": [each[chosen].sum(), chosen.sum()] for kind, each in own.items()}
    if known is not None:
        for name, effect in _effects(values).items():
            limit, scale = EFFECTS[name]
            height = np.arcsinh(effect / scale) / np.arcsinh(limit / scale)  # in -1..1
            bins = np.clip((height + 1) / 2 * EFFECT_BINS, 0, EFFECT_BINS - 1).astype(int)
            rows[f"auc_{name}"] = np.bincount(bins + EFFECT_BINS * ~known, minlength=2 * EFFECT_BINS)
            if "log" not in name:
                found = effect > DEFAULT_THRESHOLD
                hits, sizes = (found & known).sum(), (found.sum(), known.sum())
                rows[f"precision_{name}"], rows[f"recall_{name}"] = ([hits, size] for size in sizes)
                rows[f"f1_{name}"] = [2 * hits, sum(sizes)]
    return {name: _as_row(row) for name, row in rows.items()}


def _effects(values: Mapping[str, Floats]) -> dict[str, Floats]:
    """The effects of `EFFECTS` that these values give, each [tokens]."""
    effects = {"effect_prob": values["effect_prob"], "effect_logprob": values["effect_logprob"]}
    if "nll_placebo" in values:
        effects["effect_prob_placebo"] = np.exp(-values["nll_factual"]) - np.exp(-values["nll_placebo"])
        effects["effect_logprob_placebo"] = values["effect_placebo"]
    return effects


def _as_row(values: Sequence[float] | NDArray[Any]) -> Row:
    return {str(column): round(float(value), 6) for column, value in enumerate(values) if value}
