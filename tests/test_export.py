"""The whole merge, on tiny models: what is written, what is left alone, what is refused."""

import json
import logging
import stat
import subprocess
import sys
from pathlib import Path

import bitsandbytes.functional as bnb
import pytest
import torch
from models import (
    BASES,
    QUANTISED,
    adapt,
    base_weight,
    load_base,
    logits,
    merged_weights,
    qlora,
    same,
    save_base,
    snapshot,
    tokenizer,
    ulps,
)
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    BartConfig,
    BartForConditionalGeneration,
    BitsAndBytesConfig,
    Zamba2Config,
    Zamba2ForCausalLM,
)

from merge_callback import MergeError, MergeOptions, MergeRefused, MergeStore, merge_adapter
from merge_callback.export import check_merge


def load_weights(directory):
    tensors = {}
    for file in sorted(Path(directory).glob("*.safetensors")):
        tensors |= load_file(file)
    return tensors


def load_stock(directory):
    model, info = AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True)
    assert not any(info.values()), info
    return model.eval()


@pytest.mark.parametrize("shard_size", ["5GB", "150KB"], ids=["1-shard", "4-shards"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("kind", BASES)
def test_16bit_export_is_the_float64_sum_rounded_once(tmp_path, kind, tied, shard_size):
    model = qlora(tmp_path, kind, tied=tied)
    result = merge_adapter(
        model, tmp_path / "out", save_method="merged_16bit", max_shard_size=shard_size
    )

    written = load_weights(result.path)
    original = load_weights(tmp_path / "base")
    files = len(list(result.path.glob("*.safetensors")))
    assert files == 1 if shard_size == "5GB" else files >= 4
    assert written.keys() == original.keys()
    reference = merged_weights(model)
    assert len(reference) == 14
    for name, tensor in written.items():
        if name not in reference:
            expected = original[name].to(tensor.dtype)
            assert torch.equal(tensor.view(torch.uint8), expected.view(torch.uint8)), name
        elif kind == "float32":
            error = (tensor.double() - reference[name]).abs().max()
            assert error <= 2**-22 * reference[name].abs().max(), name
        else:
            assert tensor.dtype == torch.bfloat16
            assert ulps(tensor, reference[name].to(torch.bfloat16)) <= 1, name
    load_stock(result.path)


@pytest.mark.parametrize("kind", ["nf4-nested", "nf4", "fp4", "float32"])
def test_16bit_export_answers_as_the_live_model_does(tmp_path, kind):
    model = qlora(tmp_path, kind)
    dtype = "float32"  # so that only the merge's own error is left
    result = merge_adapter(model, tmp_path / "out", save_method="merged_16bit", dtype=dtype)
    live = logits(model)
    with model.disable_adapter():
        base = logits(model)
    merged = logits(AutoModelForCausalLM.from_pretrained(result.path))
    assert (live - base).norm() > 0.05 * live.norm()  # the adapter says something
    assert (merged - live).norm() <= 0.02 * (live - base).norm()


@pytest.mark.parametrize("shard_size", ["5GB", "50KB"])
@pytest.mark.parametrize("kind", QUANTISED)
def test_4bit_export_has_the_codes_and_scales_of_bitsandbytes(tmp_path, kind, shard_size):
    model = qlora(tmp_path, kind)
    methods = ["merged_4bit", "merged_16bit"]
    result = merge_adapter(
        model,
        tmp_path / "out",
        save_method=methods,
        rounding="nearest",
        dtype="float32",
        max_shard_size=shard_size,
    )

    written = load_stock(result.path)
    exact = load_weights(result.paths["merged_16bit"])
    for name in merged_weights(model):
        codes, state = bnb.quantize_4bit(
            exact[name], quant_type=kind[:3], compress_statistics=kind.endswith("nested")
        )
        found = written.get_parameter(name)
        assert torch.equal(found.data, codes), name
        state.dtype = torch.bfloat16
        assert same(found.quant_state.as_dict(), state.as_dict()), name


@pytest.mark.parametrize("kind", QUANTISED)
def test_weights_without_an_update_keep_their_own_codes(tmp_path, kind):
    model = qlora(tmp_path, kind, target_modules=["q_proj"])
    result = merge_adapter(model, tmp_path / "out")
    written = load_stock(result.path)
    live = model.get_base_model()
    for layer in range(2):
        name = f"model.layers.{layer}.mlp.down_proj.weight"
        one, other = written.get_parameter(name), live.get_parameter(name)
        assert torch.equal(one.data, other.data)
        assert same(one.quant_state.as_dict(), other.quant_state.as_dict())


@pytest.mark.parametrize("kind", ["int8", "bfloat16"])
@pytest.mark.parametrize("nested", [True, False])
def test_other_bases_are_quantised_to_4bit(tmp_path, kind, nested):
    model = qlora(tmp_path, kind)
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=nested,
        bnb_4bit_compute_dtype=torch.float16,
    )
    methods = ["merged_4bit", "merged_16bit"]
    result = merge_adapter(
        model, tmp_path / "out", save_method=methods, dtype="float32", quantization_config=config
    )
    written = load_stock(result.path)
    exact = load_weights(result.paths["merged_16bit"])
    assert type(written.lm_head) is torch.nn.Linear
    assert written.config.quantization_config.bnb_4bit_compute_dtype == torch.float16
    for name in merged_weights(model):
        codes, _ = bnb.quantize_4bit(exact[name], quant_type="nf4")
        assert torch.equal(written.get_parameter(name).data, codes), name
    assert written.model.layers[0].mlp.up_proj.weight.quant_state.nested is nested


def test_a_merge_leaves_the_live_model_bit_identical(tmp_path):
    model = qlora(tmp_path, lora_dropout=0.1).train()
    torch.rand(1)
    before = snapshot(model)
    methods = ["merged_4bit", "merged_16bit", "lora"]
    merge_adapter(model, tmp_path / "out", save_method=methods, processing_class=tokenizer())
    after = snapshot(model)
    assert same(before, after), [k for k in before if not same(before[k], after[k])]


def test_a_process_without_peft_loads_the_export(tmp_path):
    model = qlora(tmp_path)
    result = merge_adapter(model, tmp_path / "out", processing_class=tokenizer())
    script = tmp_path / "load.py"
    script.write_text(
        "import importlib.util, sys\n"
        "found = importlib.util.find_spec\n"
        "hidden = ('peft', 'merge_callback')\n"
        "importlib.util.find_spec = lambda n, *a: None if n in hidden else found(n, *a)\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1])\n"
        "tokens = AutoTokenizer.from_pretrained(sys.argv[1])\n"
        "text = tokens.apply_chat_template([{'role': 'user', 'content': 'w7'}], tokenize=False)\n"
        "assert text == 'w7', text\n"
        "model.generate(**tokens(text, return_tensors='pt'), max_new_tokens=2)\n"
        "assert not set(hidden) & set(sys.modules)\n"
    )
    command = [sys.executable, str(script), str(result.path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


def test_several_methods_share_one_pass_and_one_version(tmp_path):
    model = qlora(tmp_path)
    methods = ["lora", "merged_16bit", "forced_merged_4bit", "merged_4bit_forced"]
    result = merge_adapter(model, tmp_path / "out", save_method=methods)
    assert list(result.paths) == ["lora", "merged_16bit", "merged_4bit"]
    assert result.path == tmp_path / "out" / "merged" / "lora"
    for method in ("merged_16bit", "merged_4bit"):
        alone = merge_adapter(model, tmp_path / "alone", save_method=method)
        name = "model.safetensors"
        assert (alone.path / name).read_bytes() == (result.paths[method] / name).read_bytes()
    adapter = load_file(result.paths["lora"] / "adapter_model.safetensors")
    assert len(adapter) == 28
    MergeStore(tmp_path / "out").verify("merged")


def test_the_default_method_follows_the_base(tmp_path):
    for kind, method in [("nf4", "merged_4bit"), ("int8", "merged_16bit")]:
        model = qlora(tmp_path, kind)
        result = merge_adapter(model, tmp_path / "out")
        assert list(result.paths) == [method]
        assert result.path == tmp_path / "out" / result.version


def test_several_active_adapters_are_summed_and_rounded_once(tmp_path):
    model = qlora(tmp_path, "nf4")
    adapt(model, seed=5, name="second", r=2, use_rslora=True)
    model.base_model.set_adapter(["default", "second"])
    result = merge_adapter(model, tmp_path / "out", save_method="merged_16bit")
    written = load_weights(result.path)
    for name, weight in merged_weights(model).items():
        assert ulps(written[name], weight.to(torch.bfloat16)) <= 1
    assert result.manifest["adapters"] == ["default", "second"]


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")
def test_an_adapter_on_one_end_unties_the_embeddings(tmp_path):
    model = qlora(tmp_path, "nf4", target_modules=["embed_tokens", "q_proj"])
    result = merge_adapter(model, tmp_path / "out", save_method="merged_16bit")
    written = load_weights(result.path)
    original = load_weights(tmp_path / "base")
    assert torch.equal(written["lm_head.weight"], original["model.embed_tokens.weight"])
    expected = merged_weights(model)["model.embed_tokens.weight"].to(torch.bfloat16)
    assert ulps(written["model.embed_tokens.weight"], expected) <= 1
    loaded = load_stock(result.path)
    assert loaded.lm_head.weight.data_ptr() != loaded.model.embed_tokens.weight.data_ptr()
    live = logits(model)
    assert (logits(loaded) - live).norm() < 0.05 * live.norm()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("settings", [{"modules_to_save": ["lm_head"]}, {}], ids=["whole", "lora"])
def test_every_weight_is_written_once_one_of_several_ties_breaks(tmp_path, settings):
    config = BartConfig(
        d_model=128, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=64, decoder_ffn_dim=64,
        encoder_attention_heads=4, decoder_attention_heads=4, vocab_size=304,
        max_position_embeddings=64,
    )  # fmt: skip
    BartForConditionalGeneration(config).to(torch.bfloat16).save_pretrained(tmp_path / "base")
    base = BartForConditionalGeneration.from_pretrained(tmp_path / "base", dtype=torch.bfloat16)
    targets = ["q_proj"] if settings else ["q_proj", "lm_head"]
    model = adapt(base, target_modules=targets, task_type="SEQ_2_SEQ_LM", **settings)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modules_to_save" in name:
                parameter += 0.05
    result = merge_adapter(model, tmp_path / "out")
    loaded, info = BartForConditionalGeneration.from_pretrained(
        result.path, output_loading_info=True
    )
    assert not any(info.values()), info
    written, shared = load_weights(result.path), base.model.shared.weight
    for name in ("model.shared", "model.encoder.embed_tokens", "model.decoder.embed_tokens"):
        assert torch.equal(written[f"{name}.weight"], shared), name
        assert torch.equal(loaded.get_submodule(name).weight, shared), name
    assert not torch.equal(loaded.lm_head.weight, shared)


@pytest.mark.filterwarnings("ignore")
def test_adapters_at_several_places_of_one_layer_are_refused_before_training(tmp_path):
    config = Zamba2Config(
        vocab_size=304, hidden_size=64, num_hidden_layers=4, intermediate_size=64,
        layers_block_type=["mamba", "hybrid", "mamba", "hybrid"], num_attention_heads=2,
        num_key_value_heads=2, mamba_d_state=16, n_mamba_heads=4, mamba_ngroups=1,
        num_mem_blocks=1, hybrid_layer_ids=[1, 3], adapter_rank=4, chunk_size=16, pad_token_id=0,
    )  # fmt: skip
    told = r"the model shares the weight with model\.layers\.1.* with exclude_modules"
    model = adapt(Zamba2ForCausalLM(config), target_modules=["down_proj"])
    with pytest.raises(MergeRefused, match=told):
        check_merge(model, MergeStore(tmp_path), MergeOptions())
    model = adapt(Zamba2ForCausalLM(config), target_modules=["layers.0.mamba.in_proj"])
    check_merge(model, MergeStore(tmp_path), MergeOptions())


def test_modules_trained_whole_replace_the_base_ones(tmp_path):
    model = qlora(
        tmp_path, "nf4", tied=False, target_modules=["q_proj"], modules_to_save=["lm_head"]
    )
    trained = model.get_base_model().lm_head.modules_to_save["default"].weight
    torch.nn.init.normal_(trained, std=0.02)
    result = merge_adapter(model, tmp_path / "out", save_method="merged_16bit")
    written = load_weights(result.path)
    assert torch.equal(written["lm_head.weight"], trained.to(torch.bfloat16))


def test_dora_is_the_magnitude_times_the_direction(tmp_path):
    model = qlora(tmp_path, "nf4", use_dora=True)
    for name, parameter in model.named_parameters():
        if "magnitude" in name:
            parameter.data.mul_(1 + 0.1 * torch.rand_like(parameter))
    layer = model.get_base_model().model.layers[0].mlp.up_proj
    a, b = (m["default"].weight.detach().double() for m in (layer.lora_A, layer.lora_B))
    direction = base_weight(layer.get_base_layer()) + layer.scaling["default"] * b @ a
    magnitude = layer.lora_magnitude_vector["default"].weight.detach().double()
    expected = magnitude[:, None] * direction / direction.norm(dim=1, keepdim=True)
    result = merge_adapter(model, tmp_path / "out", save_method="merged_16bit")
    written = load_weights(result.path)["model.layers.0.mlp.up_proj.weight"]
    assert ulps(written, expected.to(torch.bfloat16)) <= 1
    live = logits(model)
    assert (logits(load_stock(result.path)) - live).norm() < 0.05 * live.norm()


def test_weights_that_were_up_cast_go_back_to_the_base_dtype(tmp_path):
    from peft import prepare_model_for_kbit_training

    model = load_base(save_base(tmp_path / "base"), "nf4")
    model = adapt(prepare_model_for_kbit_training(model, use_gradient_checkpointing=False))
    norm = model.get_base_model().model.norm.weight
    assert norm.dtype == torch.float32
    original = load_weights(tmp_path / "base")
    result = merge_adapter(model, tmp_path / "out")
    assert torch.equal(
        load_weights(result.path)["model.norm.weight"], original["model.norm.weight"]
    )
    norm.data.mul_(1.0001)  # no longer a 16-bit value: kept whole
    result = merge_adapter(model, tmp_path / "out")
    assert torch.equal(load_weights(result.path)["model.norm.weight"], norm)


@pytest.mark.parametrize("dtype", [torch.float16, "float32"])
def test_dtype_rules_the_16bit_output(tmp_path, dtype):
    result = merge_adapter(
        qlora(tmp_path), tmp_path / "out", save_method="merged_16bit", dtype=dtype
    )
    name = str(dtype).removeprefix("torch.")
    assert {str(t.dtype) for t in load_weights(result.path).values()} == {f"torch.{name}"}
    config = json.loads((result.path / "config.json").read_text())
    assert config["dtype"] == name
    assert "quantization_config" not in config


def test_every_tensor_starts_at_a_multiple_of_its_item_size(tmp_path):
    path = save_base(tmp_path / "base", vocab_size=301, intermediate_size=70)
    model = adapt(load_base(path, "nf4-nested"))
    result = merge_adapter(model, tmp_path / "out", save_method=["merged_4bit", "merged_16bit"])
    for directory in result.paths.values():
        data = (directory / "model.safetensors").read_bytes()
        length = int.from_bytes(data[:8], "little")
        assert length % 8 == 0
        header = json.loads(data[8 : 8 + length])
        sizes = {"F32": 4, "BF16": 2, "U8": 1}
        end = 0
        assert header.pop("__metadata__") == {"format": "pt"}
        for entry in header.values():
            start, stop = entry["data_offsets"]
            assert start == end and start % sizes[entry["dtype"]] == 0
            end = stop
        assert 8 + length + end == len(data)


def test_blocks_that_cross_rows_survive(tmp_path):
    path = save_base(tmp_path / "base", intermediate_size=70)  # 70 % 64 != 0
    model = adapt(load_base(path, "nf4-nested"))
    written = load_stock(merge_adapter(model, tmp_path / "out", rounding="nearest").path)
    name = "model.layers.1.mlp.down_proj.weight"
    codes, state = bnb.quantize_4bit(
        merged_weights(model)[name].float(), quant_type="nf4", compress_statistics=True
    )
    assert torch.equal(written.get_parameter(name).data, codes)
    assert torch.equal(written.get_parameter(name).quant_state.absmax, state.absmax)


def test_storage_of_another_dtype_is_written_as_bytes(tmp_path):
    path = save_base(tmp_path / "base")
    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_quant_storage=torch.bfloat16
    )
    model = adapt(AutoModelForCausalLM.from_pretrained(path, quantization_config=config))
    result = merge_adapter(model, tmp_path / "out", rounding="nearest")
    for tensor in load_weights(result.path).values():
        assert tensor.dtype in (torch.uint8, torch.float32, torch.bfloat16)
    written = load_stock(result.path)
    for name, weight in merged_weights(model).items():
        codes, _ = bnb.quantize_4bit(weight.float(), quant_type="nf4")
        assert torch.equal(written.get_parameter(name).data, codes)


def test_the_manifest_tells_what_was_done(tmp_path):
    model = qlora(tmp_path)
    result = merge_adapter(model, tmp_path / "out", name="mine")
    stored = json.loads((tmp_path / "out" / "mine" / "merge_manifest.json").read_text())
    assert stored == result.manifest
    assert stored["schema"] == 1 and stored["kind"] == "merged"
    assert stored["base"] == {"id": "base", "revision": None}
    assert stored["save_methods"] == ["merged_4bit"] and stored["rounding"] == "stochastic"
    assert stored["merged_into"] == "live" and stored["calibration"] is None
    assert stored["maths_dtype"] == "float32"
    assert len(stored["retention"]["merged_4bit"]["tensors"]) == 14
    assert len(stored["adapter_sha256"]) == 64
    assert {"torch", "peft", "merge_callback"} <= stored["libraries"].keys()
    assert stored["files"].keys() == {
        "model.safetensors",
        "config.json",
        "generation_config.json",
        "merge_report.json",
        "merge_report.md",
        "merge_report.png",
        "README.md",
    }
    assert str(tmp_path) not in json.dumps(stored)
    again = merge_adapter(model, tmp_path / "out", name="mine").manifest
    assert again["adapter_sha256"] == stored["adapter_sha256"]
    adapt(model, seed=9, name="other")
    model.set_adapter("other")
    other = merge_adapter(model, tmp_path / "out", name="mine").manifest
    assert other["adapter_sha256"] != stored["adapter_sha256"]


def test_a_base_made_in_memory_has_no_id(tmp_path):
    model = qlora(tmp_path)
    model.get_base_model().config._name_or_path = ""
    assert merge_adapter(model, tmp_path / "out").manifest["base"]["id"] is None


def test_by_chance_on_a_base_that_is_on_no_grid_is_to_nearest_and_said(tmp_path, caplog):
    model = adapt(load_base(save_base(tmp_path / "base"), "bfloat16"))
    settings = {"save_method": "merged_4bit", "rounding": "stochastic"}
    result = merge_adapter(model, tmp_path / "out", progress=False, **settings)
    assert result.manifest["rounding"] == "nearest"
    assert "not on a 4-bit grid: merging with rounding='nearest'" in caplog.text


def test_a_small_update_that_rounding_swallows_is_never_silent(tmp_path, caplog):
    model = qlora(tmp_path, scale=1e-4)
    caplog.set_level(logging.INFO)
    methods = ["merged_4bit", "merged_16bit"]
    result = merge_adapter(model, tmp_path / "out", save_method=methods, rounding="nearest")
    kept = {m: r["overall"] for m, r in result.manifest["retention"].items()}
    assert kept["merged_4bit"] < 0.1
    assert "rounding to 4 bits kept" in caplog.text
    assert "merged_4bit retention" in caplog.text
    caplog.clear()
    merge_adapter(qlora(tmp_path, scale=0.5), tmp_path / "out", rounding="nearest")
    assert "rounding to 4 bits kept" not in caplog.text
    merge_adapter(model, tmp_path / "out")
    assert "codes were chosen by chance, without data" in caplog.text


def test_an_untrained_adapter_is_said_to_change_nothing(tmp_path, caplog):
    merge_adapter(qlora(tmp_path, scale=0), tmp_path / "out")
    assert "the adapter changes nothing" in caplog.text


def test_file_modes_follow_the_umask(tmp_path):
    import os

    before = os.umask(0o027)
    try:
        methods = ["merged_4bit", "lora"]
        merge_adapter(qlora(tmp_path), tmp_path / "out", save_method=methods)
    finally:
        os.umask(before)
    modes = {stat.S_IMODE(p.stat().st_mode) for p in (tmp_path / "out").rglob("*") if p.is_file()}
    assert modes == {0o640}
    assert stat.S_IMODE((tmp_path / "out" / "merged").stat().st_mode) == 0o750


def test_the_export_restores_precision_settings_even_on_failure(tmp_path):
    matmul = torch.backends.cuda.matmul
    model = qlora(tmp_path)
    before = torch.backends.fp32_precision
    try:
        torch.backends.fp32_precision = "tf32"
        merge_adapter(model, tmp_path / "out")
        assert matmul.fp32_precision == "tf32"
        torch.backends.fp32_precision = "ieee"
        assert matmul.fp32_precision == "ieee"  # still inherits
        matmul.fp32_precision = "tf32"
        merge_adapter(model, tmp_path / "out")
        assert matmul.fp32_precision == "tf32"
    finally:
        matmul.fp32_precision = "none"
        torch.backends.fp32_precision = before


def test_autocast_does_not_touch_the_maths(tmp_path):
    model = qlora(tmp_path, "nf4")
    one = merge_adapter(model, tmp_path / "out", save_method="merged_16bit")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        other = merge_adapter(model, tmp_path / "out", save_method="merged_16bit")
    assert same(load_weights(one.path), load_weights(other.path))


def test_memory_that_runs_out_moves_a_tensor_to_the_cpu(tmp_path, caplog, monkeypatch):
    from merge_callback.adapters.lora import LowRank

    model = qlora(tmp_path)
    whole = merge_adapter(model, tmp_path / "out")
    add_to, calls = LowRank.add_to, []

    def once(self, merged, base, rows):
        calls.append(merged.device)
        if len(calls) == 3:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        add_to(self, merged, base, rows)

    monkeypatch.setattr(LowRank, "add_to", once)
    retried = merge_adapter(model, tmp_path / "out", verify=False)
    assert len(calls) == 2 * 14 + 1  # scales first, then codes
    assert "merged on the CPU" in caplog.text
    assert same(load_weights(whole.path), load_weights(retried.path))


def test_nan_in_an_adapter_is_named_and_publishes_nothing(tmp_path):
    model = qlora(tmp_path)
    layer = model.get_base_model().model.layers[1].mlp.down_proj
    layer.lora_A["default"].weight.data[0, 0] = torch.nan
    with pytest.raises(MergeError, match=r"layers\.1\.mlp\.down_proj\.weight.*not finite"):
        merge_adapter(model, tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def test_values_too_large_for_float16_are_named(tmp_path):
    model = qlora(tmp_path)
    model.get_base_model().model.layers[1].mlp.down_proj.scaling["default"] = 1e8
    with pytest.raises(MergeError, match="too large for the output dtype"):
        merge_adapter(model, tmp_path / "out", save_method="merged_16bit", dtype="float16")


def test_a_flipped_bit_on_the_disk_is_caught_before_publishing(tmp_path, monkeypatch):
    from merge_callback.store import Draft

    seal = Draft.seal

    def flip(self):
        again = bool(self.records) and "config.json" in self.records
        seal(self)
        if again:
            return
        path = self.path / "model.safetensors"
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)

    monkeypatch.setattr(Draft, "seal", flip)
    model = qlora(tmp_path)
    with pytest.raises(MergeError, match=r"model\.safetensors is not what was written"):
        merge_adapter(model, tmp_path / "out")
    assert MergeStore(tmp_path / "out").versions() == []
    merge_adapter(model, tmp_path / "out", verify=False)
    with pytest.raises(MergeError, match=r"model\.safetensors"):
        MergeStore(tmp_path / "out").verify("merged")


def test_tensors_are_in_no_checkpoint_twice(tmp_path):
    result = merge_adapter(qlora(tmp_path), tmp_path / "out", max_shard_size="50KB")
    index = json.loads((result.path / "model.safetensors.index.json").read_text())
    seen = []
    for file in result.path.glob("*.safetensors"):
        with safe_open(file, "pt") as shard:
            assert all(index["weight_map"][key] == file.name for key in shard.keys())
            seen += shard.keys()
    assert sorted(seen) == sorted(index["weight_map"])


def refusal(model, tmp_path, **options):
    with pytest.raises(MergeRefused) as caught:
        merge_adapter(model, tmp_path / "out", **options)
    assert not list((tmp_path / "out").glob("*"))
    return str(caught.value)


def test_what_cannot_be_merged_is_refused_with_the_cure(tmp_path):
    base = load_base(save_base(tmp_path / "base"), "nf4")
    assert "get_peft_model" in refusal(base, tmp_path)
    model = adapt(base)
    model.base_model.disable_adapter_layers()
    assert "enable_adapter_layers" in refusal(model, tmp_path)
    model.base_model.enable_adapter_layers()
    layer = model.get_base_model().model.layers[0].mlp.up_proj
    layer.merged_adapters = ["default"]
    assert "already merged" in refusal(model, tmp_path)
    layer.merged_adapters = []
    model.base_model.set_adapter([])
    assert "no adapter is active" in refusal(model, tmp_path)


def test_a_merged_16bit_model_is_refused(tmp_path):
    model = qlora(tmp_path, "bfloat16")
    model.merge_adapter()
    assert "already merged" in refusal(model, tmp_path)


def test_mixed_models_are_refused(tmp_path):
    from peft import LoraConfig, PeftMixedModel

    base = load_base(save_base(tmp_path / "base"), "bfloat16")  # PEFT mixes on no quantised base
    mixed = PeftMixedModel(base, LoraConfig(target_modules=["q_proj"]))
    assert "PeftMixedModel" in refusal(mixed, tmp_path)


def test_a_weight_repacked_for_avx512_is_refused(tmp_path):
    model = qlora(tmp_path)
    weight = model.get_base_model().model.layers[0].mlp.up_proj.base_layer.weight
    weight.quant_state.packing_format_for_cpu = True
    told = refusal(model, tmp_path)
    assert "support_avx512bf16_for_cpu = False" in told and "up_proj" in told


def test_all_problems_come_in_one_error(tmp_path):
    model = qlora(tmp_path)
    model.base_model.disable_adapter_layers()
    (tmp_path / "file").write_text("")
    config = BitsAndBytesConfig(load_in_4bit=True)
    with pytest.raises(MergeRefused) as caught:
        merge_adapter(model, tmp_path / "file", quantization_config=config)
    assert len(caught.value.problems) == 3
    assert (tmp_path / "file").read_text() == ""


def test_a_generation_config_that_cannot_be_saved_is_refused(tmp_path):
    model = qlora(tmp_path)
    model.generation_config.do_sample = False
    model.generation_config.temperature = 0.3
    assert "generation_config" in refusal(model, tmp_path)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"save_method": "gguf"}, "save_method 'gguf'"),
        ({"save_method": []}, "save_method is empty"),
        ({"rounding": "up"}, "rounding='up'"),
        ({"dtype": "int8"}, "dtype='int8'"),
        ({"max_shard_size": "5 apples"}, "max_shard_size"),
        ({"max_shard_size": 0}, "max_shard_size"),
        ({"max_shard_size": None}, "max_shard_size"),
        ({"save_method": 5}, "save_method=5"),
        ({"save_method": [["lora"]]}, "save_method=[['lora']]"),
        ({"min_gain_kept": 95}, "is a share, from 0 to 1"),
        ({"min_gain_kept": "95%"}, "min_gain_kept='95%' must be a positive number"),
        ({"max_kl": float("nan")}, "max_kl=nan must be a positive number"),
        ({"max_kl": -1}, "max_kl=-1 must be a positive number"),
        ({"calibration_tokens": "65536"}, "calibration_tokens='65536' must be a positive number"),
        ({"safe_serialization": False}, "safetensors"),
        ({"quantization_config": BitsAndBytesConfig(load_in_8bit=True)}, "load_in_4bit"),
        ({"name": "../up"}, "name='../up'"),
        ({"name": ""}, "name=''"),
        ({"quantization_config": BitsAndBytesConfig(load_in_4bit=True)}, "4-bit already"),
    ],
)
def test_options_that_cannot_be_honoured_are_refused(tmp_path, options, told):
    assert told in refusal(qlora(tmp_path), tmp_path, **options)


