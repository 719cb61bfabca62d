"""Run by test_publisher in a process of its own, which talks to the Hub of HF_ENDPOINT.

python push_child.py train ROOT          train and push, everything logged
python push_child.py push PATH [REPO]    push a version
"""

import logging
import sys
from pathlib import Path

from merge_callback import MergeOnSaveCallback, push_version


def train(root):
    from test_callback import trainer

    logging.basicConfig(level=logging.DEBUG)
    callback = MergeOnSaveCallback(
        push_to_hub=True, hub_token="hf_writer", rounding="nearest", verify=False
    )
    trainer(Path(root), callback, max_steps=1).train()
    print(len(callback.pushes), "pushed")


def push(path, repo_id=None):
    done = push_version(path, repo_id)
    print(done.tag, "newest" if done.newest else "old")


if __name__ == "__main__":
    {"train": train, "push": push}[sys.argv[1]](*sys.argv[2:])
