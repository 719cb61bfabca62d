"""An architecture on a base: made small, adapted, merged, and compared with the live model.

What a merge must give is computed here, without the library, in float64 and float32.
"""

import copy
import json
import os
import resource
import select
import signal
import textwrap
import time
import traceback
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors import safe_open
from shrink import AUTO, INPUTS, WORDS, save_small
from transformers import BitsAndBytesConfig

from merge_callback import MergeOptions, MergeRefused, MergeStore, merge_adapter
from merge_callback.export import check_merge
from merge_callback.live import keep_cpu_weights_unpacked

BASES = ("bfloat16", "nf4")
SECONDS = 600  # some take two minutes, and more where others compute
_MEMORY = 16 << 30
_NOISE = 0.2  # of the weight that it is added to
_INFO = ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")


class Unusable(Exception):
    """transformers, PEFT or bitsandbytes cannot do it, with no merge in sight."""


@dataclass
class Base:
    """A checkpoint on the disk, and how it is loaded."""

    task: str
    path: Path
    kind: str

    def load(self, path=None, dtype=torch.bfloat16):
        """The model as users load it, and what the loader says is wrong with the files."""
        settings = {}
        if path is None and self.kind == "nf4":
            settings["quantization_config"] = BitsAndBytesConfig(
                load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16,
                bnb_4bit_use_double_quant=True,
            )  # fmt: skip
        model, info = AUTO[self.task].from_pretrained(
            path or self.path, dtype=dtype, output_loading_info=True, **settings
        )
        keep_cpu_weights_unpacked(model)
        told = {what: sorted(map(str, info.get(what) or ())) for what in _INFO}
        return model.eval(), {what: keys for what, keys in told.items() if keys}


def cell(task, name, kind, place):
    """What docs/support.md says of a pair; an AssertionError, or a merge's own, where it is wrong.

    Raises:
        Unusable: it does not run without a merge either.
    """
    base = Base(task, Path(place) / "base", kind)
    with _usable("its checkpoint"):
        save_small(task, name, base.path)
    model, told = adapted(base, name)
    try:
        methods, note = _methods(model, kind)
    except MergeRefused as error:
        return f"refused: {_short(error.problems[0], place)}"
    rounding = "calibrated" if kind == "nf4" and "merged_4bit" in methods else "nearest"
    batches = {"calibration_data": rows(name, 3, seed=1)} if rounding == "calibrated" else {}
    held = rows(name, 2, seed=9)
    result = merge_adapter(
        model, Path(place) / "out", save_method=methods, rounding=rounding, progress=False,
        verification_data=held, **batches,
    )  # fmt: skip
    ties = model.get_base_model().all_tied_weights_keys
    check_files(base, result.paths["merged_16bit"], {*ties, *ties.values()})
    check_values(base, model, result.paths["merged_16bit"], told)
    check_outputs(base, model, result.paths, told, held, place)
    if left := (result.manifest["calibration"] or {}).get("left_out"):
        count = len(result.manifest["retention"]["merged_4bit"]["tensors"])
        note += f"; {len(left)} of {count} layers without data"
    return f"yes{note}"


def _short(what, place):
    """The first words of a message, for a cell of a table."""
    words = " ".join(str(what).replace(str(place), "").replace("|", "/").split())
    return textwrap.shorten(words, 120, placeholder=" …")


# --- what users do ---------------------------------------------------------------------------


class _usable:
    """Errors within are not of a merge."""

    def __init__(self, what):
        self._what = what

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        if error is not None and isinstance(error, Exception) and not isinstance(error, Unusable):
            raise Unusable(f"{self._what}: {type(error).__name__}: {error}") from error


def adapted(base, name):
    """The live model with an adapter that changes each of its layers, and what its loader told."""
    with _usable("loading"):
        model, told = base.load()
    if "missing_keys" in told:
        raise Unusable("loading: what transformers saves has not all that it loads")
    with _usable("its forward"):
        found = [logits(model, rows(name, 1, seed=1)) for _ in range(2)]
    if not torch.equal(*(f.nan_to_num() for f in found)):
        raise Unusable("its forward: answers differ from call to call")
    if not found[0].isfinite().any():
        raise Unusable("its forward: no output is finite")
    try:
        return _with_lora(base, name, lambda model: "all-linear"), told
    except Exception:  # as users then do: they name layers, and leave out those of state spaces
        with _usable("PEFT"):
            return _with_lora(base, name, _layers), told


