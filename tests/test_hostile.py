"""Whatever lies where a version should: no crash, and no file is read or touched elsewhere."""

import json
import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_store import publish

from merge_callback import CorruptVersion, MergeStore
from merge_callback.store import MANIFEST, read_version

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=8,
)
KEYS = ("schema", "kind", "created", "step", "best_step", "files")
PARTS = st.sampled_from(
    ["..", ".", "", "a", "config.json", "/", "\\", "\0", "../..", "step-1", "é"]
)
NAMES = st.lists(PARTS, min_size=1, max_size=4).map("/".join)
RECORDS = st.fixed_dictionaries(
    {"size": st.integers() | JSON, "sha256": st.text(max_size=4) | JSON}
)
few = settings(max_examples=150, derandomize=True, deadline=None, database=None)


def look(root):
    """All that reads versions; an error is one of ours."""
    store = MergeStore(root)
    store.latest(), store.pending()
    for version in store.versions():
        try:
            store.verify(version)
        except CorruptVersion:
            pass
        for name in version.records():
            try:
                inside = version.file(name)
            except CorruptVersion:
                continue
            assert inside.resolve().is_relative_to(version.path.resolve())
    store.prune(1, names=["step-1"], keep_steps=frozenset())


@given(raw=st.binary(max_size=64) | st.text(max_size=64).map(str.encode))
@few
def test_any_bytes_may_stand_in_a_manifest(tmp_path_factory, raw):
    root = tmp_path_factory.mktemp("hostile")
    (root / "step-1").mkdir()
    (root / "step-1" / MANIFEST).write_bytes(raw)
    look(root)
    assert MergeStore(root).versions() == []


@given(changed=st.dictionaries(st.sampled_from(KEYS), JSON), gone=st.sets(st.sampled_from(KEYS)))
@few
def test_any_values_may_stand_in_a_manifest(tmp_path_factory, changed, gone):
    root = tmp_path_factory.mktemp("hostile")
    version = publish(MergeStore(root), "step-1")
    found = {**json.loads((version.path / MANIFEST).read_text()), **changed}
    found = {key: value for key, value in found.items() if key not in gone}
    (version.path / MANIFEST).write_text(json.dumps(found))
    look(root)


@given(files=st.dictionaries(NAMES, RECORDS, max_size=4))
@few
def test_any_names_may_stand_in_a_manifest(tmp_path_factory, files):
    root = tmp_path_factory.mktemp("hostile")
    (root / "secret").write_text("secret")
    version = publish(MergeStore(root / "store"), "step-1")
    found = json.loads((version.path / MANIFEST).read_text())
    (version.path / MANIFEST).write_text(json.dumps({**found, "files": files}))
    look(root / "store")
    assert (root / "secret").read_text() == "secret"


def test_a_manifest_of_gigabytes_is_not_read(tmp_path):
    version = publish(MergeStore(tmp_path), "step-1")
    with open(version.path / MANIFEST, "r+b") as file:
        file.truncate(8 << 30)  # sparse
    assert read_version(version.path) is None


def test_a_deeply_nested_manifest_is_none(tmp_path):
    version = publish(MergeStore(tmp_path), "step-1")
    (version.path / MANIFEST).write_text("[" * 200_000)
    assert read_version(version.path) is None


@pytest.mark.parametrize("kind", ["link", "directory", "fifo"])
def test_a_manifest_that_is_no_file_makes_no_version(tmp_path, kind):
    version = publish(MergeStore(tmp_path / "store"), "step-1")
    path = version.path / MANIFEST
    path.rename(tmp_path / MANIFEST)
    make = {"link": lambda: path.symlink_to(tmp_path / MANIFEST), "directory": path.mkdir}
    make.get(kind, lambda: os.mkfifo(path))()
    assert MergeStore(tmp_path / "store").versions() == []


def test_a_pipe_among_the_files_is_not_waited_for(tmp_path):
    version = publish(MergeStore(tmp_path), "step-1")
    (version.path / "deep" / "file").unlink()
    os.mkfifo(version.path / "deep" / "file")
    with pytest.raises(CorruptVersion, match="is no file"):
        MergeStore(tmp_path).verify(version)


def test_a_version_that_is_a_link_is_none_and_is_not_pruned(tmp_path):
    elsewhere = publish(MergeStore(tmp_path / "elsewhere"), "step-1")
    store = MergeStore(tmp_path / "store")
    publish(store, "step-2")
    (store.root / "step-1").symlink_to(elsewhere.path)
    assert [version.name for version in store.versions()] == ["step-2"]
    store.prune(1, names=["step-1", "step-2"], keep_steps=frozenset())
    MergeStore(tmp_path / "elsewhere").verify("step-1")
