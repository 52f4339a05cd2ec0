"""The command line: one file per command, flags in options.py, parsing in parsing.py."""
