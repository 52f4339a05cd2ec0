"""One run of the study, in a process of its own: `python -m benchmarks.study.run --run NAME`, which the study starts.

It trains, or resumes from its last checkpoint, measures on people of three sets, generates texts in several ways, and
writes one file. A run that was killed gives the same file as an uninterrupted one, but for its times.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments, set_seed

from benchmarks.measure import commit, device_name, short_name
from benchmarks.study.__main__ import add_study_flags, study_of
from benchmarks.study.folder import Study, alone
from benchmarks.study.methods import BASE, METHODS, Method, WarmUp, WarmWeighting, without_copied, words_shuffled
from benchmarks.study.people import DEV, TEST, People
from benchmarks.study.plan import Preset, Run
from nextquill.comparison.measuring import ComparedTrainer, RunMeter
from nextquill.data import EncodedDataset, ExampleEncoder, PromptTemplate
from nextquill.evaluation.evaluate import evaluate_model
from nextquill.evaluation.judge import PersonJudge
from nextquill.evaluation.measures import effect_measures
from nextquill.evaluation.metrics.authors import CANDIDATES
from nextquill.evaluation.options import EvaluationOptions
from nextquill.evaluation.results import EFFECTS_FILE, EVALUATION_FILE, read_evaluation, read_examples
from nextquill.evaluation.scoring import effect_line, pad_token, score_examples
from nextquill.evaluation.text_measures import REFERENCE, authors_of, text_measures
from nextquill.evaluation.token_measures import SUM_MEASURES
from nextquill.generation import GenerationOptions, generation_engine, make_prompts
from nextquill.mirror import MirrorTrainer
from nextquill.models.loading import PromptSettings, load_model
from nextquill.storage import checkpoints
from nextquill.storage.atomic_files import write_whole
from nextquill.storage.json_files import json_object, json_objects

_TEXT_METRICS = (
    "rouge_1", "rouge_l", "meteor_exact_stem", "chrf", "right_person", "right_person_uncopied", "copied", "distinct",
    "length_ratio",
)  # fmt: skip
#: Texts generated at a time: a step reads all weights, whatever their number.
_AT_A_TIME = 24
#: Measures whose two sums for every text are kept, for paired tests.
PAIRED = {
    "nll_factual", "nll_at_temperature", "nll_personal", "nll_generic", "effect_placebo", "top1",
    "rouge_l", "meteor_exact_stem", "right_person", "right_person_lm", "right_person_uncopied", "copied",
    "length_ratio",
}  # fmt: skip


class SamplingTrainer(ComparedTrainer, MirrorTrainer):
    """MIRROR's trainer, measured like the others."""


