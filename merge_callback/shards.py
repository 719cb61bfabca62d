"""Write safetensors files tensor by tensor, hashing on the way. Knows nothing of models.

safetensors' own writer wants every tensor of a file alive at once. The format is simple enough to
be streamed: a little-endian u64 with the header's length, the JSON header, then the data without
gaps. Names, shapes and dtypes are known before the first value is computed, so the header goes out
first and each file is written once, front to back. Source: safetensors' README, section "Format".
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError, safe_open
from torch import Tensor

from merge_callback.codecs import TensorSpec
from merge_callback.errors import CorruptVersion
from merge_callback.files import FileRecord

DTYPE_NAMES = {  # those that safetensors reads back
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.complex64: "C64",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.float8_e4m3fnuz: "F8_E4M3FNUZ",
    torch.float8_e5m2fnuz: "F8_E5M2FNUZ",
    torch.float8_e8m0fnu: "F8_E8M0",
}
_BYTES_AT_ONCE = 1 << 24


class CheckpointWriter:
    """The weight files of one model, `model.safetensors` or its shards with their index.

    A thread hashes and writes; while it is at one tensor the caller can make the next. What fails
    there is raised by the next call, or on leaving the context.

    Args:
        directory: exists; nothing in it is overwritten.
        groups: what to write, in order; the tensors of a group stay in one file.
        max_shard_size: bytes, or as "5GB"; a larger group gets a file of its own.

    Raises:
        ValueError: a name comes twice.
    """

    def __init__(
        self,
        directory: Path,
        groups: Sequence[Mapping[str, TensorSpec]],
        max_shard_size: int | str,
    ):
        names = Counter(name for group in groups for name in group)
        if twice := [name for name, count in names.items() if count > 1]:
            raise ValueError(f"planned more than once: {', '.join(twice)}")
        self._directory = directory
        self._specs = {name: spec for group in groups for name, spec in group.items()}
        self._files = _split(groups, max_shard_size)
        self._file_of = {name: file for file, names in self._files.items() for name in names}
        self._waiting = {file: list(names)[::-1] for file, names in self._files.items()}
        self._open: dict[str, _File] = {}
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="merge-writer")
        self._pending: Future[None] | None = None
        self.records: dict[str, FileRecord] = {}

    def write(self, name: str, tensor: Tensor) -> None:
        """Write the next tensor of its file, which must not change until the next call.

        Raises:
            ValueError: it is not the tensor that was planned at this place.
        """
        file = self._file_of[name]
        expected = self._waiting[file].pop()
        spec = self._specs[expected]
        if (name, spec) != (expected, TensorSpec(tuple(tensor.shape), tensor.dtype)):
            raise ValueError(
                f"{name} {tuple(tensor.shape)} {tensor.dtype} came where {expected} "
                f"{spec.shape} {spec.dtype} was planned"
            )
        data = host_bytes(tensor)
        self._settle()
        self._pending = self._thread.submit(self._append, file, data, not self._waiting[file])

    def _append(self, file: str, data: memoryview, last: bool) -> None:
        if file not in self._open:
            specs = {name: self._specs[name] for name in self._files[file]}
            self._open[file] = _File(self._directory / file, specs)
        self._open[file].append(data)
        if last:
            self.records[file] = self._open[file].close()
            del self._open[file]

    def _settle(self) -> None:
        """Wait for the thread, and raise what it met."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def __enter__(self) -> CheckpointWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._thread.shutdown()  # it ends what it has begun
        try:
            if kind is None:
                self._settle()
        finally:
            for file in self._open.values():
                file.abandon()
        if kind is not None:
            return
        if missing := self._files.keys() - self.records.keys():
            raise ValueError(f"weight files not finished: {', '.join(sorted(missing))}")
        if len(self._files) > 1:
            self._write_index()

    def _write_index(self) -> None:
        total = sum(spec.nbytes for spec in self._specs.values())
        index = {"metadata": {"total_size": total}, "weight_map": self._file_of}
        text = json.dumps(index, indent=2, sort_keys=True) + "\n"
        (self._directory / "model.safetensors.index.json").write_text(text, "utf-8")


