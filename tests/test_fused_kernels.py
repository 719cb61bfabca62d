"""Kernels that read weights and call no layer change nothing of what a merge gives."""

import sys
from contextlib import contextmanager
from types import MethodType, SimpleNamespace

import bitsandbytes
import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from models import adapt, load_base, qlora, same, save_base, snapshot
from safetensors.torch import load_file
from test_calibration import batches
from torch import nn
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.models.llama import modeling_llama as llama

from merge_callback import VerificationError, compare, merge_adapter
from merge_callback.pristine import pristine
from merge_callback.verification import checks, kernels
from merge_callback.verification.kernels import _called
from merge_callback.verification.tensors import Deviation


def fused(layer, inputs):
    """A layer's outputs, of its tensors; the adapter is always there, and always on."""
    weight = layer.base_layer.weight
    weight = bitsandbytes.functional.dequantize_4bit(weight.data, weight.quant_state)
    outputs = inputs @ weight.to(inputs.dtype).t()
    (name,) = layer.active_adapters
    a, b = layer.lora_A[name].weight, layer.lora_B[name].weight
    added = inputs.to(a.dtype) @ a.t() @ b.t()
    return outputs + (layer.scaling[name] * added).to(outputs.dtype)


def mlp(self, inputs):
    gate = nn.functional.silu(fused(self.gate_proj, inputs))
    return fused(self.down_proj, gate * fused(self.up_proj, inputs))


def attention(self, hidden_states, position_embeddings, attention_mask=None, **kwargs):
    rows, length, _ = hidden_states.shape
    q, k, v = (
        fused(layer, hidden_states).view(rows, length, -1, self.head_dim).transpose(1, 2)
        for layer in (self.q_proj, self.k_proj, self.v_proj)
    )
    q, k = llama.apply_rotary_pos_emb(q, k, *position_embeddings)
    mixed = nn.functional.scaled_dot_product_attention(
        q, k, v, attn_mask=attention_mask, is_causal=attention_mask is None, enable_gqa=True
    )
    return fused(self.o_proj, mixed.transpose(1, 2).flatten(2)), None


def norm(layer, inputs):
    wide = inputs.float()
    wide = wide * (wide.pow(2).mean(-1, keepdim=True) + layer.variance_epsilon).rsqrt()
    return layer.weight * wide.to(inputs.dtype)


def whole_model(self, input_ids=None, attention_mask=None, use_cache=None, **kwargs):
    """Calls the embedding and the angles, and nothing else."""
    hidden = self.embed_tokens(input_ids)
    positions = torch.arange(hidden.shape[1])[None]
    mask = create_causal_mask(
        config=self.config,
        inputs_embeds=hidden,
        attention_mask=attention_mask,
        past_key_values=None,
        position_ids=positions,
    )
    angles = self.rotary_emb(hidden, position_ids=positions)
    for layer in self.layers:
        normed = norm(layer.input_layernorm, hidden)
        hidden = hidden + attention(layer.self_attn, normed, angles, mask)[0]
        hidden = hidden + mlp(layer.mlp, norm(layer.post_attention_layernorm, hidden))
    return BaseModelOutputWithPast(last_hidden_state=norm(self.norm, hidden))


class Angles(nn.Module):
    """In the place of transformers' own, of which it lacks most attributes."""

    def __init__(self, config):
        super().__init__()
        self.own = config.head_dim

    def forward(self, inputs, position_ids):
        exponents = torch.arange(0, self.own, 2, dtype=torch.float) / self.own
        angles = position_ids[..., None].float() / 10000.0**exponents
        angles = torch.cat((angles, angles), -1)
        return angles.cos().to(inputs.dtype), angles.sin().to(inputs.dtype)


class FusedMLP(llama.LlamaMLP):
    forward = mlp


def on_classes(monkeypatch, **forwards):
    for name, forward in forwards.items():
        monkeypatch.setattr(getattr(llama, f"Llama{name}"), "forward", forward)


