"""Run one block of a model alone, and find out how its linear layers hang together.

A block is a decoder layer, an encoder layer, or a linear layer that stands alone. Once it is known
how the model calls it, it can be run with other weights and from another input. Knows nothing of
rounding.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, MutableMapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from merge_callback.stand_ins import (
    SMALL,
    Reached,
    in_float32,
    product,
    stand_in,
    standing_in,
)
from merge_callback.undo import Undone, hooked

_SHIFTED = 0.02  # relative error below which a sum has moved as its summand did
_AGAIN = 0.02  # the same for a block that is run once more, where sums may have another order
_ALIKE = 0.5  # the same in more bits than within the model, by which routers may choose otherwise

Weights = Mapping[str, Tensor]  # name of a linear layer within its block -> (out, in)


class Reader(NamedTuple):
    """Where the outputs of a linear layer, times `factor`, are added to the stream.

    `module` is the one within the block that reads the sum; "" stands for the block's own output.
    """

    module: str
    factor: float


class Group(NamedTuple):
    """Linear layers that meet the same input, in the order of their calls.

    `reader` is there when it is one layer, and its outputs are added to a stream.
    """

    names: tuple[str, ...]
    reader: Reader | None


class Call(NamedTuple):
    """The arguments of a block for one batch, with `INPUT` where its input goes."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


INPUT = object()
NOT_ALL = "not all batches take the same way through the model"


class Unrunnable(Exception):
    """Why a block cannot be run alone; no error of a merge, which goes on without it."""


