"""Mutations of MIRROR: its loss, its samples, its anchor and its running means."""

from tools.mutation import Mutation

MUTATIONS = (
    Mutation(
        "mirror-divergence-share",
        "nextquill/mirror/loss.py",
        "share, own_share = (1 - self.alpha) / self.term_means[0]",
        "share, own_share = 1 / self.term_means[0]",
        "MIRROR-F gives the divergence more than its share",
    ),
    Mutation(
        "mirror-no-teacher",
        "nextquill/ops/objective.py",
        "or self.anchor > 0 or self.jsd_beta is not None",
        "or self.anchor > 0",
        "with token weights MIRROR does without a teacher",
    ),
    Mutation(
        "mirror-effect-unset",
        "nextquill/ops/fused_loss.py",
        "if self.effect or self.beta is None:",
        "if self.beta is None:",
        "the reported NLL of the effect is what the memory held before",
    ),
    Mutation(
        "mirror-anchor-count",
        "nextquill/mirror/loss.py",
        'len(part["anchor_ids"][keep].unique())',
        'len(part["anchor_ids"].unique())',
        "examples without informative tokens dilute the anchor",
    ),
    Mutation(
        "mirror-same-samples",
        "nextquill/mirror/trainer.py",
        "{step} {example.index} {copy}",
        "{example.index} {copy}",
        "every step of a run samples with the same seeds",
    ),
    Mutation(
        "mirror-copies",
        "nextquill/mirror/trainer.py",
        "(copy > 0 or max(anchor.labels) < 0)",
        "(max(anchor.labels) < 0)",
        "each rollout counts the user's own response again",
    ),
    Mutation(
        "mirror-means-of-this-rank",
        "nextquill/mirror/trainer.py",
        "divergence, anchor = self._reduced(terms)",
        "divergence, anchor = terms.tolist()",
        "processes divide the terms by different means",
    ),
    Mutation(
        "mirror-means-lost",
        "nextquill/mirror/term_means.py",
        "if saved and state.global_step > 0:",
        "if not saved and state.global_step > 0:",
        "a resumed run forgets the terms' means",
    ),
    Mutation(
        "mirror-skipped-step",
        "nextquill/mirror/trainer.py",
        "            self.term_means.forget()",
        "            pass",
        "a step that is not finite spoils the terms' means for good",
    ),
    Mutation(
        "mirror-log-not-cut",
        "nextquill/training/atomic_checkpoints.py",
        "self._sample_log.resume(checkpoint)",
        "pass",
        "a resumed run logs samples twice",
    ),
    Mutation(
        "mirror-common-tokens",
        "nextquill/mirror/informative.py",
        " & self._rare",
        "",
        "frequent words count as informative",
    ),
    Mutation(
        "mirror-space-before",
        "nextquill/mirror/informative.py",
        'for start in ("", " ")',
        'for start in ("",)',
        "a word that begins the response is not found inside the history",
    ),
    Mutation(
        "mirror-history-that-was-dropped",
        "nextquill/mirror/trainer.py",
        "_last(record.history, example.history_kept)",
        "record.history",
        "tokens of history that is not in the prompt count as informative",
    ),
)
