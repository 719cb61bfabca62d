"""Names: what is written carries the names of the checkpoint that was loaded, fused or not."""

import json

import pytest
import torch
import transformers
from models import adapt, base_weight, load_base, merged_weights, save_base, ulps
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BitsAndBytesConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen3VLMoeConfig,
    Qwen3VLMoeForConditionalGeneration,
)
from transformers.core_model_loading import WeightRenaming, revert_weight_conversion

from merge_callback import (
    MergeOptions,
    MergeRefused,
    MergeStore,
    VerificationError,
    merge_adapter,
)
from merge_callback.compat import GroupWeightRename
from merge_callback.conversions import CheckpointNames
from merge_callback.export import check_merge
from merge_callback.files import hash_file
from merge_callback.live import keep_cpu_weights_unpacked
from merge_callback.planning import make_plan
from merge_callback.store import Draft

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


def nomic(path):
    """Its checkpoint keeps q, k and v in one tensor, which transformers splits."""
    config = transformers.NomicBertConfig(
        hidden_size=128, intermediate_size=192, num_hidden_layers=2, num_attention_heads=4,
        vocab_size=304, max_position_embeddings=64, head_dim=32, num_labels=3, pad_token_id=0,
    )  # fmt: skip
    transformers.NomicBertForSequenceClassification(config).to(torch.bfloat16).save_pretrained(path)
    return path


def classifier(path, **settings):
    model = transformers.NomicBertForSequenceClassification.from_pretrained(
        path, dtype=torch.bfloat16, **settings
    )
    keep_cpu_weights_unpacked(model)
    return model


@pytest.mark.since("5.5")
def test_what_the_checkpoint_keeps_in_one_tensor_is_one_group(tmp_path):
    model = classifier(nomic(tmp_path / "base"))
    names = CheckpointNames(model)
    state = model.state_dict()
    groups = names.groups(state)
    assert sorted(key for group in groups for key in group) == sorted(state)
    assert sum(len(group) == 3 for group in groups) == 2  # q, k and v of two layers
    pieces = [names.revert({key: state[key] for key in group}) for group in groups]
    assert sum(map(len, pieces)) == len({name for piece in pieces for name in piece})
    together = revert_weight_conversion(model, dict(state))
    apart = {name: tensor for piece in pieces for name, tensor in piece.items()}
    assert apart.keys() == together.keys()
    assert all(torch.equal(apart[name], together[name]) for name in together)


@pytest.mark.since("5.5")
def test_q_k_and_v_are_joined_and_every_byte_of_the_file_is_written(tmp_path):
    model = classifier(nomic(tmp_path / "base"))
    model = adapt(model, target_modules=["q_proj", "v_proj"], task_type="SEQ_CLS")
    result = merge_adapter(model, tmp_path / "out")
    original = load_file(tmp_path / "base" / "model.safetensors")
    written = load_file(result.path / "model.safetensors")
    assert written.keys() == original.keys()
    merged = merged_weights(model)
    for i in range(2):
        layer = next(name for name in merged if f"layers.{i}.self_attn.q_proj" in name)
        q, v = (
            merged[layer.replace("q_proj", part)].to(torch.bfloat16)
            for part in ("q_proj", "v_proj")
        )
        (name,) = (n for n in original if f"layers.{i}.attn.Wqkv.weight" in n)
        kept = original[name].chunk(3)[1]
        assert ulps(written[name], torch.cat([q, kept, v])) <= 1
        assert torch.equal(written[name].chunk(3)[1], kept)
    _, info = transformers.NomicBertForSequenceClassification.from_pretrained(
        result.path, output_loading_info=True
    )
    assert not any(info.values()), info