class Block:
    """One block: how it is called, and how its linear layers hang together.

    Args:
        name: its name in the model.
        module: the block itself.
        linears: names within the block of the layers whose weights are given to `run`.

    Attributes:
        linears: the same, with their names in the model.
        calls: one for each batch that reaches it.
        starts: its input is not the output of the block before.
        given: its input for the first batch, within the live model.
        output: what it gave for it.
        returns_tensor: it gave that alone, no tuple.
    """

    def __init__(self, name: str, module: nn.Module, linears: Sequence[str]):
        self.name = name
        self.calls: list[Call] = []
        self.starts = False
        self.given: Tensor | None = None
        self.output: Tensor | None = None
        self.returns_tensor = False
        self.linears = {n: f"{name}.{n}" if n else name for n in linears}
        self._module = module
        self._stand_ins = {n: stand_in(module.get_submodule(n)) for n in linears}
        self.dtype = stream_dtype(module, linears)

    def forget(self) -> None:
        """Free what was recorded."""
        self.calls.clear()
        self.given = self.output = None

    def opened(self) -> Undone:
        """Ready to be run."""

        def change(undo: ExitStack) -> None:
            undo.enter_context(standing_in(self._module, self._stand_ins))
            if self.dtype == torch.float32:
                undo.enter_context(in_float32(self._module))

        return Undone(change)

    def run(self, batch: int, hidden: Tensor, weights: Weights) -> Tensor:
        """The outputs for the inputs `hidden` of a batch."""
        for name, weight in weights.items():
            self._stand_ins[name].product = partial(product, weight=weight)
        return self._called(batch, hidden.to(self.dtype))

    def _called(self, batch: int, hidden: Tensor) -> Tensor:
        """What the module gives as it is; tensors beside `hidden` are widened to its dtype."""

        def put(value: Any) -> Any:
            if value is INPUT:
                return hidden.clone()  # some add to it in place
            if isinstance(value, Tensor) and value.is_floating_point():
                narrow = value.dtype.itemsize < hidden.dtype.itemsize
                return value.to(hidden.dtype) if narrow else value
            return rebuilt(value, put)

        call = self.calls[batch]
        kwargs = {name: put(value) for name, value in call.kwargs.items()}
        output = first_tensor(self._module(*map(put, call.args), **kwargs))
        if output is None:
            raise Unrunnable("it gives no tensor")
        return output

    def meet(
        self, batch: int, hidden: Tensor, weights: Weights, group: Group
    ) -> tuple[Tensor, Tensor | None]:
        """The inputs of a group and what its reader reads, if it has one; stops right there."""
        met: list[Tensor] = []
        reader = group.reader

        def watch(inputs: Tensor) -> None:
            if reader is None:
                raise Reached(inputs)
            met.append(inputs.clone())  # what comes behind may change it in place

        stand = self._stand_ins[group.names[0]]
        stand.watch = watch
        try:
            if reader is None:
                return self._run_until(batch, hidden, weights), None
            elif reader.module:
                with self._stopped_at(reader.module, met):
                    read = self._run_until(batch, hidden, weights)
            else:
                read = self.run(batch, hidden, weights)
        finally:
            stand.watch = None
        return met[0], read

    def groups(self, hidden: Tensor, weights: Weights) -> list[Group]:
        """Find the groups, in order, by running the first batch."""
        order: list[tuple[str, Tensor]] = []
        outputs: dict[str, Tensor] = {}
        for name, stand in self._stand_ins.items():
            stand.watch = lambda inputs, name=name: order.append((name, inputs))
            stand.listen = lambda made, name=name: outputs.__setitem__(name, made.clone())
        try:
            reads = self._reads(hidden, weights)
        finally:
            for stand in self._stand_ins.values():
                stand.watch = stand.listen = None
        found: list[tuple[list[str], Tensor]] = []
        for name, inputs in order:
            if any(name in names for names, _ in found):
                continue  # called again: what it met first counts
            if found and found[-1][1] is inputs:
                found[-1][0].append(name)
            else:
                found.append(([name], inputs))
        groups = []
        for names, _ in found:
            reader = None
            if len(names) == 1:
                reader = self._reader(names[0], hidden, weights, reads, outputs[names[0]])
            groups.append(Group(tuple(names), reader))
        return groups

    def _reader(
        self,
        name: str,
        hidden: Tensor,
        weights: Weights,
        before: Mapping[str, Tensor],
        outputs: Tensor,
    ) -> Reader | None:
        """Shift the outputs of a layer: whose input moves by just as much, or a multiple of it?

        One that reads the outputs alone, added to nothing, as dropout does, is passed over.
        """
        generator = torch.Generator().manual_seed(0)
        shift = torch.randn(len(weights[name]), generator=generator).to(hidden.device)
        stand = self._stand_ins[name]
        stand.shift = shift
        try:
            after = self._reads(hidden, weights)
        finally:
            stand.shift = None
        for module, read in after.items():
            if module not in before or before[module].shape != read.shape:
                continue
            if read.shape[-1] != len(shift) or read.numel() != outputs.numel():
                continue
            moved = (read - before[module]).float()
            factor = float((moved @ shift).mean() / (shift @ shift))
            error = (moved - factor * shift).norm() / moved.norm()
            if factor == 0 or not error < _SHIFTED:
                continue
            added = before[module] - factor * outputs.view_as(read)  # tokens may lie in one row
            if not added.norm() < _SHIFTED * before[module].norm():
                return Reader(module, factor)
        return None

    def _reads(self, hidden: Tensor, weights: Weights) -> dict[str, Tensor]:
        """The first input of each module in the block, in order of the calls, and the output."""
        reads: dict[str, Tensor] = {}

        def note(name: str) -> Any:
            def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
                if args and isinstance(args[0], Tensor) and args[0].is_floating_point():
                    reads.setdefault(name, args[0].clone())

            return hook

        linears = tuple(self._stand_ins)
        with ExitStack() as undo:
            for name, module in self._module.named_modules():
                if name and not name.startswith(linears):
                    hooked(undo, module)
                    module.register_forward_pre_hook(note(name))
            reads[""] = self.run(0, hidden, weights)
        return reads

    def check(self) -> None:
        """Run the block alone, as it is, and compare with what it gave within the live model.

        Raises:
            Unrunnable: it is not the same.
            FloatingPointError: the live model gave values that are not finite.
        """
        if self.given is None or self.output is None:
            raise Unrunnable("it gives no tensor")
        if not self.output.isfinite().all():
            raise FloatingPointError(f"{self.name}: its outputs are not finite")
        self._compare(self._called(0, self.given), _AGAIN)

    def check_with(self, weights: Weights) -> None:
        """The same with stand-ins, in the dtype that it is calibrated in.

        Raises:
            Unrunnable: it is another block.
        """
        assert self.given is not None
        self._compare(self.run(0, self.given, weights), _ALIKE)

    def _compare(self, alone: Tensor, limit: float) -> None:
        assert self.output is not None
        if alone.shape != self.output.shape:
            raise Unrunnable("run alone it gives another shape than within the live model")
        error = float((alone - self.output).float().norm() / self.output.float().norm())
        if not error < limit:
            raise Unrunnable(f"run alone it differs from the live model by {error:.2g}")

    def _run_until(self, batch: int, hidden: Tensor, weights: Weights) -> Tensor:
        try:
            self.run(batch, hidden, weights)
        except Reached as reached:
            return reached.value
        raise Unrunnable(NOT_ALL)

    def _stopped_at(self, module: str, met: list[Tensor]) -> Undone:
        """Stop where `module` reads after the group has met its inputs."""

        def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
            if met:
                raise Reached(args[0])

        def change(undo: ExitStack) -> None:
            reader = self._module.get_submodule(module)
            hooked(undo, reader)
            reader.register_forward_pre_hook(hook)

        return Undone(change)


def stream_dtype(module: nn.Module, apart: Iterable[str]) -> torch.dtype:
    """What `module` can compute in: float32, unless a large 16-bit weight wants its own.

    Weights of the layers `apart` do not count.
    """
    prefixes = tuple(f"{name}." if name else "" for name in apart)
    for name, parameter in module.named_parameters():
        if parameter.dtype in (torch.bfloat16, torch.float16) and parameter.numel() > SMALL:
            if not name.startswith(prefixes):
                return parameter.dtype
    return torch.float32


def first_tensor(output: Any) -> Tensor | None:
    """What a block gives to the next one: the first of its outputs, if that is a tensor."""
    while isinstance(output, tuple | list) and output:
        output = output[0]
    return output if isinstance(output, Tensor) else None


def rebuilt(value: Any, change: Callable[[Any], Any]) -> Any:
    """A container with changed members, which is another one; what is none comes back itself."""
    if isinstance(value, tuple | list):
        members = map(change, value)
        return type(value)(*members) if hasattr(value, "_fields") else type(value)(members)
    if isinstance(value, MutableMapping):
        copied = copy.copy(value)
        for key, member in value.items():
            copied[key] = change(member)
        return copied
    return value
