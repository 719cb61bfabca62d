"""Bases as people have them: quantised before, resized, offloaded, with fused experts."""

import json

import pytest
import torch
import transformers
from models import adapt, load_base, qlora, same, save_base, snapshot
from pairs import rows
from peft import IA3Config, get_peft_model
from safetensors.torch import load_file
from shrink import save_small
from test_adapters import effect_error
from test_architectures import MODELS, made
from test_calibration import batches
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    BitsAndBytesConfig,
    LlamaForCausalLM,
    TorchAoConfig,
    WhisperForConditionalGeneration,
)

from merge_callback import MergeOptions, MergeRefused, MergeStore, merge_adapter
from merge_callback.export import check_merge
from merge_callback.model_code import used_outside_their_layers
from merge_callback.planning import make_plan
from merge_callback.recipe import write_recipe
from merge_callback.shards import DTYPE_NAMES
from merge_callback.verification.tensors import Deviation, deviations

pytestmark = pytest.mark.matrix

EXACT = {"save_method": "merged_16bit", "dtype": "float32", "progress": False}


@pytest.mark.parametrize("kind", ["nf4", "nf4-nested", "fp4", "int8"])
def test_a_base_that_was_quantised_before(tmp_path, kind, support):
    support("Bases", "saved quantised", kind)
    load_base(save_base(tmp_path / "base"), kind).save_pretrained(tmp_path / "quantised")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "quantised")
    model = adapt(loaded)
    assert effect_error(model, merge_adapter(model, tmp_path / "out", **EXACT).path) < 2e-4
    four = merge_adapter(model, tmp_path / "out", save_method="merged_4bit")
    assert four.manifest["verification"]["problems"] == []


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["bfloat16", "nf4"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_embeddings_that_were_resized(tmp_path, tied, kind, support):
    support("Bases", f"resized embeddings, {'tied' if tied else 'untied'}", kind)
    base = load_base(save_base(tmp_path / "base", tied=tied), kind)
    base.resize_token_embeddings(320)
    model = adapt(base, modules_to_save=["embed_tokens"], target_modules=["q_proj", "up_proj"])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modules_to_save" in name:
                parameter += 0.05
    path = merge_adapter(model, tmp_path / "out", **EXACT).path
    written = load_file(path / "model.safetensors")
    assert written["model.embed_tokens.weight"].shape == (320, 128)
    assert AutoModelForCausalLM.from_pretrained(path).config.vocab_size == 320
    assert effect_error(model, path) < 2e-4


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["gpt_oss", "qwen3_moe", "mixtral"])
def test_experts_that_are_one_parameter(tmp_path, name, kind, support):
    support("Bases", f"target_parameters, {name}", kind)
    model_class = made(name, tmp_path / "base")
    base = model_class.from_pretrained(tmp_path / "base", dtype=getattr(torch, kind))
    router = {"gpt_oss": "router", "qwen3_moe": "gate", "mixtral": "gate"}[name]  # two dimensions
    fused = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj", f"mlp.{router}.weight"]
    model = adapt(base, target_modules=["q_proj"], target_parameters=fused, scale=0.05)
    before = snapshot(model)
    result = merge_adapter(model, tmp_path / "out", **EXACT, verification_data=batches(1))
    assert same(before, snapshot(model))
    assert effect_error(model, result.path) < 2e-4
    kept = result.manifest["retention"]["merged_16bit"]["tensors"]
    assert sum(".experts." in key for key in kept) == 4  # two parameters of two layers
    assert sum(f".{router}.weight" in key for key in kept) == 2
    one, other = (load_file(p / "model.safetensors") for p in (tmp_path / "base", result.path))
    assert one.keys() == other.keys()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("name", "ends"),
    [
        ("whisper", ["conv1", "conv2"]),
        ("llava", ["patch_embedding"]),
        ("qwen2_vl", ["patch_embed.proj"]),
    ],
)
def test_convolutions(tmp_path, name, ends, support):
    model_class = made(name, tmp_path / "base")
    base = model_class.from_pretrained(tmp_path / "base", dtype=torch.float32)
    model = adapt(base, task_type=None, target_modules=[*ends, "q_proj"])
    layers = {
        key: layer
        for key, layer in model.get_base_model().named_modules()
        if key.endswith(tuple(ends)) and hasattr(layer, "get_delta_weight")
    }
    assert len(layers) == len(ends)
    kind = type(next(iter(layers.values())).base_layer).__name__
    support("Bases", f"LoRA on {kind}", "float32")
    result = merge_adapter(model, tmp_path / "out", **EXACT)
    merged = model_class.from_pretrained(result.path, dtype=torch.float32)
    for key, layer in layers.items():
        delta = layer.get_delta_weight("default").double()
        wanted = layer.base_layer.weight.double() + delta
        error = (merged.get_submodule(key).weight.double() - wanted).norm()
        assert float(error / delta.norm()) < 1e-5


