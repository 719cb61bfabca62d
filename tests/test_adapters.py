"""Every tuner of PEFT: merged as PEFT itself computes it in float64, or refused by name."""

import copy
import inspect
import warnings

import peft
import pytest
import torch
from models import adapt, load_base, logits, qlora, save_base
from peft import LoraConfig, PeftModel, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
)

from merge_callback import MergeRefused, merge_adapter
from merge_callback.live import base_model, read_weights

pytestmark = pytest.mark.matrix

EXACT = {"save_method": "merged_16bit", "dtype": "float32", "progress": False}
TARGETS = ["q_proj", "v_proj", "down_proj"]
SETTINGS = {
    "ADALORA": {"total_step": 10},
    "ADAPTION_PROMPT": {"adapter_len": 4, "adapter_layers": 1, "target_modules": "self_attn"},
    "C3A": {"block_size": 32},
    "IA3": {"feedforward_modules": ["down_proj"]},
    "LN_TUNING": {"target_modules": ["input_layernorm", "norm"]},
    "PROMPT_TUNING": {"num_virtual_tokens": 2},
    "SHIRA": {"r": 4},
    "VBLORA": {"vector_length": 64, "num_vectors": 16},
}
KINDS = {str(getattr(kind, "value", kind)): kind for kind in PEFT_TYPE_TO_TUNER_MAPPING}
REFUSED = {  # what is said of them
    "ADAPTION_PROMPT": "beside the weights",
    "LILY": "no product with a matrix",
    "PROMPT_TUNING": "beside the weights",
}
# On a 4-bit base these do not run in PEFT 0.21 itself: making them raises, or their forward does.
NOT_LIVE_ON_4BIT = {
    "DEFT", "DELORA", "FROD", "GLORA", "HRA", "LOHA", "LOKR", "OSF", "PEANUT", "PSOFT",
    "SUPERTUNING", "TINYLORA",
}  # fmt: skip
# Not tuners of weights, or they need what this test does not give them (scikit-learn, task ids, a
# classifier over experts, an initialised cache).
LEFT_OUT = {
    "ADAMSS", "CARTRIDGE", "CPT", "LORA", "MULTITASK_PROMPT_TUNING", "POLY", "PREFIX_TUNING",
    "P_TUNING", "SHADOW", "TRAINABLE_TOKENS", "XLORA",
}  # fmt: skip
TUNERS = sorted(set(KINDS) - LEFT_OUT)


def tuned(model, name, seed=2):
    """`model` with an adapter of a kind, all of its parameters moved from where they begin."""
    config_class = PEFT_TYPE_TO_CONFIG_MAPPING[KINDS[name]]
    known = inspect.signature(config_class).parameters
    settings = {"target_modules": TARGETS, "task_type": "CAUSAL_LM"} | SETTINGS.get(name, {})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(
            model, config_class(**{k: v for k, v in settings.items() if k in known})
        )
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            noise = 0.05 * torch.randn(parameter.shape, generator=generator)
            parameter.data += noise.to(parameter.dtype)
    return model.eval()


def load_nf4(path):
    """A 4-bit base that computes in float32: several tuners mix dtypes otherwise, and raise."""
    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
    )
    return AutoModelForCausalLM.from_pretrained(
        path, quantization_config=config, dtype=torch.float32
    )


def in_float64(model):
    """The live model in float64, its base decoded: what it would say without any rounding."""
    weights = read_weights(base_model(model))
    memo = {}
    for name, module in model.get_base_model().named_modules():
        if isinstance(module, BaseTunerLayer):
            module, name = module.get_base_layer(), name
        if type(module).__module__.startswith("bitsandbytes"):
            weight = weights[f"{name.removesuffix('.base_layer')}.weight"].decoded()
            linear = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
            linear.weight.data, linear.bias = weight.double(), copy.deepcopy(module.bias)
            memo[id(module)] = linear
    memo |= {id(b): b.detach().clone() for b in model.buffers() if not b.is_leaf}
    whole = copy.deepcopy(model, memo)
    for module in whole.modules():
        if isinstance(module, BaseTunerLayer):
            if type(module).__module__.endswith(".bnb"):
                kind = type(module).__name__.removesuffix("4bit").removesuffix("8bitLt")
                package = type(module).__module__.removesuffix(".bnb")
                module.__class__ = getattr(__import__(f"{package}.layer", fromlist=[kind]), kind)
            module.quantization_backend = None
            module.fan_in_fan_out = getattr(module, "fan_in_fan_out", False)
    return whole.double().eval()


