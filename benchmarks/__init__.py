"""Benchmarks: each suite checks its providers' results against each other, then times them as ratios in one run.

python -m benchmarks.run --suite step      a whole training step of the `small` model, per loss
python -m benchmarks.run --suite head      the loss alone, against plain PyTorch over full logits
python -m benchmarks.table                 write the README's tables from benchmarks/results
"""