@pytest.mark.filterwarnings("ignore")
def test_a_convolution_whose_bias_moves(tmp_path):
    model_class = made("gemma3", tmp_path / "base")
    base = model_class.from_pretrained(tmp_path / "base", dtype=torch.float32)
    config = IA3Config(target_modules=["patch_embedding"], feedforward_modules=[])
    model = get_peft_model(base, config)
    (name,) = (n for n, m in base.named_modules() if n.endswith("patch_embedding"))
    layer = base.get_submodule(name)
    layer.ia3_l["default"].data += 0.3 * torch.randn_like(layer.ia3_l["default"])
    layer.base_layer.bias.data += 0.2
    result = merge_adapter(model, tmp_path / "out", **EXACT)
    merged = model_class.from_pretrained(result.path, dtype=torch.float32).get_submodule(name)
    picture = torch.randn(1, 3, 32, 32)
    assert torch.allclose(merged(picture), layer(picture), atol=1e-5)


@pytest.mark.filterwarnings("ignore")
def test_convolutions_that_peft_merges_wrongly_are_refused(tmp_path):
    made("whisper", tmp_path / "base")
    base = WhisperForConditionalGeneration.from_pretrained(tmp_path / "base", dtype=torch.float32)
    base.model.encoder.conv2 = torch.nn.Conv1d(128, 128, 3, 2, 1, groups=4)
    model = adapt(base, task_type=None, target_modules=["conv2"])
    with pytest.raises(MergeRefused, match="lora on a Conv1d does not merge in PEFT"):
        merge_adapter(model, tmp_path / "out", **EXACT)
    base = WhisperForConditionalGeneration.from_pretrained(tmp_path / "base", dtype=torch.float32)
    base.model.encoder.conv2 = torch.nn.Conv1d(128, 128, 3, 2, 1, padding_mode="circular")
    model = adapt(base, task_type=None, target_modules=["conv2"])
    with pytest.raises(MergeRefused, match="another layer than it trains"):
        merge_adapter(model, tmp_path / "out", **EXACT)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("place", ["cpu", "disk"])
def test_weights_that_are_brought_when_they_are_needed(tmp_path, place, support):
    from accelerate import cpu_offload, disk_offload

    support("Bases", f"offloaded to {place}", "bfloat16")

    def load(offloaded):
        base = load_base(save_base(tmp_path / "base"), "bfloat16")
        layer, device = base.model.layers[1], torch.device("cpu")
        if offloaded and place == "cpu":
            cpu_offload(layer, execution_device=device)
        elif offloaded:
            disk_offload(layer, str(tmp_path / "offload"), execution_device=device)
        return base, layer

    results = []
    for offloaded in (False, True):
        base, layer = load(offloaded)
        assert (layer.mlp.up_proj.weight.device.type == "meta") is offloaded
        # PEFT makes the adapter of an offloaded layer on the meta device, where it cannot learn.
        model = adapt(base, target_modules=["q_proj", "up_proj"], layers_to_transform=[0])
        result = merge_adapter(model, tmp_path / str(offloaded), verification_data=batches(1))
        assert result.manifest["verification"]["data"] == "held-out data"
        results.append((result.path / "model.safetensors").read_bytes())
        assert (layer.mlp.up_proj.weight.device.type == "meta") is offloaded
    assert results[0] == results[1]
    with pytest.raises(MergeRefused, match="its adapter is on the meta device"):
        merge_adapter(adapt(load(True)[0]), tmp_path / "out")


