"""Pictures, pages and terminal output, from plain data.

    data.py      the records that the others render
    terminal.py  rich: a table, and tokens coloured by effect
    plots.py     matplotlib: curves as small multiples
    html.py      one self-contained page: page.css, page.js; its parts in svg.py (curves), tokens.py and text.py

and the page of some runs, which is made of these:

    runs.py      reading run folders
    curves.py, measures.py, examples.py, choosing.py    what is shown of them
    run_page.py  all of it as a page

Nothing here computes a loss or loads a model. It imports the standard library and `nextquill.evaluation`, and rich and
matplotlib where they are used.
"""

from __future__ import annotations