def _with_lora(base, name, targets):
    model = base.load()[0]
    task = "CAUSAL_LM" if base.task == "causal" else None
    settings = {"target_modules": targets(model), "task_type": task}
    model = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, **settings))
    _train(model, _called(model, rows(name, 1, seed=1)))
    logits(model.eval(), rows(name, 1, seed=1))
    return model


def _called(model, batches):
    """Adapted layers that a forward calls. One whose weight alone is read learns nothing."""
    found, layers = set(), {key: layer for key, layer, _ in _adapters(model)}
    for key, layer in layers.items():
        layer.register_forward_pre_hook(lambda *_, key=key: found.add(key))
    logits(model.eval(), batches)
    for layer in layers.values():
        layer._forward_pre_hooks.clear()
    return found


def _layers(model):
    """Linear layers of the blocks, without those of state spaces that PEFT refuses."""
    found = set()
    for key, module in model.named_modules():
        parts = key.split(".")
        if type(module) in (torch.nn.Linear, Linear4bit) and any(part.isdigit() for part in parts):
            if not (parts[-2] in ("mamba", "mixer") and parts[-1] in ("out_proj", "dt_proj")):
                found.add(key)
    return sorted(found)


@torch.no_grad()
def _train(model, reached):
    """Give the adapters that are reached weights whose product is a fifth of the base's."""
    generator = torch.Generator().manual_seed(2)
    for key, layer, name in _adapters(model):
        if key not in reached:
            continue
        a, b = layer.lora_A[name].weight, layer.lora_B[name].weight
        for factor in (a, b):
            factor.copy_(0.1 * torch.randn(factor.shape, generator=generator))
        size = _base(layer).norm() / _added(layer, name).norm()
        b.mul_(_NOISE * float(size) if size else 1)


def _adapters(model):
    """Name of the adapted weight, layer, and name of the adapter."""
    for name, layer in model.get_base_model().named_modules():
        for adapter in layer.active_adapters if isinstance(layer, LoraLayer) else ():
            owner = name.replace(".base_layer", "")
            yield f"{owner}.{getattr(layer, 'parameter_name', 'weight')}", layer, adapter


def _base(layer):
    """The float64 weight that an adapter of `layer` changes, of experts too."""
    inner = layer.get_base_layer()
    if hasattr(layer, "parameter_name"):
        return getattr(inner, layer.parameter_name).detach().double()
    return _decoded(inner)


def _decoded(layer):
    """The float64 weight of a layer; in 4 bits, what a GPU decodes."""
    if not isinstance(layer, Linear4bit):
        return layer.weight.detach().double()
    state = copy.copy(layer.weight.quant_state)
    shape, state.shape = state.shape, torch.Size([state.shape.numel()])  # a CPU takes rows apart
    return dequantize_4bit(layer.weight.data, state).view(shape).double()


def _added(layer, adapter):
    """What an adapter adds to it, in float64."""
    a, b = (part[adapter].weight.detach().double() for part in (layer.lora_A, layer.lora_B))
    if not b.any():  # no forward has reached it
        return torch.zeros((), dtype=torch.float64)
    if (experts := getattr(layer, "num_experts", 1)) == 1:
        product = b @ a
        return layer.scaling[adapter] * (product.t() if layer.fan_in_fan_out else product)
    a = a.reshape(experts, -1, a.shape[1])
    b = b.reshape(len(b), -1, experts)
    stored = "eio" if getattr(layer.get_base_layer(), "is_transposed", False) else "eoi"
    return layer.scaling[adapter] * torch.einsum(f"ore,eri->{stored}", b, a)


def _methods(model, kind):
    """The outputs that are not refused when planned, and a note of the one that is."""
    methods = ["merged_16bit", "merged_4bit"]
    store = MergeStore("never-written")
    try:
        options = MergeOptions(
            save_method=methods, rounding="calibrated" if kind == "nf4" else "auto"
        )
        check_merge(model, store, options)
    except MergeRefused as error:
        if not all("merged_16bit'" in problem for problem in error.problems):
            raise
        check_merge(model, store, MergeOptions(save_method="merged_16bit"))
        return ["merged_16bit"], "; 16 bits only"
    return methods, ""