def test_code_of_its_own_goes_along(tmp_path, support):
    support("Bases", "custom code (auto_map)", "bfloat16")
    path = save_base(tmp_path / "base")
    (path / "helper_tiny.py").write_text("SCALE = 1.0\n")
    (path / "configuration_tiny.py").write_text(
        "from transformers import LlamaConfig\n"
        "class TinyConfig(LlamaConfig):\n    model_type = 'tiny_custom'\n"
    )
    (path / "modeling_tiny.py").write_text(
        "from transformers import LlamaForCausalLM\n"
        "from .configuration_tiny import TinyConfig\n"
        "from .helper_tiny import SCALE\n"
        "class TinyForCausalLM(LlamaForCausalLM):\n    config_class = TinyConfig\n"
    )
    config = json.loads((path / "config.json").read_text())
    config |= {
        "model_type": "tiny_custom",
        "architectures": ["TinyForCausalLM"],
        "auto_map": {
            "AutoConfig": "configuration_tiny.TinyConfig",
            "AutoModelForCausalLM": "modeling_tiny.TinyForCausalLM",
        },
    }
    (path / "config.json").write_text(json.dumps(config))
    base = AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True)
    result = merge_adapter(adapt(base), tmp_path / "out")
    assert (result.path / "helper_tiny.py").exists()
    loaded = AutoModelForCausalLM.from_pretrained(result.path, trust_remote_code=True)
    assert type(loaded).__name__ == "TinyForCausalLM"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["Int8WeightOnlyConfig", "Float8WeightOnlyConfig"])
def test_tensors_that_know_their_values_give_16_bits(tmp_path, kind, support):
    torchao = pytest.importorskip("torchao.quantization")
    support("Bases", f"torchao {kind.removesuffix('Config')}", "merged_16bit")
    base = AutoModelForCausalLM.from_pretrained(
        save_base(tmp_path / "base", tied=False),
        dtype=torch.bfloat16,
        quantization_config=TorchAoConfig(getattr(torchao, kind)()),
    )
    model = adapt(base, target_modules=["q_proj", "up_proj"])
    result = merge_adapter(model, tmp_path / "out", verification_data=batches(1))
    found = result.manifest["verification"]
    assert found["problems"] == [] and found["models"]["merged_16bit"]["kl"] < 1e-4
    assert AutoModelForCausalLM.from_pretrained(result.path).dtype == torch.bfloat16
    with pytest.raises(MergeRefused, match="another library"):
        merge_adapter(model, tmp_path / "out", save_method="merged_4bit")


def test_layers_without_a_weight_are_refused_by_name(tmp_path):
    """As those of GPTQ and AWQ, whose packages need a GPU."""
    model = qlora(tmp_path, "bfloat16")
    layer = model.get_base_model().model.layers[0].mlp.up_proj.base_layer
    packed = layer.weight.data.view(torch.int16)
    del layer.weight
    layer.register_buffer("qweight", packed)
    with pytest.raises(MergeRefused, match="no such parameter to merge into, as GPTQ's"):
        merge_adapter(model, tmp_path / "out")


def test_floats_of_8_bits_are_refused_by_name(tmp_path):
    model = qlora(tmp_path, "bfloat16")
    layer = model.get_base_model().model.layers[0].mlp.up_proj.base_layer
    layer.weight = torch.nn.Parameter(layer.weight.data.to(torch.float8_e4m3fn), False)
    with pytest.raises(MergeRefused, match="float8_e4m3fn of an unknown quantiser"):
        merge_adapter(model, tmp_path / "out")


def with_extra(dtype, *, parameter):
    """A class with one more tensor, and a model of it with values whose every byte counts."""
    empty = torch.zeros(32 * dtype.itemsize, dtype=torch.uint8)
    values = (torch.arange(len(empty)) * 37 % (2 if dtype == torch.bool else 256)).to(torch.uint8)

    class Extra(LlamaForCausalLM):
        def __init__(self, config):
            super().__init__(config)
            if parameter:
                self.extra = torch.nn.Parameter(empty.clone().view(dtype), requires_grad=False)
            else:
                self.register_buffer("extra", empty.clone().view(dtype))

    return Extra, values.view(dtype)


