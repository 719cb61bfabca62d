"""Whatever lies where a version should: no crash, and no file is read or touched elsewhere."""

import io
import json
import math
import os
import pickle
import resource
import shutil

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import adapt, load_base, save_base
from safetensors.torch import load_file, save_file
from test_store import publish

from merge_callback import CorruptVersion, MergeStore, compare, merge_adapter
from merge_callback.cli import main
from merge_callback.verification.rebuilt import rebuild
from merge_callback.versions import MANIFEST, read_version

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=8,
)
KEYS = ("schema", "kind", "created", "step", "best_step", "files", "save_methods", "verification")
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
    assert main(["list", str(root)]) == 0
    assert main(["show", str(root / "step-1")]) in (0, 3)
    assert main(["prune", str(root), "--keep", "1"]) == 0
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


# Models that others made


def a_model(root, kind="bfloat16"):
    """A directory as a merge writes it, and what is in its one weight file."""
    result = merge_adapter(
        adapt(load_base(save_base(root / "base"), kind)), root / "out", verify=False, progress=False
    )
    return result.path


def says(directory):
    """What is said of a directory that somebody else made."""
    with pytest.raises(CorruptVersion) as caught:
        compare(directory, directory, [{"input_ids": torch.arange(8)[None]}])
    return str(caught.value)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    root = tmp_path_factory.mktemp("made")
    return {kind: a_model(root / kind, kind) for kind in ("bfloat16", "nf4", "nf4-nested")}


@pytest.fixture
def hostile(made, tmp_path):
    """A copy of a model to spoil, and its weight file."""

    def copy(kind="bfloat16"):
        directory = tmp_path / kind
        shutil.copytree(made[kind], directory)
        weights = directory / "model.safetensors"
        weights.chmod(0o600)
        return directory, weights

    return copy


def with_header(weights, change):
    """Change the header of a safetensors file; its data stays."""
    raw = weights.read_bytes()
    size = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + size])
    change(header)
    text = json.dumps(header).encode()
    weights.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + size :])


def overlap(header):
    first, second, *_ = [name for name in header if name != "__metadata__"]
    header[second] = header[first]


def beyond(header):
    last = max(header, key=lambda name: header[name].get("data_offsets", [0])[0])
    start, end = header[last]["data_offsets"]
    header[last] |= {"data_offsets": [start, end + 2**40], "shape": [2**40]}


def test_a_header_of_an_exabyte_is_not_read(hostile):
    directory, weights = hostile()
    weights.write_bytes((2**60).to_bytes(8, "little") + weights.read_bytes()[8:])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert "does not load" in says(directory)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 * 1024


@pytest.mark.parametrize("change", [overlap, beyond])
def test_tensors_that_lie_where_they_cannot_do_not_load(hostile, change):
    directory, weights = hostile()
    with_header(weights, change)
    assert "does not load" in says(directory)


@given(at=st.integers(0, 400), byte=st.integers(0, 255), size=st.integers(0, 2**63))
@settings(max_examples=60, derandomize=True, deadline=None, database=None)
def test_any_byte_of_a_header_may_be_another(made, tmp_path_factory, at, byte, size):
    directory = tmp_path_factory.mktemp("bytes") / "model"
    shutil.copytree(made["bfloat16"], directory)
    weights = directory / "model.safetensors"
    weights.chmod(0o600)
    raw = bytearray(weights.read_bytes())
    raw[8 + at] = byte
    if at % 3 == 0:
        raw[:8] = size.to_bytes(8, "little")
    weights.write_bytes(raw)
    try:
        rebuild(directory)
    except CorruptVersion:
        pass


@pytest.mark.parametrize("part", [".absmax", ".nested_absmax"])
def test_a_scale_that_is_no_number_is_named(hostile, part):
    directory, weights = hostile("nf4" if part == ".absmax" else "nf4-nested")
    tensors = load_file(weights)
    name = next(name for name in tensors if name.endswith(part))
    tensors[name][0] = math.nan
    save_file(tensors, weights, metadata={"format": "pt"})
    assert f"scales that are not finite: {name.removesuffix(part)}" in says(directory)


def test_a_pickle_is_not_opened(hostile, tmp_path):
    directory, weights = hostile()
    weights.unlink()

    class Payload:
        def __reduce__(self):
            return (open, (str(tmp_path / "run"), "w"))

    (directory / "pytorch_model.bin").write_bytes(pickle.dumps(Payload()))
    assert "model.safetensors" in says(directory) and not (tmp_path / "run").exists()


def test_code_that_came_with_a_model_is_not_run(hostile, tmp_path, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n"))  # should anybody ask
    directory, _ = hostile()
    (directory / "code.py").write_text(f"open({str(tmp_path / 'run')!r}, 'w')")
    config = json.loads((directory / "config.json").read_text())
    config |= {"model_type": "theirs", "auto_map": {"AutoConfig": "code.Config"}}
    (directory / "config.json").chmod(0o600)
    (directory / "config.json").write_text(json.dumps(config))
    assert "does not load" in says(directory) and not (tmp_path / "run").exists()
