"""The former place of the demo of losses; removed in version 0.3."""

raise ImportError(f"{__name__} is now demos.losses, in the source tree only", name=__name__)
