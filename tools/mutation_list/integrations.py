"""Mutations of the trainers, of models' heads and attention, scoring, generation and checkpoints."""

from tools.mutation import Mutation

_FOLDER = "nextquill/integrations"

MUTATIONS = (
    Mutation(
        "trainer-ranks",
        f"{_FOLDER}/mixin.py",
        "            loss = loss * self.accelerator.num_processes\n",
        "            loss = loss * 1\n",
        "on several processes gradients are too small by their number",
    ),
    Mutation(
        "trainer-accumulation",
        f"{_FOLDER}/mixin.py",
        "sum(self.passes.count_items(batch) for batch in batches)",
        "self.passes.count_items(batches[-1]) * len(batches)",
        "gradient accumulation normalises by the last batch",
    ),
    Mutation(
        "trainer-data-seed",
        f"{_FOLDER}/mixin.py",
        "seed = self.args.seed if self.args.data_seed is None else self.args.data_seed",
        "seed = self.args.seed",
        "data_seed does nothing with examples_per_user",
    ),
    Mutation(
        "trainer-collator-restored",
        f"{_FOLDER}/mixin.py",
        "            self.data_collator = previous\n",
        "            self.data_collator = self.data_collator\n",
        "training after an evaluation runs with the evaluation's batches",
    ),
    Mutation(
        "trainer-placebo-sign",
        f"{_FOLDER}/metrics.py",
        '"effect_placebo": means["nll_placebo"] - means["nll_factual"]',
        '"effect_placebo": means["nll_factual"] - means["nll_placebo"]',
        "eval_effect_placebo has the wrong sign",
    ),
    Mutation(
        "trainer-token-means",
        f"{_FOLDER}/metrics.py",
        "means = {name: float((column * tokens).sum() / total) for",
        "means = {name: float(column.mean()) for",
        "evaluation metrics are means over examples, not tokens",
    ),
    Mutation(
        "trainer-watch",
        f"{_FOLDER}/metrics.py",
        "min(self.lowest.get(name, nll), nll)",
        "max(self.lowest.get(name, nll), nll)",
        "nobody is warned of a counterfactual that gets worse",
    ),
    Mutation(
        "trainer-watch-resumed",
        f"{_FOLDER}/metrics.py",
        "if saved and state.global_step > 0:",
        "if saved and state.global_step < 0:",
        "a resumed run forgets how good the counterfactual was",
    ),
    Mutation(
        "trainer-greater-is-better",
        f"{_FOLDER}/checks.py",
        'if metric.startswith("nll_") and args.greater_is_better:',
        'if metric.startswith("nll_") and not args.greater_is_better:',
        "the checkpoint with the worst nll is kept as the best",
    ),
    Mutation(
        "trainer-stored-effects",
        f"{_FOLDER}/effects.py",
        "weighting(PairNLL(piece[0].clone(), piece[1].clone(), None))",
        "weighting(PairNLL(piece[1].clone(), piece[0].clone(), None))",
        "stored effects weigh tokens by the opposite",
    ),
    Mutation(
        "checkpoints-identity",
        f"{_FOLDER}/checkpoints.py",
        "different = [key for key in identity if saved.get(key) != identity[key]]",
        "different = [key for key in identity if key not in saved]",
        "a checkpoint of another loss or adapter is resumed from",
    ),
    Mutation(
        "checkpoints-rotation",
        f"{_FOLDER}/checkpoints.py",
        'int(path.name.partition("-")[2])))',
        'int(path.name.partition("-")[2])), reverse=True)',
        "save_total_limit deletes the newest checkpoints",
    ),
    Mutation(
        "checkpoints-incomplete",
        f"{_FOLDER}/checkpoints.py",
        'if not (path / "trainer_state.json").is_file():',
        "if not path.is_dir():",
        "a checkpoint that was cut short is resumed from",
    ),
    Mutation(
        "checkpoints-half-written",
        f"{_FOLDER}/checkpoints.py",
        """\
    try:
        yield staging
        for path""",
        """\
    try:
        try:
            yield staging
        except BaseException:
            for path in sorted(staging.iterdir()):
                os.replace(path, folder / path.name)
            raise
        for path""",
        "an error while a model is saved leaves part of it in the run's folder",
    ),
    Mutation(
        "head-lora-scale",
        f"{_FOLDER}/head.py",
        "head.scaling[name] * (up.to(wide) @ down.to(wide))",
        "(up.to(wide) @ down.to(wide))",
        "LoRA on the head counts with another scale",
    ),
    Mutation(
        "head-softcap-restored",
        f"{_FOLDER}/probe.py",
        "object.__setattr__(config, _SOFTCAP, value)",
        "object.__setattr__(config, _SOFTCAP, None)",
        "a model that was trained generates without its soft cap",
    ),
    Mutation(
        "head-training-mode-restored",
        f"{_FOLDER}/probe.py",
        "            module.training = training\n",
        "            module.training = training and module.training\n",
        "making a trainer leaves the model in evaluation mode",
    ),
    Mutation(
        "head-ids-unchecked",
        f"{_FOLDER}/checks.py",
        "if size and largest >= size:",
        "if size and largest > size:",
        "a tokenizer with one id too many crashes in training",
    ),
    Mutation(
        "attention-restored",
        f"{_FOLDER}/attention.py",
        "                self._configs[key]._attn_implementation_internal = name\n",
        "                pass\n",
        "a model that was trained keeps nextquill's attention",
    ),
    Mutation(
        "attention-rope-limit",
        f"{_FOLDER}/architectures.py",
        "return min(limits, default=None)",
        "return None",
        "dynamic rotary embeddings are trained beyond where they change",
    ),
    Mutation(
        "attention-dropout",
        f"{_FOLDER}/architectures.py",
        "if rate and (module.training or not in_training_only):",
        "if rate and module.training and not in_training_only:",
        "dropout that training switches on acts inside shared prefixes",
    ),
    Mutation(
        "attention-window-type",
        f"{_FOLDER}/attention.py",
        'mask(window if name == "sliding_attention" else None)',
        'mask(window if name == "full_attention" else None)',
        "windows are on the layers that should see everything",
    ),
    Mutation(
        "router-factor",
        f"{_FOLDER}/router.py",
        "return self._factor * loss.float()",
        "return loss.float()",
        "the router loss of a mixture of experts has no coefficient",
    ),
    Mutation(
        "scratch-generator-restored",
        f"{_FOLDER}/scratch.py",
        "    with torch.random.fork_rng(devices=[]):\n",
        "    if True:\n",
        "making a model changes the random numbers of whoever asked for it",
    ),
    Mutation(
        "scoring-resume",
        f"{_FOLDER}/scoring.py",
        "members, done = order[start : start + size], max(0, skip - start)",
        "members, done = order[start : start + size], max(0, skip - start - 1)",
        "a resumed scoring computes a record twice",
    ),
    Mutation(
        "scoring-budget",
        f"{_FOLDER}/scoring.py",
        "            budget = max(budget, size)\n",
        "            budget = min(budget, size)\n",
        "an example longer than the usual budget cannot be scored",
    ),
    Mutation(
        "partial-lock",
        f"{_FOLDER}/partial_file.py",
        "fcntl.LOCK_EX | fcntl.LOCK_NB",
        "fcntl.LOCK_SH | fcntl.LOCK_NB",
        "two processes write one output file",
    ),
    Mutation(
        "partial-cut-line",
        f"{_FOLDER}/partial_file.py",
        'if not line.endswith(b"\\n") or not isinstance(index, int) or index in self._offsets:',
        "if not isinstance(index, int) or index in self._offsets:",
        "after a line that lost its end the next one is joined to it",
    ),
    Mutation(
        "measures-per-token",
        f"{_FOLDER}/measures.py",
        "MetricScores.ratio_of([float(each[name].sum()) for each in values], sizes)",
        "MetricScores.ratio_of([float(each[name].mean()) for each in values], sizes)",
        "nlls per token are divided by the tokens twice",
    ),
    Mutation(
        "preferences-ties",
        f"{_FOLDER}/preferences.py",
        "0.5 if value == 0 else float(value > 0)",
        "float(value >= 0)",
        "a tie counts as a preference for the chosen response",
    ),
    Mutation(
        "partial-other-run",
        f"{_FOLDER}/partial_file.py",
        "if saved.get(name) != run.get(name)), None)",
        "if name not in run), None)",
        "an evaluation that was stopped goes on with another model",
    ),
    Mutation(
        "generation-seeds",
        f"{_FOLDER}/generation/options.py",
        'f"{seed} {example.index} {branch}"',
        'f"{seed} {branch}"',
        "all examples are sampled with the same random numbers",
    ),
    Mutation(
        "generation-padding",
        f"{_FOLDER}/generation/transformers_engine.py",
        "[0] * left + [1] * len(each.ids)",
        "[1] * (left + len(each.ids))",
        "what is generated depends on the prompts beside it",
    ),
    Mutation(
        "generation-stop",
        f"{_FOLDER}/generation/options.py",
        "for position, token in enumerate(ids, 1) if token in stops), len(ids))",
        "for position, token in enumerate(ids) if token in stops), len(ids))",
        "sampled ids lose the token that ended them",
    ),
    Mutation(
        "loading-missing-weights",
        f"{_FOLDER}/loading.py",
        "    if missing:  #",
        "    if len(missing) > 1:  #",
        "a weight that a folder lacks is random",
    ),
    Mutation(
        "loading-checkpoint-prompts",
        f"{_FOLDER}/loading.py",
        "        places.append(folder.parent / PROMPT_FILE)\n",
        "        places.append(folder.parent.parent / PROMPT_FILE)\n",
        "a checkpoint is evaluated with other prompts than it was trained with",
    ),
    Mutation(
        "item-effects-sign",
        f"{_FOLDER}/item_effects.py",
        "return torch.stack(nll_without) - nll_all",
        "return nll_all - torch.stack(nll_without)",
        "effects of single history items have the wrong sign",
    ),
    Mutation(
        "item-effects-kept",
        f"{_FOLDER}/item_effects.py",
        "record.history[len(record.history) - example.history_kept :]",
        "record.history[: example.history_kept]",
        "effects are given to items that were not in the prompt",
    ),
)