def rows(name, count, seed):
    """Batches that the architecture is trained on."""
    found = []
    for index in range(count):
        generator = torch.Generator().manual_seed(100 * seed + index)
        ids = torch.randint(4, WORDS, (4, 24), generator=generator)
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
        if name in INPUTS:
            batch |= INPUTS[name](ids, generator)
        found.append({column: tensor for column, tensor in batch.items() if tensor is not None})
    return found


# --- what the files must be ------------------------------------------------------------------


def _header(path):
    """Name -> shape and dtype, of all safetensors files."""
    found = {}
    for file in sorted(path.glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            for key in tensors.keys():
                part = tensors.get_slice(key)
                assert key not in found, f"{key} is written twice"
                found[key] = (tuple(part.get_shape()), part.get_dtype())
    return found


def check_files(base, path, ties=()):
    """Names, shapes and dtypes are the base's; or those that transformers itself gives it.

    It gives float32 to what a class keeps in float32, whatever the base's file has. An end of a tie
    may be in the file as well: adapters on one end have broken it.
    """
    wanted, found = _header(base.path), _header(path)
    if wanted != found:
        again = path.parent / "saved-again"
        base.load(base.path)[0].save_pretrained(again)
        given = _header(again)
        if wanted.keys() != found.keys():
            wanted = given
        wanted = {
            key: given[key] if key in given and found.get(key) == given[key] else wanted[key]
            for key in wanted
        }
    missing, extra = (
        sorted(wanted.keys() - found.keys()),
        sorted(found.keys() - wanted.keys() - {*ties}),
    )
    assert not (missing or extra), f"names: {missing[:5]} are missing, {extra[:5]} are new"
    differing = {key: (found[key], wanted[key]) for key in wanted if found[key] != wanted[key]}
    assert not differing, f"shapes and dtypes: {list(differing.items())[:3]} are not the base's"


@torch.no_grad()
def check_values(base, live, path, told):
    """Each adapted weight is base + adapter, rounded once; each other one is the base's."""
    model, found = base.load(path)
    assert found.keys() <= told.keys(), f"16 bits load with {found}"
    merged = {}
    for key, layer, adapter in _adapters(live):
        merged[key] = merged.get(key, _base(layer)) + _added(layer, adapter)
    state = model.state_dict()
    assert merged and merged.keys() <= state.keys(), "adapted weights have other names"
    inner = live.get_base_model()
    before = {
        k.replace(".base_layer", ""): m for k, m in inner.named_modules(remove_duplicate=False)
    }
    after = dict(model.named_modules(remove_duplicate=False))
    for key, tensor in state.items():
        owner, _, attribute = key.rpartition(".")
        module = before[owner]
        wanted = merged.get(key, getattr(module, attribute)).detach()
        if key not in merged and hasattr(getattr(module, attribute), "quant_state"):
            wanted = _decoded(module)
        if type(after[owner]).__name__ == "Conv1D" != type(module).__name__ and wanted.dim() == 2:
            wanted = wanted.t()
        assert wanted.shape == tensor.shape, f"{key} is {tensor.shape}, not {wanted.shape}"
        if key in merged:
            _check_rounded(key, wanted, tensor)
        else:
            assert _same(wanted, tensor), f"{key} was not trained and has changed"


def _check_rounded(key, exact, tensor):
    """At most a neighbour of the nearest value; near 0, as near as float32 adds up."""
    dtype = (
        torch.bfloat16 if torch.equal(tensor.bfloat16().to(tensor.dtype), tensor) else tensor.dtype
    )
    equal = float((exact.to(dtype) == tensor).double().mean())  # of its file, up-cast in the model
    slack = torch.finfo(dtype).eps * exact.abs() + 1e-6 * exact.abs().max()
    off = int(((exact - tensor.double()).abs() > slack).sum())
    least = 0.99 if dtype.itemsize == 2 else 0.0  # the last place of float32 is that of its sums
    assert off == 0 and equal >= least, (
        f"{key}: {off} values are not base + adapter, {equal:.2%} equal"
    )


def _same(one, other):
    """Bit for bit; a decoded float64 is rounded first."""
    one = one.to(other.dtype) if one.dtype == torch.float64 else one
    return one.dtype == other.dtype and torch.equal(one.nan_to_num(), other.nan_to_num())


@torch.no_grad()
def check_outputs(base, live, paths, told, held, place):
    """In float32: 16 bits are nearer than 2 % of what the adapter does, 4 bits keep half of it."""
    in_float32(live)
    wanted = logits(live, held)
    with live.disable_adapter():
        ground = logits(live, held)
    seen = wanted.isfinite() & ground.isfinite()
    effect = (wanted - ground)[seen]
    share = float(effect.norm() / ground[seen].norm())
    assert share > 1e-3, f"harness: the adapter moves the outputs by {share:.2g} only"
    found = logits(base.load(paths["merged_16bit"], torch.float32)[0], held)
    off = float((found - wanted)[seen].norm() / effect.norm())
    assert off < 0.5, f"16 bits: off by {off:.3g} of the effect"
    if not off < 0.02:  # of rounding, where a router or a hash decides by a hair?
        whole = merge_adapter(
            live, Path(place) / "whole", save_method="merged_16bit", dtype="float32", verify=False,
            progress=False,
        )  # fmt: skip
        found = logits(base.load(whole.path, torch.float32)[0], held)
        rest = float((found - wanted)[seen].norm() / effect.norm())
        assert rest < 0.005, (
            f"16 bits: outputs off by {off:.3g} of the effect (float32: {rest:.3g})"
        )
    if "merged_4bit" not in paths:
        return
    four, said = base.load(paths["merged_4bit"])
    assert said.keys() <= told.keys(), f"4 bits load with {said}"
    found = logits(in_float32(four), held)[seen]
    assert found.isfinite().all(), "4 bits: outputs are not finite"
    kept = float((found - ground[seen]) @ effect / (effect @ effect))
    least = 0.5 if base.kind == "nf4" else 0  # which rounds the base of 16 bits as well, unseen
    assert kept > least, f"4 bits keep {kept:.2f} of the effect"


def in_float32(model):
    """The same model, which computes in float32 with the same weights. For good."""
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.dtype in (torch.bfloat16, torch.float16):
            tensor.data = tensor.data.float()
    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.forward = partial(_linear, _decoded(module).float(), module.bias)
    return model.eval()


def _linear(weight, bias, inputs):
    return torch.nn.functional.linear(inputs.float(), weight, bias)


@torch.no_grad()
def logits(model, batches):
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    found = []
    for batch in batches:
        batch = {k: v.to(dtype) if v.is_floating_point() else v for k, v in batch.items()}
        out = model(**batch)
        found.append(out.logits.float().flatten())
    return torch.cat(found)


# --- a process for each ----------------------------------------------------------------------


def in_child(task, name, kind, place, seconds=SECONDS):
    """What `cell` returns, "unusable: ...", or "wrong: ..."; in a process that may hang or die."""
    receiver, sender = os.pipe()
    child = os.fork()
    if not child:
        os.close(receiver)
        _serve(sender, task, name, kind, place)
    os.close(sender)
    told = _read(receiver, time.monotonic() + seconds)
    if told is None:
        os.kill(child, signal.SIGKILL)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if told is None:
        return f"wrong: no end after {seconds} s"
    return json.loads(told) if told else f"wrong: the process died ({status})"


def _serve(sender, *pair):
    try:
        resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
        torch.set_num_threads(1)  # in a fork the first thread to ask replaces PyTorch's pool; alone
        log = os.open(Path(pair[-1]) / "log", os.O_WRONLY | os.O_CREAT)
        os.dup2(log, 1)
        os.dup2(log, 2)
        try:
            told = cell(*pair)
        except Unusable as error:
            told = f"unusable: {_short(error, pair[-1])}"
        except BaseException:
            told = f"wrong: {traceback.format_exc()}"
        with os.fdopen(sender, "w") as pipe:
            pipe.write(json.dumps(told))
    finally:
        os._exit(0)


def _read(receiver, until):
    """What comes, to its end; None: it has not ended by then."""
    told = b""
    with os.fdopen(receiver, "rb", buffering=0) as pipe:
        while select.select([pipe], [], [], max(0.0, until - time.monotonic()))[0]:
            part = pipe.read(1 << 16)
            if not part:
                return told
            told += part
    return None
