"""Several losses on the same data, from the same start, and what sets them apart."""

from __future__ import annotations
