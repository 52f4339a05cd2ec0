"""The engine room: row plans, chunk kernels, autograd functions, dispatch by `impl`. Imports no public module."""
