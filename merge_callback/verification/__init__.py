"""Is what lies on the disk what was trained? Asked of the files, before they are published.

`rebuilt` makes a model of a directory as anybody would, `tensors` compares its weights and the
adapter's arithmetic with the live model's, `outputs` what both say, `checks` tells the story.
"""