@pytest.mark.parametrize("parameter", [True, False], ids=["parameter", "buffer"])
@pytest.mark.parametrize("dtype", DTYPE_NAMES, ids=str)
def test_whatever_safetensors_names_is_written_byte_for_byte(tmp_path, dtype, parameter):
    kind, values = with_extra(dtype, parameter=parameter)
    base = kind.from_pretrained(save_base(tmp_path / "base"), dtype=torch.bfloat16)
    base.extra.data = values.clone()
    result = merge_adapter(adapt(base), tmp_path / "out", progress=False, verify=True)
    assert result.manifest["verification"]["problems"] == []
    found = load_file(result.path / "model.safetensors")["extra"]
    assert found.dtype == dtype
    assert torch.equal(found.view(torch.uint8), values.view(torch.uint8))


@pytest.mark.parametrize("dtype", [torch.int64, torch.complex64, torch.float8_e4m3fn], ids=str)
def test_a_copy_that_differs_in_one_bit_is_no_copy(tmp_path, dtype):
    kind, values = with_extra(dtype, parameter=False)
    save_base(tmp_path / "base")
    live, rebuilt = [kind.from_pretrained(tmp_path / "base", dtype="auto") for _ in range(2)]
    for model in (live, rebuilt):
        model.extra.data = values.clone()
    plan = make_plan(adapt(live), MergeOptions())
    assert deviations(plan, "merged_16bit", rebuilt)["extra"] == Deviation(0.0, False)
    rebuilt.extra.data.view(torch.uint8)[5] ^= 1
    assert deviations(plan, "merged_16bit", rebuilt)["extra"].broken


@pytest.mark.parametrize("dtype", [torch.complex128, torch.uint4, torch.float4_e2m1fn_x2], ids=str)
def test_a_dtype_that_safetensors_does_not_name_is_refused_with_the_cure(tmp_path, dtype):
    model = qlora(tmp_path)
    model.get_base_model().model.register_buffer("extra", torch.empty(4, dtype=dtype))
    with pytest.raises(MergeRefused) as caught:
        check_merge(model, MergeStore(tmp_path / "out"), MergeOptions(verify=False))
    assert list(caught.value.problems) == [
        f"model.extra: safetensors files hold no {dtype}; convert it before training, or register "
        "the buffer with persistent=False"
    ]
    check_merge(model, MergeStore(tmp_path / "out"), MergeOptions(save_method="lora"))


def test_a_tensor_that_would_not_load_again_is_found_before_training(tmp_path):
    model = qlora(tmp_path)
    inner, store = model.get_base_model().model, MergeStore(tmp_path / "out")
    inner.register_buffer("one", torch.zeros(4))
    inner.register_buffer("other", torch.zeros(4))
    with pytest.raises(MergeRefused) as caught:
        check_merge(model, store, MergeOptions())
    assert list(caught.value.problems) == [
        "model.one and 1 others: LlamaForCausalLM makes no such tensor, so it would not load "
        "again; take it off the model, or register the buffer with persistent=False"
    ]
    for accepted in (MergeOptions(verify=False), MergeOptions(verify="warn")):
        check_merge(model, store, accepted)
    for name in ("one", "other"):
        delattr(inner, name)
        inner.register_buffer(name, torch.zeros(4), persistent=False)
    check_merge(model, store, MergeOptions())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["bfloat16", "nf4"])
def test_four_bits_that_transformers_cannot_load_are_found_before_training(
    tmp_path, monkeypatch, capfd, kind
):
    save_small("causal", "llama4_text", tmp_path / "base")
    model = adapt(load_base(tmp_path / "base", kind), target_modules=["q_proj"])
    store, scratch = MergeStore(tmp_path / "out"), tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(scratch))
    torch.manual_seed(5)
    capfd.readouterr()
    wanted = torch.random.get_rng_state()
    with pytest.raises(MergeRefused) as caught:
        check_merge(model, store, MergeOptions(save_method=["merged_16bit", "merged_4bit"]))
    assert list(caught.value.problems) == [
        "merged_4bit does not load: \"normal_kernel_cpu\" not implemented for 'Byte' "
        "(Llama4ForCausalLM); use save_method='merged_16bit'"
    ]
    assert torch.equal(torch.random.get_rng_state(), wanted)
    assert list(scratch.iterdir()) == []
    assert "Loading weights" not in "".join(capfd.readouterr())
    check_merge(model, store, MergeOptions(save_method="merged_16bit"))
    check_merge(model, store, MergeOptions(save_method="merged_4bit", verify=False))


