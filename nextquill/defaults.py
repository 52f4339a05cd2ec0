"""Defaults that commands show before they load torch."""

#: The probability difference above which `NextQuillLoss` takes a token for a personal one (arXiv 2506.02368).
DEFAULT_THRESHOLD = 0.05
