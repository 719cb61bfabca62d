"""Architectures: names, shapes and untouched bytes are those of the base's checkpoint."""

import json

import pytest
import torch
import transformers
from models import adapt, same, snapshot
from safetensors.torch import load_file
from test_calibration import batches
from transformers import BitsAndBytesConfig

from merge_callback import merge_adapter
from merge_callback.live import keep_cpu_weights_unpacked

pytestmark = pytest.mark.matrix

TEXT = {
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 304,
    "max_position_embeddings": 128,
}
HEADS = TEXT | {"num_key_value_heads": 2}
MOE = HEADS | {"moe_intermediate_size": 64, "num_experts": 4, "num_experts_per_tok": 2}
VISION = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 16,
}
NO_PADDING = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
MODELS = {  # name -> class, settings of its config
    "llama, tied": ("LlamaForCausalLM", HEADS | {"tie_word_embeddings": True}),
    "llama": ("LlamaForCausalLM", HEADS),
    "mistral": ("MistralForCausalLM", HEADS),
    "qwen2": ("Qwen2ForCausalLM", HEADS),
    "qwen3": ("Qwen3ForCausalLM", HEADS | {"head_dim": 32}),
    "qwen3_moe": ("Qwen3MoeForCausalLM", MOE | {"head_dim": 32}),
    "mixtral": ("MixtralForCausalLM", HEADS | {"num_local_experts": 4}),
    "gpt_oss": (
        "GptOssForCausalLM",
        HEADS | NO_PADDING | {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 32},
    ),
    "gemma2": ("Gemma2ForCausalLM", HEADS | {"head_dim": 32}),
    "gemma3": (
        "Gemma3ForConditionalGeneration",
        {
            "text_config": HEADS | {"head_dim": 32, "sliding_window": 16},
            "vision_config": VISION,
            "mm_tokens_per_image": 4,
            "image_token_index": 303,
        },
    ),
    "phi3": ("Phi3ForCausalLM", HEADS | NO_PADDING),
    "gpt2": (
        "GPT2LMHeadModel",
        {"n_embd": 128, "n_layer": 2, "n_head": 4, "vocab_size": 304, "n_positions": 128},
    ),
    "gpt_neox": ("GPTNeoXForCausalLM", TEXT),
    "deepseek_v3": (
        "DeepseekV3ForCausalLM",
        HEADS
        | {
            "num_key_value_heads": 4, "moe_intermediate_size": 64, "n_routed_experts": 4,
            "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1,
            "q_lora_rank": 64, "kv_lora_rank": 64, "qk_nope_head_dim": 32, "qk_rope_head_dim": 32,
            "v_head_dim": 32, "n_shared_experts": 1,
        },
    ),
    "qwen2_vl": (
        "Qwen2VLForConditionalGeneration",
        {
            "text_config": HEADS
            | {"rope_parameters": {"rope_type": "default", "mrope_section": [4, 6, 6]}},
            "vision_config": {
                "depth": 2, "embed_dim": 64, "hidden_size": 128, "num_heads": 2, "patch_size": 14,
            },
            "image_token_id": 303, "video_token_id": 302,
            "vision_start_token_id": 301, "vision_end_token_id": 300,
        },
    ),
    "llava": (
        "LlavaForConditionalGeneration",
        {
            "text_config": HEADS | {"model_type": "llama"},
            "vision_config": VISION | {"model_type": "clip_vision_model"},
            "image_token_index": 303,
            "image_seq_length": 4,
        },
    ),
    "mllama": (
        "MllamaForConditionalGeneration",
        {
            "text_config": HEADS | NO_PADDING | {"cross_attention_layers": [1]},
            "vision_config": {
                "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
                "num_global_layers": 1, "attention_heads": 2, "image_size": 32, "patch_size": 16,
                "vision_output_dim": 128, "intermediate_layers_indices": [0],
                "supported_aspect_ratios": [[1, 1]], "max_num_tiles": 1,
            },
            "image_token_index": 303,
        },
    ),
    "falcon_h1": (
        "FalconH1ForCausalLM",
        HEADS
        | NO_PADDING
        | {
            "mamba_d_ssm": 128, "mamba_n_heads": 4, "mamba_d_head": 32, "mamba_n_groups": 1,
            "mamba_d_state": 16, "head_dim": 32,
        },
    ),
    "bert": ("BertForSequenceClassification", TEXT | {"num_labels": 3}),
    "t5": (
        "T5ForConditionalGeneration",
        {
            "d_model": 128, "d_kv": 32, "d_ff": 192, "num_layers": 2, "num_heads": 4,
            "vocab_size": 304, "decoder_start_token_id": 0,
        },
    ),
    "whisper": (
        "WhisperForConditionalGeneration",
        NO_PADDING
        | {
            "d_model": 128, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
            "decoder_attention_heads": 4, "encoder_ffn_dim": 192, "decoder_ffn_dim": 192,
            "vocab_size": 304, "num_mel_bins": 16, "max_source_positions": 32,
            "max_target_positions": 64, "decoder_start_token_id": 3,
        },
    ),
}  # fmt: skip
# A head of these is not quantised, for it is tied or the output; gpt2's Conv1D is on nf4 alone.


