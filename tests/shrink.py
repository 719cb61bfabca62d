"""A config of transformers, made small: every size that it names, and its parts likewise.

What no rule covers stands in CHANGES, with its reason.
"""

import math

import torch
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

VOCABULARY = 304
WORDS = 240  # below are words, above the tokens that stand for images, audio and the like
IMAGE = VOCABULARY - 1
LARGEST = 25_000_000  # parameters
AUTO = {"causal": AutoModelForCausalLM, "image-text": AutoModelForImageTextToText}
MAPPINGS = {
    "causal": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    "image-text": modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
}


def _each(value, names):
    return dict.fromkeys(names.split(), value)


SIZES = {
    **_each(VOCABULARY, "vocab_size vocab_size_per_layer_input"),
    **_each(128, "hidden_size d_model n_embd dim embed_dim embedding_size word_embed_proj_dim"),
    **_each(128, "lru_width out_hidden_size max_position_embeddings n_positions n_ctx"),
    **_each(192, "intermediate_size ffn_dim d_ff n_inner ffn_hidden_size feed_forward_hidden_size"),
    **_each(192, "encoder_ffn_dim decoder_ffn_dim mlp_dim dff dim_ff"),
    **_each(2, "num_hidden_layers n_layer n_layers num_layers num_decoder_layers depth"),
    **_each(2, "num_encoder_layers encoder_layers decoder_layers max_window_layers"),
    **_each(4, "num_attention_heads n_head n_heads num_heads attention_heads"),
    **_each(4, "encoder_attention_heads decoder_attention_heads"),
    **_each(2, "num_key_value_heads type_vocab_size"),
    **_each(32, "head_dim kv_channels d_kv qk_nope_head_dim qk_rope_head_dim v_head_dim"),
    **_each(64, "q_lora_rank kv_lora_rank projection_dim max_target_positions"),
    # experts
    **_each(4, "num_local_experts num_experts n_routed_experts moe_num_experts"),
    **_each(2, "num_experts_per_tok moe_topk moe_k"),
    **_each(64, "moe_intermediate_size shared_expert_intermediate_size expert_ffn_hidden_size"),
    **_each(64, "shared_intermediate_size"),
    **_each(1, "n_shared_experts num_shared_experts moe_num_shared_experts n_group topk_group"),
    **_each(1, "first_k_dense_replace moe_layer_start_index"),
    # state spaces and linear attention
    **_each(4, "mamba_num_heads linear_num_value_heads conv_L_cache"),
    "mamba_n_heads": 8,
    "mamba_d_ssm": 256,
    **_each(32, "mamba_d_head mamba_head_dim linear_key_head_dim linear_value_head_dim"),
    **_each(16, "mamba_d_state ssm_state_size state_size sliding_window attention_window_size"),
    **_each(1, "mamba_n_groups n_groups"),
    **_each(2, "n_mamba_heads linear_num_key_heads"),
    **_each(8, "mamba_dt_rank time_step_rank"),
    # images and audio
    **_each(16, "patch_size num_mel_bins laurel_rank"),
    **_each(32, "image_size max_source_positions hidden_size_per_layer_input"),
    # what would make two runs differ, or belongs to no stock class
    **_each(0.0, "dropout attention_dropout hidden_dropout hidden_dropout_prob"),
    **_each(0.0, "attention_probs_dropout_prob embd_pdrop attn_pdrop resid_pdrop"),
    **_each(0, "num_nextn_predict_layers num_kv_shared_layers decoder_start_token_id"),
}
ENCODER = SIZES | {
    **_each(64, "hidden_size embed_dim d_model dim"),
    **_each(2, "num_attention_heads num_heads encoder_attention_heads num_key_value_heads"),
    "intermediate_size": 128,
}
_ENCODES = ("vision", "audio", "speech", "image", "video", "backbone", "vq", "vit", "sam")
_PER_LAYER = (  # one entry a layer: each kind is kept once
    "layer_types", "layers_block_type", "mlp_layer_types", "no_rope_layers", "block_types",
    "moe_layer_freq", "attention_types",
)  # fmt: skip

