"""Mutations of comparisons: arms, their runs, figures and findings; and of the demos."""

from tools.mutation import Mutation

MUTATIONS = (
    Mutation(
        "comparison-equal-time",
        "nextquill/comparison/running.py",
        "ratio = reference.seconds / pace.seconds",
        "ratio = pace.seconds / reference.seconds",
        "SFT at equal time gets less time, not more",
    ),
    Mutation(
        "comparison-learning-rate",
        "nextquill/comparison/running.py",
        "args.learning_rate = setup.args.learning_rate * arm.learning_rate_factor",
        "args.learning_rate = setup.args.learning_rate",
        "SFT at twice the learning rate is plain SFT",
    ),
    Mutation(
        "comparison-seeds",
        "nextquill/comparison/running.py",
        "    args.seed = seed\n",
        "    args.seed = setup.seeds[0]\n",
        "every seed sees the examples in the same order",
    ),
    Mutation(
        "comparison-finished",
        "nextquill/comparison/running.py",
        "        if getattr(record, name) != value:\n",
        "        if getattr(record, name) is None:\n",
        "a finished run of another loss is taken",
    ),
    Mutation(
        "comparison-lock",
        "nextquill/comparison/folder.py",
        "if not try_lock(lock):",
        "if not try_lock(lock) and False:",
        "two comparisons run in one folder",
    ),
    Mutation(
        "comparison-holm",
        "nextquill/report/comparison/collect.py",
        "pair.p_value, p_adjusted, p_runs)",
        "pair.p_value, pair.p_value, p_runs)",
        "p-values are not adjusted for the number of arms",
    ),
    Mutation(
        "comparison-verdict",
        "nextquill/report/comparison/findings.py",
        'return "better" if (difference.value > 0) == measure.higher_is_better else "worse"',
        'return "better" if difference.value > 0 else "worse"',
        "a higher NLL is called better",
    ),
    Mutation(
        "comparison-order",
        "nextquill/comparison/arms.py",
        "sorted(arms, key=lambda arm: arm.matches_time)",
        "sorted(arms, key=lambda arm: not arm.matches_time)",
        "the arm of equal time runs before the one whose time it takes",
    ),
    Mutation(
        "comparison-time-of-evaluation",
        "nextquill/comparison/measuring.py",
        "    on_evaluate = on_save = on_log\n",
        "",
        "evaluations and checkpoints count as training time",
    ),
    Mutation(
        "demo-placebo",
        "demos/losses/world.py",
        "return histories[1:] + histories[:1]",
        "return histories",
        "the demo's placebo is the user's own history",
    ),
    Mutation(
        "demo-personal-marks",
        "demos/losses/world.py",
        "tuple(word in personal_fills for word in RESPONSE_TEMPLATE)",
        "tuple(word in fills for word in RESPONSE_TEMPLATE)",
        "the demo measures the items' facts and calls them personal",
    ),
    Mutation(
        "demo-bad-seeds",
        "demos/kit/run.py",
        "        if value < least:\n",
        "        if value < 0:\n",
        "a demo of no seeds begins, and fails when it has nothing to report",
    ),
    Mutation(
        "demo-without-checkout",
        "nextquill/cli/checkout.py",
        '    if not (root / folder / "__init__.py").is_file():\n',
        "    if not folder:\n",
        "an installed nextquill does not say that the demos are in the source tree",
    ),
)
