"""Every provider of suite `head`, the baseline first."""

from benchmarks.peers import cce, liger, ours, plain, torch_lce
from benchmarks.provider import Provider

PROVIDERS: tuple[Provider, ...] = (plain.PROVIDER, *ours.PROVIDERS, torch_lce.PROVIDER, liger.PROVIDER, cce.PROVIDER)