_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_MROPE = {"text_config": {"rope_parameters": _ROPE | {"mrope_section": [4, 6, 6]}}}
_QSA = {
    "indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 32, "indexer_budget": 16,
    "indexer_compress_ratio": 4,
}  # fmt: skip
_VQ = {"base_channels": 32, "num_embeddings": 64, "channel_multiplier": [1, 1]}
_DOTS = {
    "index_head_dim": 32, "index_n_heads": 2, "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 4, "swa_q_lora_rank": 64, "swa_kv_lora_rank": 64,
    "swa_head_dim": 64, "swa_qk_nope_head_dim": 32, "swa_v_head_dim": 32,
}  # fmt: skip
_COMPASS = {"rope_parameters": {"full_attention": _ROPE, "sliding_attention": _ROPE}}

# What the rules above do not find: sizes that must fit one another, and defaults that are none.
CHANGES: dict[str, dict] = {
    "bamba": {"attn_layer_indices": [1]},
    "blip-2": {"num_query_tokens": 4, "image_token_index": IMAGE},
    "blt": {
        "encoder_hash_byte_group_vocab": 64, "use_cache": False,
        "encoder_config": {"hidden_size_global": 128},
        "decoder_config": {"hidden_size_global": 128},
    },
    "chameleon": {"vocabulary_map": {"<image>": 303}, "vq_config": _VQ},
    "codegen": {"rotary_dim": 16},
    "cohere_compass": {"text_config": _COMPASS},
    "cohere_compass_text": _COMPASS,
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "clip_qkv": 8}},
    "deepseek_ocr2": {"text_config": {"mlp_layer_types": ["dense", "sparse"]}},
    "diffusion_gemma": {
        "text_config": {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 64}
    },
    "dots1": {"n_routed_experts": 4},
    "dots3_note": {
        "text_config": _DOTS,
        "vision_config": {"adapter_in_dim": 64, "adapter_out_dim": 128},
        "audio_config": {"adapter_input_size": 64, "adapter_out_dim": 128, "feature_size": 16},
    },
    "dots3_note_text": _DOTS,
    "emu3": {
        "vocabulary_map": {"<image>": 303},
        "vq_config": _VQ | {"hidden_size": 64, "codebook_size": 64, "num_attention_heads": 1},
    },
    "ernie4_5_vl_moe": {
        "text_config": {
            "rope_parameters": _ROPE | {"mrope_section": [6, 6, 4]},
            "moe_intermediate_size": [64, 64],
        }
    },
    "florence2": {
        "vision_config": {
            "depths": [1, 1, 1, 1], "embed_dim": [32, 32, 64, 64], "num_heads": [1, 1, 2, 2],
            "num_groups": [1, 1, 2, 2], "projection_dim": 128,
        }
    },
    "gemma3n_text": {  # its list for 35 layers does not shrink, and 16384 inputs take minutes
        "intermediate_size": 192, "num_hidden_layers": 4, "activation_sparsity_pattern": [0.0] * 4,
        "layer_types": ["sliding_attention"] * 3 + ["full_attention"],
    },
    "gemma4_unified": {
        "vision_config": {"mm_embed_dim": 128, "mm_posemb_size": 16, "output_proj_dims": 128}
    },
    "glm46v": _MROPE,
    "glm4v": _MROPE,
    "glm4v_moe": {
        "text_config": {
            "rope_parameters": _ROPE
            | {"partial_rotary_factor": 0.5, "mrope_section": [2, 3, 3]}
        }
    },
    "glm5_next": {
        "text_config": {
            "qk_rope_head_dim": 0, "head_dim": 0, "index_n_heads": 2, "index_head_dim": 32,
            "linear_head_dim": 32, "linear_num_heads": 4,
        }
    },
    "glm_ocr": _MROPE,
    "glmga": _MROPE,
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "gptj": {"rotary_dim": 16},
    "granite4_vision": {
        "image_grid_pinpoints": [[32, 32]], "deepstack_layer_map": [], "spatial_target_layers": [],
        "downsample_rate": "1/2",
    },
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "hunyuan_vl": {"text_config": {"rope_parameters": _ROPE | {"mrope_section": [4, 4, 4, 4]}}},
    "inkling2": {"vision_config": {"text_hidden_size": 128}},
    "instructblip": {"num_query_tokens": 4, "image_token_index": IMAGE},
    "instructblipvideo": {"num_query_tokens": 4, "video_token_index": IMAGE},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "janus": {
        "vision_config": {"projection_dim": 128},
        "vq_config": _VQ,
    },
    "kosmos-2": {"latent_query_num": 4},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "mamba2": {"num_heads": 8, "head_dim": 32},  # their product is expand times hidden_size
    "mistral4": {"head_dim": 64},
    "molmo2": {"adapter_config": {"vision_feature_layer": [1, 0], "text_hidden_size": 128}},
    "muse_spark": {
        "audio_config": {
            "num_hidden_layers": 4, "hidden_sizes": [64, 64, 64, 64], "out_hidden_size": 128,
        },
        "projector_hidden_size": 128,
    },
    "nemotron": {"num_key_value_heads": 2},
    "nemotron_h_omni": {
        "vision_config": {"video_temporal_patch_size": 2}, "projector_hidden_size": 128,
    },
    "paddleocr_vl": _MROPE,
    "pix2struct": {"vision_config": {"hidden_size": 128, "num_attention_heads": 4}},
    "qwen2_5_omni_thinker": _MROPE | {"vision_start_token_id": 300},
    "qwen2_5_vl": _MROPE,
    "qwen2_vl": _MROPE,
    "qwen3_omni_moe_thinker": {"vision_start_token_id": 300},
    "qwen4_exp": {"text_config": _QSA},
    "qwen4_exp_text": _QSA,
    "recurrent_gemma": {"block_types": ["recurrent", "attention"]},
    "reformer": {
        "is_decoder": True, "axial_pos_shape": [8, 16], "axial_pos_embds_dim": [64, 64],
    },
    "step3p7": {"text_config": {"sliding_window": 16}},
    "udop": {"decoder_start_token_id": 0},
    "vision-encoder-decoder": {"decoder_start_token_id": 0, "pad_token_id": 0},
    "xlm": {"emb_dim": 128},
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        "num_hidden_layers": 4, "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"],
    },
    "zaya": {"num_experts_per_tok": 1},
}  # fmt: skip
_TIMM = "its vision tower is of the timm library"
_DRAFTS = "drafts for another model, whose keys and values it takes"
NOT_TRIED = {
    "diffusion_gemma": "its forward draws noise: no two runs agree",
    "fast_vlm": _TIMM,
    "gemma3n": _TIMM,
    "gemma4_assistant": _DRAFTS,
    "gemma4_unified_assistant": _DRAFTS,
    "inkling_mm_model": "its audio encoder needs the scipy library",
    "perception_lm": _TIMM,
    "pp_formulanet": "no rule shrinks its image encoder",
    "pi0": "takes the states of a robot",
}


