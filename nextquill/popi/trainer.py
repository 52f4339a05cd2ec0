"""`POPITrainer`: transformers' Trainer for a model that infers summaries and a generator that conditions on them.

A data set's item is a user, and a batch some users. For every optimiser step all summaries are sampled and scored at
once (`steps`), which leaves weighted branches: responses of pairs for the generator, summaries for the inference model.
Each micro-batch then runs its users' branches with gradient, merged into trees, one role after the other. What they are
divided by is the number of users of the whole step, over all micro-batches and ranks; gradients are summed over ranks
once, at the end of the step. Optimisers, schedules, logging, checkpoints and callbacks are the Trainer's.

Draws and samples follow from the seed, the step and the user alone. So a resumed run goes on with the summaries that an
uninterrupted one would have sampled, and no split of a step into micro-batches or ranks changes what it learns from.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments
from transformers.trainer_utils import EvalLoopOutput

from nextquill.data import load_records
from nextquill.errors import ArgumentError, ArgumentTypeError, RecordError
from nextquill.integrations import checkpoints
from nextquill.integrations.checks import check_arguments, check_vocabulary
from nextquill.integrations.loading import context_length
from nextquill.integrations.staged import StagedCheckpoints
from nextquill.popi.config import POPIConfig
from nextquill.popi.evaluation import score_pairs
from nextquill.popi.passes import RolePasses
from nextquill.popi.prompts import GeneratorPrompts, InferencePrompts, PopiTemplates
from nextquill.popi.roles import Role, Roles
from nextquill.popi.rollouts import ModelRollouts, Rollouts
from nextquill.popi.sample_log import SampleLog
from nextquill.popi.steps import StepMaker, UserWork
from nextquill.popi.summarizing import summarize
from nextquill.popi.users import User, UserCounts, check_users, held_out, users_from_records


class POPITrainer(StagedCheckpoints, Trainer):
    """Train summaries of users, and a generator that conditions on them, under one preference objective.

    Args:
        model: the base model of both roles, which become LoRA adapters of it; or a PEFT model that has the adapters
            "inference" and "generator". None where the roles are separate models.
        args: TrainingArguments; a batch's size is in users.
        config: see `POPIConfig`.
        train_dataset, eval_dataset: users, or records with `chosen` and `rejected` (`users_from_records`). Users
            without pairs or with too few signals are left out with a warning; `train_users` and `eval_users` say which.
        processing_class: the tokenizer.
        inference_model, generator_model: separate models, given together.
        generator_tokenizer: the generator's, where it is another one.
        peft_config: LoRA of the adapters, without dropout; see `Roles.shared`.
        templates: how signals, summaries and requests are worded.
        rollouts: what samples the summaries, such as `RecordedRollouts`; by default what `config.rollouts` names.
        attention: how rows of trees are attended; see `PairPasses`.
        max_tokens: most tokens of a forward, after sharing; by default 16384 (4096 on a CPU), or what the largest
            branch takes. It changes no gradient.
        options: everything else the Trainer takes that this class does not fill.

    Logged while training, over the interval since the last log and all ranks, means per pair or per summary:
    preference_loss, preference_margin (nats), preference_accuracy, informativeness and generator_error (the two parts
    of the loss, nats per pair, see `objective`), reward, reward_std (within groups), kl (nats), summary_tokens; and
    summaries_empty, summaries_unfinished, summaries_too_long (to be read again; the generator is then given none),
    prompts_without_signals, groups_equal (shares), reward_nan (a number a step). Every sampled summary is
    appended to `sampled_summaries.jsonl` in the run's folder. Evaluation summarises every user greedily and returns
    accuracy, margin and loss of pairs that are no signals, with the summary, with none and with another user's.

    Raises:
        ArgumentError, ArgumentTypeError: an argument does not fit; the message names it.
        RecordError: no user can be drawn from.
        BudgetError: a pair or a signal does not fit its budget.
        UnsupportedModelError: a model's head or attention cannot be handled exactly.
    """

    def __init__(
        self,
        model: Any = None,
        args: TrainingArguments | None = None,
        *,
        config: POPIConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        inference_model: Any = None,
        generator_model: Any = None,
        generator_tokenizer: Any = None,
        peft_config: Any = None,
        templates: PopiTemplates | None = None,
        rollouts: Rollouts | None = None,
        attention: str = "auto",
        max_tokens: int | None = None,
        **options: Any,
    ) -> None:
        args = TrainingArguments(output_dir="tmp_trainer") if args is None else args
        config = POPIConfig() if config is None else config
        _check_options(options)
        _check_args(args)
        if processing_class is None:
            raise ArgumentTypeError("processing_class: expected a tokenizer, got None")
        self.config = config
        roles = self._make_roles(
            model, inference_model, generator_model, processing_class, generator_tokenizer, peft_config
        )
        self.config = _within_context(config, roles)
        self.templates = PopiTemplates() if templates is None else templates
        self.inference_prompts = InferencePrompts(
            roles.inference.tokenizer, self.templates, max_prompt_tokens=self.config.max_signal_tokens
        )
        self.generator_prompts = GeneratorPrompts(
            roles.generator.tokenizer, self.templates, max_length=self.config.max_length
        )
        self.train_users = self._users("train_dataset", train_dataset)
        self.eval_users = self._users("eval_dataset", eval_dataset)
        self._check_warm_start()
        args.remove_unused_columns = False
        if not torch.accelerator.is_available():
            args.dataloader_pin_memory = False
        self.passes = RolePasses(attention=attention, max_tokens=max_tokens, temperature=self.config.temperature)
        for role in roles:
            with role.active() as active:
                longest = max(self.config.max_length, self.config.max_signal_tokens + self.config.max_summary_tokens)
                self.passes.of(role, active).check_training(longest)
        self.passes.close()
        self.roles = roles
        super().__init__(
            roles,
            args,
            data_collator=_collate,
            train_dataset=None if self.train_users is None else _Indices(len(self.train_users.users)),
            eval_dataset=None if self.eval_users is None else _Indices(len(self.eval_users.users)),
            processing_class=processing_class,
            **options,
        )
        self.model_accepts_loss_kwargs = True
        self.loss_is_scaled_for_ga = True
        self.rollouts = self._make_rollouts() if rollouts is None else rollouts
        self.steps = StepMaker(
            roles, self.config, self.inference_prompts, self.generator_prompts, self.rollouts, self.passes, args.seed
        )
        self._log = SampleLog(Path(str(args.output_dir)), args.process_index)
        self._sums: dict[str, list[float]] = {}
        self._tokens = [0.0, 0.0]

    # ---- what is made at the start -------------------------------------------------------------------

    def _make_roles(
        self, model: Any, inference_model: Any, generator_model: Any, tokenizer: Any, other: Any, peft_config: Any
    ) -> Roles:
        frozen = {"freeze_inference": self.config.freeze_inference, "freeze_generator": self.config.freeze_generator}
        for name, given in (
            ("model", model),
            ("inference_model", inference_model),
            ("generator_model", generator_model),
        ):
            if given is not None and not isinstance(given, nn.Module):
                raise ArgumentTypeError(f"{name}: expected a torch module, got {type(given).__name__}")
        if isinstance(model, Roles):
            return model
        if (model is None) is (inference_model is None) or (inference_model is None) is not (generator_model is None):
            raise ArgumentError(
                "model: expected one model for both roles, or inference_model and generator_model together, got "
                f"{[type(m).__name__ for m in (model, inference_model, generator_model)]}"
            )
        if model is not None:
            check_vocabulary(model, tokenizer)
            return Roles.shared(model, tokenizer, peft_config, **frozen)
        if peft_config is not None:
            raise ArgumentError("peft_config: expected None with separate models; wrap them with get_peft_model")
        check_vocabulary(inference_model, tokenizer)
        check_vocabulary(generator_model, tokenizer if other is None else other)
        return Roles.separate(inference_model, generator_model, tokenizer, other, **frozen)

    def _make_rollouts(self) -> Rollouts:
        role, config = self.roles.inference, self.config
        common = (role.model, role.tokenizer, self.inference_prompts.stop_ids)
        sampling: dict[str, Any] = {"max_new_tokens": config.max_summary_tokens, "temperature": config.temperature}
        if config.rollouts == "vllm":
            from nextquill.popi.rollouts_vllm import VLLMRollouts

            longest = config.max_signal_tokens
            return VLLMRollouts(*common, **sampling, max_prompt_tokens=longest, adapter=role.adapter)
        return ModelRollouts(*common, **sampling, batch_size=config.rollout_batch_size)

    def _users(self, name: str, given: Any) -> UserCounts | None:
        """Those that can be drawn from, whose pairs and signals fit."""
        if given is None:
            return None
        found = list(given) if isinstance(given, Sequence) and not isinstance(given, (str, bytes)) else None
        if found is None or not all(isinstance(each, User) for each in found):
            found = users_from_records(load_records(given))
        try:
            counts = check_users(found, num_pairs=1, num_signals=self.config.signals_per_user)
        except (RecordError, ArgumentError) as error:
            raise type(error)(f"{name}: {error}") from error
        if counts.skipped:
            warnings.warn(f"{name}: {counts}", UserWarning, stacklevel=3)
        for user in counts.users:
            for pair in user.pairs:
                self.generator_prompts.check(pair, self.config.max_summary_tokens, f"{name}: user {user.user_id!r}")
        return counts

    def _check_warm_start(self) -> None:
        if not (self.config.warm_start_steps and self.config.warm_start == "given") or self.train_users is None:
            return
        missing = [user.user_id for user in self.train_users.users if user.summary is None]
        if missing:
            raise ArgumentError(
                f"warm_start: expected every user's records to have a field 'summary' with warm_start='given', "
                f"{len(missing)} of {len(self.train_users.users)} users have none, such as {missing[0]!r}"
            )

    # ---- training ------------------------------------------------------------------------------------

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """As the Trainer's.

        Raises:
            CheckpointError: the checkpoint is missing, incomplete, lacks an adapter, or is of another run.
        """
        if self.train_users is None:
            raise ArgumentError("train_dataset: expected users or records, got None")
        self._sums, self._tokens = {}, [0.0, 0.0]
        self._log.restart(self._steps_done(resume_from_checkpoint))
        try:
            return super().train(resume_from_checkpoint, *args, **kwargs)
        finally:
            self.passes.close()
            self.rollouts.close()

    def _steps_done(self, resume: str | bool | None) -> int:
        checkpoint = checkpoints.find_checkpoint(resume, Path(str(self.args.output_dir)))
        if checkpoint is None:
            return 0
        return int(json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))["global_step"])

    def run_identity(self) -> dict[str, Any]:
        """What must agree between this run and a checkpoint it resumes from."""
        users: Any = () if self.train_users is None else self.train_users.users
        digest = hashlib.sha256()
        for user in users:
            digest.update(repr(user).encode(errors="surrogatepass"))
        models = [checkpoints.run_identity(model, self.config) for model in self.roles.models]
        return {**models[0], "models": models, "templates": self.templates.to_dict(), "users": digest.hexdigest()[:16]}

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor | int | None]:
        """The accumulation window's batches with their users' work, and the number of users of the whole step."""
        if self.state.global_step >= self.state.max_steps:  # transformers asks once more when a finished run is resumed
            return [], None
        batches = [batch for _, batch in zip(range(num_batches), epoch_iterator, strict=False)]
        assert self.train_users is not None
        users = [self.train_users.users[index] for batch in batches for index in batch["users"].tolist()]
        with self.compute_loss_context_manager():
            step = self.steps.make(users, self.state.global_step)
        work = iter(step.work)
        for batch in batches:
            batch["work"] = [next(work) for _ in batch["users"]]
        for name, (total, count) in step.sums.items():
            known = self._sums.setdefault(name, [0.0, 0.0])
            known[0] += total
            known[1] += count
        self._log.append(line for each in step.work for line in each.lines)
        own = torch.tensor(float(len(users)), device=device)
        return batches, self.accelerator.reduce(own, reduction="sum").clamp(min=1.0)

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """Forward and backward of a micro-batch's branches, role by role; its share of the preference loss."""
        model.train()
        if callable(getattr(self.optimizer, "train", None)):
            self.optimizer.train()  # type: ignore[union-attr]
        work: list[UserWork] = inputs["work"]
        users = float(len(work) if num_items_in_batch is None else num_items_in_batch)
        for role in self.roles:
            self._backward(role, work, users)
        if self.accelerator.sync_gradients:
            self._sum_over_ranks()
            self.rollouts.sync()
        ranks = self.accelerator.num_processes
        return torch.tensor(sum(each.loss for each in work) * ranks / users, device=self.args.device)

    def _backward(self, role: Role, work: Sequence[UserWork], users: float) -> None:
        branches = [branch for each in work for branch in each.branches.get(role.name, ())]
        if not branches:
            return
        weights = torch.cat([each.weights[role.name] for each in work if role.name in each.weights]) / users
        with role.active() as model:
            passes = self.passes.of(role, model)
            for part in passes.parts(branches, weights):
                self._tokens[0] += part["num_tokens"]
                self._tokens[1] += part["num_branch_tokens"]
                with self.compute_loss_context_manager():
                    loss = passes.loss(part)
                self.accelerator.backward(loss)

    def _sum_over_ranks(self) -> None:
        """Gradients were divided by the users of all ranks. A parameter without one on this rank adds 0."""
        if self.accelerator.num_processes == 1:
            return
        trained = [p for role in self.roles for p in role.parameters()]
        has = torch.tensor([p.grad is not None for p in trained], dtype=torch.float32, device=self.args.device)
        has = self.accelerator.reduce(has, reduction="sum")
        used = [p for p, ranks in zip(trained, has.tolist(), strict=True) if ranks]
        for parameter in used:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        for dtype in {p.dtype for p in used}:
            grads = [p.grad for p in used if p.dtype == dtype and p.grad is not None]
            flat = self.accelerator.reduce(torch.cat([g.reshape(-1) for g in grads]), reduction="sum")
            for grad, total in zip(grads, flat.split([g.numel() for g in grads]), strict=True):
                grad.copy_(total.view_as(grad))

    def compute_loss(self, *_: Any, **__: Any) -> Any:
        """Not used: a step has two losses, see `training_step`."""
        raise ArgumentError("compute_loss: POPITrainer has a loss for each role; call training_step or evaluate")

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As the Trainer's; a log of the training loop, which every rank makes, gets the interval's metrics."""
        if "loss" in logs and start_time is not None:
            logs |= self._metrics()
        super().log(logs, start_time)

    def _metrics(self) -> dict[str, float]:
        sums = torch.tensor([self._sums.get(name, [0.0, 0.0]) for name in METRICS], dtype=torch.float64)
        packed = torch.cat((sums, torch.tensor([self._tokens], dtype=torch.float64)))
        packed = self.accelerator.reduce(packed.to(self.args.device), reduction="sum").cpu()
        self._sums, self._tokens = {}, [0.0, 0.0]
        found = {name: total / count for name, (total, count) in zip(METRICS, packed.tolist(), strict=False) if count}
        computed, own = packed[-1].tolist()
        return {**found, "num_tokens": computed, "sharing_factor": own / max(1.0, computed)}

    # ---- evaluation ----------------------------------------------------------------------------------

    def summarize(self, users: Sequence[User], *, temperature: float = 0.0) -> list[str]:
        """One summary for each user, of the signals that `held_out` leaves; greedy by default.

        Args:
            users: any, each once.
            temperature: 0 for the most likely tokens.
        """
        self.passes.close()
        signals = {user.user_id: held_out(user, num_signals=self.config.signals_per_user).signals for user in users}
        found = summarize(
            self.roles.inference,
            self.inference_prompts,
            signals,
            max_new_tokens=self.config.max_summary_tokens,
            temperature=temperature,
            seed=self.args.seed,
            batch_size=self.config.rollout_batch_size,
        )
        texts = {each.user_id: each.text for each in found}
        return [texts[user.user_id] for user in users]

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Pairs of users that are no signals, judged with a greedy summary, with none, and with another user's.

        Returns:
            PREFIX_accuracy, PREFIX_margin (nats) and PREFIX_loss under the summary; the same with `_none` and
            `_placebo`; PREFIX_summary_tokens; PREFIX_summaries_empty (share).
        """
        counts = self.eval_users if eval_dataset is None else self._users("eval_dataset", eval_dataset)
        if counts is None:
            raise ArgumentError("eval_dataset: expected users or records, got None")
        with self.compute_loss_context_manager():
            metrics = {f"{metric_key_prefix}_{name}": value for name, value in self._measure(counts.users).items()}
        self.passes.close()
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _measure(self, users: Sequence[User]) -> dict[str, float]:
        draws = [held_out(user, num_signals=self.config.signals_per_user) for user in users]
        texts = self.summarize(users)
        self.passes.close()
        scores = score_pairs(
            self.roles.generator,
            self.generator_prompts,
            draws,
            {user.user_id: text for user, text in zip(users, texts, strict=True)},
            loss=self.config.loss,
            reference_sees_context=self.config.reference_sees_summary,
            seed=self.args.seed,
        )
        found: dict[str, float] = {}
        for context, suffix in (("summary", ""), ("none", "_none"), ("placebo", "_placebo")):
            rows = scores.get(context, [])
            for name in ("accuracy", "margin", "loss"):
                if rows:
                    found[f"{name}{suffix}"] = sum(getattr(row, name) for row in rows) / len(rows)
        rows = scores["summary"]
        found["summary_tokens"] = sum(row.context_tokens for row in rows) / len(rows)
        found["summaries_empty"] = sum(not text.strip() for text in texts) / len(texts)
        return found

    def predict(self, *_: Any, **__: Any) -> Any:
        """Not offered: see `summarize` and `evaluate`."""
        raise ArgumentError("predict: POPITrainer has summarize and evaluate instead")

    def evaluation_loop(self, *_: Any, **__: Any) -> EvalLoopOutput:
        """Not used: see `evaluate`."""
        raise ArgumentError("evaluation_loop: POPITrainer has evaluate instead")

    # ---- files ---------------------------------------------------------------------------------------

    def settings(self) -> dict[str, Any]:
        """What a reader of the saved roles needs: the templates and the settings."""
        return {"config": self.config.to_dict(), "templates": self.templates.to_dict()}

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        folder = Path(str(self.args.output_dir if output_dir is None else output_dir))
        self.passes.close()
        self.roles.save(folder, self.settings())
        torch.save(self.args, folder / "training_args.bin")

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        self.roles.load_weights(Path(resume_from_checkpoint))

    def _load_best_model(self) -> None:
        self.roles.load_weights(Path(str(self.state.best_model_checkpoint)))


