"""The model card in a trained model's folder: what it was trained on, how to prompt it, and what was measured."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any

from huggingface_hub import ModelCardData

from nextquill.data import HistoryItem
from nextquill.models.configs import base_model
from nextquill.models.gguf import is_gguf

CARD_FILE = "README.md"
#: The measures that a card shows, by the name of their log without "eval_".
_MEASURES = {
    "nll_factual": "NLL under the user's own history, nats a token",
    "nll_counterfactual": "NLL without a history, nats a token",
    "nll_placebo": "NLL under another user's history, nats a token",
    "effect_placebo": "gain from the own history over another user's, nats a token",
}


def model_card(trainer: Any) -> str:
    """The Markdown of a model card for a trainer with a causal loss; it names no path of this machine."""
    base, adapter, encoder = hub_name(trainer.model), hasattr(trainer.model, "peft_config"), trainer.encoder
    data = ModelCardData(
        base_model=base,
        library_name="peft" if adapter else "transformers",
        pipeline_tag="text-generation",
        tags=["nextquill", "personalization"],
    )
    rows = {
        "base model": base_name(trainer.model),
        "trained weights": "an adapter" if adapter else "all",
        "loss": f"`{re.sub(', (impl|chunk_bytes)=[^,)]+', '', repr(trainer.loss))}`",
        "training": steps(trainer.args, trainer.state.global_step, "examples"),
        "data": _data(trainer.train_dataset),
    }
    if encoder is not None:
        rows["order of the prompt"] = encoder.template.order
        rows["longest prompt and response"] = f"{encoder.max_length} tokens"
    table = "\n".join(f"| {name} | {value} |" for name, value in {"": "", "---": "---", **rows}.items())
    return _CARD.format(
        data=data.to_yaml(), table=table, prompting=_prompting(encoder), measures=measures(trainer.state, _MEASURES)
    )


_CARD = """---
{data}
---

# A model that writes as each user would

It reads texts that a user wrote before, and responds to a query as this user would. It may repeat what it was trained
on and what its prompt holds: treat both as the users' own.

{table}

## How to prompt it

{prompting}

## Measures

{measures}
"""
_PROMPTING = """The prompt looks like this, with any number of earlier texts:

~~~~text
{prompt}
~~~~

With nextquill, from this folder:

```python
import nextquill as nq

writer = nq.Writer.load(".")
print(writer.write("THE QUERY", ["AN EARLIER TEXT", "A LATER TEXT"], max_new_tokens=100)[0])
```

For another engine, `nq.prompt_for(".", query, history)` makes the same prompt as text and as token ids."""


def hub_name(model: Any) -> str | None:
    """The base model's name on the hub; None for a new model and for a folder of this machine."""
    name = str(getattr(getattr(base_model(model), "config", None), "_name_or_path", ""))
    return None if not name or os.path.isabs(name) or os.path.exists(name) or is_gguf(name) else name


def base_name(model: Any) -> str:
    """The base model in a card's table."""
    base = base_model(model)
    file = os.path.basename(str(getattr(base, "name_or_path", "")))
    if is_gguf(file):
        return ", ".join(filter(None, (getattr(base, "gguf_name", None), f"read from the file `{file}`")))
    return hub_name(model) or "not on the hub"


def steps(args: Any, number: int, of: str) -> str:
    """How long a run trained, in words."""
    batch = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    made = f"{number} {'step' if number == 1 else 'steps'} of {batch} {of}"
    return f"{made}, learning rate {args.learning_rate:g}, seed {args.seed}"


def _data(dataset: Any) -> str:
    if dataset is None:
        return "none"
    stats, users = dataset.stats, len(set(dataset.user_ids))
    return f"{stats.examples} examples of {users} users, {stats.response_tokens} response tokens"


def _prompting(encoder: Any) -> str:
    """What a card says on prompts, with that of a query and two texts."""
    if encoder is None:
        return "With the prompts of the program that trained it, which are not known here."
    renderer = encoder.renderer
    start = renderer.tokenizer.decode(renderer.start_ids)
    history = [HistoryItem("AN EARLIER TEXT"), HistoryItem("A LATER TEXT")]
    return _PROMPTING.format(prompt=f"{start}{renderer.prompt('THE QUERY', history)}")


def measures(state: Any, names: Mapping[str, str]) -> str:
    """A table of the last evaluation: a row for each of `names` (without "eval_") that it logged."""
    log = next((log for log in reversed(state.log_history) if f"eval_{next(iter(names))}" in log), None)
    if log is None:
        return "None during training."
    rows = [f"| {said} | {log[f'eval_{name}']:.3g} |" for name, said in names.items() if f"eval_{name}" in log]
    return "\n".join(
        [f"On the evaluation data, after step {log['step']}:", "", "| measure | mean |", "|---|---|", *rows]
    )
