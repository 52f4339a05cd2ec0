"""The model card in a trained model's folder: what it was trained on, how to prompt it, and what was measured."""

from __future__ import annotations

import os
import re
from typing import Any

from huggingface_hub import ModelCardData

from nextquill.data import HistoryItem
from nextquill.models.configs import base_model

CARD_FILE = "README.md"
#: The measures that a card shows, by the name of their log without "eval_"; nats a token.
_MEASURES = {
    "nll_factual": "NLL under the user's own history",
    "nll_counterfactual": "NLL without a history",
    "nll_placebo": "NLL under another user's history",
    "effect_placebo": "gain of the own history over another user's",
}


def model_card(trainer: Any) -> str:
    """The Markdown of a `NextQuillTrainer`'s model card; it names no path of this machine."""
    base, adapter = _hub_name(trainer.model), hasattr(trainer.model, "peft_config")
    data = ModelCardData(
        base_model=base,
        library_name="peft" if adapter else "transformers",
        pipeline_tag="text-generation",
        tags=["nextquill", "personalization"],
    )
    rows = {
        "base model": base or "not on the hub",
        "trained weights": "an adapter" if adapter else "all",
        "loss": f"`{re.sub(', (impl|chunk_bytes)=[^,)]+', '', repr(trainer.loss))}`",
        "training": _training(trainer.args, trainer.state.global_step),
        "data": _data(trainer.train_dataset),
        "order of the prompt": trainer.encoder.template.order,
        "longest prompt and response": f"{trainer.encoder.max_length} tokens",
    }
    table = "\n".join(f"| {name} | {value} |" for name, value in {"": "", "---": "---", **rows}.items())
    return _CARD.format(
        data=data.to_yaml(), table=table, prompt=_prompt(trainer.encoder), measures="\n".join(_measures(trainer.state))
    )


_CARD = """---
{data}
---

# A model that writes as each user would

It reads texts that a user wrote before, and responds to a query as this user would. It may repeat what it was trained
on and what its prompt holds: treat both as the users' own.

{table}

## How to prompt it

The prompt looks like this, with any number of earlier texts:

~~~~text
{prompt}
~~~~

With nextquill, from this folder:

```python
import nextquill as nq

writer = nq.Writer.load(".")
print(writer.write("THE QUERY", ["AN EARLIER TEXT", "A LATER TEXT"], max_new_tokens=100)[0])
```

For another engine, `nq.prompt_for(".", query, history)` makes the same prompt as text and as token ids.

## Measures

{measures}
"""


def _hub_name(model: Any) -> str | None:
    """The base model's name on the hub; None for a new model and for a folder of this machine."""
    name = str(getattr(getattr(base_model(model), "config", None), "_name_or_path", ""))
    return None if not name or os.path.isabs(name) or os.path.exists(name) else name


def _training(args: Any, steps: int) -> str:
    batch = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    return f"{steps} steps of {batch} examples, learning rate {args.learning_rate:g}, seed {args.seed}"


def _data(dataset: Any) -> str:
    if dataset is None:
        return "none"
    stats, users = dataset.stats, len(set(dataset.user_ids))
    return f"{stats.examples} examples of {users} users, {stats.response_tokens} response tokens"


def _prompt(encoder: Any) -> str:
    """The prompt of a query and two texts, as text."""
    renderer = encoder.renderer
    start = renderer.tokenizer.decode(renderer.start_ids)
    history = [HistoryItem("AN EARLIER TEXT"), HistoryItem("A LATER TEXT")]
    return f"{start}{renderer.prompt('THE QUERY', history)}"


def _measures(state: Any) -> list[str]:
    """A table of the last evaluation."""
    log = next((log for log in reversed(state.log_history) if "eval_nll_factual" in log), None)
    if log is None:
        return ["None during training; `nextquill evaluate` makes them."]
    rows = [f"| {said} | {log[f'eval_{name}']:.3g} |" for name, said in _MEASURES.items() if f"eval_{name}" in log]
    tokens = f"On {log['eval_num_tokens']:.0f} response tokens of the evaluation data, after step {log.get('step', 0)}:"
    return [tokens, "", "| measure | nats a token |", "|---|---|", *rows]
