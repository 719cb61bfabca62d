"""The model that stock transformers makes of a directory; its weights stay on the disk.

On the CPU a loaded tensor is a view of the mapped file: it takes no memory that could not be taken
back. For a device the layers are copied there one at a time, when they compute.

A directory may be anybody's: code that came with it is not run unless it is said to be trusted, and
what would hold the process for ever is refused first.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import logging
import os
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open
from torch import nn
from transformers import AutoConfig, PreTrainedModel
from transformers.integrations import deepspeed
from transformers.models.auto.auto_factory import _BaseAutoModelClass
from transformers.utils import logging as transformers_logging

from merge_callback.codecs import TensorSpec
from merge_callback.codecs.bnb4 import SETTINGS, Bnb4, Bnb4Weight
from merge_callback.codecs.bnb8 import Bnb8Weight
from merge_callback.companions import merged_config
from merge_callback.conversions import CheckpointNames
from merge_callback.engines import class_of
from merge_callback.errors import CorruptVersion
from merge_callback.foreign import pipes_in, read_json, refuse_layers, slow_pattern, texts
from merge_callback.live import keep_cpu_weights_unpacked, read_weights
from merge_callback.loading import asking_nobody
from merge_callback.plan import Plan
from merge_callback.shards import write_sparse
from merge_callback.stand_ins import generators_kept, standing_in
from merge_callback.undo import Undone, put

logger = logging.getLogger(__name__)

_OLD_BUFFERS = (r"rotary_emb\.inv_freq", r"(^|\.)position_ids$")  # transformers lets them be
_MOST_COPIED = 1 << 30  # bytes, about a second
_SPARE = 1.25  # times its weights: free memory that a model needs to be moved to a device whole


def rebuild(
    path: str | os.PathLike[str],
    model_class: type[PreTrainedModel] | None = None,
    *,
    trust_remote_code: bool = False,
    carried: Iterable[str] = (),
) -> PreTrainedModel:
    """Load a directory on the CPU, in eval mode.

    Args:
        model_class: None: the one that its config names.
        carried: tensors that the class does not make, as the base's own checkpoint has them.
        trust_remote_code: run the Python that lies in it.

    Raises:
        CorruptVersion: it does not load, or not every tensor has its place.
    """
    path = Path(path)
    try:
        refuse_hostile(path, trust_remote_code=trust_remote_code)
        with asking_nobody(), _no_progress_bar(), _in_this_process():
            kind: Any = model_class or _named_class(path, trust_remote_code)
            model, found = kind.from_pretrained(
                path,
                device_map={"": "cpu"},
                local_files_only=True,
                trust_remote_code=trust_remote_code,
                use_safetensors=True,  # a pickle may do anything
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # then they are named
            )
    except Exception as error:  # whatever it is: nobody else could load it either
        raise CorruptVersion(f"{path} does not load: {error}") from error
    told = {
        what: sorted(map(str, found.get(what) or ()))
        for what in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")
    }
    known = CheckpointNames(model).renamed(carried)
    told["unexpected_keys"] = [key for key in told["unexpected_keys"] if key not in known]
    if any(told.values()):
        problems = "; ".join(f"{what}: {', '.join(keys)}" for what, keys in told.items() if keys)
        raise CorruptVersion(f"{path} does not load whole: {problems}")
    if broken := [name for name, p in model.named_parameters() if not _scales_are_finite(p)]:
        raise CorruptVersion(f"{path} has scales that are not finite: {', '.join(broken)}")
    keep_cpu_weights_unpacked(model)
    loaded: PreTrainedModel = model.eval()
    return loaded


def loading_problems(plan: Plan) -> Iterator[str]:
    """Why stock transformers would not load what is planned, each with its cure.

    An empty model is made to see what the class does not make, then files of zeros with the planned
    headers are loaded. Where either cannot be done nothing is said before there are files.
    """
    lost = list(_name_problems(plan))
    yield from lost
    if not lost:
        for method in plan.containers:
            yield from _sparse_problems(plan, method)


def _name_problems(plan: Plan) -> Iterator[str]:
    """Tensors of a live model that its class does not make, so that they would not load again."""
    model, stored = plan.model, [weight.stored for weight in plan.weights.values()]
    ours = any(isinstance(found, Bnb4Weight | Bnb8Weight) for found in stored)
    if getattr(model.config, "quantization_config", None) is not None and not ours:
        return
    try:
        with generators_kept(), torch.device("meta"), _in_this_process():
            empty: PreTrainedModel = class_of(model)(copy.deepcopy(model.config))
        made = read_weights(empty).keys()
    except Exception:
        return
    known = {*(empty._keys_to_ignore_on_load_unexpected or ()), *_OLD_BUFFERS}
    lost = [key for key in plan.weights if key not in made]
    lost = [key for key in lost if not any(re.search(pattern, key) for pattern in known)]
    if lost:
        others = f" and {len(lost) - 1} others" if len(lost) > 1 else ""
        yield (
            f"{lost[0]}{others}: {class_of(model).__name__} makes no such tensor, so it would not "
            "load again; take it off the model, or register the buffer with persistent=False"
        )


def _sparse_problems(plan: Plan, method: str) -> Iterator[str]:
    """Load the planned files as sparse ones, whose zeros take neither disk nor memory."""
    if _copied_nbytes(plan, method) > _MOST_COPIED:
        return
    model_class = class_of(plan.model)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name:
        directory = Path(name)
        try:
            merged_config(plan, method, {}).save_pretrained(directory)
            write_sparse(directory / "model.safetensors", *_planned(plan, method))
        except Exception as error:  # a file system without sparse files, say
            logger.debug("%s is not tried", method, exc_info=error)
            return
        try:
            with generators_kept():
                rebuild(directory, model_class, carried=[t.name for t in plan.carried])
        except CorruptVersion as error:
            if not is_short_of_memory(error.__cause__):
                told = str(error).removeprefix(f"{directory} ")
                cure = "merged_16bit" if method == "merged_4bit" else "lora"
                yield f"{method} {told} ({model_class.__name__}); use save_method={cure!r}"


def _planned(plan: Plan, method: str) -> tuple[dict[str, TensorSpec], dict[str, bytes]]:
    """What is written, and the bytes that must not be zeros: the settings of 4-bit weights."""
    specs: dict[str, TensorSpec] = {}
    values: dict[str, bytes] = {}
    for group in plan.groups:
        specs |= group.specs[method]
        for weight in group.weights:
            container = plan.containers[method][weight.key]
            if isinstance(container, Bnb4):
                named = [name for name in group.specs[method] if SETTINGS in name]
                if len(group.weights) > 1:  # then they have their names in memory
                    named = [name for name in named if name.startswith(f"{weight.key}.")]
                values |= dict.fromkeys(named, container.settings(weight.stored.shape))
    return specs, values


def _copied_nbytes(plan: Plan, method: str) -> int:
    """Bytes of what a loader cuts or joins; the rest it maps."""
    found = 0
    for group in plan.groups:
        named = group.specs[method].values()
        plain = not any(isinstance(plan.containers[method][w.key], Bnb4) for w in group.weights)
        if plain and max(len(named), len(group.weights)) > 1:
            found += sum(spec.nbytes for spec in named)
    return found


def is_short_of_memory(error: BaseException | None) -> bool:
    """Whether there was no memory; on the CPU torch says so in a RuntimeError."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and "allocate memory" in str(error)


