"""A model that stays as it is while the live one goes on being trained.

What training changes is megabytes: the adapter, and what is trained whole. A snapshot has copies of
that, and of the modules that hold it, and shares the frozen base with the live model. It is there
to be read: nothing runs on it. Knows nothing of what becomes of it.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import GenerationConfig, PretrainedConfig

_OF_EVERY_MODULE = frozenset(vars(nn.Module()))
_MARKS = 64  # of each parameter, or some more
_CONFIGS = (PretrainedConfig, GenerationConfig, PeftConfig)


def snapshot(model: PeftModel) -> PeftModel:
    """Copy what training may change.

    Parameters that are trained, all that lies in adapters, persistent buffers, configs, and which
    module is where, are the snapshot's own. Frozen parameters of the base are those of the live
    model: nobody may write to them in place while the snapshot is in use.

    Args:
        model: a PeftModel, in one process and unwrapped.
    """
    taken: PeftModel = _Copies().of_module(model, adapter=False)
    if torch.accelerator.is_available():  # the copies are made, whatever stream they are read on
        torch.accelerator.synchronize()
    return taken


def marks(model: nn.Module) -> list[Tensor]:
    """Some values of each frozen parameter of floats, which tell whether somebody wrote to it.

    PEFT's `merge_adapter()` writes to those in place, and what `unmerge_adapter()` puts back is
    not the same in its last bits. Quantised parameters it replaces, which harms no snapshot.
    """
    frozen = [p for p in model.parameters() if not p.requires_grad and p.is_floating_point()]
    flat = [p.detach().flatten() for p in frozen if type(p.data) is Tensor]
    return [values[:: values.numel() // _MARKS | 1].to("cpu", copy=True) for values in flat]


class _Copies:
    """What has been copied already, so that what is one in the live model stays one."""

    def __init__(self) -> None:
        self._made: dict[Any, Any] = {}
        self._seen: list[Any] = []  # an id is somebody else's once its object is gone

    def of_module(self, module: Any, *, adapter: bool) -> Any:
        """Args: adapter: the module lies in one."""
        if id(module) in self._made:
            return self._made[id(module)]
        kind: Any = type(module)
        made = self._keep(module, kind.__new__(kind))
        own = vars(made)
        own.update(vars(module))
        own["_parameters"] = {
            name: self._of_tensor(
                tensor, changes=adapter or getattr(tensor, "requires_grad", False)
            )
            for name, tensor in module._parameters.items()
        }
        transient = module._non_persistent_buffers_set
        own["_buffers"] = {
            name: self._of_tensor(tensor, changes=name not in transient)
            for name, tensor in module._buffers.items()
        }
        tuner = isinstance(module, BaseTunerLayer)
        own["_modules"] = {
            name: None
            if child is None
            else self.of_module(child, adapter=adapter or (tuner and name != "base_layer"))
            for name, child in module._modules.items()
        }
        for name in vars(module).keys() - _OF_EVERY_MODULE:
            own[name] = self._of_value(own[name])
        return made

    def _of_tensor(self, tensor: Any, *, changes: bool) -> Any:
        if tensor is None or not changes:
            return tensor
        place = (tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride())
        if place not in self._made:
            values = tensor.detach().clone()
            if isinstance(tensor, nn.Parameter):
                values = nn.Parameter(values, requires_grad=tensor.requires_grad)
            self._keep(tensor, values, place)
        return self._made[place]

    def _of_value(self, value: Any) -> Any:
        """An attribute: containers and configs are copied, modules in them too, all else is not."""
        if isinstance(value, nn.Module):
            return self.of_module(value, adapter=True)
        if isinstance(value, _CONFIGS):
            known = self._made.get(id(value))
            return self._keep(value, copy.deepcopy(value)) if known is None else known
        if type(value) in (list, tuple):
            return type(value)(map(self._of_value, value))
        if type(value) is dict:
            if id(value) not in self._made:
                self._keep(value, {key: self._of_value(part) for key, part in value.items()})
            return self._made[id(value)]
        if type(value) is set:
            return set(value)
        return value

    def _keep(self, original: Any, made: Any, key: Any = None) -> Any:
        self._seen.append(original)
        self._made[id(original) if key is None else key] = made
        return made