@pytest.mark.filterwarnings("ignore")
def test_what_a_model_reads_itself_stays_in_16_bits(tmp_path):
    save_small("causal", "mamba", tmp_path / "base")
    model = adapt(load_base(tmp_path / "base", "bfloat16"), target_modules=["in_proj"])
    result = merge_adapter(
        model, tmp_path / "out", save_method="merged_4bit", verification_data=batches(2)
    )
    assert result.manifest["verification"]["checks"]["merged_4bit: outputs"] == "passed"
    read = {name for name, _ in model.get_base_model().named_modules() if "dt_proj" in name}
    config = json.loads((result.path / "config.json").read_text())["quantization_config"]
    assert read and set(config["llm_int8_skip_modules"]) == {*read, "lm_head"}


def test_what_the_class_keeps_in_32_bits_is_not_quantised(tmp_path):
    model = qlora(tmp_path, "bfloat16")
    model.get_base_model()._keep_in_fp32_modules_strict = {"gate_proj"}
    plan = make_plan(model, MergeOptions(save_method="merged_4bit"))
    layers = range(model.config.num_hidden_layers)
    gates = [f"model.layers.{i}.mlp.gate_proj" for i in layers]
    assert plan.unquantised_linears("merged_4bit") == ["lm_head", *gates]


class Reading(torch.nn.Module):
    def __init__(self):
        super().__init__()
        names = "called read cast asked sliced fused made"
        for name in names.split():
            setattr(self, name, torch.nn.Linear(4, 4))
        torch.nn.init.zeros_(self.made.weight)

    def forward(self, x):
        # self.called.weight is a comment
        if self.training:
            x = x @ self.fused.weight
        x = self.called(x.to(self.asked.weight.dtype)) @ self.read.weight.t()
        x = self.asked(x) @ self.sliced.weight[:2].t().repeat(1, 2)
        return self.fused(self.cast(x.to(self.cast.weight.dtype)))


def test_weights_that_a_model_reads_itself_are_found():
    model = torch.nn.ModuleDict({"inner": Reading()})
    assert used_outside_their_layers(model) == {
        "inner.asked.weight",
        "inner.cast.weight",
        "inner.read.weight",
    }
    model.inner = torch.nn.ModuleDict({"again": model.inner})
    assert "inner.again.read.weight" in used_outside_their_layers(model)


def test_the_output_has_a_dtype_of_weights_though_the_first_tensor_has_8_bits(tmp_path):
    model = qlora(tmp_path, "float32")
    model.config.dtype = None
    base = model.get_base_model()
    own = dict(base._parameters)
    base._parameters.clear()
    base.register_parameter(
        "extra", torch.nn.Parameter(torch.zeros(4).to(torch.float8_e4m3fn), requires_grad=False)
    )
    base._parameters.update(own)
    assert make_plan(model, MergeOptions()).dtype == torch.float32


def test_weights_that_are_nowhere_are_refused(tmp_path):
    model = qlora(tmp_path, "bfloat16")
    model.get_base_model().model.layers[0].to("meta")
    with pytest.raises(MergeRefused, match="offloaded"):
        merge_adapter(model, tmp_path / "out")


def test_every_architecture_names_a_class():
    assert all(hasattr(transformers, kind) for kind, _ in MODELS.values())


