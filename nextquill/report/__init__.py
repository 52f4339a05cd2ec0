"""Pages, tables and pictures, for a browser and for a terminal.

Render plain data:

    data.py        the values that the others render
    numbers.py     figures, intervals and p-values as text
    html.py        one self-contained page, of page.css and page.js; its parts in svg.py, tokens.py and text.py
    plots.py       measures and curves as a PNG or SVG, by matplotlib
    terminal.py    tables, and tokens coloured by effect, by rich

Make the page of some runs, or of a comparison:

    runs.py        reads the folders of runs
    headline.py    the verdict, and the measures that matter
    run_tables.py  all their measures, and paired differences
    examples.py    some of the evaluated examples
    run_page.py    the curves of their trainings, and all of it as one page
    comparison/    the report of a comparison of losses

Nothing here computes a loss or loads a model. rich and matplotlib are imported only where they are used.
"""
