"""Training loops with a causal loss.

trainer.py             `NextQuillTrainer`: transformers' Trainer
trl.py                 TRL's `SFTTrainer`
causal_loss_mixin.py   the parts that both share
meter.py               measurements during training and evaluation
checks.py              checks of arguments, before any work
finite.py              stops at the first step that is not finite
atomic_checkpoints.py  checkpoints that are complete or absent, and the run that they belong to
sharded_state.py       the trained weights of a module that FSDP2 shards, as one file
model_card.py          the README of a trained model's folder
"""
