"""The study: what personalised training is worth, on a real model and real people's texts.

    python -m benchmarks.study --model DIR --data reasons=DIR --data senate=DIR      starts or resumes it
    python -m benchmarks.study.tables                                                tables from the results

plan.py      data × method × learning rate × seed: which runs there are, and in which order
methods.py   the methods: how each trains, and what its authors or we expect of it
people.py    the records: people to train on, to choose on, and to test on
run.py       one run, in a process of its own: train, measure, write one small file
tables.py    the tables of the results
picture.py   their picture
popi.py      summaries of users on the same people: a study of its own, `python -m benchmarks.study.popi`

A run's result is `runs/<name>.json` in the study's folder; all tables follow from these files. With
them the study resumes on any machine. Files of a run under way are below `work/`, which may be deleted at any time.
"""
