"""Demos: small models, trained from nothing on synthetic users, and a real model on real texts. Not part of the wheel.

    losses/   which loss moves a user's personal tokens soonest      nextquill demo
    popi/     what a summary of a user is worth                      nextquill popi demo
    people/   what a real model takes from a person's own texts      nextquill demo --model MODEL
    kit/      what the demos of losses and POPI share: the run, its settings and its files, training, curves

The demos of losses and POPI have the same files: `world.py` makes the users, `recipe.py` holds the settings,
`training.py` trains, `measuring.py` measures on unseen users, `findings.py` says what follows, and `run.py` does all of
it in order and makes the tables and curves.
"""
