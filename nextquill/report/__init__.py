"""Pictures, pages and terminal output, from plain data.

    data.py      the records that the others render
    terminal.py  rich: a table, and tokens coloured by effect
    plots.py     matplotlib: curves as small multiples
    html.py      one self-contained page
    files.py     writing a file whole or not at all

Nothing here computes a loss or loads a model: it imports the standard library, and matplotlib and rich where they are
used.
"""

from __future__ import annotations
