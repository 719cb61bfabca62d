"""Ways to choose the scales and codes of a 4-bit weight. Know nothing of adapters or files."""

from merge_callback.rounding.nearest import nearest

ROUNDINGS = {"nearest": nearest}

__all__ = ["ROUNDINGS", "nearest"]
