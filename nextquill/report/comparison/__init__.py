"""What sets the arms of a comparison apart: figures, sentences, tables, a page.

figures.py       means over seeds, paired differences, costs: what is reported
collecting.py    the figures of finished runs
findings.py      the sentences that follow from the figures
presentation.py  tables for a page, a terminal and Markdown
reporting.py     the files that all this goes into
"""

from __future__ import annotations
