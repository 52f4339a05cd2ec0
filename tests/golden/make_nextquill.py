"""Compute nextquill.json with mpmath in 60 digits: `python tests/golden/make_nextquill.py`.

It uses neither torch nor nextquill. Values come from the equations over lists of numbers. Gradients are central
differences of the objective, with constant token weights, and a constant z0 if it is detached.
"""

from __future__ import annotations

import itertools
import json
from pathlib import Path

from mpmath import exp, log, mp, mpf, tanh

mp.dps = 60
STEP = mpf(10) ** -20

INPUTS = {
    "hidden_factual": [["0.9", "-0.4"], ["1.3", "0.2"], ["-0.7", "1.1"], ["0.25", "-1.5"], ["-0.6", "-0.35"]],
    "hidden_counterfactual": [["0.1", "-0.2"], ["1.2", "0.3"], ["0.4", "0.9"], ["0.5", "-1.25"], ["0.8", "0.15"]],
    "lm_head_weight": [["1.5", "-0.5"], ["-0.75", "1.25"], ["0.3", "0.6"]],
    "bias": ["0.2", "-0.1", "0.05"],
}
LABELS = [0, 2, -100, 1, 0]
SEQUENCE_IDS = [7, 7, 7, 3, 7]
SOFTCAP, LOGIT_SCALE = "2.0", "0.8"
VARIANTS = {
    "nextquill": {"loss": "NextQuillLoss", "options": {}},
    "nextquill_paper": {"loss": "NextQuillLoss", "options": {"weighted_effect": True, "alpha": 0.3}},
    "nextquill_detached": {"loss": "NextQuillLoss", "options": {"detach_counterfactual": True, "alpha": 0.25}},
    "nextquill_anchored": {"loss": "NextQuillLoss", "options": {"anchor": 0.2}},
    "perce": {"loss": "PerCELoss", "options": {"min_weight": 0.05, "max_weight": 0.4}},
    "longce": {"loss": "LongCELoss", "options": {"max_weight": 1.3}},
    "sft": {"loss": "SFTLoss", "options": {}},
}
ROWS = [i for i, y in enumerate(LABELS) if y >= 0]


def parse(values):
    return [parse(v) for v in values] if isinstance(values, list) else mpf(values)


def logits(h, x):
    c, s = mpf(SOFTCAP), mpf(LOGIT_SCALE)
    dots = [sum(a * b for a, b in zip(h, w, strict=True)) for w in x["lm_head_weight"]]
    return [c * tanh(s * (dot + b) / c) for dot, b in zip(dots, x["bias"], strict=True)]


def nll(z, y):
    return log(sum(exp(value) for value in z)) - z[y]


def streams(x):
    """The logits of both streams for every supervised row."""
    return {i: (logits(x["hidden_factual"][i], x), logits(x["hidden_counterfactual"][i], x)) for i in ROWS}


def nlls(z):
    return {
        i: (nll(z1, LABELS[i]), nll(z0, LABELS[i]), nll([a - b for a, b in zip(z1, z0, strict=True)], LABELS[i]))
        for i, (z1, z0) in z.items()
    }


def weight_of(loss, options, nll_f, nll_c):
    pir, effect_prob = nll_c - nll_f, exp(-nll_f) - exp(-nll_c)
    if loss == "NextQuillLoss":
        return mpf("0.9") if effect_prob > mpf("0.05") else mpf("0.1")
    if loss == "PerCELoss":
        return min(max(pir, mpf(str(options["min_weight"]))), mpf(str(options["max_weight"])))
    if loss == "LongCELoss":
        return min(exp(pir), mpf(str(options["max_weight"])))
    return mpf(1)


def objective(x, variant, weights, constant_z0):
    """The mean of the objective over sequences."""
    loss, options = variant["loss"], variant["options"]
    z = streams(x)
    if options.get("detach_counterfactual"):
        z = {i: (z[i][0], constant_z0[i][1]) for i in z}
    n = nlls(z)
    alpha = mpf(str(options.get("alpha", "0.1"))) if loss == "NextQuillLoss" else mpf(0)
    anchor = mpf(str(options.get("anchor", 0)))
    total, ids = mpf(0), sorted({SEQUENCE_IDS[i] for i in ROWS})
    for sequence in ids:
        rows = [i for i in ROWS if SEQUENCE_IDS[i] == sequence]
        weight_sum = sum(weights[i] for i in rows) if loss == "NextQuillLoss" else mpf(len(rows))
        total += sum(weights[i] * n[i][0] for i in rows) / weight_sum
        if options.get("weighted_effect"):
            total += alpha * sum(weights[i] * n[i][2] for i in rows) / weight_sum
        else:
            total += alpha * sum(n[i][2] for i in rows) / len(rows)
        total += anchor * sum(n[i][1] for i in rows) / len(rows)
    return total / len(ids)


def gradient(x, name, evaluate):
    values = x[name]
    result = json.loads(json.dumps(INPUTS[name]))
    if isinstance(values[0], list):
        places = [(values[i], result[i], j) for i, j in itertools.product(range(len(values)), range(len(values[0])))]
    else:
        places = [(values, result, j) for j in range(len(values))]
    for source, target, j in places:
        kept = source[j]
        source[j] = kept + STEP
        above = evaluate()
        source[j] = kept - STEP
        below = evaluate()
        source[j] = kept
        target[j] = float((above - below) / (2 * STEP))
    return result


def main():
    x = {name: parse(values) for name, values in INPUTS.items()}
    z = streams(x)
    n = nlls(z)
    golden = {
        "inputs": INPUTS,
        "labels": LABELS,
        "sequence_ids": SEQUENCE_IDS,
        "softcap": float(SOFTCAP),
        "logit_scale": float(LOGIT_SCALE),
        "nll": {
            field: [float(n[i][k]) if i in n else 0.0 for i in range(len(LABELS))]
            for k, field in enumerate(("factual", "counterfactual", "effect"))
        },
        "losses": {},
    }
    for name, variant in VARIANTS.items():
        weights = {i: weight_of(variant["loss"], variant["options"], n[i][0], n[i][1]) for i in n}

        def evaluate(variant=variant, weights=weights):
            return objective(x, variant, weights, z)

        golden["losses"][name] = {
            **variant,
            "value": float(evaluate()),
            "token_weights": [float(weights.get(i, 0)) for i in range(len(LABELS))],
            "gradients": {inputs: gradient(x, inputs, evaluate) for inputs in INPUTS},
        }
    path = Path(__file__).with_name("nextquill.json")
    path.write_text(json.dumps(golden, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
