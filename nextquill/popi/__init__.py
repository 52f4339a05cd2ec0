"""POPI (arXiv 2510.17881): short summaries of users, in words, that make any generator personal.

An inference model turns a user's signals into a summary; a generator conditions on it; both are trained under one
preference objective, the summary by reinforcement learning. See `objective` for the mathematics, `POPITrainer` for
training, `summarizing`, `summaries` and `export` for what is done with summaries afterwards.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from nextquill.lazy import on_first_use

if TYPE_CHECKING:
    from nextquill.popi.config import POPIConfig
    from nextquill.popi.estimators import advantages
    from nextquill.popi.objective import PreferenceLoss, generator_error, informativeness
    from nextquill.popi.prompts import GeneratorPrompts, InferencePrompts, PopiTemplates
    from nextquill.popi.roles import Roles
    from nextquill.popi.trainer import POPITrainer
    from nextquill.popi.users import Draw, Pair, User, draw, held_out, users_from_records
else:
    __getattr__, __dir__ = on_first_use(
        __name__, ("users", "prompts", "estimators", "objective", "config", "roles", "trainer")
    )

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
