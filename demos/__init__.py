"""Demos: small models, trained from nothing on synthetic users of whom the truth is known. Not part of the wheel.

    losses/   which loss moves a user's personal tokens soonest      nextquill demo
    popi/     what a summary of a user is worth                      nextquill popi demo
    kit/      what they share: the run, its settings and its files, training, curves

Each demo has the same files: `world.py` makes the users, `recipe.py` holds the settings, `training.py` trains,
`measuring.py` measures on unseen users, `findings.py` says what follows, and `run.py` does all of it in order and makes
the tables and curves.
"""
