"""A model once more, of the classes that transformers ships, over the same tensors.

Fused kernels replace the forwards of transformers' classes for the whole process, or of single
modules, and read weights without calling the layers that hold them. The file of such a class is run
once more, apart from `sys.modules`: the classes that come of it are as they were shipped. The model
itself and the classes of the process stay as they are. Knows nothing of adapters or rounding.
"""

from __future__ import annotations

import functools
import importlib.util
import sys
from types import MethodType, ModuleType
from typing import Any, TypeVar

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from merge_callback.compat import install_capturing_hooks

_SHIPPED = "transformers.models."

M = TypeVar("M", bound=nn.Module)


def pristine(model: M) -> M:
    """A twin of `model`, each module of which computes as transformers' class of it does.

    Parameters, buffers and configs are those of `model`; which module is where, their modes, hooks
    and forwards are the twin's own. What has no class of transformers' stays what it is.
    """
    here = (p.device for p in model.parameters() if p.device.type != "meta")
    twins = _Twins(next(here, torch.device("cpu")))
    twin = twins.of(model, None, None)
    for part in twin.modules():
        if isinstance(part, PreTrainedModel):
            install_capturing_hooks(part)  # a first forward would look for the other classes
    twins.change_classes()
    return twin


def is_shipped(kind: type) -> bool:
    """Whether a class of a model's module is transformers' own."""
    return kind.__module__.startswith(_SHIPPED)


class _Twins:
    """What has been made already, so that what is one in the model is one in its twin."""

    def __init__(self, device: torch.device):
        self._device = device
        self._made: dict[int, Any] = {}
        self._shipped: list[tuple[Any, type[nn.Module]]] = []

    def of(self, module: M, file: str | None, config: Any) -> M:
        """Args: file, config: the module of Python's, and the config, of what `module` is in."""
        if id(module) not in self._made:
            file = next((k.__module__ for k in type(module).__mro__ if is_shipped(k)), file)
            own = vars(module).get("config")
            config = own if isinstance(own, PreTrainedConfig) else config
            shipped = _shipped(type(module), file)
            made = None if shipped is None else self._anew(module, shipped, config)
            if made is None:
                made = self._sharing(module, file, config)
                self._shipped += [(made, shipped)] if shipped is not None else []
            self._made[id(module)] = made
        twin: M = self._made[id(module)]
        return twin

    def _anew(self, module: nn.Module, shipped: type[nn.Module], config: Any) -> nn.Module | None:
        """A module of another class that holds nothing but what its config says, as angles are."""
        if is_shipped(type(module)) or module.state_dict():
            return None
        try:
            return shipped(config).to(self._device).eval()
        except Exception:  # it is made of something else
            return None

    def change_classes(self) -> None:
        """Give each twin that has one the class that transformers ships."""
        for made, shipped in self._shipped:
            made.__class__ = shipped
            _take_off(vars(made), made)

    def _sharing(self, module: nn.Module, file: str | None, config: Any) -> nn.Module:
        made: nn.Module = type(module).__new__(type(module))
        own = vars(made)
        own |= {name: _bound_to(value, module, made) for name, value in vars(module).items()}
        own |= {name: own[name].copy() for name in own if name.startswith("_") and "_hooks" in name}
        own.pop("_compiled_call_impl", None)
        own["_parameters"], own["_buffers"] = module._parameters.copy(), module._buffers.copy()
        own["_modules"] = {
            name: None if child is None else self.of(child, file, config)
            for name, child in module._modules.items()
        }
        return made


def _take_off(own: dict[str, Any], made: Any) -> None:
    """Methods that were set on a module alone; accelerate's hook stays, around the class's own."""
    hooked = "_hf_hook" in own and isinstance(own.get("forward"), functools.partial)
    for name in [name for name in own if callable(getattr(type(made), name, None))]:
        if not (hooked and name == "forward"):
            del own[name]
    if hooked:
        own["_old_forward"] = MethodType(type(made).forward, made)


def _bound_to(value: Any, module: nn.Module, made: nn.Module) -> Any:
    """A method, or accelerate's hook around one, of the twin instead of the module."""
    if isinstance(value, MethodType) and value.__self__ is module:
        return MethodType(value.__func__, made)
    if isinstance(value, functools.partial) and any(part is module for part in value.args):
        arguments = [made if part is module else part for part in value.args]
        return functools.partial(value.func, *arguments, **value.keywords)
    return value


def _shipped(kind: type, file: str | None) -> type[nn.Module] | None:
    """The class that transformers ships in place of one; None: there is none.

    Others may have put a class of theirs under the name of one in its module.
    """
    if file is None:
        return None
    names = [kind.__name__] if is_shipped(kind) else []
    names += [name for name, value in vars(sys.modules[file]).items() if value is kind]
    found = (getattr(_run_again(file), name, None) for name in names)
    return next((f for f in found if isinstance(f, type) and issubclass(f, nn.Module)), None)


@functools.cache
def _run_again(name: str) -> ModuleType:
    """A module of Python's, from its file, which nobody else has a reference to."""
    spec = importlib.util.find_spec(name)
    assert spec is not None and spec.origin is not None and spec.loader is not None
    own = importlib.util.spec_from_file_location(name, spec.origin)
    assert own is not None and own.loader is not None
    module = importlib.util.module_from_spec(own)
    own.loader.exec_module(module)
    return module
