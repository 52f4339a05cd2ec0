"""Triton kernels of nextquill, one file per kernel family. Imports triton and torch only.

stream          statistics straight from hidden states, no logits in memory (tiles: tile_table.json, tune)
chunk           statistics of a chunk of logits, and its gradient (logits: bias, scale and cap)
jsd             the Jensen-Shannon divergence of two streams of logits, and its gradient
coefficients    token weights and their normalisation, per sequence
launch          where kernels can run; crosscompile: their resources on a GPU that this machine does not have
"""