def on_instances(model, **forwards):
    for module in model.modules():
        for name, forward in forwards.items():
            if type(module).__name__ == f"Llama{name}":
                module.forward = MethodType(forward, module)


FORWARDS = {"MLP": mlp, "Attention": attention, "Model": whole_model}
PATCHES = {
    "no": (),
    "mlp": ("MLP",),
    "attention": ("Attention",),
    "both": ("MLP", "Attention"),
    "model": ("Model",),
    "all": ("MLP", "Attention", "Model"),
}


@contextmanager
def patched(tmp_path, what, where):
    """A model in a process where others have replaced forwards."""
    forwards = {name: FORWARDS[name] for name in PATCHES[what]}
    with pytest.MonkeyPatch.context() as monkeypatch:
        if where == "names":
            monkeypatch.setattr(llama, "LlamaMLP", FusedMLP)
            monkeypatch.setattr(llama, "LlamaRotaryEmbedding", Angles)
        elif where == "classes":
            on_classes(monkeypatch, **forwards)
        model = qlora(tmp_path, tied=False, scale=0.01)
        if where == "instances":
            on_instances(model, **forwards)
        yield model


def merged(tmp_path, model, rounding, **settings):
    settings = {"calibration_data": batches(4), "progress": False} | settings
    return merge_adapter(model, tmp_path / "out", rounding=rounding, **settings)


WANTED = {}


@pytest.fixture
def wanted(tmp_path_factory):
    """What a merge gives where nothing was replaced."""

    def made(rounding):
        if rounding not in WANTED:
            path = tmp_path_factory.mktemp("stock")
            with patched(path, "no", "classes") as model:
                result = merged(path, model, rounding)
            assert "kernels" not in result.manifest["calibration"]
            checks = result.manifest["verification"]["checks"]
            assert set(checks.values()) == {"passed"}
            weights = load_file(result.path / "model.safetensors")
            WANTED[rounding] = SimpleNamespace(manifest=result.manifest, weights=weights)
        return WANTED[rounding]

    return made


CASES = [(what, where) for what in PATCHES for where in ("classes", "instances") if what != "no"]


@pytest.mark.parametrize("rounding", ["calibrated", "tuned"])
@pytest.mark.parametrize(("what", "where"), [*CASES, ("no", "names")])
def test_what_is_chosen_with_data_is_the_same_bit_for_bit(tmp_path, wanted, what, where, rounding):
    """So is KL(live || merged)."""
    expected = wanted(rounding)
    with patched(tmp_path, what, where) as model:
        before = snapshot(model)
        result = merged(tmp_path, model, rounding)
        assert same(before, snapshot(model))
    assert result.manifest["rounding"] == rounding
    chosen = dict(result.manifest["calibration"])
    assert "transformers' own classes, which say the same" in chosen.pop("kernels")
    assert chosen == expected.manifest["calibration"]
    assert same(load_file(result.path / "model.safetensors"), expected.weights)
    found, known = (m["verification"] for m in (result.manifest, expected.manifest))
    assert found["models"] == known["models"]
    told = found["checks"].pop("outputs by transformers' own classes")
    assert told.startswith("passed; the model's forwards, which were replaced, do not call model.")
    assert found["checks"] == known["checks"]


# --- where transformers' own classes are no help ------------------------------------------------


class OwnMLP(llama.LlamaMLP):
    """A class that transformers does not ship."""

    forward = mlp


def too_loud(self, inputs):
    return 40 * mlp(self, inputs)


def lacking(self, *args, **kwargs):
    return attention(self, *args, **kwargs)


def left_to_themselves(model, kind):
    """Replace the MLPs, or the attention, of a model so that it cannot be run otherwise."""
    for layer in model.get_base_model().model.layers:
        if kind == "another class":
            layer.mlp.__class__ = OwnMLP
        elif kind == "another function":
            layer.mlp.forward = MethodType(too_loud, layer.mlp)
        else:
            layer.self_attn.forward = MethodType(lacking, layer.self_attn)
            del layer.self_attn.layer_idx, layer.self_attn.config


