"""Is what lies on the disk what was trained? Asked of the files, before they are published.

`rebuilt` makes a model of a directory as anybody would. `settings` compares what stands beside the
weights, `tensors` the weights and buffers, `adapter_files` a saved adapter, `arithmetic` what is
merged with what PEFT and bitsandbytes compute, `outputs` what both models say. `limits` says which
figures are too bad, `checks` tells the story.
"""
