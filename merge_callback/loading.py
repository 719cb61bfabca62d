"""Load third-party files without prompting to run their code. Knows nothing of what is loaded."""

from __future__ import annotations

from transformers import dynamic_module_utils

from merge_callback.undo import Undone, put


def asking_nobody() -> Undone:
    """Nobody is asked whether code that came along may run; where nobody has said so, it may not.

    `trust_remote_code=False` is not enough: a config can name a class to load with that does not
    hand it down.
    """
    return Undone(lambda undo: put(undo, vars(dynamic_module_utils), "TIME_OUT_REMOTE_CODE", 0))
