"""The phases of `python -m benchmarks.verify_gpu`, each a process of its own with a time limit.

    probe      versions, and what this GPU copies and multiplies
    smoke      every public operator against float64, case by case
    tests      the tests that need a GPU, in several processes
    head       suite `head`, the loss alone against other code
    step       suite `step`, whole optimiser steps
    sweep      chunk sizes and lengths of responses
    profile    the kernels of one loss call, by time
    tune       the fastest tiles of the streaming kernels
    counters   three kernels under NVIDIA's profiler `ncu`

Part a is the first three, part b the others. `report` reads their files and writes one page.

An illegal memory access makes a CUDA context useless, and every later call in its process fails too. So `shares` lets
several processes work through one list: a process that ends is replaced, and the new one goes on after the item that
ended it.
"""
