"""Make a plan: which tensors, names, dtypes and ties; and find all that cannot work.

Looks into a model, with `live` and `refusals`; what comes after has tensors, names and specs.
Reads no tensor data but of 32-bit weights that may be 16-bit ones, up-cast.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any, cast

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import build_glob_alternation
from transformers.quantizers.quantizers_utils import should_convert_module

from merge_callback.adapters import Update
from merge_callback.adapters.lora import LowRank
from merge_callback.codecs import Container, Stored, TensorSpec
from merge_callback.codecs.bnb4 import Bnb4, Bnb4Weight
from merge_callback.codecs.bnb8 import Bnb8Weight
from merge_callback.codecs.plain import Dequantised, OffloadedWeight, Plain, PlainWeight
from merge_callback.compat import dtypes_kept
from merge_callback.conversions import CheckpointNames
from merge_callback.engines import WholeView
from merge_callback.errors import MergeRefused
from merge_callback.exact_maths import exact_maths
from merge_callback.live import (
    Weight,
    active_adapters,
    adapted,
    any_4bit,
    base_model,
    is_sharded_model,
    read_weights,
)
from merge_callback.model_code import used_outside_their_layers
from merge_callback.options import MergeOptions
from merge_callback.originals import Unloaded, find_originals, find_unloaded
from merge_callback.plan import Group, Plan
from merge_callback.processes import ALONE, Processes
from merge_callback.refusals import (
    adapter_problems,
    code_problems,
    sharding_problems,
    weight_problems,
)
from merge_callback.rounding.grid import Grid
from merge_callback.sharding import storage
from merge_callback.shards import DTYPE_NAMES


def make_plan(model: nn.Module, options: MergeOptions, processes: Processes = ALONE) -> Plan:
    """Plan the export of `model`, whose adapter is attached and active.

    Args:
        processes: those that hold parts of the model; each of them has to make the plan.

    Raises:
        MergeRefused: all that stands against it, each with its cure.
    """
    peft_model = adapted(model)
    base = base_model(peft_model)
    sharded = is_sharded_model(model)
    if not sharded:
        processes = ALONE
    view = WholeView(model)
    devices = [parameter.device.type for parameter in base.parameters()]
    with view.shown(), exact_maths(devices):
        if sharded:
            problems = [*sharding_problems(base, known_engine=view.of_an_engine)]
            problems += _sharded_problems(options)
            if problems:
                raise MergeRefused(problems)
        plan = _make_plan(peft_model, base, options, view)
    return replace(plan, sharded=sharded, processes=processes)


def _make_plan(
    peft_model: PeftModel, base: PreTrainedModel, options: MergeOptions, view: WholeView
) -> Plan:
    weights = read_weights(base)
    problems = [*adapter_problems(peft_model, base, weights), *weight_problems(weights.values())]
    methods = options.methods(base_is_4bit=any_4bit(weights.values()))
    problems += [*code_problems(base, weights)]
    problems += _method_problems(methods, options, weights.values())
    if problems:
        raise MergeRefused(problems)

    dtype = options.output_dtype or _base_dtype(base, weights.values())
    if options.base == "original":
        weights = _with_originals(base, weights)
    unloaded = find_unloaded(base, [*weights, *(name for name, _ in base.named_buffers())])
    weights, tied, untied = _without_ties(base, weights)
    problems += _tie_problems(base, untied)
    for key in base._keys_to_ignore_on_save or ():
        weights.pop(key, None)
    containers = {
        method: _containers(method, base, weights, dtype, options)
        for method in methods
        if method != "lora"
    }
    if problems := [*problems, *_dtype_problems(containers)]:
        raise MergeRefused(problems)
    fours = containers.get("merged_4bit", {}).values()
    if "merged_4bit" in methods and not any(isinstance(c, Bnb4) for c in fours):
        raise MergeRefused(
            ["the model has no linear layer to quantise; use save_method='merged_16bit'"]
        )
    names = CheckpointNames(base)
    groups = _with_carried(list(_groups(names, weights, containers)), unloaded, list(containers))
    if problems := [*_name_problems(groups)]:
        raise MergeRefused(problems)
    return Plan(
        model=base,
        peft_model=peft_model,
        adapters=active_adapters(peft_model),
        methods=methods,
        groups=groups,
        containers=containers,
        names=names,
        dtype=dtype,
        tied_names=tied,
        ties_broken=untied,
        quantization_config=options.quantization_config,
        weights=weights,
        view=view,
    )


def _sharded_problems(options: MergeOptions) -> Iterator[str]:
    """What takes the whole model in one process."""
    if options.rounding in ("calibrated", "tuned"):
        yield (
            f"rounding={options.rounding!r} does not run on a sharded model; use 'stochastic', or "
            "merge the saved adapter in one process with merge_adapter"
        )
    if options.base == "original":
        yield "base='original' does not run on a sharded model; merge in one process"
    if options.min_gain_kept is not None or options.max_kl is not None:
        yield (
            "min_gain_kept and max_kl need outputs, which are not compared for a sharded model; "
            "leave them out, or merge in one process"
        )


def _method_problems(
    methods: tuple[str, ...], options: MergeOptions, weights: Iterable[Weight]
) -> Iterator[str]:
    weights = list(weights)
    if options.quantization_config is not None:
        if any_4bit(weights):
            yield "quantization_config: the base is 4-bit already, and its own settings are kept"
        if "merged_4bit" not in methods:
            yield "quantization_config is only used by save_method='merged_4bit'"
    if options.base == "original" and not any(
        isinstance(weight.stored, Bnb4Weight | Bnb8Weight) for weight in weights
    ):
        yield "base='original': the base is not quantised; it is its own original"
    if "merged_4bit" in methods and any(isinstance(w.stored, Dequantised) for w in weights):
        yield "the base is quantised by another library; use save_method='merged_16bit'"
    if "merged_4bit" in methods:
        for weight in weights:
            if weight.replaced and isinstance(weight.stored, Bnb4Weight | Bnb8Weight):
                yield f"{weight.key}: modules_to_save on a quantised layer does not merge here"


def _dtype_problems(containers: Mapping[str, Mapping[str, Container]]) -> Iterator[str]:
    """Each dtype that cannot be written, with the first tensor that has it."""
    found: dict[torch.dtype, str] = {}
    for by_key in containers.values():
        for key, container in by_key.items():
            if isinstance(container, Plain) and container.dtype not in DTYPE_NAMES:
                found.setdefault(container.dtype, key)
    for dtype, key in found.items():
        yield (
            f"{key}: safetensors files hold no {dtype}; convert it before training, or register "
            "the buffer with persistent=False"
        )


def _base_dtype(model: PreTrainedModel, weights: Iterable[Weight]) -> torch.dtype:
    """The dtype that the base was loaded in, whatever its norms were cast to since."""
    dtype = getattr(model.config, "dtype", None)
    if isinstance(dtype, str):
        dtype = getattr(torch, dtype)
    if isinstance(dtype, torch.dtype):
        return dtype
    dtypes = [weight.stored.dtype for weight in weights]
    return next(found for found in dtypes if found.is_floating_point and found.itemsize > 1)


def _with_originals(model: PreTrainedModel, weights: Mapping[str, Weight]) -> dict[str, Weight]:
    quantised = {
        key: (weight.stored, weight.conv1d)
        for key, weight in weights.items()
        if isinstance(weight.stored, Bnb4Weight | Bnb8Weight)
    }
    originals = find_originals(model, quantised)
    return {key: replace(w, original=originals.get(key)) for key, w in weights.items()}


def _without_ties(
    model: PreTrainedModel, weights: Mapping[str, Weight]
) -> tuple[dict[str, Weight], tuple[str, ...], tuple[str, ...]]:
    """Drop each tied weight that still equals its source; say which, and which do not.

    Once one does not, a config can only turn off all tying, so that every weight has to be written.
    """
    ties = (getattr(model, "all_tied_weights_keys", None) or {}).items()
    pairs = [(end, source) for end, source in ties if end in weights and source in weights]
    broken = tuple(end for end, source in pairs if not _same(weights[end], weights[source]))
    if broken:
        return dict(weights), (), broken
    tied = tuple(end for end, _ in pairs)
    return {key: weight for key, weight in weights.items() if key not in tied}, tied, ()


def _tie_problems(model: PreTrainedModel, broken: tuple[str, ...]) -> Iterator[str]:
    """Embeddings may part; a layer that is used at several places is one for every loader."""
    ties = model.all_tied_weights_keys
    layers = [
        end
        for end in broken
        if not any(_is_embedding(model, key.rpartition(".")[0]) for key in (end, ties[end]))
    ]
    if layers:
        others = f" and {len(layers) - 1} others" if len(layers) > 1 else ""
        yield (
            f"{layers[0]}{others}: the model shares the weight with {ties[layers[0]]}, and the "
            "adapter trains them apart; leave shared layers out with exclude_modules"
        )


def _is_embedding(model: PreTrainedModel, path: str) -> bool:
    return any(isinstance(part, nn.Embedding) for part in model.get_submodule(path).modules())


def _same(one: Weight, other: Weight) -> bool:
    if list(map(_identity, one.updates)) != list(map(_identity, other.updates)):
        return False
    if isinstance(one.stored, OffloadedWeight) and isinstance(other.stored, OffloadedWeight):
        return one.stored.load().data_ptr() == other.stored.load().data_ptr()
    held = [_held(weight.stored) for weight in (one, other)]
    return bool(storage(held[0]) == storage(held[1]))


def _held(stored: Stored) -> Tensor:
    if isinstance(stored, Bnb4Weight):
        return stored.packed
    if isinstance(stored, Bnb8Weight):
        return stored.codes
    assert isinstance(stored, PlainWeight | OffloadedWeight | Dequantised)
    return cast(Tensor, stored.tensor)


def _identity(update: Update) -> tuple[Any, ...]:
    """Equal for changes that come from the same tensors and are made in the same way."""
    trained = [t for t in update.tensors() if t.dim() and t.is_floating_point()]
    if isinstance(update, LowRank) and update.transposed:  # an embedding's: its tie has B' and A'
        trained.reverse()
    return (type(update), *map(storage, trained))


def _containers(
    method: str,
    model: PreTrainedModel,
    weights: Mapping[str, Weight],
    dtype: torch.dtype,
    options: MergeOptions,
) -> dict[str, Container]:
    kept_in = _dtypes_by_class(model, dtype)
    force = options.dtype is not None and method == "merged_16bit"
    containers: dict[str, Container] = {
        key: _plain(weight, kept_in(key) or dtype, force=force) for key, weight in weights.items()
    }
    if method == "merged_16bit":
        return containers
    for key, weight in weights.items():
        if isinstance(weight.stored, Bnb4Weight):
            containers[key] = _same_format(weight.stored, options)
    if not any_4bit(weights.values()):
        new = _new_format(dtype, options)
        containers |= dict.fromkeys(_quantisable(model, weights, options, kept_in), new)
    return containers


def _dtypes_by_class(
    model: PreTrainedModel, dtype: torch.dtype
) -> Callable[[str], torch.dtype | None]:
    """Which weights the class keeps in another dtype when a model is loaded in `dtype`."""
    kept = dtypes_kept(model, dtype)
    if not kept:
        return lambda key: None
    pattern, names, _ = build_glob_alternation(list(kept))

    def kept_in(key: str) -> torch.dtype | None:
        match = pattern.search(key)
        return None if match is None else kept[names[str(match.lastgroup)]]

    return kept_in


def _plain(weight: Weight, dtype: torch.dtype, *, force: bool = False) -> Plain:
    """A weight's own dtype; the output's for what was quantised, trained or up-cast from it."""
    stored = weight.stored
    if not isinstance(stored, PlainWeight | OffloadedWeight):
        return Plain(dtype, transposed=weight.conv1d)
    if not stored.dtype.is_floating_point or stored.dtype.itemsize < 2:  # no number by itself
        return Plain(stored.dtype)
    if force or weight.updates or weight.replaced or stored.fits(dtype):
        return Plain(dtype)
    return Plain(stored.dtype)


def _same_format(stored: Bnb4Weight, options: MergeOptions) -> Bnb4:
    if options.rounding == "nearest" or options.base == "original":
        return Bnb4(grid=replace(stored.grid, offset=None), dtype=stored.dtype)
    return Bnb4(grid=stored.grid, dtype=stored.dtype, base=stored)


def _new_format(dtype: torch.dtype, options: MergeOptions) -> Bnb4:
    config: Any = options.quantization_config
    grid = Grid(
        quant_type=getattr(config, "bnb_4bit_quant_type", "nf4"),
        blocksize=64,
        nested=getattr(config, "bnb_4bit_use_double_quant", True),
    )
    return Bnb4(grid=grid, dtype=dtype)


def _quantisable(
    model: PreTrainedModel,
    weights: Mapping[str, Weight],
    options: MergeOptions,
    kept_in: Callable[[str], torch.dtype | None],
) -> list[str]:
    """Weights that become 4-bit: the 8-bit ones, else those that transformers would quantise.

    Not those that the class keeps in another dtype or uses without calling their layer.
    """
    if eight_bit := [key for key, w in weights.items() if isinstance(w.stored, Bnb8Weight)]:
        return eight_bit
    patterns = getattr(options.quantization_config, "llm_int8_skip_modules", None)
    if patterns is None:  # as transformers.quantizers.base.get_keys_to_not_convert
        tied = getattr(model, "all_tied_weights_keys", None) or {}
        output = model.get_output_embeddings()  # type: ignore[no-untyped-call]
        patterns = [key.removesuffix(".weight") for pair in tied.items() for key in pair]
        patterns += [name for name, module in model.named_modules() if module is output]
        patterns += [list(weights)[-1].removesuffix(".weight")]
    patterns = [*patterns, *(model._keep_in_fp32_modules or ())]
    plain = used_outside_their_layers(model)
    # What was trained whole stays in 16 bits: no adapter would tell how much of it rounding took.
    linears = [
        key
        for key, weight in weights.items()
        if weight.linear and not weight.replaced and key not in plain and kept_in(key) is None
    ]
    return [k for k in linears if should_convert_module(k.removesuffix(".weight"), patterns)]


def _groups(
    names: CheckpointNames,
    weights: Mapping[str, Weight],
    containers: Mapping[str, Mapping[str, Container]],
) -> Iterator[Group]:
    """Widest first, so that in each file every tensor starts at a multiple of its item size."""
    if not containers:
        return
    ordered = sorted(weights, key=lambda key: -_alignment(weights[key].stored))
    for keys in names.groups(ordered):
        specs = {}
        for method, by_key in containers.items():
            flat: dict[str, Tensor] = {}
            for key in keys:
                for name, spec in by_key[key].specs(key, weights[key].stored.shape).items():
                    flat[name] = torch.empty(spec.shape, dtype=spec.dtype, device="meta")
            packed = any(isinstance(by_key[key], Bnb4) for key in keys)
            reverted = names.revert(flat, packed=packed).items()
            ends = sorted(reverted, key=lambda item: -item[1].dtype.itemsize)
            specs[method] = {name: TensorSpec(tuple(t.shape), t.dtype) for name, t in ends}
        yield Group(tuple(weights[key] for key in keys), specs)


def _with_carried(
    groups: list[Group], unloaded: Iterable[Unloaded], methods: list[str]
) -> tuple[Group, ...]:
    """Each carried tensor as a group of its own, in the same order of item sizes."""
    if methods:
        groups += [Group((), {key: {u.name: u.spec} for key in methods}, u) for u in unloaded]

    def width(group: Group) -> int:
        if group.carried is not None:
            return group.carried.spec.dtype.itemsize
        return _alignment(group.weights[0].stored)

    return tuple(sorted(groups, key=width, reverse=True))


def _name_problems(groups: Iterable[Group]) -> Iterator[str]:
    """Each name of a checkpoint that several groups would write."""
    known: dict[tuple[str, str], str] = {}
    for group in groups:
        key = group.name
        for method, specs in group.specs.items():
            for name in specs:
                other = known.setdefault((method, name), key)
                if other != key:
                    yield (
                        f"{name}: {other} and {key} have this name in a checkpoint; "
                        "use save_method='lora'"
                    )


def _alignment(stored: Stored) -> int:
    """Bytes that a weight's tensors are aligned to: a quantised one fills up to 8."""
    return stored.dtype.itemsize if isinstance(stored, PlainWeight | OffloadedWeight) else 4
