"""Several losses on the same data, from the same start. `nextquill.report.comparison` presents what sets them apart.

arms.py       what is compared: a loss, a factor of the learning rate, or another arm's time
folder.py     what a comparison's folder holds, and which of its runs are finished
measuring.py  what a run costs, and the order of its examples
running.py    one arm from one seed: train, evaluate, keep
"""

from __future__ import annotations