@pytest.mark.since("5.5")
def test_packed_weights_that_cannot_be_joined_keep_their_names_in_memory(tmp_path):
    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
    )
    base = classifier(nomic(tmp_path / "base"), quantization_config=config)
    layers = {n for n, m in base.named_modules() if type(m).__name__ == "Linear4bit"}
    model = adapt(base, target_modules=["q_proj", "v_proj"], task_type=None)
    result = merge_adapter(model, tmp_path / "out", save_method="merged_4bit", rounding="nearest")
    loaded, info = transformers.NomicBertForSequenceClassification.from_pretrained(
        result.path, output_loading_info=True
    )
    assert not any(info.values()), info
    keep_cpu_weights_unpacked(loaded)
    found = dict(loaded.eval().named_modules())
    assert {n for n, m in found.items() if type(m).__name__ == "Linear4bit"} == layers
    merged, live = merged_weights(model), dict(base.named_modules())
    for name in layers:
        weight = base_weight(found[name])
        if f"{name}.weight" in merged:
            expected = merged[f"{name}.weight"]
            assert (weight - expected).norm() < 0.12 * expected.norm(), name
        else:
            assert torch.equal(weight, base_weight(live[name])), name
    assert len(merged) == 4
    assert loaded(input_ids=torch.arange(4, 20).view(2, 8)).logits.isfinite().all()


def test_experts_whose_file_is_their_transpose_are_planned(tmp_path):
    text = dict(
        hidden_size=64, intermediate_size=64, moe_intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, head_dim=32, vocab_size=304, num_experts=4,
        num_experts_per_tok=2, pad_token_id=0,
    )  # fmt: skip
    vision = dict(
        hidden_size=32, intermediate_size=32, depth=1, num_heads=2, out_hidden_size=64,
        deepstack_visual_indexes=[0], num_position_embeddings=16,
    )  # fmt: skip
    config = Qwen3VLMoeConfig(text_config=text, vision_config=vision)
    kind = Qwen3VLMoeForConditionalGeneration
    kind(config).to(torch.bfloat16).save_pretrained(tmp_path / "base")
    base = kind.from_pretrained(tmp_path / "base", dtype=torch.bfloat16)
    original = load_file(tmp_path / "base" / "model.safetensors")
    fused = ["experts.gate_up_proj", "experts.down_proj"]
    model = adapt(base, target_modules=["q_proj"], target_parameters=fused, scale=0.5)
    result = merge_adapter(model, tmp_path / "out")
    written = load_file(result.path / "model.safetensors")
    assert {n: t.shape for n, t in written.items()} == {n: t.shape for n, t in original.items()}
    changed = {name for name in written if not torch.equal(written[name], original[name])}
    assert {name.rpartition("experts.")[2] for name in changed if "experts" in name} == {
        "gate_up_proj", "down_proj",
    }  # fmt: skip
    assert result.manifest["retention"]["merged_16bit"]["overall"] == pytest.approx(1, abs=0.01)


@pytest.mark.since("5.14")
def test_names_that_shift_are_reverted_one_at_a_time(tmp_path):
    model = LlamaForCausalLM(LlamaConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, vocab_size=304,
    ))  # fmt: skip
    shift = [[r"block.(\d+).norm0", r"block.(\d+).norm1"], [r"block.\1.norm1", r"block.\1.norm2"]]
    model._weight_conversions = [GroupWeightRename(*shift)]
    names, one = CheckpointNames(model), torch.zeros(1)
    for key, wanted in {"block.3.norm1": "block.3.norm0", "block.3.norm2": "block.3.norm1"}.items():
        assert list(names.revert({key + ".weight": one})) == [wanted + ".weight"]


def test_a_name_that_two_weights_would_have_is_refused_before_training(tmp_path):
    path = tmp_path / "base"
    base = AutoModelForCausalLM.from_pretrained(mixtral(path), dtype=torch.bfloat16)
    base._weight_conversions = [
        *base._weight_conversions,
        WeightRenaming("model.norm.weight", "model.layers.1.input_layernorm.weight"),
    ]
    model = adapt(base, target_modules=["q_proj"])
    with pytest.raises(MergeRefused, match=r"model\.norm\.weight: .* have this name"):
        check_merge(model, MergeStore(tmp_path / "out"), MergeOptions())


HEAD = {
    "model.layers.2.eh_proj.weight": torch.arange(12.0).view(3, 4).bfloat16(),
    "model.layers.2.embed_tokens.scale": torch.tensor([1.5, -2.0]),
    "mtp.ids": torch.tensor([7, 8, 9], dtype=torch.uint8),
}


def with_a_head(path, tensors=None):
    """A checkpoint that has more than transformers loads, as DeepSeek's and Qwen's do."""
    save_base(path)
    file = path / "model.safetensors"
    save_file(load_file(file) | (HEAD if tensors is None else tensors), file, {"format": "pt"})
    return path


