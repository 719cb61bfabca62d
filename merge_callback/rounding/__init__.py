"""Ways to choose the scales and codes of a 4-bit weight. Know nothing of adapters, models or files.

`nearest` and `unbiased` look at the weight alone; `calibrated` at the inputs that it meets too.
"""