MLP = ("gate_proj", "up_proj", "down_proj")
KINDS = {
    "another class": (
        "mlp",
        MLP,
        "the forward of OwnMLP does not call them; transformers has no such class to compute in "
        "its place",
    ),
    "another function": (
        "mlp",
        MLP,
        "the forward of LlamaMLP does not call them; transformers' own classes say something else "
        "(KL ",
    ),
    "something is gone": (
        "self_attn",
        ("q_proj", "k_proj", "v_proj", "o_proj"),
        "the forward of LlamaAttention does not call them; transformers' own classes do not run "
        "(AttributeError: ",
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_what_cannot_be_gone_round_is_left_out_by_name(tmp_path, caplog, kind):
    part, names, why = KINDS[kind]
    model = qlora(tmp_path, tied=False, scale=0.01)
    model.get_output_embeddings().weight.data *= 20  # it has something to say
    left_to_themselves(model, kind)
    result = merged(tmp_path, model, "tuned", verify="warn")
    manifest, report = result.manifest, (result.path / "merge_report.md").read_text()
    left_out = manifest["calibration"]["left_out"]
    lost = {f"model.layers.{index}.{part}.{name}" for index in (0, 1) for name in names}
    assert manifest["rounding"] == "tuned" and left_out.keys() == lost
    assert all(reason.startswith(why) for reason in left_out.values())
    assert f"{len(lost)} layers were rounded without data, since {why}" in caplog.text
    assert f"{len(lost)} layers: {why}" in manifest["calibration"]["kernels"]
    assert f"- model.layers.0.{part}.{names[0]}: {why.split('(')[0]}" in report
    told = manifest["verification"]["checks"]["outputs by transformers' own classes"]
    assert told.startswith(f"not run: {len(lost)} layers: {why}")
    assert f"not checked ({len(lost)} layers: {why}" in caplog.text


def test_a_model_that_computes_something_else_than_its_classes_is_not_published(tmp_path):
    """Whoever loads it has those classes."""
    model = qlora(tmp_path, tied=False, scale=0.01)
    model.get_output_embeddings().weight.data *= 20
    for layer in model.get_base_model().model.layers:
        layer.mlp.forward = MethodType(too_loud, layer.mlp)
    with pytest.raises(VerificationError, match="merged_16bit: KL "):
        merged(tmp_path, model, "auto", save_method="merged_16bit")


# --- comparison ---------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", [True, False])
@pytest.mark.parametrize("method", ["merged_16bit", "merged_4bit"])
def test_a_kernel_that_keeps_the_live_weights_hides_no_fault(tmp_path, monkeypatch, method, fault):
    """What is written is run by transformers' own classes, in the same process."""
    base = load_base(save_base(tmp_path / "base", tied=False, num_hidden_layers=1), "nf4")
    base.lm_head.weight.data *= 20
    model = adapt(base, scale=0.01)
    (layer,) = base.model.layers
    monkeypatch.setattr(llama.LlamaMLP, "forward", lambda _, inputs: mlp(layer.mlp, inputs))

    def planted(plan, _, model):
        with torch.no_grad():
            if fault and method == "merged_16bit":
                model.model.layers[0].mlp.up_proj.weight.zero_()
            elif fault:
                model.model.layers[0].mlp.up_proj.weight.quant_state.absmax.zero_()
        return {key: Deviation(0.0, False) for key in plan.weights}

    monkeypatch.setattr(checks, "deviations", planted)  # the weights themselves would tell
    settings = {"save_method": method, "max_kl": 1.0}
    if not fault:
        found = merged(tmp_path, model, "auto", **settings).manifest["verification"]
        assert found["checks"][f"{method}: outputs"] == "passed"
        return
    with pytest.raises(VerificationError, match=f"{method}: KL "):
        merged(tmp_path, model, "auto", **settings)


def test_models_are_compared_with_a_patched_one_as_with_one_that_is_not(tmp_path):
    found = []
    for what in ("no", "all"):
        with patched(tmp_path, what, "classes") as model:
            path = tmp_path / "out" / "merged"
            if not found:
                merged(tmp_path, model, "stochastic", verify=False)
            found.append(compare(model, path, iter(batches(2))))
    assert found[0] == found[1] and found[0].kl > 0


# --- twins --------------------------------------------------------------------------------------


def test_a_twin_shares_all_tensors_and_changes_nothing_of_its_model(tmp_path, monkeypatch):
    model = qlora(tmp_path)
    ids = batches(1)[0]["input_ids"]
    with torch.no_grad():
        expected = model(input_ids=ids).logits
    before = snapshot(model)
    on_classes(monkeypatch, **FORWARDS)
    twin = pristine(model)
    tensors = [dict([*m.named_parameters(), *m.named_buffers()]) for m in (model, twin)]
    assert [*tensors[0]] == [*tensors[1]]
    assert all(tensors[0][name] is tensor for name, tensor in tensors[1].items())
    assert {id(m) for m in model.modules()}.isdisjoint(id(m) for m in twin.modules())
    with torch.no_grad():
        assert torch.equal(twin(input_ids=ids).logits, expected)
    assert same(before, snapshot(model))
    assert sys.modules["transformers.models.llama.modeling_llama"] is llama
    assert llama.LlamaMLP.forward is mlp


def test_a_module_that_is_there_twice_has_one_twin():
    shared = nn.Linear(2, 2)
    twin = pristine(nn.Sequential(shared, nn.ReLU(), shared))
    assert twin[0] is twin[2] and twin[0] is not shared and twin[0].weight is shared.weight


@pytest.mark.parametrize("where", ["classes", "instances"])
def test_accelerates_hooks_stay_around_the_forwards_of_a_twin(tmp_path, monkeypatch, where):
    seen = []

    class Hook(ModelHook):
        def pre_forward(self, module, *args, **kwargs):
            seen.append(module)
            return args, kwargs

    model = qlora(tmp_path)
    if where == "classes":
        on_classes(monkeypatch, MLP=mlp)
    else:
        on_instances(model, MLP=mlp)
    layers = model.get_base_model().model.layers
    for layer in layers:
        add_hook_to_module(layer.mlp, Hook())
    twin = pristine(model).get_base_model()
    assert _called(model.get_base_model(), batches(1)[0]).isdisjoint({"model.layers.0.mlp.up_proj"})
    assert seen == [layer.mlp for layer in layers]
    seen.clear()
    assert {"model.layers.0.mlp.up_proj"} <= _called(twin, batches(1)[0])
    assert seen == [layer.mlp for layer in twin.model.layers]


def test_what_was_compiled_runs_as_it_was_written(tmp_path):
    model = qlora(tmp_path).get_base_model()

    def compiled(*args, **kwargs):
        raise AssertionError("a cache of its own")

    model.model.layers[0]._compiled_call_impl = compiled
    assert "model.layers.0.mlp.up_proj" in _called(pristine(model), batches(1)[0])


def test_a_model_that_calls_all_its_layers_is_run_as_it_is(tmp_path, monkeypatch):
    """Without a look at any file."""
    monkeypatch.setattr(kernels, "pristine", None)
    assert kernels.way(qlora(tmp_path), batches(1)[0]) == kernels.Way()


def test_layers_that_transformers_does_not_call_either_are_no_finding(tmp_path):
    model = qlora(tmp_path)
    model.get_base_model().model.layers[0].mlp.unused = nn.Linear(2, 2)
    assert kernels.way(model, batches(1)[0]) == kernels.Way()