def made(name, path):
    kind, settings = MODELS[name]
    model_class = getattr(transformers, kind)
    torch.manual_seed(3)
    model = model_class(model_class.config_class(**settings)).bfloat16()
    for key, parameter in model.named_parameters():
        if "norm" in key and parameter.dim() == 1:  # ones would hide a norm that got lost
            torch.nn.init.normal_(parameter, 1, 0.1)
    model.save_pretrained(path)
    if model._get_dtype_plan(torch.bfloat16):  # as transformers saves it: some stays in float32
        model_class.from_pretrained(path, dtype=torch.bfloat16).save_pretrained(path)
    return model_class


def data(name):
    found = batches(2, vocabulary=300)
    for batch in found:
        if name in ("t5", "whisper"):
            batch["labels"] = batch["input_ids"][:, :9].clone()
        if name == "whisper":
            batch.clear()
            generator = torch.Generator().manual_seed(1)
            batch["input_features"] = torch.randn(4, 16, 64, generator=generator)
            batch["labels"] = torch.randint(4, 300, (4, 9), generator=generator)
        if name == "bert":
            batch["labels"] = torch.tensor([0, 1, 2, 0])
    return found


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["bfloat16", "nf4"])
@pytest.mark.parametrize("name", MODELS)
def test_an_architecture_is_written_as_its_base_was(tmp_path, name, kind, support):
    support("Architectures", name, kind)
    model_class = made(name, tmp_path / "base")
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.bfloat16,
        llm_int8_skip_modules=["classifier"] if name == "bert" else None,
    )
    settings = {"quantization_config": config} if kind == "nf4" else {}
    base = model_class.from_pretrained(tmp_path / "base", dtype=torch.bfloat16, **settings)
    keep_cpu_weights_unpacked(base)
    task = "SEQ_CLS" if name == "bert" else None
    model = adapt(base, scale=0.02, task_type=task, target_modules=targets(name, base))
    before = snapshot(model)
    methods = ["merged_16bit", "merged_4bit"] if kind == "nf4" else ["merged_16bit"]
    result = merge_adapter(
        model, tmp_path / "out", save_method=methods, verification_data=data(name), progress=False
    )
    assert same(before, snapshot(model))
    found = result.manifest["verification"]
    assert found["problems"] == [] and found["data"] == "held-out data"
    place = result.paths["merged_16bit"]
    one, other = (load_file(path / "model.safetensors") for path in (tmp_path / "base", place))
    assert one.keys() == other.keys()
    changed = set()
    for key, tensor in other.items():
        assert tensor.shape == one[key].shape and tensor.dtype == one[key].dtype, key
        changed |= set() if torch.equal(tensor, one[key]) else {key}
    adapted = result.manifest["retention"]["merged_16bit"]["tensors"]
    if kind == "bfloat16":  # and those that no adapter touches are the same bytes
        one_by_one = {key for key in changed if ".experts." not in key}  # experts are fused
        assert len(one_by_one) == len([key for key in adapted if ".experts." not in key]) > 0
    written = json.loads((place / "config.json").read_text())
    assert written["architectures"] == [model_class.__name__]
    assert (
        written["model_type"]
        == json.loads((tmp_path / "base/config.json").read_text())["model_type"]
    )


PARTS = {
    "attention": ["q_proj", "k_proj", "v_proj", "o_proj"],
    "mlp": ["gate_proj", "up_proj", "down_proj"],
    "both": "all-linear",
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("settings", [{}, {"use_dora": True}], ids=["lora", "dora"])
@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("name", ["llama", "qwen3", "mistral", "gemma2"])
def test_a_float32_merge_is_that_of_peft(tmp_path, name, part, settings):
    model_class = made(name, tmp_path / "base")
    base = model_class.from_pretrained(tmp_path / "base", dtype=torch.float32)
    base.save_pretrained(tmp_path / "whole")
    patterns = {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"up_proj": 3}}
    model = adapt(base, target_modules=PARTS[part], **patterns, **settings)
    result = merge_adapter(
        model, tmp_path / "out", max_shard_size="300KB", progress=False, save_method="merged_16bit"
    )
    index = json.loads((result.path / "model.safetensors.index.json").read_text())["weight_map"]
    written = {}
    for file in sorted(set(index.values())):
        part_of = load_file(result.path / file)
        assert all(index[key] == file for key in part_of)
        written |= part_of
    assert written.keys() == index.keys()
    wanted = model.merge_and_unload().state_dict()
    before = load_file(tmp_path / "whole" / "model.safetensors")
    assert written.keys() == before.keys() and not any("lora" in key for key in written)
    limit = 1e-4 if settings else 1e-5
    adapted = result.manifest["retention"]["merged_16bit"]["tensors"]
    for key, tensor in written.items():
        if key in adapted:
            delta = wanted[key] - before[key]
            assert float((tensor - wanted[key]).norm() / delta.norm()) < limit, key
        else:
            assert torch.equal(tensor, before[key]), key


def targets(name, model):
    """Linear layers inside the blocks; the names that PEFT takes."""
    found = set()
    for key, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) or type(module).__name__ == "Conv1D":
            inside = any(part.isdigit() for part in key.split("."))
            if inside and not key.endswith("mamba.out_proj"):  # PEFT refuses that one
                found.add(key)
    return sorted(found)