def effect_error(model, path):
    """|merged - live| / |live - base| of float64 logits; of the file as float32 weights hold it."""
    merged = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).double().eval()
    exact = in_float64(model)
    wanted = logits64(exact)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with exact.disable_adapter():
            base = logits64(exact)
    return float((logits64(merged) - wanted).norm() / (wanted - base).norm())


def logits64(model):
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")  # others know no float64
    ids = torch.randint(0, 300, (2, 16), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        return model(input_ids=ids).logits


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["float32", "nf4"])
@pytest.mark.parametrize("tuner", TUNERS)
def test_tuners_merge_as_peft_computes_them(tmp_path, tuner, kind, support):
    support("Tuners", tuner, kind)
    path = save_base(tmp_path / "base", num_key_value_heads=4)
    if kind == "nf4" and tuner in NOT_LIVE_ON_4BIT:
        with pytest.raises((RuntimeError, ValueError, TypeError)):
            logits64(tuned(load_nf4(path), tuner))
        return support.refused("does not run in PEFT")
    if tuner == "BEFT":  # biases alone: the base has to have some
        path = save_base(tmp_path / "base", num_key_value_heads=4, attention_bias=True)
        SETTINGS["BEFT"] = {"target_modules": ["q_proj", "v_proj"]}
    model = tuned(load_base(path, kind) if kind == "float32" else load_nf4(path), tuner)
    if (tuner, kind) == ("UNILORA", "nf4"):  # PEFT's scales are uint8 there, and 0
        with pytest.raises(MergeRefused, match="adds nothing"):
            merge_adapter(model, tmp_path / "out")
        return support.refused("adds nothing in PEFT")
    if tuner in REFUSED:
        with pytest.raises(MergeRefused, match=REFUSED[tuner]):
            merge_adapter(model, tmp_path / "out")
        return support.refused(REFUSED[tuner])
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    result = merge_adapter(model, tmp_path / "out", **EXACT)
    assert effect_error(model, result.path) < 2e-4
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())
    if kind == "nf4" and tuner != "LN_TUNING":
        merge_adapter(model, tmp_path / "out", progress=False)


def test_every_tuner_of_peft_is_accounted_for():
    assert set(TUNERS) | LEFT_OUT == set(KINDS)


@pytest.mark.parametrize("name", ["P_TUNING", "PREFIX_TUNING", "CPT"])
def test_prompts_are_refused_by_name(tmp_path, name):
    config_class = PEFT_TYPE_TO_CONFIG_MAPPING[KINDS[name]]
    extra = {"num_virtual_tokens": 2} if name != "CPT" else {"cpt_token_ids": [3, 4]}
    extra |= {"encoder_hidden_size": 16} if name == "P_TUNING" else {}
    base = load_base(save_base(tmp_path / "base"), "bfloat16")
    model = get_peft_model(base, config_class(task_type="CAUSAL_LM", **extra))
    with pytest.raises(MergeRefused, match=f"{name} works beside the weights"):
        merge_adapter(model, tmp_path / "out")


LORAS = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "rank_pattern": {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 3, "up_proj": 16}},
    "lora_bias": {"lora_bias": True, "target_modules": ["q_proj", "v_proj"]},
    "bias_all": {"bias": "all", "target_modules": ["q_proj", "v_proj"]},
    "bias_lora_only": {"bias": "lora_only", "target_modules": ["q_proj", "v_proj"]},
    "embedding": {"target_modules": ["embed_tokens", "q_proj"]},
    "dora_embedding": {"target_modules": ["embed_tokens", "q_proj"], "use_dora": True},
    "lm_head": {"target_modules": ["lm_head", "q_proj"]},
    "modules_to_save": {"modules_to_save": ["lm_head", "norm"]},
    "trainable_tokens": {"trainable_token_indices": {"embed_tokens": [1, 5, 300]}},
    "pissa": {"init_lora_weights": "pissa"},
    "olora": {"init_lora_weights": "olora"},
    "orthogonal": {"init_lora_weights": "orthogonal"},
    "eva": {"init_lora_weights": "eva"},
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["float32", "bfloat16", "int8", "nf4", "nf4-nested", "fp4"])
@pytest.mark.parametrize("name", LORAS)
def test_loras_merge_as_peft_computes_them(tmp_path, name, kind, support):
    support("LoRA", name, kind)
    quantised = kind not in ("float32", "bfloat16")
    if (name in ("pissa", "orthogonal") and quantised) or (name, kind) == ("olora", "int8"):
        return support.refused("does not run in PEFT")
    path = save_base(tmp_path / "base", tied=False, attention_bias=True)
    model = adapt(load_base(path, kind), **LORAS[name])
    generator = torch.Generator().manual_seed(7)
    for key, parameter in model.named_parameters():
        if parameter.requires_grad and ".lora_A" not in key and parameter.is_floating_point():
            noise = 0.02 * torch.randn(parameter.shape, generator=generator)
            parameter.data += noise.to(parameter.dtype)
    result = merge_adapter(model, tmp_path / "out", **EXACT)
    assert effect_error(model, result.path) < 2e-4
    merge_adapter(model, tmp_path / "out", progress=False)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["float32", "nf4"])
