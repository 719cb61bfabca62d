"""Arguments of Unsloth's `save_pretrained_merged` and `push_to_hub_merged`, and ours for them.

Knows nothing of models or files.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import ParamSpec, TypeVar

from merge_callback.errors import MergeRefused

P = ParamSpec("P")
T = TypeVar("T")

_FOR_BOTH = {
    "save_directory": "use output_dir",
    "max_shard_size_gb": "use max_shard_size",
    "num_calibration_samples": "use calibration_tokens",
    "maximum_memory_usage": "use calibration_memory, in bytes; a merge holds a few weights",
    "temporary_location": "leave it out: drafts lie in output_dir, and no weight is offloaded",
    "max_seq_length": "leave it out: batches are as long as they come",
    "is_main_process": "leave it out: one process writes, and finds out itself",
    "state_dict": "leave it out: weights are those of the model",
    "save_function": "leave it out: weights are written as safetensors",
    "variant": "leave it out: files have the names that from_pretrained looks for",
    "save_peft_format": "leave it out: save_method='lora' is PEFT's format",
    "quantization_method": "use save_method='merged_16bit', then llama.cpp's converter",
    "install_missing_dependencies": "leave it out: nothing is installed",
    "use_temp_dir": "leave it out: the files of the version are pushed",
    "commit_message": "leave it out: commits name the version",
    "commit_description": "leave it out: commits name the version",
    "tags": "use card, a template of the model card",
    "datasets": "use card, a template of the model card",
}
FOR_CALLBACK = _FOR_BOTH | {
    "tokenizer": "leave it out: the trainer has it, as processing_class",
    "calibration_dataset": "leave it out: batches are drawn from the training data",
    "repo_id": "use push_to_hub=True and hub_model_id",
    "token": "use hub_token",
    "private": "use hub_private_repo",
    "revision": "use hub_revision",
    "create_pr": "use hub_revision; each version has a branch and a tag of its own, too",
}
FOR_MERGE_ADAPTER = _FOR_BOTH | {
    "tokenizer": "use processing_class",
    "calibration_dataset": "use calibration_data",
    "push_to_hub": "use push_version(result.path, repo_id)",
    "repo_id": "use push_version(result.path, repo_id)",
    "token": "use push_version(token=)",
    "private": "use push_version(private=)",
    "revision": "use push_version(revision=)",
    "create_pr": "use push_version(revision=); each version has a branch and a tag of its own, too",
}


def refusing(theirs: Mapping[str, str]) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """Decorate a function to name its own arguments to callers who give it Unsloth's.

    Args:
        theirs: name of an argument of theirs -> what to do here. What neither of the two knows is
            a TypeError, as ever.
    """

    def decorate(function: Callable[P, T]) -> Callable[P, T]:
        parameters = inspect.signature(function).parameters.values()
        unnamed = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]

        @functools.wraps(function)
        def asked(*args: P.args, **kwargs: P.kwargs) -> T:
            problems = [
                f"{name} is an argument of Unsloth's; {theirs[name]}"
                for name in kwargs
                if name in theirs
            ]
            if len(args) > len(unnamed):
                cure = theirs["tokenizer"]
                problems.append(f"what comes after {unnamed[-1]} needs its name; tokenizer: {cure}")
            if problems:
                raise MergeRefused(problems)
            return function(*args, **kwargs)

        return asked

    return decorate
