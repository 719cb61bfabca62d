"""Merge a LoRA adapter into its quantised base at the end of training, and lose nothing.

trainer = SFTTrainer(model=model, peft_config=lora, callbacks=[MergeOnSaveCallback()])
"""

from merge_callback.callback import MergeFailure, MergeOnSaveCallback
from merge_callback.errors import CorruptVersion, MergeError, MergeRefused
from merge_callback.export import MergeResult, merge_adapter
from merge_callback.options import MergeOptions
from merge_callback.store import MergeStore, Version

__version__ = "0.1.0"

__all__ = [
    "CorruptVersion",
    "MergeError",
    "MergeFailure",
    "MergeOnSaveCallback",
    "MergeOptions",
    "MergeRefused",
    "MergeResult",
    "MergeStore",
    "Version",
    "merge_adapter",
]