def test_a_disk_fault_is_told_with_the_cure(tmp_path, monkeypatch):
    import os

    def full(descriptor, data):
        raise OSError(28, "No space left on device")

    model = qlora(tmp_path)
    monkeypatch.setattr(os, "write", full)
    with pytest.raises(MergeError, match=r"No space left on device; nothing was published.*free"):
        merge_adapter(model, tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def test_what_lies_elsewhere_is_refused_by_name(tmp_path):
    model = qlora(tmp_path, "nf4")
    norm = model.get_base_model().model.norm
    norm.weight = torch.nn.Parameter(norm.weight.to("meta"), requires_grad=False)
    assert "model.norm.weight: offloaded" in refusal(model, tmp_path)


def test_modules_to_save_of_a_quantised_layer_are_refused(tmp_path):
    model = qlora(tmp_path, "nf4")
    wrapper = model.get_base_model().model.layers[0].mlp.up_proj
    from peft.utils import ModulesToSaveWrapper

    model.get_base_model().model.layers[0].mlp.up_proj = ModulesToSaveWrapper(
        wrapper.get_base_layer(), "default"
    )
    assert "modules_to_save on a quantised layer" in refusal(model, tmp_path)


def test_quantization_config_without_4bit_output_is_refused(tmp_path):
    model = qlora(tmp_path, "bfloat16")
    config = BitsAndBytesConfig(load_in_4bit=True)
    assert "only used by" in refusal(model, tmp_path, quantization_config=config)


def test_layers_that_a_user_skips_stay_in_16_bits(tmp_path):
    model = qlora(tmp_path, "bfloat16")
    config = BitsAndBytesConfig(load_in_4bit=True, llm_int8_skip_modules=["lm_head", "down_proj"])
    result = merge_adapter(
        model, tmp_path / "out", save_method="merged_4bit", quantization_config=config
    )
    loaded = load_stock(result.path)
    assert type(loaded.model.layers[1].mlp.down_proj) is torch.nn.Linear
    assert type(loaded.model.layers[1].mlp.up_proj) is not torch.nn.Linear


def test_a_model_that_is_not_of_transformers_is_refused(tmp_path):
    from peft import LoraConfig, get_peft_model

    plain = torch.nn.Sequential(torch.nn.Linear(4, 4))
    model = get_peft_model(plain, LoraConfig(target_modules=["0"]))
    assert "not a transformers model" in refusal(model, tmp_path)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["nf4-nested", "bfloat16"])
