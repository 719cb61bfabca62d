"""Processes that die and disks that run full, at every step of an export."""

import json
import os
import subprocess
import sys
from pathlib import Path

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


def test_a_process_killed_at_any_step_leaves_whole_versions_and_the_next_run_works(tmp_path):
    rows = child("kill", tmp_path)
    calls = [row["call"] for row in rows]
    assert {"mkdir", "write", "fsync", "rename", "chmod"} <= set(calls) and len(rows) > 30
    renamed = calls.index("rename")
    for at, row in enumerate(rows):
        assert row["status"] == -9, row
        assert row["after"] == (1 if at <= renamed else 2), row
        assert (row["again"], row["then"], row["left"]) == (0, row["after"] + 1, 0), row


def test_a_full_disk_publishes_nothing_and_leaves_no_draft(tmp_path):
    *rows, last = child("full", tmp_path)
    for row in rows:
        assert "No space left on device" in row["told"] and "free space" in row["told"]
        assert row["left"] == []
    assert last == {"same": True, "left": ["merged"]}