def test_both_ends_of_a_tied_adapter_are_checked_and_tied_where_they_are(tmp_path, kind, caplog):
    ends = ["q_proj", "embed_tokens", "lm_head"]
    base = load_base(save_base(tmp_path / "base"), kind)
    model = adapt(base, target_modules=ends, ensure_weight_tying=True, seed=5)
    batch = {"input_ids": torch.arange(3, 60)[None]}
    settings = {"save_method": "merged_16bit", "dtype": "float32", "progress": False}
    result = merge_adapter(model, tmp_path / "out", verification_data=[batch], **settings)
    assert "could not be checked" not in caplog.text
    heads = [
        layer.get_delta_weight("default")
        for layer in (base.get_submodule("lm_head"), base.model.embed_tokens)
    ]
    tied = torch.equal(*heads)
    assert tied == (kind == "float32")  # PEFT casts the factors of a bfloat16 base, each by itself
    assert ("lm_head.weight" in load_file(result.path / "model.safetensors")) != tied
    with torch.no_grad():
        wanted = model(**batch).logits
        stock = AutoModelForCausalLM.from_pretrained(result.path, dtype=torch.float32)
        found = stock(**batch).logits
    assert torch.allclose(found, wanted.float(), atol=1e-4 if tied else 0.1 * float(wanted.std()))


@pytest.mark.parametrize("kind", ["bfloat16", "nf4"])
def test_tokens_of_tied_embeddings_stay_tied(tmp_path, kind):
    model = qlora(tmp_path, kind, trainable_token_indices=[1, 5, 300])
    for key, parameter in model.named_parameters():
        if "trainable_tokens_delta" in key:
            parameter.data += 0.1
    result = merge_adapter(model, tmp_path / "out", save_method="merged_16bit", dtype="float32")
    assert "lm_head.weight" not in load_file(result.path / "model.safetensors")
    written = load_file(result.path / "model.safetensors")["model.embed_tokens.weight"]
    base = model.get_base_model().model.embed_tokens.token_adapter.base_layer.weight.float()
    changed = (written != base).any(1).nonzero().flatten().tolist()
    assert changed == [1, 5, 300]
    assert effect_error(model, result.path) < 2e-4


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("settings", [{}, {"use_dora": True}], ids=["lora", "dora"])
def test_an_embedding_that_scales_is_stored_unscaled(tmp_path, settings):
    config = Gemma3TextConfig(
        hidden_size=128, intermediate_size=192, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, vocab_size=304, tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(1)
    model = adapt(Gemma3ForCausalLM(config), target_modules=["embed_tokens"], **settings)
    path = merge_adapter(model, tmp_path / "out", **EXACT).path
    assert effect_error(model, path) < 2e-4


def test_several_adapters_are_summed_and_rounded_once(tmp_path):
    model = qlora(tmp_path, "nf4")
    adapt(model, seed=6, name="other", r=8)
    model.base_model.set_adapter(["default", "other"])
    assert effect_error(model, merge_adapter(model, tmp_path / "out", **EXACT).path) < 2e-4
    for layer in model.modules():
        if hasattr(layer, "set_scale"):
            layer.set_scale("other", 0.3)
    assert effect_error(model, merge_adapter(model, tmp_path / "out", **EXACT).path) < 2e-4


@pytest.mark.filterwarnings("ignore")
def test_what_looks_at_other_tokens_is_refused(tmp_path):
    base = load_base(save_base(tmp_path / "base"), "bfloat16")
    config = LoraConfig(
        task_type="CAUSAL_LM", target_modules=["q_proj"], alora_invocation_tokens=[3, 4]
    )
    with pytest.raises(MergeRefused, match="q_proj"):
        merge_adapter(get_peft_model(base, config), tmp_path / "out")


@pytest.mark.parametrize("order", [["default", "other"], ["other", "default"]])
def test_dora_after_another_adapter_rescales_that_too(tmp_path, order):
    model = qlora(tmp_path, "nf4", scale=0.1)
    adapt(model, seed=6, name="other", use_dora=True, scale=0.1)
    generator = torch.Generator().manual_seed(7)
    for key, parameter in model.named_parameters():
        if "magnitude" in key:
            parameter.data *= 1 + 0.2 * torch.rand(parameter.shape, generator=generator)
    model.base_model.set_adapter(order)
    assert effect_error(model, merge_adapter(model, tmp_path / "out", **EXACT).path) < 2e-4


@pytest.mark.filterwarnings("ignore")
def test_layers_of_an_adapter_that_is_not_active_stay(tmp_path):
    base = load_base(save_base(tmp_path / "base", num_key_value_heads=4), "float32")
    model = tuned(base, "IA3")
    other = PEFT_TYPE_TO_CONFIG_MAPPING[KINDS["IA3"]](
        target_modules=["o_proj"], feedforward_modules=[], task_type="CAUSAL_LM"
    )
    model.add_adapter("other", other)
    model.set_adapter("default")
    result = merge_adapter(model, tmp_path / "out", **EXACT)
    assert not any("o_proj" in k for k in result.manifest["retention"]["merged_16bit"]["tensors"])
    assert effect_error(model, result.path) < 2e-4


def test_adapters_laid_over_each_other_are_refused(tmp_path):
    model = qlora(tmp_path, "bfloat16")
    layer = model.get_base_model().model.layers[0].mlp
    layer.up_proj = copy.deepcopy(layer.up_proj)
    layer.up_proj.base_layer = copy.deepcopy(layer.up_proj)
    with pytest.raises(MergeRefused, match="laid over another"):
        merge_adapter(model, tmp_path / "out")


def test_a_weight_under_another_name_is_refused(tmp_path):
    model = qlora(tmp_path, "float32", target_modules=["q_proj"])
    inner = model.get_base_model().model.layers[0].self_attn.q_proj.base_layer
    torch.nn.utils.parametrizations.weight_norm(inner)
    with pytest.raises(MergeRefused, match=r"q_proj\.weight: the Param.* has no such parameter"):
        merge_adapter(model, tmp_path / "out")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["kasa", "velora", "monteclora"])
