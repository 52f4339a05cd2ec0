"""The former place of the demo of POPI; removed in version 0.3."""

raise ImportError(f"{__name__} is now demos.popi, in the source tree only", name=__name__)
