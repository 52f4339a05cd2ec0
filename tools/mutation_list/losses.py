"""Mutations of the losses, the operators below them, their plain twins, and the files that everyone writes with."""

from tools.mutation import Mutation

MUTATIONS = (
    Mutation(
        "losses-alpha-default",
        "nextquill/losses.py",
        "alpha: float = 0.1,",
        "alpha: float = 0.01,",
        "NextQuillLoss() is not the published objective",
    ),
    Mutation(
        "losses-perce-default",
        "nextquill/losses.py",
        "min_weight: float = 0.8, max_weight: float = 5.0",
        "min_weight: float = 0.0, max_weight: float = 5.0",
        "PerCELoss() gives tokens without an effect no weight",
    ),
    Mutation(
        "losses-micro-batch",
        "nextquill/losses.py",
        'sequence_ids=None if self.reduction == "micro_batch" else ids,',
        "sequence_ids=ids,",
        "reduction='micro_batch' normalises by sequence",
    ),
    Mutation(
        "losses-share-of-all-rows",
        "nextquill/losses.py",
        "share_above_threshold=above.sum() / count,",
        "share_above_threshold=above.double().mean(),",
        "the logged share of personal tokens is one of all rows, ignored ones too",
    ),
    Mutation(
        "weighting-nan-hidden",
        "nextquill/weighting.py",
        "return weights.masked_fill_(effect.isnan(), torch.nan)",
        "return weights",
        "a counterfactual of NaN leaves a finite loss",
    ),
    Mutation(
        "weighting-longce-bound",
        "nextquill/weighting.py",
        "pair.effect_logprob.exp().clamp(max=self.maximum)",
        "pair.effect_logprob.clamp(max=self.maximum).exp()",
        "LongCE's weights reach exp(5)",
    ),
    Mutation(
        "outputs-effect-sign",
        "nextquill/outputs.py",
        "return self._counterfactual() - self.factual",
        "return self.factual - self._counterfactual()",
        "effects have the wrong sign",
    ),
    Mutation(
        "functional-kl-and-entropy",
        "nextquill/functional.py",
        "*nlls, kl, entropy = (",
        "*nlls, entropy, kl = (",
        "linear_pair_stats swaps its two statistics",
    ),
    Mutation(
        "ops-weighted-effect",
        "nextquill/ops/objective.py",
        "return coefficients.weighted if self.weighted_effect else coefficients.uniform",
        "return coefficients.uniform",
        "weighted_effect=True does nothing",
    ),
    Mutation(
        "ops-detach-ignored",
        "nextquill/ops/objective.py",
        "return self.detach_counterfactual or (self.alpha == 0 and self.anchor == 0)",
        "return self.alpha == 0 and self.anchor == 0",
        "detach_counterfactual=True trains through the counterfactual",
    ),
    Mutation(
        "ops-token-reduction",
        "nextquill/ops/objective.py",
        'return plan.num_rows if self.reduction == "token" else 1',
        'return plan.num_sequences if self.reduction == "token" else 1',
        "reduction='token' divides by the number of sequences",
    ),
    Mutation(
        "ops-anchor-weights",
        "nextquill/ops/objective.py",
        "coefficients.uniform * self.anchor if self.anchor > 0 else None",
        "coefficients.weighted * self.anchor if self.anchor > 0 else None",
        "the anchor's gradient is not that of its value",
    ),
    Mutation(
        "ops-weights-of-zero",
        "nextquill/ops/objective.py",
        "return sums.masked_fill_(sums == 0, 1.0).repeat_interleave(sizes, output_size=weights.numel())",
        "return sums.repeat_interleave(sizes, output_size=weights.numel())",
        "a sequence whose weights are all 0 gives NaN",
    ),
    Mutation(
        "ops-chunk-budget",
        "nextquill/ops/chunks.py",
        "of_row, of_gradient = streams * stride * self.dtype.itemsize, 0",
        "of_row, of_gradient = stride * self.dtype.itemsize, 0",
        "two streams take twice chunk_bytes",
    ),
    Mutation(
        "ops-last-rows-dropped",
        "nextquill/ops/fused_loss.py",
        "        self.gradient_buffer.flush()\n",
        "",
        "on a GPU the last rows of a batch have no gradient",
    ),
    Mutation(
        "ops-weight-overwritten",
        "nextquill/ops/gradients.py",
        "overwrite=not self._weight_begun",
        "overwrite=True",
        "the head's gradient is that of the last chunk alone",
    ),
    Mutation(
        "ops-unwritten-weight",
        "nextquill/ops/gradients.py",
        "            self._weight.zero_()\n",
        "",
        "a batch without labels gives the head whatever was in its memory",
    ),
    Mutation(
        "ops-bias-after-scale",
        "nextquill/ops/head.py",
        """\
        if self.wide_bias is not None:
            products.add_(self.wide_bias if columns is None else self.wide_bias[columns])
        if self.logit_scale != 1.0:
            products.mul_(self.logit_scale)
""",
        """\
        if self.logit_scale != 1.0:
            products.mul_(self.logit_scale)
        if self.wide_bias is not None:
            products.add_(self.wide_bias if columns is None else self.wide_bias[columns])
""",
        "logit_scale leaves the bias out",
    ),
    Mutation(
        "ops-cap-scale",
        "nextquill/ops/chunk_torch.py",
        "torch.mul(gradient, logit_scale, out=out)",
        "out.copy_(gradient)",
        "gradients miss logit_scale",
    ),
    Mutation(
        "ops-effect-gradient-sign",
        "nextquill/ops/chunk_torch.py",
        "        effect.neg_()\n",
        "",
        "the effect term pushes the counterfactual the wrong way",
    ),
    Mutation(
        "ops-masked-entropy",
        "nextquill/ops/chunk_torch.py",
        "return torch.where(probabilities > 0, probabilities * values, probabilities).sum(-1)",
        "return (probabilities * values).sum(-1)",
        "an entry masked by a bias of -inf makes KL and entropy NaN",
    ),
    Mutation(
        "ops-label-of-v",
        "nextquill/ops/row_groups.py",
        "(labels >= vocabulary)",
        "(labels > vocabulary)",
        "a label of V is not refused",
    ),
    Mutation(
        "ops-half-gradients",
        "nextquill/ops/gradients.py",
        "return torch.float32 if hidden.dtype == torch.float16 else hidden.dtype",
        "return hidden.dtype",
        "float16 gradients underflow before the loss scale is applied",
    ),
    Mutation(
        "ops-second-derivative",
        "nextquill/ops/gradients.py",
        "        if torch.is_grad_enabled():\n            raise GradientError(",
        "        if not grad_outputs:\n            raise GradientError(",
        "create_graph=True gives wrong second derivatives without a word",
    ),
    Mutation(
        "ops-autocast-rounds",
        "nextquill/ops/precision.py",
        'if device == "cpu":',
        'if device == "mps":',
        "autocast on a CPU rounds float32 master weights",
    ),
    Mutation(
        "ops-given-weights-unchecked",
        "nextquill/ops/row_groups.py",
        "_check_weights(token_weights, unusable & (labels != ignore_index))",
        "_check_weights(token_weights, unusable & (labels == ignore_index))",
        "negative token_weights are accepted, and those of ignored rows refused",
    ),
    Mutation(
        "reference-detach",
        "nextquill/reference/losses.py",
        "        z0 = z0.detach()\n",
        "        z0 = z0.clone()\n",
        "the oracle has a gradient through a detached counterfactual",
    ),
    Mutation(
        "reference-kl-sign",
        "nextquill/reference/linear.py",
        "p1 * (log_p1 - log_p0)",
        "p1 * (log_p0 - log_p1)",
        "the oracle's KL is negative",
    ),
    Mutation(
        "ops-jsd-weights",
        "nextquill/ops/chunk_torch.py",
        "weight0, weight1 = (beta, 1 - beta)",
        "weight1, weight0 = (beta, 1 - beta)",
        "the divergence weighs the student as it should the teacher",
    ),
    Mutation(
        "ops-jsd-end",
        "nextquill/ops/jsd.py",
        "    tiny = torch.finfo(dtype).eps / 2\n",
        "    tiny = 0.0\n",
        "a beta just below 1 means 1, which is another divergence",
    ),
    Mutation(
        "ops-jsd-mask",
        "nextquill/functional.py",
        "counts = inputs.labels.bool() if mask.dtype == torch.bool else inputs.labels != ignore_index",
        "counts = inputs.labels != ignore_index",
        "a bool mask counts every row",
    ),
    Mutation(
        "files-half-written",
        "nextquill/storage/atomic_files.py",
        'return path.with_name(f".{path.name}.tmp")',
        "return path",
        "an error while a file is written leaves half of it in the place of the old one",
    ),
    Mutation(
        "files-shared-lock",
        "nextquill/storage/locks.py",
        "fcntl.LOCK_EX | fcntl.LOCK_NB",
        "fcntl.LOCK_SH | fcntl.LOCK_NB",
        "two processes hold the lock of one file",
    ),
    Mutation(
        "files-seed-of-parts",
        "nextquill/storage/fingerprints.py",
        '"\\x1f".join(map(str, parts))',
        '"".join(map(str, parts))',
        "step 1 of user 23 has the random numbers of step 12 of user 3",
    ),
)
