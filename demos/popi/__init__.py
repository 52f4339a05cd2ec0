"""The demo of POPI: what a summary of a user is worth, in a world where what users prefer is known."""