def test_what_the_class_keeps_in_32_bits_stays_so(tmp_path):
    base = load_base(save_base(tmp_path / "base"), "bfloat16")
    base._keep_in_fp32_modules_strict = {"post_attention_layernorm"}
    for layer in base.model.layers:  # their values fit 16 bits
        layer.post_attention_layernorm.float()
        layer.input_layernorm.float()
    result = merge_adapter(adapt(base), tmp_path / "out", verify=False, progress=False)
    written = load_file(result.path / "model.safetensors")
    for name, tensor in written.items():
        kept = "post_attention_layernorm" in name
        assert tensor.dtype == (torch.float32 if kept else torch.bfloat16), name
    layer = base.model.layers[0].post_attention_layernorm
    name = "model.layers.0.post_attention_layernorm.weight"
    assert torch.equal(written[name], layer.weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_infinite_values_that_nothing_changes_are_written_as_they_are(tmp_path, dtype):
    path = save_base(tmp_path / "base", tied=False)
    base = load_base(path, "bfloat16")
    with torch.no_grad():
        base.model.norm.weight[:2] = torch.tensor([torch.inf, -torch.inf])
        base.model.norm.to(dtype)
    result = merge_adapter(adapt(base, target_modules=["q_proj"]), tmp_path / "out")
    written = load_file(result.path / "model.safetensors")
    assert torch.equal(written["model.norm.weight"], base.model.norm.weight.to(torch.bfloat16))
    assert result.manifest["verification"]["problems"] == []


def four_bits(name, path, **settings):
    """A small model of images and text on an NF4 base, adapted."""
    save_small("image-text", name, path)
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", **settings)
    base = AutoModelForImageTextToText.from_pretrained(
        path, dtype=torch.bfloat16, quantization_config=config
    )
    return adapt(base, target_modules="all-linear", task_type=None)


@pytest.mark.filterwarnings("ignore")
def test_a_model_that_casts_activations_to_uint8_is_refused_with_the_skip_list(tmp_path):
    """Pix2Struct, as T5 without its float32 list: in 4 bits its outputs are noise."""
    with pytest.raises(MergeRefused, match=r"llm_int8_skip_modules=\['wo'\]"):
        check_merge(four_bits("pix2struct", tmp_path / "a"), MergeStore(tmp_path), MergeOptions())
    model = four_bits("pix2struct", tmp_path / "b", llm_int8_skip_modules=["wo", "lm_head"])
    check_merge(model, MergeStore(tmp_path), MergeOptions())


@pytest.mark.filterwarnings("ignore")
def test_what_loaders_skip_for_its_tie_is_named_once_the_tie_breaks(tmp_path):
    """BLIP's decoder has no name of its own in the default list of what is not quantised."""
    model = four_bits("blip", tmp_path / "base")
    result = merge_adapter(
        model, tmp_path / "out", save_method="merged_4bit", verification_data=rows("blip", 1, 9),
        rounding="stochastic", progress=False,
    )  # fmt: skip
    assert result.manifest["verification"]["checks"]["merged_4bit: outputs"] == "passed"
    config = json.loads((result.path / "config.json").read_text())["quantization_config"]
    assert "text_decoder.cls.predictions.decoder" in config["llm_int8_skip_modules"]


def test_a_quantisation_that_the_config_holds_as_a_dict_is_written_as_an_object_is(tmp_path):
    model = qlora(tmp_path)
    settings = {
        "save_method": ["merged_4bit", "merged_16bit"], "rounding": "nearest",
        "verification_data": [{"input_ids": torch.arange(3, 35)[None]}], "progress": False,
    }  # fmt: skip
    plain = merge_adapter(model, tmp_path / "plain", **settings)
    write_recipe(model, plain.paths["merged_4bit"])
    told = {  # as Unsloth's loader does where there is a GPU
        "bnb_4bit_compute_dtype": torch.bfloat16,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_has_fp16_weight": False,
        "llm_int8_skip_modules": None,
        "llm_int8_threshold": 6.0,
        "load_in_4bit": True,
        "load_in_8bit": False,
        "quant_method": "bitsandbytes",
    }
    model.config.update({"quantization_config": told})
    result = merge_adapter(model, tmp_path / "dict", **settings)
    write_recipe(model, result.paths["merged_4bit"])
    assert model.config.quantization_config is told
    for method, path in plain.paths.items():
        for file in path.iterdir():
            if file.name in ("config.json", "model.safetensors", "merge_callback.json"):
                assert (result.paths[method] / file.name).read_bytes() == file.read_bytes(), file
