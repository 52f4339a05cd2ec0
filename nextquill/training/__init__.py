"""Training loops with a causal loss.

trainer.py             `NextQuillTrainer`: transformers' Trainer
trl.py                 TRL's `SFTTrainer`
causal_loss_mixin.py   the parts that both share
meter.py               measurements during training and evaluation
checks.py              checks of arguments, before any work
atomic_checkpoints.py  checkpoints that are complete or absent, and the run that they belong to
model_card.py          the README of a trained model's folder
"""
