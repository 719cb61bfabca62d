"""Kernels that read weights and call no layer are found, and gone round.

What runs a model with other weights, or with the adapter off, reaches its layers by their calls. So
does the count here: where the model's own forwards leave out modules that transformers' own classes
call, the model is run as those compute it, provided that both say the same.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from peft.utils.other import TrainableTokensWrapper
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from merge_callback.batches import Batch, input_device, model_inputs, split_batch
from merge_callback.pristine import is_shipped, pristine
from merge_callback.processes import ALONE, Processes
from merge_callback.stand_ins import without_cache
from merge_callback.verification.limits import beyond_noise, noise_of
from merge_callback.verification.outputs import Speaker, compare_outputs, is_routed

logger = logging.getLogger(__name__)

M = TypeVar("M", bound=nn.Module)

_PIECE = 1024  # tokens on which both ways are compared, or one sequence
_WRAPPERS = (BaseTunerLayer, ModulesToSaveWrapper, TrainableTokensWrapper)


@dataclass(frozen=True)
class Way:
    """How a model is run.

    Attributes:
        around: by transformers' own classes, since its forwards call not all modules that those do.
        told: what was found, in words; None: its own forwards call all that can be called.
        uncalled: modules that are not called all the same -> why.
        agrees: False: transformers' own classes say something else.
    """

    around: bool = False
    told: str | None = None
    uncalled: Mapping[str, str] = field(default_factory=dict)
    agrees: bool = True

    def of(self, model: M) -> M:
        """The live model, or its twin."""
        return pristine(model) if self.around else model

    def of_loaded(self, model: M) -> M:
        """A model that was loaded again; all who load it have transformers' own classes."""
        return pristine(model) if self.around or not self.agrees else model


def way(model: nn.Module, batch: Batch, processes: Processes = ALONE) -> Way:
    """Find out how a model has to be run, by running it; it is in eval mode.

    Where its own forwards call all modules, this is one forward of one sequence.

    Args:
        model: with its adapter's wrapper, if it has one.
        processes: that go the same way; what counts is what the leader has found.
    """
    try:
        found = _found(model, batch)
    except Exception as error:  # whoever runs the model on all data meets it again, and says so
        logger.debug("the calls of the model's layers are not counted", exc_info=error)
        found = Way()
    return processes.from_leader(found)


def base_of(model: Any) -> PreTrainedModel:
    """The model below PEFT's wrapper, if there is one."""
    base: PreTrainedModel = model.get_base_model() if isinstance(model, PeftModel) else model
    return base


def _found(model: nn.Module, batch: Batch) -> Way:
    base = base_of(model)
    watched, own = _watched(base), _called(base, split_batch(batch, 1)[0])
    if watched <= own:
        return Way()
    try:
        twin = base_of(pristine(model))
        missed = sorted(watched & _called(twin, split_batch(batch, 1)[0]) - own)
        off = _apart(base, twin, split_batch(batch, _PIECE)[0]) if missed else ""
    except Exception as error:
        off = f"transformers' own classes do not run ({type(error).__name__}: {error})"
        return _as_it_is(_uncalled(base, own, off))
    if off:
        return replace(_as_it_is(_uncalled(base, own, off)), agrees=False)
    rest = _as_it_is(_uncalled(twin, own.union(missed), None))
    if not missed:
        return rest
    others = f" and {len(missed) - 1} others" if len(missed) > 1 else ""
    told = (
        f"the model's forwards, which were replaced, do not call {missed[0]}{others}; it was run "
        "by transformers' own classes, which say the same"
    )
    return Way(True, told if rest.told is None else f"{told}; {rest.told}", rest.uncalled)


def _as_it_is(uncalled: Mapping[str, str]) -> Way:
    reasons = list(uncalled.values())
    told = [f"{reasons.count(why)} layers: {why}" for why in dict.fromkeys(reasons)]
    return Way(False, "; ".join(told) or None, uncalled)


def _uncalled(base: nn.Module, called: set[str], why: str | None) -> dict[str, str]:
    """Linear and adapted layers that nothing calls, with what should have called them.

    Args:
        why: transformers' own classes are no help; None: they are, but for what is none of them.
    """
    uncalled = {}
    for name in _watched(base) - called:
        if isinstance(base.get_submodule(name), (nn.Linear, *_WRAPPERS)):
            caller = name
            while caller and caller not in called:
                caller = caller.rpartition(".")[0]
            kind = type(base.get_submodule(caller))
            if why is not None or not is_shipped(kind):
                reason = why or "transformers has no such class to compute in its place"
                uncalled[name] = f"the forward of {kind.__name__} does not call them; {reason}"
    return dict(sorted(uncalled.items()))


def _watched(model: nn.Module) -> set[str]:
    """Modules that hold parameters, adapted layers as one, and members of lists of modules."""
    found: set[str] = set()
    within: list[str] = []
    for name, module in model.named_modules():
        if not name or name.startswith(tuple(within)):
            continue
        parent = model.get_submodule(name.rpartition(".")[0])
        if isinstance(module, _WRAPPERS):
            within.append(f"{name}.")
        elif not module._parameters and not isinstance(parent, nn.ModuleList):
            continue
        found.add(name)
    return found


def _called(model: PreTrainedModel, batch: Batch) -> set[str]:
    called: set[str] = set()

    def note(name: str) -> Callable[..., None]:
        return lambda *_: called.add(name)

    with ExitStack() as undo:
        for name, module in model.named_modules():
            handle = RemovableHandle(module._forward_pre_hooks)  # those of a first forward stay
            undo.callback(handle.remove)
            module._forward_pre_hooks[handle.id] = note(name)
        undo.enter_context(torch.no_grad())
        undo.enter_context(without_cache(model))
        model(**model_inputs(model, batch))
    return called


def _apart(base: PreTrainedModel, twin: PreTrainedModel, piece: Batch) -> str:
    """What both say differs in, beyond noise; "": in nothing."""
    device = input_device(base)
    live, other = Speaker(base, device), Speaker(twin, device)
    found = compare_outputs(live, None, {"other": other}, [piece])["other"]
    if not found.finite:
        return "the outputs of transformers' own classes, or the model's, are not finite"
    told = ", ".join(beyond_noise(found, noise_of(is_routed(base))))
    return told and f"transformers' own classes say something else ({told})"
