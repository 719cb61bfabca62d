"""Without fcntl, O_DIRECTORY, fork and the like: what Windows lacks is taken away, see windows.py.

Nothing here ran on Windows, or on macOS.
"""

import json
import os
import subprocess
import sys
from pathlib import Path, PureWindowsPath

import pytest

import merge_callback
import merge_callback.versions
from merge_callback import MergeStore

CHILD = Path(__file__).with_name("portability_child.py")
ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}  # texts of ours are UTF-8
STRICT = {"PYTHONWARNDEFAULTENCODING": "1", "PYTHONWARNINGS": "ignore", "OMP_NUM_THREADS": "1"}


def start(*arguments):
    command = [sys.executable, *map(str, arguments)]
    env = os.environ | ASCII | STRICT
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env
    )


def child(*arguments):
    process = start(CHILD, *arguments)
    told, errors = process.communicate()
    assert process.returncode == 0, errors
    return json.loads(told.splitlines()[-1])


@pytest.fixture(scope="module")
def merged(tmp_path_factory):
    return child("merge", tmp_path_factory.mktemp("merged"))


def test_every_module_is_imported(merged):
    package = Path(merge_callback.__file__).parent
    files = package.rglob("*.py")
    parts = [path.relative_to(package.parent).with_suffix("").parts for path in files]
    names = {".".join(p for p in one if p != "__init__") for one in parts}
    assert set(merged["modules"]) == names - {"merge_callback", "merge_callback.__main__"}


BARE = """
import os, sys
from pathlib import Path
del os.O_DIRECTORY
sys.modules["fcntl"] = None
import merge_callback, merge_callback.store
store = merge_callback.store.MergeStore(sys.argv[1])
for _ in range(2):
    with store.draft("m") as draft:
        (draft.path / "file").write_text("x", "utf-8")
        draft.seal()
        manifest = {"kind": "merged", "created": "", "step": 1, "best_step": None}
        store.publish(draft, "m", manifest)
"""


def test_the_store_takes_the_locks_that_filelock_has_without_fcntl(tmp_path):
    process = start("-c", BARE, tmp_path)
    assert process.communicate()[1] == "" and process.returncode == 0
    assert [v.sequence for v in MergeStore(tmp_path).versions()] == [1, 2]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m", "m-v2"]


def test_versions_are_published_recovered_and_pruned(tmp_path):
    assert child("store", tmp_path) == {
        "published": ["m", "m-v2"],
        "draft of the living": True,
        "draft of the dead": False,
        "pruned while open": [],
        "pruned": ["m"],
        "left": ["m-v2"],
    }


def test_processes_that_race_get_a_version_each(tmp_path):
    workers = [start(CHILD, "race", tmp_path) for _ in range(3)]
    errors = [worker.communicate()[1] for worker in workers]
    assert [worker.returncode for worker in workers] == [0] * 3, errors
    versions = MergeStore(tmp_path).versions()
    assert [version.sequence for version in versions] == list(range(1, 31))
    assert len({(v.path / "deep" / "file").read_text() for v in versions}) == 30
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(v.name for v in versions)


def test_a_training_without_fork_calibrates_with_its_last_batches(merged):
    assert merged["trained"] == {"step-00000002": 24}  # tokens of one batch; the other one verifies


def test_what_a_refusal_leaves_the_next_merge_removes(merged):
    assert merged["refused"] and merged["left"] == ["merged"]


def test_texts_are_written_whatever_the_locale(merged):
    """In ASCII, and where it is an error to leave the encoding to the locale."""
    written = ["README.md", "lora", "merge_manifest.json", "merge_report.json", "merge_report.md"]
    assert merged["files"] == sorted([*written, "merge_report.png", "merged_4bit"])


@pytest.mark.parametrize("name", ["..\\secret", "a\\b", "C:/secret", "C:secret", "//host/share/x"])
def test_no_name_in_a_manifest_leads_out_of_a_version_on_windows(monkeypatch, name):
    monkeypatch.setattr(merge_callback.versions, "Path", PureWindowsPath)
    record = {"size": 1, "sha256": ""}
    assert merge_callback.versions._is_record(("lora/weights", record))
    assert not merge_callback.versions._is_record((name, record))


def test_what_is_simulated(tmp_path):
    """Were any of it let through, the laws above would say nothing."""
    assert child("simulated", tmp_path) == {
        "import fcntl": "ModuleNotFoundError",
        "import resource": "ModuleNotFoundError",
        "the C library": "TypeError",
        "names": [],
        "open a directory": "PermissionError",
        "flush what is open for reading": "OSError",
        "flush what is open for writing": None,
        "rename onto an empty directory": "FileExistsError",
        "rename a file that is open": "PermissionError",
        "rename a directory with an open file": "PermissionError",
        "replace a file that is open": "PermissionError",
        "replace a file": None,
        "remove a file that is mapped": "PermissionError",
        "rename a directory": None,
        "remove a file": None,
    }
