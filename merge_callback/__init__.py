"""Merge a LoRA adapter into its quantised base at the end of training, and lose nothing.

trainer = SFTTrainer(model=model, peft_config=lora, callbacks=[MergeOnSaveCallback()])
"""

from merge_callback.callback import MergeFailure, MergeOnSaveCallback, attach
from merge_callback.compare import compare
from merge_callback.drafts import MergeResult
from merge_callback.errors import (
    CorruptVersion,
    MergeError,
    MergeRefused,
    PushError,
    PushRefused,
    VerificationError,
)
from merge_callback.export import merge_adapter
from merge_callback.options import MergeOptions
from merge_callback.push import Push
from merge_callback.store import MergeStore, Version
from merge_callback.uploads import push_version
from merge_callback.verification.outputs import Comparison

__version__ = "0.1.0"

__all__ = [
    "Comparison",
    "CorruptVersion",
    "MergeError",
    "MergeFailure",
    "MergeOnSaveCallback",
    "MergeOptions",
    "MergeRefused",
    "MergeResult",
    "MergeStore",
    "Push",
    "PushError",
    "PushRefused",
    "VerificationError",
    "Version",
    "attach",
    "compare",
    "merge_adapter",
    "push_version",
]
