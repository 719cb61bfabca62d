"""Engines that keep a model in parts and hide it: FSDP1 and DeepSpeed ZeRO-3; and their wrappers.

FSDP2's parameters know their whole shapes by themselves; it only gives modules another class.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, TypeVar

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import ActivationWrapper
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP1

from merge_callback.errors import MergeRefused
from merge_callback.host_memory import return_freed_memory
from merge_callback.sharding import Hidden, Unit
from merge_callback.undo import Undone

M = TypeVar("M", bound=nn.Module)


def can_be_here() -> bool:
    """Whether any engine can have been at work: all of them talk through torch.distributed."""
    return dist.is_available() and dist.is_initialized()


def keeps_parts(model: nn.Module) -> bool:
    """Whether FSDP1 or DeepSpeed ZeRO-3 keeps the model in parts."""
    if not can_be_here():
        return False
    flat = bool(FSDP1.fsdp_modules(model))
    return flat or any(hasattr(parameter, "ds_id") for parameter in model.parameters())


def class_of(module: M) -> type[M]:
    """The class of a module; where FSDP2 has given it another, the one that it had before."""
    own = type(module)
    return own.__bases__[1] if issubclass(own, FSDPModule) and own is not FSDPModule else own


class WholeView:
    """A model as it looks where one process holds all of it.

    While it is `shown`, the wrappers of FSDP1 and of activation checkpointing are gone from between
    the modules, FSDP2's classes are those that they were made from, and each parameter that FSDP1
    or ZeRO-3 keeps in parts is a `Hidden` one.

    Args:
        model: with all that an engine has wrapped around it. All processes have to make the view
            together: FSDP1 tells shapes only of what is gathered, a unit at a time.

    Raises:
        MergeRefused: FSDP1 holds some of it from outside of what was given.

    Attributes:
        of_an_engine: FSDP or ZeRO-3 has been at work.
    """

    def __init__(self, model: nn.Module):
        self._wrapped = [
            (parent, name, child)
            for parent in model.modules()
            for name, child in parent.named_children()
            if _bare(parent) is parent and _bare(child) is not child
        ]
        self._renamed = [(m, type(m)) for m in model.modules() if class_of(m) is not type(m)]
        self._hidden: list[tuple[nn.Module, dict[str, Tensor]]] = []
        self._covered: list[tuple[nn.Module, dict[str, Any], dict[str, Any]]] | None = None
        self.of_an_engine = False
        if not can_be_here():
            return
        units = FSDP1.fsdp_modules(model)
        held = {parameter for unit in units for parameter in unit.parameters()}
        if any(getattr(p, "_fsdp_flattened", False) for p in {*model.parameters()} - held):
            raise MergeRefused(["FSDP1 holds more than this model; give the whole wrapped model"])
        for unit in units:
            self._hide_flat(unit)
        self._hide_partitioned(model)
        self.of_an_engine = bool(self._renamed or self._hidden)

    def shown(self) -> Undone:
        """The model looks whole; nothing can run on it."""

        def change(undo: ExitStack) -> None:
            for _ in range(2):  # Ctrl-C may cut off the first
                undo.callback(self._uncover)
            self._cover()

        return Undone(change)

    def _lifted(self) -> Undone:
        """The model is itself, for an engine that needs it in between."""

        def change(undo: ExitStack) -> None:
            if self._covered is not None:
                undo.callback(self._cover)
                self._uncover()

        return Undone(change)

    def _cover(self) -> None:
        for parent, name, wrapper in self._wrapped:
            parent._modules[name] = _bare(wrapper)
        for module, _ in self._renamed:
            module.__class__ = class_of(module)
        self._covered = []
        for module, hidden in self._hidden:
            attributes = {n: module.__dict__[n] for n in hidden if n in module.__dict__}
            self._covered.append((module, dict(module._parameters), attributes))
            for name in attributes:
                del module.__dict__[name]
            module._parameters.pop("_flat_param", None)
            module._parameters.update(hidden)  # type: ignore[arg-type]

    def _uncover(self) -> None:
        for module, parameters, attributes in self._covered or ():
            module._parameters.clear()
            module._parameters.update(parameters)
            module.__dict__.update(attributes)
        self._covered = None
        for module, renamed in self._renamed:
            module.__class__ = renamed
        for parent, name, wrapper in self._wrapped:
            parent._modules[name] = wrapper

    def _hide_flat(self, wrapper: FSDP1) -> None:
        """FSDP1: parameters are parts of a flat one, which each unit has of its own."""
        unit = Unit(partial(self._summoned, wrapper))
        with unit.gathered():
            for module in dict.fromkeys(_of_unit(wrapper.module)):  # tied ones meet twice
                hidden: dict[str, Tensor] = {}
                for name, tensor in module.named_parameters(recurse=False):
                    identity = (id(wrapper), tensor.data_ptr())
                    read = partial(getattr, module, name)
                    hidden[name] = Hidden(tensor, tensor.shape, unit, read, identity)
                self._hidden.append((module, hidden))

    @contextmanager
    def _summoned(self, wrapper: FSDP1) -> Iterator[None]:
        with self._lifted():
            with FSDP1.summon_full_params(wrapper, recurse=False, writeback=False):
                yield
        return_freed_memory()

    def _hide_partitioned(self, model: nn.Module) -> None:
        """ZeRO-3: parameters are empty, and know what they were."""
        units: dict[int, Unit] = {}
        for module in model.modules():
            hidden: dict[str, Tensor] = {}
            for name, tensor in module.named_parameters(recurse=False):
                if (number := getattr(tensor, "ds_id", None)) is not None:
                    unit = units.setdefault(number, Unit(partial(_gathered, tensor)))
                    shape = tensor.ds_shape  # type: ignore[attr-defined]
                    hidden[name] = Hidden(tensor, shape, unit, partial(_itself, tensor), number)
            if hidden:
                self._hidden.append((module, hidden))


def _bare(module: nn.Module) -> nn.Module:
    """What is below wrappers that are no part of the model."""
    while isinstance(module, FSDP1 | ActivationWrapper):
        module = next(iter(module.children()))
    return module


def _of_unit(module: nn.Module) -> Iterator[nn.Module]:
    """The modules whose parameters are of one unit of FSDP1."""
    yield module
    for child in module.children():
        if not isinstance(child, FSDP1):
            yield from _of_unit(child)


def _itself(parameter: Tensor) -> Tensor:
    return parameter


@contextmanager
def _gathered(parameter: Tensor) -> Iterator[None]:
    import deepspeed
    from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

    if parameter.ds_status is ZeroParamStatus.AVAILABLE:  # type: ignore[attr-defined]
        yield  # small ones stay gathered; leaving the context below would part them
        return
    with deepspeed.zero.GatheredParameters([parameter]):
        yield
    return_freed_memory()
