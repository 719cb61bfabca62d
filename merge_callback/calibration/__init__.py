"""Round with the model and its data at hand: what is lost in one layer is made good in the next.

`recording` notes how the model calls its blocks, `blocks` runs one of them alone, `sequential`
rounds layer by layer, `distillation` tunes what was rounded, `choice` decides which of it is done.
"""
