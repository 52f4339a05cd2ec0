"""The model card of a POPI run: what its two roles do, what they were trained on, and what was measured."""

from __future__ import annotations

from typing import Any

from huggingface_hub import ModelCardData

from nextquill.training.model_card import base_name, hub_name, measures, steps

#: The measures that a card shows, by the name of their log without "eval_".
_MEASURES = {
    "accuracy": "pairs judged right, with the summary",
    "accuracy_none": "the same without a context",
    "accuracy_placebo": "the same with another user's summary",
    "summary_tokens": "tokens of a summary",
}
_CARD = """---
{data}
---

# Summaries of users, and answers from them

`inference` reads what a user preferred before and writes a short summary. `generator` answers with the summary in place
of the user's data (POPI, arXiv 2510.17881). Summaries describe people: treat them as the users' own.

| | |
|---|---|
| base model | {base} |
| objective | {objective}, β {beta:g} |
| training | {steps} |
| data | {pairs} pairs of {users} users |

## How to use it

With nextquill, from this folder; the file holds the users' pairs or texts:

```bash
nextquill popi summarize --model . --signals_file users.jsonl --output_file summaries.jsonl
```

## Measures

{measures}
"""


def popi_card(trainer: Any) -> str:
    """The Markdown of a `POPITrainer`'s model card; it names no path of this machine."""
    users = () if trainer.train_users is None else trainer.train_users.users
    base = hub_name(trainer.roles.inference.model)
    return _CARD.format(
        data=ModelCardData(base_model=base, tags=["nextquill", "personalization"]).to_yaml(),
        base=base_name(trainer.roles.inference.model),
        objective=trainer.config.objective,
        beta=trainer.config.beta,
        steps=steps(trainer.args, trainer.state.global_step, "users"),
        pairs=sum(len(user.pairs) for user in users),
        users=len(users),
        measures=measures(trainer.state, _MEASURES),
    )