#: Logged sums; the order is that of a reduction over ranks.
METRICS = (
    "preference_loss", "preference_margin", "preference_accuracy", "informativeness", "generator_error", "reward",
    "reward_std", "reward_nan", "kl", "summary_tokens", "summaries_empty", "summaries_unfinished", "groups_equal",
    "summaries_too_long", "prompts_without_signals", "warm_start",
)  # fmt: skip


class _Indices(Dataset[int]):
    """The places of users."""

    def __init__(self, count: int) -> None:
        self._count = count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> int:
        return index


def _collate(indices: Sequence[int]) -> dict[str, Any]:
    return {"users": torch.tensor(indices, dtype=torch.long)}


def _within_context(config: POPIConfig, roles: Roles) -> POPIConfig:
    """The settings with budgets that the models' contexts have room for.

    Raises:
        ArgumentError: a summary alone takes all of the inference model's context.
    """
    inference, generator = (_context(role) for role in roles)
    if inference <= config.max_summary_tokens:
        raise ArgumentError(
            f"max_summary_tokens: expected less than the inference model's context of {inference} tokens, got "
            f"{config.max_summary_tokens}"
        )
    return dataclasses.replace(
        config,
        max_signal_tokens=min(config.max_signal_tokens, inference - config.max_summary_tokens),
        max_length=min(config.max_length, generator),
    )


def _context(role: Role) -> int:
    base = role.model.get_base_model() if hasattr(role.model, "get_base_model") else role.model
    return context_length(base) or 2**31


_FILLED = ("compute_loss_func", "compute_metrics", "data_collator", "preprocess_logits_for_metrics", "model_init")


def _check_options(options: dict[str, Any]) -> None:
    for name in _FILLED:
        if options.get(name) is not None:
            raise ArgumentError(f"{name}: POPITrainer fills this itself; subclass it to change it")


def _check_args(args: TrainingArguments) -> None:
    check_arguments(args)
    for name in ("fsdp", "deepspeed"):
        if getattr(args, name, None):
            raise ArgumentError(
                f"args: {name} is not supported by POPITrainer, only single processes and data parallel"
            )
    if getattr(args, "neftune_noise_alpha", None) is not None:
        raise ArgumentError("args: neftune_noise_alpha is not supported: rewards are measured without noise")
