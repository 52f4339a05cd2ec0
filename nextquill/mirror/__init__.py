"""MIRROR (arXiv 2610.09795): on-policy self-distillation from the same model with the user's own response in view.

A response ŷ is sampled from the model under the user's history and the query. Two branches read it:

    student    history, query, ŷ
    teacher    history, query and the user's own response to it, ŷ; a constant

and the student's distribution moves towards the teacher's, token by token; see `MirrorLoss`. History and query are the
beginning of both, and a prefix tree computes them once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from nextquill.lazy import on_first_use

if TYPE_CHECKING:
    from nextquill.mirror.loss import MirrorLoss
    from nextquill.mirror.trainer import MirrorTrainer
else:
    __getattr__, __dir__ = on_first_use(__name__, ("loss", "trainer"))

__all__ = ["MirrorLoss", "MirrorTrainer"]