def _image(*shape):
    return lambda ids, generator: {"pixel_values": torch.randn(*shape, generator=generator)}


def _queries(ids, generator):
    """Images, which are to take the place of their tokens, and what is asked of them."""
    ids = torch.cat([torch.full((len(ids), 4), IMAGE), ids[:, 4:]], 1)
    asked = {"qformer_input_ids": ids[:, 4:12], "input_ids": ids, "labels": ids}
    return asked | _image(4, 3, 32, 32)(ids, generator)


def _no_text(columns):
    """An encoder of images, and what is to be said of them."""
    return lambda ids, generator: {
        "input_ids": None,
        "attention_mask": None,
        "labels": ids[:, :9],
        **columns(ids, generator),
    }


# What a batch has beside text, or in its place (None).
INPUTS = {
    "blip": _image(4, 3, 32, 32),
    "blip-2": lambda ids, generator: _queries(ids, generator) | {"qformer_input_ids": None},
    "git": _image(4, 3, 32, 32),
    "idefics": lambda ids, generator: {
        "pixel_values": torch.randn(4, 1, 3, 32, 32, generator=generator),
        "image_attention_mask": torch.ones(*ids.shape, 1),
    },
    "instructblip": _queries,
    "instructblipvideo": lambda ids, generator: (
        _queries(ids, generator) | _image(4, 1, 3, 32, 32)(ids, generator)
    ),
    "kosmos-2": lambda ids, generator: {
        "pixel_values": torch.randn(4, 3, 32, 32, generator=generator),
        "image_embeds_position_mask": torch.arange(ids.shape[1]).expand_as(ids) < 4,
    },
    "pix2struct": _no_text(
        lambda ids, generator: {"flattened_patches": torch.rand(4, 8, 770, generator=generator)}
    ),
    "udop": lambda ids, generator: {"bbox": torch.zeros(*ids.shape, 4)},
    "vision-encoder-decoder": _no_text(_image(4, 3, 32, 32)),
}


