"""Names: what is written carries the names of the checkpoint that was loaded, fused or not."""

import pytest
import torch
from models import adapt, ulps
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    GPT2Config,
    GPT2LMHeadModel,
    MixtralConfig,
    MixtralForCausalLM,
)

from merge_callback import merge_adapter
from merge_callback.conversions import CheckpointNames
from merge_callback.live import keep_cpu_weights_unpacked

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]


def nf4(path):
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    model = AutoModelForCausalLM.from_pretrained(
        path, quantization_config=config, dtype=torch.bfloat16
    )
    keep_cpu_weights_unpacked(model)
    return model


def mixtral(path):
    config = MixtralConfig(
        hidden_size=128,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=304,
        num_local_experts=4,
    )
    MixtralForCausalLM(config).to(torch.bfloat16).save_pretrained(path)
    return path


@pytest.mark.parametrize("method", ["merged_16bit", "merged_4bit"])
def test_fused_experts_are_split_under_their_own_names(tmp_path, method):
    model = adapt(nf4(mixtral(tmp_path / "base")), target_modules=ATTENTION)
    result = merge_adapter(model, tmp_path / "out", save_method=method)
    original = load_file(tmp_path / "base" / "model.safetensors")
    written = load_file(result.path / "model.safetensors")
    if method == "merged_16bit":
        assert written.keys() == original.keys()
    experts = [name for name in original if ".experts." in name]
    assert len(experts) == 2 * 4 * 3
    for name in experts:
        assert torch.equal(written[name], original[name]), name
    _, info = AutoModelForCausalLM.from_pretrained(result.path, output_loading_info=True)
    assert not any(info.values()), info


def test_weights_that_are_fused_form_one_group(tmp_path):
    model = AutoModelForCausalLM.from_pretrained(mixtral(tmp_path / "base"), dtype=torch.bfloat16)
    names = CheckpointNames(model)
    keys = [f"model.layers.0.mlp.experts.{part}" for part in ("gate_up_proj", "down_proj")]
    groups = names.groups(["model.norm.weight", *keys])
    assert sorted(map(len, groups)) in ([1, 1, 1], [1, 2])
    merged = [names.revert({k: model.get_parameter(k) for k in group}) for group in groups]
    found = {name for group in merged for name in group}
    assert found == {"model.norm.weight"} | {
        name
        for name in load_file(tmp_path / "base" / "model.safetensors")
        if "layers.0" in name and ".experts." in name
    }


def test_a_model_that_was_not_loaded_is_written_under_the_names_of_its_class(tmp_path):
    config = MixtralConfig(
        hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, vocab_size=304, num_local_experts=2,
    )  # fmt: skip
    made = MixtralForCausalLM(config).to(torch.bfloat16)
    made.save_pretrained(tmp_path / "stock")
    result = merge_adapter(adapt(made, target_modules=["q_proj"]), tmp_path / "out")
    stock = load_file(tmp_path / "stock" / "model.safetensors")
    assert load_file(result.path / "model.safetensors").keys() == stock.keys()


def test_what_was_a_conv1d_is_turned_back(tmp_path):
    config = GPT2Config(n_embd=128, n_layer=1, n_head=4, vocab_size=304, n_positions=32)
    GPT2LMHeadModel(config).to(torch.bfloat16).save_pretrained(tmp_path / "base")
    model = adapt(nf4(tmp_path / "base"), target_modules=["c_attn", "c_proj"])
    result = merge_adapter(model, tmp_path / "out", save_method=["merged_16bit", "merged_4bit"])
    original = load_file(tmp_path / "base" / "model.safetensors")
    written = load_file(result.paths["merged_16bit"] / "model.safetensors")
    assert {n: t.shape for n, t in written.items()} == {n: t.shape for n, t in original.items()}
    name = "transformer.h.0.attn.c_proj.weight"  # square: turned wrong, it would load all the same
    layer = model.get_base_model().transformer.h[0].attn.c_proj
    import bitsandbytes.functional as bnb

    base = layer.get_base_layer().weight
    weight = bnb.dequantize_4bit(base.data, base.quant_state).double()
    a, b = (m["default"].weight.detach().double() for m in (layer.lora_A, layer.lora_B))
    expected = (weight + layer.scaling["default"] * b @ a).t().to(torch.bfloat16).contiguous()
    assert ulps(written[name], expected) <= 1
    for path in result.paths.values():
        _, info = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True)
        assert not any(info.values()), info
