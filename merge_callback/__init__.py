"""Merge a LoRA adapter into its quantised base at the end of training, and lose nothing.

trainer = SFTTrainer(model=model, peft_config=lora, callbacks=[MergeOnSaveCallback()])

A name is imported when it is first asked for: the command line lists versions without torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from merge_callback.callback import MergeFailure, MergeOnSaveCallback, attach
    from merge_callback.comparing import compare
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
    from merge_callback.store import MergeStore
    from merge_callback.uploads import push_version
    from merge_callback.verification.outputs import Comparison
    from merge_callback.versions import Version

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

_MODULES = {
    "MergeFailure": "callback",
    "MergeOnSaveCallback": "callback",
    "attach": "callback",
    "compare": "comparing",
    "MergeResult": "drafts",
    "CorruptVersion": "errors",
    "MergeError": "errors",
    "MergeRefused": "errors",
    "PushError": "errors",
    "PushRefused": "errors",
    "VerificationError": "errors",
    "merge_adapter": "export",
    "MergeOptions": "options",
    "Push": "push",
    "MergeStore": "store",
    "push_version": "uploads",
    "Comparison": "verification.outputs",
    "Version": "versions",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