def shrunken(kind, changes=None, *, encoder=False):
    """A small config of class `kind`.

    Args:
        changes: values that go before the rules; a dict for a part is of changes to it.
        encoder: of images or audio, which may be smaller than the text model.
    """
    changes = dict(changes or {})
    base = kind()
    given = base.to_dict()
    settings = _sizes(given, ENCODER if encoder else SIZES, kind.attribute_map)
    settings |= _tokens(given)
    settings |= _rope(given, settings)
    for name, part in _parts(base):
        encodes = any(word in name for word in _ENCODES) and "text" not in name
        of_part = changes.pop(name, {})
        settings[name] = shrunken(part, of_part, encoder=encodes)
    settings |= changes
    settings |= _per_layer(kind, given, settings, changes)
    return kind(**settings)


def _sizes(given, table, names):
    table = table | {own: table[usual] for usual, own in names.items() if usual in table}
    found = {k: v for k, v in table.items() if isinstance(given.get(k), int | float)}
    found = {k: v for k, v in found.items() if not isinstance(given[k], bool)}
    if "kv_lora_rank" in found and "num_key_value_heads" in found:
        found["num_key_value_heads"] = found["num_attention_heads"]
    for name in ("n_shared_experts", "num_experts_per_tok"):
        if given.get(name, 1) is None:
            found[name] = table[name]
    if given.get("head_dim", 1) is None and "num_attention_heads" in given:
        found["head_dim"] = table["head_dim"]
    return found


def _tokens(given):
    """Special tokens that lie in the vocabulary, each its own."""
    found, free = {}, VOCABULARY - 1
    for name in sorted(given):
        if not name.endswith(("_token_id", "_token_index")) or name == "decoder_start_token_id":
            continue
        if name in ("pad_token_id", "bos_token_id", "eos_token_id"):
            found[name] = ("pad_token_id", "bos_token_id", "eos_token_id").index(name)
        elif isinstance(given[name], int) and given[name] >= WORDS:
            found[name], free = free, free - 1
    return found


def _rope(given, settings):
    """Sections of the rotary embedding that fit the heads."""
    rope = given.get("rope_parameters")
    if not isinstance(rope, dict) or "mrope_section" not in rope:
        return {}
    half = settings.get("head_dim", 32) // 2
    first, second = half // 4, (half - half // 4) // 2
    sections = [first, second, half - first - second]
    return {"rope_parameters": rope | {"mrope_section": sections}}


def _parts(base):
    for name, kind in (getattr(base, "sub_configs", None) or {}).items():
        part = getattr(base, name, None)
        kind = kind if part is None else type(part)
        if getattr(kind, "model_type", ""):
            yield name, kind


def _per_layer(kind, given, settings, changes):
    """Lists of one entry a layer, as long as there are layers; all kinds of layers are there."""
    count, found = given.get("num_hidden_layers"), {}
    lists = [n for n in _PER_LAYER if isinstance(given.get(n), list) and n not in changes]
    lists = [n for n in lists if len(given[n]) == count and not hasattr(kind, n)]
    kinds = {n: list(dict.fromkeys(given[n])) for n in lists}
    layers = max([settings.get("num_hidden_layers", 2), *map(len, kinds.values())])
    for name in lists:
        found[name] = (kinds[name] * layers)[:layers]
    return found | {"num_hidden_layers": layers} if lists else {}


def save_small(task, name, path):
    """Save a small base of architecture `name`, in bfloat16, at `path`."""
    config = shrunken(CONFIG_MAPPING[name], CHANGES.get(name))
    with torch.device("meta"):
        count = sum(p.numel() for p in AUTO[task].from_config(config).parameters())
    assert count <= LARGEST, f"{count / 1e6:.0f} million parameters"
    torch.manual_seed(3)
    model = AUTO[task].from_config(shrunken(CONFIG_MAPPING[name], CHANGES.get(name))).bfloat16()
    for key, parameter in model.named_parameters():
        if parameter.is_floating_point():
            _scramble(key, parameter)
    model.save_pretrained(path)


@torch.no_grad()
def _scramble(key, parameter):
    """Norms that differ from one, and weights that are large enough to be seen in the outputs."""
    spread = float(parameter.float().std()) if parameter.numel() > 1 else 0.0
    if parameter.dim() == 1 and "norm" in key and "weight" in key:
        parameter.add_(torch.randn(parameter.shape).to(parameter.dtype) * 0.1)
    elif parameter.dim() >= 2 and not 0 < spread < 1:  # never initialised
        torch.nn.init.normal_(parameter, 0, 0.05)
    elif parameter.dim() >= 2 and spread < 0.05 and "embed" not in key:
        parameter.mul_(min(0.06 / spread, 4))
    if not math.isfinite(float(parameter.float().sum())):
        torch.nn.init.normal_(parameter, 0, 0.02)
