"""The results of a comparison of losses: figures, sentences, tables, a page.

figures.py   the figures as values: means over seeds, paired differences, costs
collect.py   computes them from finished runs
findings.py  the sentences that follow from them
tables.py    tables for a page, a terminal and Markdown
page.py      the page, the Markdown, and the files
"""
