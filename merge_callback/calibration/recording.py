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
from merge_callback.calibration.blocks import INPUT, Block, Call
from merge_callback.errors import MergeError
from merge_callback.stand_ins import Reached, standing_in
from merge_callback.undo import hooked


class _Recorders:
    """Hooks that fill in the calls of blocks, and their order."""

    def __init__(self, order: dict[str, Block]):
        self._order = order
        self._index = 0
        self._last: Tensor | None = None  # output of the block that ran last

    def next_batch(self) -> None:
        self._index += 1
        self._last = None

    def before(self, block: Block) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if len(block.calls) == self._index:
                return  # called again in the same forward: its first call counts
            found: list[Tensor] = []

            def cut(value: Any) -> Any:
                if isinstance(value, Tensor) and value.is_floating_point() and not found:
                    found.append(value)
                    return INPUT
                return value

            call = Call(tuple(map(cut, args)), {k: cut(v) for k, v in kwargs.items()})
            if not found:
                raise MergeError(
                    f"{block.name}: it is called without an input, so it cannot be run"
                )
            block.calls.append(call)
            self._order.setdefault(block.name, block)
            if found[0] is not self._last:
                block.starts.append(found[0])

        return hook

    def after(self, block: Block) -> Any:
        def hook(_: nn.Module, args: Any, output: Any) -> None:
            self._last = output if isinstance(output, Tensor) else output[0]
            if block.output is None:
                block.output = self._last
                block.returns_tensor = isinstance(output, Tensor)

        return hook


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

    Blocks that no batch reaches are left out.
    """
    order: dict[str, Block] = {}
    recorders = _Recorders(order)
    with ExitStack() as undo:
        for block in blocks:
            module = model.get_submodule(block.name)
            hooked(undo, module)
            module.register_forward_pre_hook(recorders.before(block), with_kwargs=True)
            module.register_forward_hook(recorders.after(block))
        for index, batch in enumerate(batches):
            recorders.next_batch()
            if index == 1 and _calls_are_shared(list(order.values())):
                undo.enter_context(standing_in(model, dict.fromkeys(order, _pass_on)))
            final_input(model, batch)
    for block in order.values():
        if len(block.calls) != len(batches) or len(block.starts) not in (0, len(batches)):
            raise MergeError(f"{block.name}: not all batches take the same way through the model")
    return list(order.values())


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
        return _reached(model, inputs)


def _reached(model: PreTrainedModel, inputs: dict[str, Any]) -> Tensor:
    """What a forward that is stopped has found."""
    try:
        model(**inputs)
    except Reached as reached:
        return reached.value
    raise MergeError("the model has an output layer that its forward does not use")