def check_written(directory: Path, groups: Sequence[Mapping[str, TensorSpec]]) -> None:
    """Read the headers of all files back, which safetensors compares with their lengths.

    Raises:
        CorruptVersion: they do not have the tensors of `groups`.
    """
    wanted = {name: spec for group in groups for name, spec in group.items()}
    found = {}
    for path in sorted(directory.glob("*.safetensors")):
        try:
            with safe_open(path, "pt") as file:
                for name in file.keys():
                    tensor = file.get_slice(name)
                    found[name] = (tuple(tensor.get_shape()), tensor.get_dtype())
        except SafetensorError as error:
            raise CorruptVersion(f"{path} does not read back: {error}; merge again") from error
    planned = {name: (tuple(spec.shape), DTYPE_NAMES[spec.dtype]) for name, spec in wanted.items()}
    if differing := sorted(n for n in {*planned, *found} if planned.get(n) != found.get(n)):
        told = ", ".join(differing)
        raise CorruptVersion(f"{directory} does not have the tensors planned: {told}; merge again")


def write_sparse(path: Path, specs: Mapping[str, TensorSpec], values: Mapping[str, bytes]) -> None:
    """Write a file of zeros that takes no room, but for `values`, which blanks fill up.

    Raises:
        OSError: the file system cannot hold it.
    """
    with open(path, "xb") as file:
        place = file.write(_header(specs))
        for name, spec in specs.items():
            if name in values:
                file.seek(place)
                file.write(values[name].ljust(spec.nbytes))
            place += spec.nbytes
        file.truncate(place)


def host_bytes(tensor: Tensor) -> memoryview:
    """The values of a tensor in host memory, row-major, as bytes."""
    values = tensor.detach().to("cpu").resolve_conj().resolve_neg()
    flat = values.contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data


def _split(
    groups: Sequence[Mapping[str, TensorSpec]], max_shard_size: int | str
) -> dict[str, list[str]]:
    """File name -> names of its tensors in order."""
    sizes = [sum(spec.nbytes for spec in group.values()) for group in groups]
    stand_ins = {
        str(index): torch.empty(size, dtype=torch.uint8, device="meta")
        for index, size in enumerate(sizes)
    }
    split = split_torch_state_dict_into_shards(
        stand_ins, filename_pattern="model{suffix}.safetensors", max_shard_size=max_shard_size
    )
    return {
        file: [name for index in sorted(indices, key=int) for name in groups[int(index)]]
        for file, indices in split.filename_to_tensors.items()
    }


class _File:
    """One safetensors file that is being written."""

    def __init__(self, path: Path, specs: Mapping[str, TensorSpec]):
        self._hash = hashlib.sha256()
        self._size = 0
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
        self._descriptor = os.open(path, flags, 0o666)  # the umask takes its share
        self.append(_header(specs))
        self._planned = self._size + sum(spec.nbytes for spec in specs.values())

    def close(self) -> FileRecord:
        if self._size != self._planned:
            raise ValueError(f"{self._size} bytes written of a file of {self._planned}")
        os.fsync(self._descriptor)
        os.close(self._descriptor)
        return FileRecord(self._size, self._hash.hexdigest())

    def abandon(self) -> None:
        os.close(self._descriptor)

    def append(self, data: bytes | memoryview) -> None:
        for start in range(0, len(data), _BYTES_AT_ONCE):
            part = memoryview(data)[start : start + _BYTES_AT_ONCE]
            self._hash.update(part)
            self._size += len(part)
            while part:  # a write may be short
                part = part[os.write(self._descriptor, part) :]


def _header(specs: Mapping[str, TensorSpec]) -> bytes:
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, spec in specs.items():
        start, end = end, end + spec.nbytes
        dtype = DTYPE_NAMES[spec.dtype]
        entries[name] = {"dtype": dtype, "shape": spec.shape, "data_offsets": [start, end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text
