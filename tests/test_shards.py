"""The streaming writer: files that safetensors' own reader takes, whatever the split."""

import hashlib
import json
import os

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from merge_callback.codecs import TensorSpec
from merge_callback.errors import CorruptVersion
from merge_callback.files import hash_file
from merge_callback.shards import (
    DTYPE_NAMES,
    CheckpointWriter,
    _File,
    check_written,
    write_sparse,
)


def spec(tensor):
    return TensorSpec(tuple(tensor.shape), tensor.dtype)


def write(directory, groups, size="5GB"):
    specs = [{name: spec(tensor) for name, tensor in group.items()} for group in groups]
    with CheckpointWriter(directory, specs, size) as writer:
        for group in groups:
            for name, tensor in group.items():
                writer.write(name, tensor)
    return writer.records


def test_every_dtype_and_shape_comes_back(tmp_path):
    tensors = {str(d): torch.randint(0, 2, (3, 5)).to(d) for d in DTYPE_NAMES}
    tensors |= {"scalar": torch.tensor(1.5), "empty": torch.empty(0, 4)}
    tensors["strided"] = torch.randn(4, 6).t()
    records = write(tmp_path, [tensors])
    assert list(records) == ["model.safetensors"]
    loaded = load_file(tmp_path / "model.safetensors")
    assert loaded.keys() == tensors.keys()
    assert all(torch.equal(loaded[name], tensors[name]) for name in tensors)


def test_groups_stay_in_one_file_and_big_ones_get_their_own(tmp_path):
    groups = [
        {"a": torch.randn(10), "a.scale": torch.randn(10)},  # 80 bytes
        {"big": torch.randn(100)},
        {"b": torch.randn(10)},
        {"c": torch.randn(10), "c.scale": torch.randn(2)},
    ]
    records = write(tmp_path, groups, size=120)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    files = {f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)}
    assert set(records) == files == set(index["weight_map"].values())
    for group in groups:
        assert len({index["weight_map"][name] for name in group}) == 1
    alone = [n for n, f in index["weight_map"].items() if f == index["weight_map"]["big"]]
    assert alone == ["big"]
    total = sum(t.nbytes for group in groups for t in group.values())
    assert index["metadata"] == {"total_size": total}
    loaded = {}
    for file in files:
        loaded |= load_file(tmp_path / file)
    assert all(torch.equal(loaded[n], t) for group in groups for n, t in group.items())


def test_records_are_those_of_the_files(tmp_path):
    records = write(tmp_path, [{"a": torch.randn(1000)}])
    data = (tmp_path / "model.safetensors").read_bytes()
    record = records["model.safetensors"]
    assert record == (len(data), hashlib.sha256(data).hexdigest())
    assert hash_file(tmp_path / "model.safetensors") == record


def test_short_writes_are_finished(tmp_path, monkeypatch):
    write_some = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: write_some(fd, bytes(data)[:7]))
    tensors = {"a": torch.randn(100)}
    write(tmp_path, [tensors])
    assert torch.equal(load_file(tmp_path / "model.safetensors")["a"], tensors["a"])


@pytest.mark.parametrize("wrong", ["order", "shape", "dtype"])
def test_what_was_not_planned_is_not_written(tmp_path, wrong):
    specs = [{"a": TensorSpec((2,), torch.float32), "b": TensorSpec((3,), torch.float32)}]
    tensor = torch.zeros(3 if wrong == "shape" else 2)
    if wrong == "dtype":
        tensor = tensor.half()
    with pytest.raises(ValueError, match="was planned"):
        with CheckpointWriter(tmp_path, specs, "5GB") as writer:
            writer.write("b" if wrong == "order" else "a", tensor)


def test_a_missing_tensor_is_an_error(tmp_path):
    specs = [{"a": TensorSpec((2,), torch.float32), "b": TensorSpec((3,), torch.float32)}]
    with pytest.raises(ValueError, match=r"not finished: model\.safetensors"):
        with CheckpointWriter(tmp_path, specs, "5GB") as writer:
            writer.write("a", torch.zeros(2))


def test_a_name_that_comes_twice_is_refused(tmp_path):
    specs = [{"a": TensorSpec((2,), torch.float32)}, {"a": TensorSpec((2,), torch.float32)}]
    with pytest.raises(ValueError, match="planned more than once: a"):
        CheckpointWriter(tmp_path, specs, "5GB")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("data", [b"", bytes(4), bytes(12)])
def test_a_file_is_covered_to_its_last_byte(tmp_path, data):
    file = _File(tmp_path / "file", {"a": TensorSpec((2,), torch.float32)})
    file.append(data)
    with pytest.raises(ValueError, match="bytes written of a file of"):
        file.close()
    file.abandon()


def test_files_are_read_back_against_the_plan(tmp_path):
    tensors = {"a": torch.randn(10), "b": torch.randn(3, 5).half()}
    write(tmp_path, [tensors])
    specs = {name: spec(tensor) for name, tensor in tensors.items()}
    check_written(tmp_path, [specs])
    wrong = {"a": TensorSpec((5, 2), torch.float32)}, {"b": TensorSpec((3, 5), torch.bfloat16)}
    for changes in (*wrong, {"c": TensorSpec((1,), torch.int8)}):
        with pytest.raises(CorruptVersion, match=f"planned: {next(iter(changes))};"):
            check_written(tmp_path, [specs | changes])
    with open(tmp_path / "model.safetensors", "r+b") as file:
        file.truncate(file.seek(0, os.SEEK_END) - 1)
    with pytest.raises(CorruptVersion, match="does not read back"):
        check_written(tmp_path, [specs])


def test_an_existing_file_is_not_overwritten(tmp_path):
    (tmp_path / "model.safetensors").write_text("mine")
    with pytest.raises(FileExistsError):
        write(tmp_path, [{"a": torch.zeros(2)}])
    assert (tmp_path / "model.safetensors").read_text() == "mine"


def test_a_sparse_file_takes_no_room_and_reads_back_as_planned(tmp_path):
    specs = {
        "large": TensorSpec((1 << 14, 1 << 14), torch.bfloat16),
        "text": TensorSpec((8,), torch.uint8),
        "last": TensorSpec((1 << 20,), torch.float32),
    }
    path = tmp_path / "model.safetensors"
    write_sparse(path, specs, {"text": b"{}"})
    assert path.stat().st_size > 1 << 29
    assert path.stat().st_blocks * 512 < 1 << 16
    with safe_open(path, "pt") as file:
        assert bytes(file.get_tensor("text").tolist()) == b"{}      "
        assert file.get_slice("large").get_shape() == [1 << 14, 1 << 14]
        assert not file.get_tensor("last").any()
