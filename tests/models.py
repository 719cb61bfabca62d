"""Tiny real models, and what a merge of them must give, computed in float64."""

import copy

import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from merge_callback.live import keep_cpu_weights_unpacked

QUANTISED = ("nf4-nested", "nf4", "fp4")
BASES = (*QUANTISED, "int8", "bfloat16", "float32")


def save_base(path, *, tied=True, dtype=torch.bfloat16, **changes):
    """A two-layer Llama; 128 columns, since 64 would hide what bitsandbytes does on AVX512."""
    settings = {
        "hidden_size": 128,
        "intermediate_size": 192,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 304,
        "tie_word_embeddings": tied,
    }
    torch.manual_seed(1)
    model = LlamaForCausalLM(LlamaConfig(**settings | changes)).to(dtype)
    for name, parameter in model.named_parameters():
        if "norm" in name:  # ones would hide a norm that got lost
            torch.nn.init.normal_(parameter, 1, 0.1)
    model.save_pretrained(path)
    return path


def load_base(path, kind):
    """The base as a user loads it. `kind`: one of BASES."""
    if kind in ("bfloat16", "float32"):
        return AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, kind))
    if kind == "int8":
        config = BitsAndBytesConfig(load_in_8bit=True)
    else:
        config = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=kind[:3],
            bnb_4bit_use_double_quant=kind.endswith("nested"),
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
    model = AutoModelForCausalLM.from_pretrained(
        path, quantization_config=config, dtype=torch.bfloat16
    )
    keep_cpu_weights_unpacked(model)
    return model


def adapt(model, seed=2, scale=0.02, name="default", **settings):
    """Attach a LoRA adapter with random weights, small against the base's."""
    settings = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"} | settings
    config = LoraConfig(**{"task_type": "CAUSAL_LM"} | settings)
    if hasattr(model, "peft_config"):
        model.add_adapter(name, config)
    else:
        model = get_peft_model(model, config, adapter_name=name)
    generator = torch.Generator().manual_seed(seed)
    for parameter_name, parameter in model.named_parameters():
        if ".lora_" in parameter_name and "magnitude" not in parameter_name:
            if f".{name}" in parameter_name:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.data.copy_(noise * scale**0.5)
    return model.eval()


def qlora(tmp_path, kind="nf4-nested", *, tied=True, **settings):
    """A tiny base of `kind` with an adapter on all its linear layers."""
    path = save_base(tmp_path / "base", tied=tied)
    return adapt(load_base(path, kind), **settings)


def base_weight(layer):
    """The float64 weight that a linear or embedding layer computes with."""
    import bitsandbytes as bnb

    weight = layer.weight
    if isinstance(layer, bnb.nn.Linear4bit):
        weight = bnb.functional.dequantize_4bit(weight.data, weight.quant_state)
    elif isinstance(layer, bnb.nn.Linear8bitLt):
        scales = layer.state.SCB if weight.SCB is None else weight.SCB
        weight = bnb.functional.int8_vectorwise_dequant(weight.data, scales)
    return weight.detach().double()


def merged_weights(model):
    """Name -> float64 weight of every adapted layer; plain LoRA only."""
    merged = {}
    for name, layer in model.get_base_model().named_modules():
        if not isinstance(layer, LoraLayer):
            continue
        weight = base_weight(layer.get_base_layer())
        for adapter in layer.active_adapters:
            scaling = layer.scaling[adapter]
            if adapter in layer.lora_A:
                a, b = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
                delta = b.detach().double() @ a.detach().double()
            else:
                a, b = layer.lora_embedding_A[adapter], layer.lora_embedding_B[adapter]
                delta = (b.detach().double() @ a.detach().double()).t()
            weight = weight + scaling * delta
        merged[f"{name}.weight"] = weight
    return merged


def ulps(one, other):
    """Largest distance between two tensors of one 16-bit dtype, in units in the last place."""
    assert one.dtype == other.dtype
    ordered = [t.contiguous().view(torch.int16).int() for t in (one, other)]
    ordered = [torch.where(o < 0, -32768 - o, o) for o in ordered]
    return int((ordered[0] - ordered[1]).abs().max())


def logits(model, seed=3):
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, 300, (2, 32), generator=generator)
    with torch.no_grad():
        return model(input_ids=tokens).logits.float()


def snapshot(model):
    """Everything about a live model that a merge must leave alone."""
    modules = dict(model.named_modules())
    return {
        "tensors": {
            n: (t.detach().clone(), t.data_ptr(), t.requires_grad, type(t))
            for n, t in [*model.named_parameters(), *model.named_buffers()]
        },
        "quant_states": {
            n: {k: copy.deepcopy(v) for k, v in p.quant_state.as_dict().items()}
            for n, p in model.named_parameters()
            if getattr(p, "quant_state", None) is not None
        },
        "modules": {n: (id(m), type(m), m.training) for n, m in modules.items()},
        "hooks": {
            n: [len(v) for k, v in vars(m).items() if k.endswith("_hooks")]
            for n, m in modules.items()
        },
        "attributes": {n: sorted(vars(m)) for n, m in modules.items()},
        "config": model.config.to_dict(),
        "generation_config": vars(getattr(model, "generation_config", None) or object),
        "peft_config": {n: dict(vars(c)) for n, c in model.peft_config.items()},
        "rng": torch.get_rng_state(),
    }


def same(one, other):
    """Deep equality, tensors bit for bit."""
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[k], other[k]) for k in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


def tokenizer():
    """A word-level tokenizer with a chat template, made on the spot."""
    words = ["<pad>", "</s>", "<unk>", *(f"w{i}" for i in range(300))]
    model = WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>")
    backend = Tokenizer(model)
    backend.pre_tokenizer = Whitespace()
    made = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )
    made.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    return made
