"""POPI (arXiv 2510.17881): short summaries of users, in words, that personalise any generator.

An inference model turns a user's signals into a summary, and a generator reads the summary. Both are trained under one
preference objective, the inference model by reinforcement learning. See `objective` for the mathematics, `POPITrainer`
for training, and `summaries`, `evaluation` and `export` for the use of a trained run.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from nextquill.lazy import on_first_use

if TYPE_CHECKING:
    from nextquill.popi.config import POPIConfig
    from nextquill.popi.objective import PreferenceLoss, advantages, generator_error, informativeness
    from nextquill.popi.prompts import GeneratorPrompts, InferencePrompts, PopiTemplates
    from nextquill.popi.roles import Roles
    from nextquill.popi.trainer import POPITrainer
    from nextquill.popi.users import Draw, Pair, User, draw, held_out, users_from_records
else:
    __getattr__, __dir__ = on_first_use(__name__, ("users", "prompts", "objective", "config", "roles", "trainer"))

__all__ = [
    "Draw",
    "GeneratorPrompts",
    "InferencePrompts",
    "POPIConfig",
    "POPITrainer",
    "Pair",
    "PopiTemplates",
    "PreferenceLoss",
    "Roles",
    "User",
    "advantages",
    "draw",
    "generator_error",
    "held_out",
    "informativeness",
    "users_from_records",
]
