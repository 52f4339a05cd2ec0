"""Training loops with a causal loss.

trainer.py             `NextQuillTrainer`: transformers' Trainer
trl.py                 TRL's `SFTTrainer`
causal_loss_mixin.py   what both have in common
meter.py               what is measured while a model trains
checks.py              what is refused before any work
atomic_checkpoints.py  checkpoints that are complete or absent
run_identity.py        what a run and its checkpoints must agree in
"""

from __future__ import annotations
