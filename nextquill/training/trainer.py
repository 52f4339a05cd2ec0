"""`NextQuillTrainer`: transformers' Trainer with a causal loss in place of the model's own.

It builds both branches of every example and merges them into trees of shared prefixes. The loss runs inside the model's
head, and its reduction is exact over gradient accumulation and ranks. Evaluation measures effects against a placebo.
Checkpoints are atomic. Everything else (optimisers, schedulers, mixed precision, PEFT, callbacks, logging) is the
Trainer's.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase, Trainer, TrainingArguments

from nextquill.data import EncodedDataset, ExampleEncoder, PromptTemplate, load_effects, load_records
from nextquill.data.prepared import PreparedDataset, is_prepared
from nextquill.errors import ArgumentError, naming
from nextquill.evaluation.scoring import ExampleScores, pad_token, score_examples
from nextquill.losses import PairLoss, PerCELoss
from nextquill.models.branch_passes import PairPasses
from nextquill.models.configs import default_max_length
from nextquill.models.stored_effects import effects_digest
from nextquill.training.atomic_checkpoints import AtomicCheckpoints, run_identity, training_identity
from nextquill.training.causal_loss_mixin import CausalLossMixin
from nextquill.training.checks import check_arguments, check_divided, check_model, check_options
from nextquill.training.meter import CounterfactualWatch

#: The batch of a step, by the flags that make it.
_STEP = "number of examples per step (--per_device_train_batch_size x --gradient_accumulation_steps x processes)"


class NextQuillTrainer(CausalLossMixin, AtomicCheckpoints, Trainer):
    """Fine-tune a causal language model on users' histories with a causal loss.

    Args:
        model: a causal language model of transformers, or a PEFT model around one.
        args: TrainingArguments; `remove_unused_columns` is turned off, since records are not model inputs.
        train_dataset, eval_dataset: records (`nextquill.data.load_records`: a JSONL path, a `datasets.Dataset`, any
            iterable of mappings), an `EncodedDataset`, or a folder of `nextquill prepare` with the tokenizer, template
            and budget given here. `eval_dataset` may be a dict of them.
        processing_class: the tokenizer.
        loss: any `PairLoss`; by default `PerCELoss()`. Its softcap and logit_scale are
            taken from the model.
        template: the wording of prompts; `PromptTemplate()` by default.
        max_length: budget of prompt and response in tokens; by default 2048, or the model's own limit if that is less.
        max_response_length: budget of the response alone, or None.
        attention: the kernel for rows of trees, or "padded" for a padded row per branch; see
            `nextquill.models.attention`.
        max_tokens: largest number of tokens in one forward with gradient, after sharing or with padding. A larger batch
            runs in several forwards, with the same gradient. None runs it in one.
        examples_per_user: keep this many examples of a user together in a batch, so that they share their history; see
            `UserGroupSampler`. The batch size must be a multiple of it.
        effects_file: take token weights from the effects that `nextquill score` has written for the training records.
            The model's own effects change while it trains. The counterfactual pass then runs only for a term of the
            loss that reads it: the effect term of NextQuill with `alpha` above 0, and `anchor` of any loss. Evaluation
            uses weights from the model's own effects.
        callbacks: as the Trainer's; a `CounterfactualWatch` among them replaces the default one.
        options: everything else the Trainer takes, except compute_loss_func, compute_metrics, data_collator,
            preprocess_logits_for_metrics and model_init, which this class sets itself.

    Training logs, over the interval since the last log and all ranks:

    - terms under the loss's reduction: loss_factual, loss_effect, loss_counterfactual;
    - means over tokens: nll_factual, nll_counterfactual, effect_logprob, effect_prob, share_above_threshold,
      token_weight;
    - counts: num_tokens, num_sequences, users_per_step;
    - tokens_per_second of the branches in separate rows, prompts included; sharing_factor, those tokens divided by the
      computed ones.

    A loss that reads only the factual branch logs no value of the other. Evaluation returns eval_loss,
    eval_nll_factual, eval_nll_counterfactual, eval_effect_logprob, eval_effect_prob, eval_share_above_threshold and
    eval_num_tokens. Data with more than one user adds eval_nll_placebo and eval_effect_placebo. `predict` takes records
    too; its `predictions` are the per-example table of `meter.EVAL_COLUMNS`, its `label_ids` the examples' positions.

    Raises:
        ArgumentError, ArgumentTypeError: an argument does not fit; the message names it.
        RecordError, BudgetError: a record is malformed or does not fit, or the effects file belongs to other records;
            raised before training starts.
        CheckpointError: a prepared folder is damaged, or its examples were made in another way.
        UnsupportedModelError: the model's head cannot be handled exactly.
    """

    encoder: ExampleEncoder

    def __init__(
        self,
        model: nn.Module,
        args: TrainingArguments | None = None,
        *,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        loss: PairLoss | None = None,
        template: PromptTemplate | None = None,
        max_length: int | None = None,
        max_response_length: int | None = None,
        attention: str = "auto",
        max_tokens: int | None = None,
        examples_per_user: int = 1,
        effects_file: str | os.PathLike[str] | None = None,
        callbacks: list[Any] | None = None,
        **options: Any,
    ) -> None:
        check_options(options)
        loss = PerCELoss() if loss is None else loss
        check_model(model, processing_class, loss)
        args = TrainingArguments(output_dir="tmp_trainer") if args is None else args
        check_arguments(args)
        check_divided(model, args)
        args.remove_unused_columns = False
        if not torch.accelerator.is_available():
            args.dataloader_pin_memory = False

        passes = PairPasses(model, loss, attention, stored_effects=effects_file is not None)
        self._set_loss(passes, args, max_tokens, examples_per_user)
        length = default_max_length(model) if max_length is None else max_length
        passes.check_training(length)
        self.encoder = ExampleEncoder(processing_class, template, length, max_response_length)  # type: ignore[arg-type]
        callbacks = list(callbacks or [])
        if not any(isinstance(each, CounterfactualWatch) for each in callbacks):
            through = self.loss.needs_counterfactual and not self.loss.detaches_counterfactual
            callbacks.append(CounterfactualWatch(trained_through=through))
        # Read below; the Trainer sets both again.
        self.args, self.processing_class = args, processing_class
        collator = passes.collator(pad_token(processing_class), max_tokens)
        train_dataset = _with_effects(self._encoded(train_dataset, placebo=False), effects_file)
        self._check_fits(train_dataset)
        super().__init__(
            model,
            args,
            data_collator=collator,
            train_dataset=train_dataset,
            eval_dataset=(
                {name: self._encoded(part, placebo=True) for name, part in eval_dataset.items()}
                if isinstance(eval_dataset, dict)
                else self._encoded(eval_dataset, placebo=True)
            ),
            processing_class=processing_class,
            compute_metrics=self._eval_metrics,
            callbacks=callbacks,
            **options,
        )
        self._set_normalised()

    # ---- data ----------------------------------------------------------------------------------

    def score(self, records: Any = None) -> Iterator[ExampleScores]:
        """Yield the effect of the history on every response token, user by user, without gradient.

        Args:
            records: as `eval_dataset`; by default the data set given at first.

        Raises:
            ArgumentError: there are no records, or a dict of data sets.
        """
        given: Any = self.eval_dataset if records is None else self._encoded(records, placebo=True)
        if not isinstance(given, EncodedDataset):
            raise ArgumentError(f"records: expected records or an eval_dataset, got {type(given).__name__}")
        model: Any = self.model
        pad, attention = pad_token(self.processing_class), self.passes.attention
        return score_examples(model, given.examples, pad, attention=attention)

    def _encoded(self, source: Any, *, placebo: bool) -> EncodedDataset | None:
        if isinstance(source, (str, os.PathLike)) and is_prepared(source):
            source = PreparedDataset(source)
        if isinstance(source, PreparedDataset):
            source.check(self.encoder)
        if source is None or isinstance(source, EncodedDataset):
            return source
        progress = None if self.args.disable_tqdm else tqdm
        return EncodedDataset(self.encoder.encode_all(load_records(source), placebo, self.args.seed, progress))

    def run_identity(self) -> dict[str, Any]:
        """The values that a checkpoint must share with a run that resumes from it."""
        dataset: Any = self.train_dataset
        effects = effects_digest(dataset.examples) if self.passes.stored_effects and dataset is not None else None
        encoder, args = self.encoder, self.args
        assert encoder is not None
        template = {**asdict(encoder.template), "chat": encoder.renderer.uses_chat}  # None leaves it to the tokenizer
        # The other reductions give the same gradient for any division of a step.
        division = args.train_batch_size if self.loss.reduction == "micro_batch" else None
        return {
            **run_identity(self.model, self.loss),
            "effects_file": effects,
            "examples_per_user": self.examples_per_user,
            **training_identity(args, self._starting_point()[1]),
            _STEP: args.train_batch_size * args.gradient_accumulation_steps * (args.world_size // self.get_tp_size()),
            "--per_device_train_batch_size": division,
            "--max_length": encoder.max_length,
            "--max_response_length": encoder.max_response_length,
            **{f"template {name}": value for name, value in template.items()},
            "--train_file (train_dataset)": None if dataset is None else f"{len(dataset)} examples, {dataset.digest}",
        }

    def _starting_point(self) -> tuple[list[str], list[Any]]:
        """The users of the training data, one for each example, and the model."""
        dataset: Any = self.train_dataset
        return [] if dataset is None else dataset.user_ids, [self.model]


def _with_effects(dataset: EncodedDataset | None, path: str | os.PathLike[str] | None) -> EncodedDataset | None:
    if dataset is None or path is None:
        return dataset
    with naming("effects_file"):
        return EncodedDataset(load_effects(path, dataset.examples))