def test_a_merge_on_a_gpu_stays_there_and_gives_the_same_model(tmp_path, kind):
    model = qlora(tmp_path, kind).to("cuda")
    before = snapshot(model)
    result = merge_adapter(model, tmp_path / "out", save_method="merged_16bit")
    assert same(before, snapshot(model))
    written = load_weights(result.path)
    for name, weight in merged_weights(model).items():
        assert ulps(written[name], weight.to(torch.bfloat16).cpu()) <= 1


def test_nan_in_what_was_trained_whole_is_named(tmp_path):
    settings = {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}
    model = qlora(tmp_path, "nf4", tied=False, **settings)
    trained = model.get_base_model().lm_head.modules_to_save["default"].weight
    trained.data[0, 0] = torch.nan
    with pytest.raises(MergeError, match=r"lm_head\.weight.*not finite"):
        merge_adapter(model, tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def test_an_untouched_value_too_large_for_the_output_is_named(tmp_path):
    model = qlora(tmp_path)
    model.get_base_model().model.embed_tokens.weight.data[0, 0] = 1e5
    with pytest.raises(MergeError, match=r"embed_tokens\.weight.*too large"):
        merge_adapter(model, tmp_path / "out", save_method="merged_16bit", dtype="float16")


def test_an_adapter_of_another_name_loads_from_its_directory(tmp_path):
    from peft import PeftModel

    model = adapt(load_base(save_base(tmp_path / "base"), "nf4"), name="mine")
    result = merge_adapter(model, tmp_path / "out", save_method="lora")
    assert {"adapter_config.json", "adapter_model.safetensors"} <= {
        path.name for path in result.path.iterdir()
    }
    loaded = PeftModel.from_pretrained(load_base(tmp_path / "base", "nf4"), result.path)
    assert torch.equal(logits(loaded.eval()), logits(model))


def test_what_was_trained_whole_is_not_quantised(tmp_path):
    settings = {"target_modules": ["q_proj"], "modules_to_save": ["up_proj"]}
    model = qlora(tmp_path, "bfloat16", **settings)
    result = merge_adapter(model, tmp_path / "out", save_method="merged_4bit")
    loaded = load_stock(result.path)
    assert type(loaded.model.layers[0].mlp.up_proj) is torch.nn.Linear
    assert type(loaded.model.layers[0].mlp.down_proj) is not torch.nn.Linear


def test_faults_of_the_libraries_that_write_are_told_as_ours(tmp_path):
    class Tokenizer:
        def save_pretrained(self, directory):
            raise Exception("disk quota exceeded")

    with pytest.raises(MergeError, match="disk quota exceeded; nothing was published"):
        merge_adapter(qlora(tmp_path), tmp_path / "out", processing_class=Tokenizer())
    assert list((tmp_path / "out").iterdir()) == []


def test_the_hash_of_an_adapter_knows_its_scale(tmp_path):
    model = qlora(tmp_path)
    one = merge_adapter(model, tmp_path / "out").manifest["adapter_sha256"]
    model.get_base_model().model.layers[0].mlp.up_proj.scaling["default"] *= 2
    assert merge_adapter(model, tmp_path / "out").manifest["adapter_sha256"] != one


def test_biases_that_were_trained_are_written_and_checked(tmp_path):
    path = save_base(tmp_path / "base", attention_bias=True)
    model = adapt(load_base(path, "nf4"), target_modules=["q_proj"], bias="lora_only")
    bias = model.get_base_model().model.layers[0].self_attn.q_proj.base_layer.bias
    assert bias.requires_grad
    torch.nn.init.normal_(bias)
    result = merge_adapter(model, tmp_path / "out")
    name = "model.layers.0.self_attn.q_proj.bias"
    assert torch.equal(load_weights(result.path)[name], bias.to(torch.bfloat16))
    bias.data[0] = torch.nan
    with pytest.raises(MergeError, match=r"q_proj\.bias.*not finite"):
        merge_adapter(model, tmp_path / "out")


def test_the_default_dtype_changes_no_byte(tmp_path):
    model = qlora(tmp_path)
    settings = {"save_method": ["merged_4bit", "merged_16bit"], "rounding": "stochastic"}
    paths = [merge_adapter(model, tmp_path / "out", **settings).paths]
    torch.set_default_dtype(torch.bfloat16)
    try:
        paths.append(merge_adapter(model, tmp_path / "out", **settings).paths)
        assert torch.get_default_dtype() == torch.bfloat16
    finally:
        torch.set_default_dtype(torch.float32)
    for method in paths[0]:
        one, other = (load_file(path[method] / "model.safetensors") for path in paths)
        assert same(one, other)