@dataclass
class Worker:
    """Makes one run.

    Args:
        study: the study it belongs to.
        run: which one.
    """

    study: Study
    run: Run

    def __post_init__(self) -> None:
        self.preset: Preset = self.study.preset
        self.method: Method = METHODS[self.run.method]
        self.people: People = self.study.people(self.run.data)
        self.folder = self.study.work / self.run.name
        self.device = TrainingArguments(output_dir=str(self.folder)).device
        self.settings = PromptSettings(PromptTemplate("history_first"), self.preset.max_length)

    def perform(self) -> dict[str, Any]:
        """The run's result, as JSON."""
        model, tokenizer = self.start()
        costs: dict[str, Any] = {}
        if self.method.kind is not None:
            model, costs = self.train(model, tokenizer)
        # Everything is measured in half precision, as models are served; a CPU is twice as fast in it.
        model.to(torch.bfloat16)
        sets = self.measure(model, tokenizer)
        return {
            "run": {"data": self.run.data, "method": self.run.method, "seed": self.run.seed, "rate": self.run.rate},
            "loss": repr(self.loss(model)) if self.method.kind is not None else None,
            "commit": commit(),
            "processor": short_name(device_name()),
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
            **costs,
            "dev_score": sets[DEV]["values"]["nll_at_temperature"],
            "sets": sets,
            "texts": self.write(model, tokenizer),
        }

    def start(self) -> tuple[Any, Any]:
        """The pretrained model, with new adapters if the run trains any, and its tokenizer."""
        model, tokenizer = load_model(self.study.model, dtype="float32")
        model.to(self.device)
        if self.method.kind is None or self.preset.lora_r is None:
            return model, tokenizer
        from peft import get_peft_model

        set_seed(self.run.seed)
        return get_peft_model(model, adapter(model, self.preset.lora_r, self.preset.lora_layers)), tokenizer

    def loss(self, model: Any) -> Any:
        """The method's loss for this model."""
        return self.method.loss(model.get_output_embeddings().weight.shape[0])

    # ---- training --------------------------------------------------------------------------------

    def train(self, model: Any, tokenizer: Any) -> tuple[Any, dict[str, Any]]:
        """The trained model, and what the training cost."""
        preset, loss = self.preset, self.loss(model)
        # Other programs may run on the same cores, so a CPU's own time counts.
        clock = time.process_time if self.device.type == "cpu" else time.perf_counter
        callbacks: list[Any] = [RunMeter(clock=clock)]
        if isinstance(loss.objective.weighting, WarmWeighting):
            callbacks.append(WarmUp(loss.objective.weighting))
        set_seed(self.run.seed)
        folder = self.folder / "training"
        args = TrainingArguments(
            str(folder), per_device_train_batch_size=preset.batch_size, learning_rate=self.run.rate,
            max_steps=self.steps(), warmup_steps=preset.warmup_steps, seed=self.run.seed, save_steps=preset.save_steps,
            save_total_limit=1, logging_steps=preset.steps, report_to="none", disable_tqdm=True, bf16=True,
            use_cpu=not torch.accelerator.is_available(),
        )  # fmt: skip
        kind, data = ComparedTrainer, {"train_dataset": self.examples(tokenizer)}
        if self.method.samples:
            kind, data = (
                SamplingTrainer,
                {"train_dataset": self.people.train, "max_new_tokens": self.longest(tokenizer), **self.method.trainer},
            )
        trainer = kind(
            model, args, processing_class=tokenizer, loss=loss, examples_per_user=preset.examples_per_user,
            callbacks=callbacks, effects_file=self.effects(tokenizer), **data, **vars(self.settings),
        )  # fmt: skip
        last = checkpoints.last_checkpoint(folder)
        trainer.train(resume_from_checkpoint=None if last is None else str(last))
        model = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)  # as it was, without autocast
        seen = trainer.run_meter
        costs = {name: getattr(seen, name) for name in ("seconds", "peak_memory", "steps", "examples", "sessions")}
        return model, costs

    def steps(self) -> int:
        """The steps of the training: the preset's, or as many as take another method's time."""
        if self.method.matches_time is None:
            return self.preset.steps
        other, own = (self.study.result(name) for name in self.run.needs)
        if other["run"]["method"] != self.method.matches_time:
            other, own = own, other
        return math.ceil(self.preset.steps * other["seconds"] / own["seconds"])

    def examples(self, tokenizer: Any) -> EncodedDataset:
        """The training examples, with the method's counterfactual."""
        template = self.settings.template
        if self.method.counterfactual == "placebo":
            template = replace(template, counterfactual="placebo")
        encoder = self.encoder(tokenizer, template)
        examples = encoder.encode_all(self.people.train, seed=self.run.seed)
        if self.method.counterfactual == "shuffled":
            others = encoder.encode_all([words_shuffled(record, self.run.seed) for record in self.people.train])
            pairs = zip(examples, others, strict=True)
            examples = [replace(own, counterfactual=other.factual) for own, other in pairs]
        return EncodedDataset(examples)

    def encoder(self, tokenizer: Any, template: PromptTemplate | None = None) -> ExampleEncoder:
        """The encoder of the study's prompts."""
        return ExampleEncoder(tokenizer, template or self.settings.template, self.settings.max_length)

    def effects(self, tokenizer: Any) -> str | None:
        """The file of the frozen effects that weigh the tokens, if the method has any."""
        if self.method.effects is None:
            return None
        examples = self.encoder(tokenizer).encode_all(self.people.train)
        path = self.folder / "effects.jsonl"
        if not path.is_file():
            lines = self._frozen(examples, tokenizer)
            if self.method.unweighted == "copied":
                lines = [without_copied(examples[line["index"]], line) for line in lines]
            write_whole(path, "".join(json.dumps(line) + "\n" for line in lines))
        return str(path)

    def _frozen(self, examples: Sequence[Any], tokenizer: Any) -> list[dict[str, Any]]:
        """Effects of the untrained model, or of another method's, which is trained again for them."""
        if self.method.effects == BASE:
            shared = self.study.work / f"{self.run.data}-base-effects.jsonl"
            with alone(shared.with_suffix(".lock")):  # two runs with these weights may start together
                if not shared.is_file():
                    model, _ = load_model(self.study.model, dtype="bfloat16")
                    lines = _scored(model.to(self.device), examples, tokenizer)
                    write_whole(shared, "".join(json.dumps(line) + "\n" for line in lines))
            return [line for _, line in json_objects(shared)]
        (needed,) = (Run(**self.study.result(name)["run"]) for name in self.run.needs)
        other = Worker(self.study, needed)
        model, _ = other.train(*other.start())
        lines = _scored(model, examples, tokenizer)
        shutil.rmtree(other.folder, ignore_errors=True)
        return lines

    # ---- measuring -------------------------------------------------------------------------------

    def measure(self, model: Any, tokenizer: Any) -> dict[str, Any]:
        """The measures of the people's own texts, by set.

        The temperature that is best for the first, development people, is that of `nll_at_temperature` in the others.
        """
        sets, temperature = dict[str, Any](), None
        for name, records in self.people.sets.items():
            options: dict[str, Any] = {"score_temperature": temperature, "generate_branches": ()}
            if name == TEST:
                options |= {"personal_from": str(self.base_evaluation()), "prose_file": self.study.prose}
            folder = self.folder / name
            if not (folder / EVALUATION_FILE).is_file():
                self.evaluate(model, tokenizer, records, folder, **options)
            metrics = read_evaluation(folder).metrics
            if name == DEV:
                temperature = metrics["temperature"].value
            sets[name] = {"values": {each: metrics[each].value for each in metrics}}
            if name == TEST:
                sets[name] |= {"users": [record.user_id for record in records], "rows": _rows(folder)}
        return sets

    def base_evaluation(self) -> Path:
        """The folder of the untrained model's evaluation of the test people, whose effects mark personal tokens."""
        folder = self.study.work / f"{self.run.data}-marks"
        with alone(folder.with_suffix(".lock")):
            if not (folder / EVALUATION_FILE).is_file():
                model, tokenizer = load_model(self.study.model, dtype="bfloat16")
                self.evaluate(model.to(self.device), tokenizer, self.people.sets[TEST], folder, generate_branches=())
        return folder

    def evaluate(self, model: Any, tokenizer: Any, records: Sequence[Any], folder: Path, **options: Any) -> None:
        """Measure the people's own texts."""
        evaluate_model(
            model, tokenizer, records, self.settings, EvaluationOptions(**options), folder, model_name=self.run.name
        )

    def write(self, model: Any, tokenizer: Any) -> dict[str, Any]:
        """Generated texts and their measures, by decoding."""
        records = self.people.sets[TEST][: self.preset.generated]
        texts = self.texts(model, tokenizer, records)
        judged = {name: texts[name] for name in self.preset.judged}
        if self.method.kind is None:  # the ceiling, which is the same for all methods
            judged[REFERENCE] = [record.response for record in records]
        return {"users": [record.user_id for record in records], "decodings": self.measured(texts, records, judged)}

    def measured(
        self, texts: Mapping[str, list[str]], records: Sequence[Any], judged: Mapping[str, Sequence[str]]
    ) -> dict[str, Any]:
        """The texts of each decoding and their measures; the language model judges those in `judged`."""
        everyone, found = self.people.sets[TEST], dict[str, Any]()
        for name, written in texts.items():
            measures = text_measures(records, written, _TEXT_METRICS, among=everyone)
            rows = {each: scores.statistics.tolist() for each, scores in measures.items()}
            found[name] = {
                "texts": written,
                "values": {each: scores.value for each, scores in measures.items()},
                "rows": {each: _short(row) for each, row in rows.items() if each in PAIRED},
            }
        for name, scores in self.judged(judged, records).items():
            place = found.setdefault(name, {"values": {}, "rows": {}})
            place["values"]["right_person_lm"] = scores.value
            place["rows"]["right_person_lm"] = _short(scores.statistics.tolist())
        return found

    def texts(self, model: Any, tokenizer: Any, records: Sequence[Any]) -> dict[str, list[str]]:
        """Generated texts by decoding; each is kept as soon as it is complete."""
        examples = self.encoder(tokenizer).encode_all(records)
        path = self.folder / "texts.json"
        found: dict[str, list[str]] = json_object(path) if path.is_file() else {}
        for decoding in self.preset.decodings:
            if decoding.name in found:
                continue
            options = GenerationOptions(self.longest(tokenizer), _AT_A_TIME, seed=self.run.seed, **asdict(decoding))
            against = "counterfactual" if options.needs_against else None
            with generation_engine(model, tokenizer, examples, options) as engine:
                texts = dict(engine.generate(make_prompts(examples, ("factual",), self.run.seed, against)))
            found[decoding.name] = [texts[index] for index in range(len(records))]
            write_whole(path, json.dumps(found))
        return found

    def longest(self, tokenizer: Any) -> int:
        """The most tokens of a generated text: half more than all but a twentieth of the training responses have."""
        lengths = sorted(len(tokenizer(record.response).input_ids) for record in self.people.train)
        return min(self.preset.max_new_tokens, math.ceil(1.5 * lengths[len(lengths) * 19 // 20]))

    def judged(self, texts: Mapping[str, Sequence[str]], records: Sequence[Any]) -> dict[str, Any]:
        """Whether the untrained model finds the author of each text, by decoding."""
        everyone = self.people.sets[TEST]
        model, tokenizer = load_model(self.study.model, dtype="bfloat16")
        judge = PersonJudge(
            model.to(self.device), tokenizer, records, everyone, authors_of(records, among=everyone), self.settings,
            CANDIDATES,
        )  # fmt: skip
        lines = list(judge.lines(list(zip(*texts.values(), strict=True)), ()))
        measures = judge.measures(lines, {name: name for name in texts})
        return {name: measures[name].scores for name in texts}


def adapter(model: Any, rank: int, share: float) -> Any:
    """The LoRA config of adapters on all linear layers but the head, in the last `share` of the model's layers."""
    from peft import LoraConfig

    layers, head = model.config.num_hidden_layers, model.get_output_embeddings()
    linear = {name.rpartition(".")[2] for name, module in model.named_modules()
              if isinstance(module, torch.nn.Linear) and module is not head}  # fmt: skip
    return LoraConfig(
        r=rank, lora_alpha=2 * rank, target_modules=sorted(linear), task_type="CAUSAL_LM",
        layers_to_transform=list(range(layers - math.ceil(share * layers), layers)),
    )  # fmt: skip


def _rows(folder: Path) -> dict[str, list[Any]]:
    """Every example's statistics by measure; None where an example has none."""
    lines = [line for _, line in json_objects(folder / EFFECTS_FILE)]
    measures, _ = effect_measures(lines)
    rows: dict[str, list[Any]] = {
        name: _short(measures[name].scores.statistics.tolist()) for name in measures if name in PAIRED
    }
    examples = read_examples(folder)
    for name in sorted(PAIRED & SUM_MEASURES.keys()):
        # At a fixed temperature every column but the last is the same sum.
        last = str(SUM_MEASURES[name].columns - 1)
        own = [example.statistics.get(name) for example in examples]
        if any(own):
            rows[name] = [None if row is None else [row.get("0", 0.0), row[last]] for row in own]
    return rows


def _short(rows: Sequence[Sequence[float]]) -> list[list[float]]:
    """Statistics in six digits."""
    return [[float(f"{value:.6g}") for value in row] for row in rows]


def _scored(model: Any, examples: Sequence[Any], tokenizer: Any) -> list[dict[str, Any]]:
    scores = score_examples(model, examples, pad_token(tokenizer))
    return [effect_line(each, tokenizer) for each in scores]


def main(arguments: Sequence[str] | None = None) -> int:
    """Make the run that the flags name, and write its result."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.study.run", allow_abbrev=False)
    add_study_flags(parser)
    parser.add_argument("--run", required=True, help="the run's name")
    chosen = parser.parse_args(arguments)
    study = study_of(chosen)
    run = next((each for each in study.runs() if each.name == chosen.run), None)
    if run is None:
        parser.error(f"--run: the study has no run {chosen.run!r} yet")
    worker = Worker(study, run)
    result = worker.perform()
    write_whole(study.path(run.name), json.dumps(result, ensure_ascii=False) + "\n")
    shutil.rmtree(worker.folder, ignore_errors=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
