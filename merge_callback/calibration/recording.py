"""Find the blocks of a model, and note how it calls them.

One forward of the live model over all batches tells in which order its blocks run and with which
arguments. Knows nothing of weights or rounding.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from merge_callback.batches import Batch, model_inputs
from merge_callback.calibration.blocks import (
    INPUT,
    NOT_ALL,
    Block,
    Call,
    Unrunnable,
    first_tensor,
    rebuilt,
)
from merge_callback.errors import MergeError
from merge_callback.stand_ins import Reached, standing_in
from merge_callback.undo import hooked


class _Recorders:
    """Hooks that fill in the calls of blocks, and their order."""

    def __init__(self, order: dict[str, Block]):
        self._order = order
        self._index = 0
        self._last: tuple[int, int] | None = None  # output of the block that ran last: id, version
        self._kept: Tensor | None = None  # that it is still that one
        self._copy: Tensor | None = None  # of it; what comes behind may change it in place

    def next_batch(self) -> None:
        self._index += 1
        self._last = None

    def before(self, block: Block) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if len(block.calls) > self._index or (self._index and block.name not in self._order):
                return  # called again in the same forward, or not in the first: its first counts
            call, given = _cut(args, kwargs)
            if given is None:
                return
            block.calls.append(call)
            follows = self._last == (id(given), given._version)
            block.starts = block.starts or not follows
            if self._index == 0:
                self._order[block.name] = block
                block.given = self._copy if follows else given.clone()

        return hook

    def after(self, block: Block) -> Any:
        def hook(_: nn.Module, args: Any, output: Any) -> None:
            last = first_tensor(output)
            if last is None or block.name not in self._order:
                self._last = None
                return
            self._kept, self._last = last, (id(last), last._version)
            if block.output is None:
                block.output = self._copy = last.clone()
                block.returns_tensor = isinstance(output, Tensor)

        return hook


def _cut(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Call, Tensor | None]:
    """A call without its input, which is the first floating tensor; None: there is none."""
    found: list[Tensor] = []

    def cut(value: Any) -> Any:
        if isinstance(value, Tensor) and value.is_floating_point() and not found:
            found.append(value)
            return INPUT
        return rebuilt(value, cut)

    call = Call(tuple(map(cut, args)), {k: cut(v) for k, v in kwargs.items()})
    return call, found[0] if found else None


def find_blocks(model: PreTrainedModel, linears: Sequence[str]) -> list[Block]:
    """The blocks that hold the layers of these names; not yet in order, nor with their calls.

    Blocks beside them in the same list are there too, so that the stream goes on through them.
    """
    members: dict[str, list[str]] = {}
    for linear in linears:
        name = _block_of(model, linear)
        parent, _, index = name.rpartition(".")
        siblings: Any = model.get_submodule(parent)
        if name != linear and index.isdigit():
            for sibling in range(len(siblings)):
                members.setdefault(f"{parent}.{sibling}", [])
        members.setdefault(name, []).append(linear.removeprefix(name).removeprefix("."))
    return [Block(name, model.get_submodule(name), names) for name, names in members.items()]


def _block_of(model: nn.Module, linear: str) -> str:
    """The outermost member of a list of modules that `linear` is in, else `linear` itself."""
    parts = linear.split(".")
    for end in range(1, len(parts)):
        if isinstance(model.get_submodule(".".join(parts[:end])), nn.ModuleList):
            return ".".join(parts[: end + 1])
    return linear


def record(
    model: PreTrainedModel, blocks: Sequence[Block], batches: Sequence[Batch]
) -> list[Block]:
    """Note how the live model calls its blocks; returns them in the order of their calls.

    Blocks that the first batch does not reach are left out.
    """
    order: dict[str, Block] = {}
    recorders = _Recorders(order)
    for batch in {frozenset(batch): batch for batch in batches}.values():
        final_input(model, batch)  # may install hooks that have to stay
    with ExitStack() as undo:
        for block in blocks:
            module = model.get_submodule(block.name)
            hooked(undo, module)
            module.register_forward_pre_hook(recorders.before(block), with_kwargs=True)
            module.register_forward_hook(recorders.after(block))
        for index, batch in enumerate(batches):
            if index:
                recorders.next_batch()
            if index == 1 and _calls_are_shared(list(order.values())):
                undo.enter_context(standing_in(model, dict.fromkeys(order, _pass_on)))
            final_input(model, batch)
    return list(order.values())


def inputs_of(model: PreTrainedModel, block: Block, batches: Sequence[Batch]) -> list[Tensor]:
    """What the live model gives to a block, float32; it runs up to there once for each batch."""

    def stop(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = _cut(args, kwargs)[1]
        if given is not None:
            raise Reached(given.float())

    with ExitStack() as undo:
        module = model.get_submodule(block.name)
        hooked(undo, module)
        module.register_forward_pre_hook(stop, with_kwargs=True)
        found = [_reached(model, model_inputs(model, batch)) for batch in batches]
    given = [tensor for tensor in found if tensor is not None]
    if len(given) < len(found):
        raise Unrunnable(NOT_ALL)
    return given


def _calls_are_shared(blocks: Sequence[Block]) -> bool:
    """Whether what all blocks are called with is made before the first one runs.

    It is when there is one chain of blocks and no tensor is made for one of them alone: then blocks
    may be skipped to find out how they are called.
    """
    if len(blocks) < 2 or any(block.starts for block in blocks[1:]):
        return False
    users: dict[int, set[str]] = {}
    for block in blocks:
        (call,) = block.calls
        pending = [*call.args, *call.kwargs.values()]
        while pending:
            value = pending.pop()
            if isinstance(value, Tensor):
                users.setdefault(id(value), set()).add(block.name)
            elif isinstance(value, tuple | list):
                pending += value
            elif not (value is None or value is INPUT or isinstance(value, bool | int | str)):
                return False  # an object, as a cache is, that blocks may talk through
    return all(len(names) > 1 for names in users.values()) and all(b.returns_tensor for b in blocks)


def _pass_on(*args: Any, **kwargs: Any) -> Tensor:
    """A block that does nothing: its input, the first floating tensor that it is called with."""
    values = [*args, *kwargs.values()]
    return next(v for v in values if isinstance(v, Tensor) and v.is_floating_point())


def final_input(model: PreTrainedModel, batch: Batch) -> Tensor:
    """What the model's output layer is given for a batch; (batch, length, hidden size)."""
    head = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    inputs = model_inputs(model, batch)
    if head is None:
        output: Tensor = model(**inputs)[0]
        return output

    def stop(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        raise Reached(args[0])

    with ExitStack() as undo:
        hooked(undo, head)
        head.register_forward_pre_hook(stop)
        given = _reached(model, inputs)
    if given is None:
        raise MergeError("the model has an output layer that its forward does not use")
    return given


def _reached(model: PreTrainedModel, inputs: dict[str, Any]) -> Tensor | None:
    """What a forward that is stopped has found; None: it came to its end."""
    try:
        model(**inputs)
    except Reached as reached:
        return reached.value
    return None
