"""What the demos of losses and POPI share.

run.py       a run from its settings to its files
training.py  a base model made from nothing, and steps of an optimizer
figures.py   values over seeds as curves and pictures
progress.py  a progress bar for each phase of a run
"""
