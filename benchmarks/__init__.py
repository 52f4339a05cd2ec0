"""Benchmarks: each suite checks its providers' results against each other, then times them as ratios in one run.

python -m benchmarks.run --suite step            whole optimiser steps, against the published scheme, a composition of
                                                 fused losses for one stream, and plain SFT
python -m benchmarks.run --suite head            the loss alone at real models' head shapes, against plain PyTorch,
                                                 torch's linear_cross_entropy, Liger-Kernel and cut-cross-entropy
python -m benchmarks.run --suite native          the C++ extension against its plain PyTorch twin, over a grid
python -m benchmarks.run --suite prepare         records into prepared folders, against the tokenizer's own speed
python -m benchmarks.run --suite popi            a step of POPI with shared prefixes, against a padded row per prompt
python -m benchmarks.run --suite generate        plain and guided decoding with a long history, against transformers
python -m benchmarks.verify_gpu --out DIR        everything on a GPU: checks in 260 s, figures in 420 s, and a page
python -m benchmarks.table                       write the README's tables from benchmarks/results
python -m benchmarks.plot                        draw docs/bench-head.png from benchmarks/results
python -m benchmarks.step_picture                draw docs/step.svg, the README's picture, from benchmarks/results
"""
