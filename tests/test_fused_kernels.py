"""Kernels that read weights and call no layer change nothing of what a merge gives."""

from contextlib import contextmanager
from types import MethodType, SimpleNamespace

import bitsandbytes
import pytest
import torch
from models import qlora, same, snapshot
from safetensors.torch import load_file
from test_calibration import batches
from torch import nn
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.models.llama import modeling_llama as llama

from merge_callback import merge_adapter


def fused(layer, inputs):
    """A layer's outputs, of its tensors, as Unsloth's kernels compute them."""
    base = getattr(layer, "base_layer", layer)
    weight = base.weight
    if getattr(weight, "quant_state", None) is not None:
        weight = bitsandbytes.functional.dequantize_4bit(weight.data, weight.quant_state)
    outputs = inputs @ weight.to(inputs.dtype).t()
    if getattr(layer, "disable_adapters", True):
        return outputs
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
    settings = {"calibration_data": batches(9), "progress": False} | settings
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
