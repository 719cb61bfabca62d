"""A fault at every step of a real merge, by hand and within a training."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from injection import FAULTS

pytestmark = pytest.mark.faults

CHILD = Path(__file__).with_name("fault_child.py")


def child(mode, root):
    done = subprocess.run(
        [sys.executable, str(CHILD), mode, str(root)],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONWARNINGS": "ignore", "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


STAGES = ("draft", "write", "companions", "verify", "report", "seal", "publish", "prune")
DEADLY = {"SIGKILL": -9, "SIGTERM": -15}


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    return child("train", tmp_path_factory.mktemp("training"))


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_within_a_training_loses_nothing_and_training_goes_on(rows, fault, stage, support):
    support("A fault within a training that merges at each save", fault, stage)
    met = [row for row in rows if (row["fault"], row["stage"]) == (fault, stage)]
    if not met:
        assert fault == "short write" and stage != "write"
        return support.found("")
    outcomes = set()
    for row in met:
        # The merge at step 1 went well, that at step 2 met the fault; 3 is of what went on.
        assert row["status"] == DEADLY.get(fault, 0), row
        assert row["checkpoints kept"] and row["trained alike"] and row["again"] == 0, row
        assert 3 in row["then"], row
        unremoved = row["stage"] == "prune" and row["call"] in ("unlink", "rmdir")
        assert row["left"] == 0, row  # the next merge removes what a failed removal has left
        if row["said"]:  # the fault came out of it, and training went on from a checkpoint
            interrupted = fault == "KeyboardInterrupt"
            assert row["said"] == ("KeyboardInterrupt" if interrupted else "MergeError"), row
            assert row["drafts"] == unremoved, row
        if row["said"] or row["status"]:
            before = stage not in ("publish", "prune")
            assert row["versions"] in ([[1]] if before else [[1], [1, 2], [2]]), row
            outcomes.add({(1,): "step 1", (2,): "step 2"}.get((*row["versions"],), "both"))
        else:
            assert fault in ("EIO", "ENOSPC", "short write") and row["then"] == [3], row
            outcomes.add("none, and it went on")
    support.found(" or ".join(sorted(outcomes)))


def test_the_steps_are_met(rows):
    met = {(row["stage"], row["call"]) for row in rows}
    assert {
        ("draft", "mkdir"),
        ("write", "write"),
        ("write", "fsync"),
        ("companions", "save_companions"),
        ("verify", "verify"),
        ("verify", "rebuild"),
        ("verify", "compare_outputs"),
        ("report", "open"),
        ("seal", "fsync"),
        ("publish", "mkdir"),
        ("publish", "rename"),
        ("prune", "unlink"),
    } <= met


def test_a_full_disk_publishes_nothing_and_leaves_no_draft(tmp_path):
    *rows, last = child("full", tmp_path)
    for row in rows:
        assert "No space left on device" in row["told"] and "free space" in row["told"]
        assert row["left"] == []
    assert last == {"same": True, "left": ["merged"]}
