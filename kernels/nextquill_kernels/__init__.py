"""Triton kernels of nextquill, one file per kernel family. Imports triton and torch only.

This version ships none: `impl="auto"` runs the plain PyTorch chunk kernels of `nextquill.ops.chunk_torch`.
"""
