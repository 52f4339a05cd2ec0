"""What the demos share.

recipe.py    the settings of a run
run.py       a run from its arguments to its files
training.py  a base model made from nothing, and steps of an optimizer
figures.py   values over seeds as curves and pictures
"""
