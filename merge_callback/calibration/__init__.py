"""Round with the model and its data at hand: what is lost in one layer is made good in the next.

`batches` finds data, `blocks` runs the model piece by piece, `sequential` rounds it layer by layer,
`distillation` tunes what was rounded, `stand_ins` lets the live model compute with other weights.
"""
