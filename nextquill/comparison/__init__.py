"""Several losses on the same data, from the same start, and what sets them apart.

arms.py          what is compared: a loss, a factor of the learning rate, or another arm's time
folder.py        what a comparison's folder holds, and which of its runs are finished
measuring.py     what a run costs, and the order of its examples
running.py       one arm from one seed: train, evaluate, keep
figures.py       means over seeds, paired differences, costs: what is reported
collecting.py    the figures of finished runs
findings.py      the sentences that follow from the figures
presentation.py  tables for a page, a terminal and Markdown
reporting.py     the files that all this goes into
"""

from __future__ import annotations