@contextlib.contextmanager
def computing_on(model: PreTrainedModel, device: torch.device) -> Iterator[None]:
    """Let a model on the CPU compute on `device`: whole if it fits, else a layer at a time."""
    if device.type == "cpu":
        yield
    elif _fits(model, device):
        model.to(device)  # type: ignore[arg-type]
        yield
    else:
        with layer_by_layer(model, device):
            yield


@contextlib.contextmanager
def layer_by_layer(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Compute on `device` with copies of layers that last for one call each."""
    visits = {name: _visit(model.get_submodule(name), device) for name in _layers(model)}
    with standing_in(model, visits):
        yield


def _in_this_process() -> Undone:
    """Load whole models although the trainer's DeepSpeed config asks for ZeRO-3."""
    return Undone(lambda undo: put(undo, vars(deepspeed), "_hf_deepspeed_config_weak_ref", None))


def _visit(layer: nn.Module, device: torch.device) -> Callable[..., Any]:
    def forward(*args: Any, **kwargs: Any) -> Any:
        there: Any = copy.deepcopy(layer)
        del there.forward  # this function
        return there.to(device)(*args, **kwargs)

    return forward


def _layers(module: nn.Module, name: str = "") -> Iterator[str]:
    """Members of lists of modules, and modules beside them that hold tensors of their own."""
    held = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
    if held and name:
        yield name
        return
    for child_name, child in module.named_children():
        full = f"{name}.{child_name}" if name else child_name
        if isinstance(module, nn.ModuleList):
            yield full
        else:
            yield from _layers(child, full)


def _fits(model: nn.Module, device: torch.device) -> bool:
    if device.type != "cuda":
        return False
    nbytes = sum(t.nbytes for t in [*model.parameters(), *model.buffers()])
    return torch.cuda.mem_get_info(device)[0] > _SPARE * nbytes


def _scales_are_finite(parameter: nn.Parameter) -> bool:
    """Of a 4-bit weight; a kernel may make finite values of one that is not."""
    state = getattr(parameter, "quant_state", None)
    nested = getattr(state, "state2", None)
    scales = [getattr(s, name, None) for s in (state, nested) for name in ("absmax", "offset")]
    return all(bool(s.isfinite().all()) for s in scales if isinstance(s, torch.Tensor))


def own_class(name: Any) -> Any:
    """The class of transformers that makes models and is called so; None: there is none.

    Not any attribute that a file may name.
    """
    try:
        found = getattr(transformers, name, None) if isinstance(name, str) else None
    except (ImportError, RuntimeError):  # a library that it needs is missing
        return None
    models = (PreTrainedModel, _BaseAutoModelClass)
    return found if isinstance(found, type) and issubclass(found, models) else None


def refuse_hostile(path: Path, *, trust_remote_code: bool) -> None:
    """Look at the files of a model before they are given to transformers.

    Raises:
        ValueError: what is wrong.
    """
    if pipes := pipes_in(path):
        raise ValueError(f"{', '.join(pipes)} in it is no file")
    if (path / "adapter_config.json").exists():
        raise ValueError("it has an adapter_config.json, whose adapter would be loaded with it")
    config = read_json(path / "config.json")
    if not isinstance(config, dict):
        raise ValueError("its config.json is no JSON object")
    _refuse_hostile_config(config, trust_remote_code)
    skipped = list(texts(config.get("quantization_config")))
    if slow := slow_pattern(skipped, itertools.chain.from_iterable(map(_tensors, path.iterdir()))):
        raise ValueError(f"its quantization_config has a pattern that takes for ever: {slow!r}")


def _refuse_hostile_config(config: dict[str, Any], trust_remote_code: bool) -> None:
    """The same for values of a config, at any depth."""
    for key, value in config.items():
        if isinstance(value, dict):
            _refuse_hostile_config(value, trust_remote_code)
        elif "implementation" in key and "/" in str(value) and not trust_remote_code:
            raise ValueError(f"its {key} is code from the Hub, {value!r}")
        else:
            refuse_layers(key, value)


def _tensors(file: Path) -> list[str]:
    if file.suffix != ".safetensors":
        return []
    with safe_open(file, "pt") as opened:
        return [name.removesuffix(".weight") for name in opened.keys()]


def _named_class(path: Path, trust_remote_code: bool) -> Any:
    config = AutoConfig.from_pretrained(
        path, local_files_only=True, trust_remote_code=trust_remote_code
    )
    (name, *_) = config.architectures or ("",)
    found = own_class(name)
    if found is None and trust_remote_code:
        mapped = (getattr(config, "auto_map", None) or {}).items()
        autos = (auto for auto, where in mapped if str(where).rpartition(".")[2] == name)
        found = next(filter(None, map(own_class, autos)), None)
    if found is None:
        raise ValueError(f"its config names no class of transformers, but {name!r}")
    return found


def _no_progress_bar() -> Undone:
    def change(undo: contextlib.ExitStack) -> None:
        if transformers_logging.is_progress_bar_enabled():
            undo.callback(transformers_logging.enable_progress_bar)
        transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]

    return Undone(change)
