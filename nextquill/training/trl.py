"""TRL's `SFTTrainer` with a causal loss.

    data = EncodedDataset(encoder.encode_all(load_records("train.jsonl")))
    trainer = CausalSFTTrainer(
        model, args, train_dataset=data, processing_class=tokenizer, encoder=encoder, loss=nq.PerCELoss()
    )

TRL's other features stay: its handling of PEFT and quantised models, its arguments and callbacks. Only the loss and the
preparation of text are replaced.
"""

from __future__ import annotations

from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase
from trl import SFTConfig, SFTTrainer

from nextquill.data import EncodedDataset, ExampleEncoder
from nextquill.errors import ArgumentError, ArgumentTypeError
from nextquill.losses import PairLoss, PerCELoss
from nextquill.models.branch_passes import PairPasses
from nextquill.training.causal_loss_mixin import CausalLossMixin
from nextquill.training.checks import check_arguments, check_divided, check_model, check_options

# Arguments of TRL's own loss and its preparation of text, with their neutral values.
_IGNORED = {"loss_type": "nll", "packing": False, "completion_only_loss": None, "assistant_only_loss": False}


class CausalSFTTrainer(CausalLossMixin, SFTTrainer):  # type: ignore[misc]
    """TRL's trainer, trained with a `PairLoss`.

    Args:
        model: as in TRL's trainer.
        args: TRL's `SFTConfig`; the preparation of data sets is switched off.
        train_dataset, eval_dataset: `EncodedDataset`s; the second may be a dict of them.
        processing_class: the tokenizer.
        encoder: the maker of the examples; its settings are then saved beside the model, as `nextquill generate` and
            `evaluate` need them, and the model card says how to prompt.
        loss, attention, max_tokens, examples_per_user: as in `NextQuillTrainer`.
        options: everything else TRL's trainer takes, except compute_loss_func, compute_metrics, data_collator,
            preprocess_logits_for_metrics and model_init.

    Logs and evaluation are `NextQuillTrainer`'s; checkpoints are TRL's own.

    Raises:
        ArgumentError, ArgumentTypeError: an argument does not fit; the message names it.
        UnsupportedModelError: the model cannot be handled exactly.
    """

    def __init__(
        self,
        model: Any,
        args: SFTConfig | None = None,
        *,
        train_dataset: EncodedDataset | None = None,
        eval_dataset: EncodedDataset | dict[str, EncodedDataset] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        encoder: ExampleEncoder | None = None,
        loss: PairLoss | None = None,
        attention: str = "auto",
        max_tokens: int | None = None,
        examples_per_user: int = 1,
        **options: Any,
    ) -> None:
        check_options(options)
        loss = PerCELoss() if loss is None else loss
        args = SFTConfig(output_dir="tmp_trainer") if args is None else args
        check_arguments(args)
        if getattr(args, "loss_type", None) == "chunked_nll":  # the default of some releases, TRL 1.14 among them
            args.loss_type = "nll"
        for name, accepted in _IGNORED.items():
            if getattr(args, name, accepted) != accepted:
                raise ArgumentError(
                    f"args.{name}: {getattr(args, name)!r} would be ignored, because the loss and the examples decide "
                    "which tokens are trained on"
                )
        for name, given in (("train_dataset", train_dataset), ("eval_dataset", eval_dataset)):
            for part in given.values() if isinstance(given, dict) else [given]:
                if part is not None and not isinstance(part, EncodedDataset):
                    raise ArgumentTypeError(f"{name}: expected an EncodedDataset, got {type(part).__name__}")
        _check_lengths(train_dataset, args.max_length)
        self.encoder = encoder
        args.remove_unused_columns = False
        args.dataset_kwargs = {**(args.dataset_kwargs or {}), "skip_prepare_dataset": True}
        super().__init__(
            model,
            args=args,
            # TRL's constructor refuses any other class, so it gets a `Dataset` of the same length.
            train_dataset=None if train_dataset is None else Dataset.from_dict({"i": list(range(len(train_dataset)))}),
            processing_class=processing_class,
            data_collator=lambda examples: {},  # replaced below, once the model is known
            compute_metrics=self._eval_metrics,
            **options,
        )
        self.train_dataset, self.eval_dataset = train_dataset, eval_dataset
        trained: Any = self.model
        check_model(trained, processing_class, loss)
        check_divided(trained, args)
        self._set_loss(PairPasses(trained, loss, attention), args, max_tokens, examples_per_user)
        self.data_collator = self.passes.collator(max_tokens=max_tokens)
        self._check_fits(train_dataset)
        self._set_normalised()


def _check_lengths(dataset: EncodedDataset | None, limit: int | None) -> None:
    """Refuse a limit that TRL would cut examples to: the encoder has already applied a budget."""
    if dataset is None or limit is None:
        return
    longest = max(dataset.num_branch_tokens(["factual"]), default=0)
    if longest > limit:
        raise ArgumentError(
            f"args.max_length: expected at least the {longest} tokens of the longest example, got {limit}; "
            "encode with a smaller max_length, or set this one larger or to None"
        )
