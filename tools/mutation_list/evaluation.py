"""Mutations of metrics, intervals and paired tests."""

from tools.mutation import Mutation

MUTATIONS = (
    Mutation(
        "evaluation-percentiles",
        "nextquill/evaluation/bootstrap.py",
        "[(1 - level) / 2, (1 + level) / 2]",
        "[1 - level, level]",
        "95% intervals are of 90%",
    ),
    Mutation(
        "evaluation-seed-spread",
        "nextquill/evaluation/bootstrap.py",
        "values.std(ddof=1)",
        "values.std(ddof=0)",
        "intervals over few seeds are too narrow",
    ),
    Mutation(
        "evaluation-single-user",
        "nextquill/evaluation/bootstrap.py",
        "    if len(users) == 1:\n        return Interval(measured.value, -math.inf, math.inf)\n",
        "",
        "one user gives an interval of width 0",
    ),
    Mutation(
        "evaluation-users-drawn",
        "nextquill/evaluation/bootstrap.py",
        "    if groups is None:\n",
        "    if groups is None or len(groups) == len(statistics):\n",
        "intervals draw records instead of users",
    ),
    Mutation(
        "evaluation-p-value",
        "nextquill/evaluation/permutation.py",
        "(1 + count) / (1 + len(sizes))",
        "count / len(sizes)",
        "a drawn p-value can be 0",
    ),
    Mutation(
        "evaluation-holm",
        "nextquill/evaluation/permutation.py",
        "np.arange(len(given), 0, -1)",
        "np.arange(1, len(given) + 1)",
        "the smallest p-value is not corrected",
    ),
    Mutation(
        "evaluation-other-records",
        "nextquill/evaluation/compare.py",
        "    if first.records != second.records:\n",
        "    if not first.records:\n",
        "evaluations of different records are paired",
    ),
    Mutation(
        "evaluation-pairs-swapped",
        "nextquill/evaluation/compare.py",
        "(scores_a, scores_b), users = paired",
        "(scores_b, scores_a), users = paired",
        "paired differences have the wrong sign",
    ),
    Mutation(
        "evaluation-rmse",
        "nextquill/evaluation/metrics/answers.py",
        "np.sqrt(ratio(sums))",
        "ratio(sums)",
        "RMSE is the mean square",
    ),
    Mutation(
        "evaluation-no-rating",
        "nextquill/evaluation/metrics/answers.py",
        "farthest if rating is None",
        "0.0 if rating is None",
        "a text that is not a rating counts as right",
    ),
    Mutation(
        "evaluation-rouge-recall",
        "nextquill/evaluation/metrics/rouge.py",
        "[kind].fmeasure",
        "[kind].recall",
        "ROUGE rewards long texts",
    ),
    Mutation(
        "evaluation-macro-f1",
        "nextquill/evaluation/metrics/answers.py",
        "known = texts.labels if texts.labels is not None else sorted(set(truth))",
        "known = sorted(set(truth))",
        "macro-F1 leaves out labels that no record has",
    ),
    Mutation(
        "evaluation-stray-predictions",
        "nextquill/evaluation/predictions.py",
        '        (given, set(wanted), f"id {{!r}} is not in {other}"),\n',
        "",
        "predictions of unknown ids are accepted",
    ),
    Mutation(
        "evaluation-changed-file",
        "nextquill/evaluation/results.py",
        "if (wrong := changed_file(folder, raw)) is not None:",
        "if (wrong := None) is not None:",
        "a changed file of a finished evaluation is read as if it were whole",
    ),
)
