"""The demo of losses: which one moves a user's personal tokens soonest, in a world where they are known."""