def test_variants_of_lora_merge_as_peft_computes_them(tmp_path, name):
    known = inspect.signature(LoraConfig).parameters
    (flag,) = (k for k in known if name in k)
    (value,) = (getattr(peft, k) for k in dir(peft) if k.lower() == f"{name}config")
    base = load_base(save_base(tmp_path / "base", num_key_value_heads=4), "float32")
    config = LoraConfig(task_type="CAUSAL_LM", target_modules=TARGETS, **{flag: value()})
    model = get_peft_model(base, config)
    generator = torch.Generator().manual_seed(3)
    for key, parameter in model.named_parameters():
        if ".lora_B" in key:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    model.train()
    ids = torch.arange(3, 20)[None]
    model(input_ids=ids, labels=ids).loss.backward()
    model.eval()
    assert effect_error(model, merge_adapter(model, tmp_path / "out", **EXACT).path) < 2e-4


def test_replicated_layers_are_refused(tmp_path):
    base = load_base(save_base(tmp_path / "base"), "bfloat16")
    config = LoraConfig(target_modules=["q_proj"], layer_replication=[(0, 2), (1, 2)])
    with pytest.raises(MergeRefused, match="layer_replication"):
        merge_adapter(get_peft_model(base, config), tmp_path / "out")


@pytest.mark.filterwarnings("ignore")
def test_a_bias_that_the_base_does_not_have_is_refused(tmp_path):
    model = qlora(tmp_path, "nf4", target_modules=["q_proj"], lora_bias=True)
    with pytest.raises(MergeRefused, match="trains a bias where the base has none"):
        merge_adapter(model, tmp_path / "out")


def test_an_adapter_that_was_loaded_merges_as_the_one_that_was_saved(tmp_path):
    model = qlora(tmp_path, "nf4", use_dora=True)
    model.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(load_base(tmp_path / "base", "nf4"), tmp_path / "adapter")
    one, other = (
        merge_adapter(m, tmp_path / "out", save_method="merged_16bit").path for m in (model, loaded)
    )
    assert (one / "model.safetensors").read_bytes() == (other / "model.safetensors").read_bytes()
    assert torch.isfinite(logits(loaded)).all()