@pytest.mark.parametrize("kind", ["bfloat16", "nf4-nested"])
@pytest.mark.parametrize("size", ["5GB", 100_000])
def test_what_transformers_does_not_load_is_carried_along(tmp_path, kind, size, caplog):
    caplog.set_level("INFO", logger="merge_callback")
    model = adapt(load_base(with_a_head(tmp_path / "base"), kind))
    methods = ["merged_16bit"] if kind == "bfloat16" else ["merged_16bit", "merged_4bit"]
    result = merge_adapter(model, tmp_path / "out", save_method=methods, max_shard_size=size)
    for method, path in result.paths.items():
        files = sorted(path.glob("*.safetensors"))
        assert (len(files) > 1) == (size != "5GB")
        written = {name: tensor for file in files for name, tensor in load_file(file).items()}
        for name, tensor in HEAD.items():
            assert written[name].dtype == tensor.dtype
            assert torch.equal(written[name], tensor), name
        if method == "merged_16bit":
            base = load_file(tmp_path / "base" / "model.safetensors")
            assert written.keys() == base.keys()
    assert sorted(result.manifest["carried"]) == sorted(HEAD)
    checks = result.manifest["verification"]["checks"]
    assert all(checks[f"{method}: carried tensors"] == "passed" for method in methods)
    assert "3 tensors that transformers does not load are those of the base's files" in caplog.text


def test_only_files_that_transformers_loads_are_looked_into(tmp_path, caplog):
    """A stale or hostile index may name others, also beyond the directory."""
    base = save_base(tmp_path / "base")
    save_file({"private": torch.ones(3)}, tmp_path / "m.safetensors", {"format": "pt"})
    index = {"metadata": {}, "weight_map": {"private": "../m.safetensors"}}
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    beside = merge_adapter(adapt(load_base(base, "bfloat16")), tmp_path / "one", progress=False)
    assert beside.manifest["carried"] == []
    names = dict.fromkeys(load_file(base / "model.safetensors"), "part.safetensors")
    index["weight_map"] = {"private": "linked.safetensors"} | names
    model = adapt(load_base(base, "bfloat16"))
    (base / "model.safetensors").rename(base / "part.safetensors")
    (base / "linked.safetensors").symlink_to(tmp_path / "m.safetensors")
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    alone = merge_adapter(model, tmp_path / "two", progress=False)
    assert alone.manifest["carried"] == [] and "is outside its directory" in caplog.text


def test_a_carried_tensor_that_differs_from_the_base_is_not_published(tmp_path, monkeypatch):
    model = adapt(load_base(with_a_head(tmp_path / "base"), "bfloat16"))
    seal = Draft.seal

    def damaged(draft):
        file = draft.path / "model.safetensors"
        if file.exists() and not (draft.path / "README.md").exists():
            tensors = load_file(file)
            save_file(tensors | {"mtp.ids": tensors["mtp.ids"] + 1}, file, {"format": "pt"})
            draft.records["model.safetensors"] = hash_file(file)
        seal(draft)

    monkeypatch.setattr(Draft, "seal", damaged)
    with pytest.raises(VerificationError, match=r"mtp\.ids is not the one in the base's"):
        merge_adapter(model, tmp_path / "out")


def test_nothing_is_carried_into_a_model_of_another_class_or_depth(tmp_path):
    path = with_a_head(tmp_path / "base")
    classifier = AutoModelForSequenceClassification.from_pretrained(path, dtype=torch.bfloat16)
    shallow = AutoModelForCausalLM.from_pretrained(path, num_hidden_layers=1, dtype=torch.bfloat16)
    for base, task in ((classifier, "SEQ_CLS"), (shallow, "CAUSAL_LM")):
        base.config.pad_token_id = 0
        model = adapt(base, target_modules=["q_proj"], task_type=task)
        assert make_plan(model, MergeOptions()).carried == ()


def test_a_base_whose_files_are_gone_has_nothing_to_carry(tmp_path):
    model = adapt(load_base(with_a_head(tmp_path / "base"), "bfloat16"))
    (tmp_path / "base").rename(tmp_path / "elsewhere")
    result = merge_adapter(model, tmp_path / "out")
    assert result.manifest["carried"] == []
