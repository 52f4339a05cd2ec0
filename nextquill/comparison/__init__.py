"""Trains several losses on the same data from the same start; `nextquill.report.comparison` presents the results.

arms.py       the arms: a loss each, perhaps with another learning rate or another arm's training time
claiming.py   shares the runs among processes
folder.py     a comparison's folder, and which of its runs are finished
measuring.py  a run's time, memory and order of examples
running.py    trains and evaluates one arm from one seed
"""
