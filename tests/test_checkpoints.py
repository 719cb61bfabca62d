"""A saved adapter is merged into the base that was trained, whatever training had done to it."""

import json
import logging
import os

import pytest
import torch
import transformers
from models import adapt, load_base, logits, same, save_base, tokenizer
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.config import KasaConfig
from safetensors.torch import load_file, save_file
from test_callback import sft
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from merge_callback import MergeOnSaveCallback, MergeRefused, MergeStore, merge_adapter
from merge_callback.bases import Loading
from merge_callback.checkpoints import load_adapter
from merge_callback.cli import main
from merge_callback.live import keep_cpu_weights_unpacked
from merge_callback.recipe import (
    RECIPE,
    read_recipe,
    refuse_hostile_settings,
    write_recipe,
)


def saved(model, path, *, noted=True):
    """An adapter as a trainer saves it, with or without what the callback notes beside it."""
    model.save_pretrained(path)
    if noted:
        write_recipe(model, path)
    return path


def loaded(checkpoint, **settings):
    found = load_adapter(checkpoint, loading=Loading(**settings))
    keep_cpu_weights_unpacked(found)
    return found


def merge(checkpoint, out, *options):
    """The tensors that the command line makes of a checkpoint."""
    arguments = ["merge", checkpoint, "--output-dir", out, "--rounding", "nearest", *options]
    assert main(list(map(str, arguments))) == 0
    return load_file(MergeStore(out).latest().path / "model.safetensors")


def config_of(directory):
    return json.loads((directory / "config.json").read_text())


def embeddings(model):
    return model.get_input_embeddings().weight.detach()


# How the base was quantised


def test_a_checkpoint_is_merged_on_the_base_of_its_training(tmp_path):
    callback = MergeOnSaveCallback(merge_on_save=True, rounding="nearest")
    sft(tmp_path, callback, kind="fp4", max_steps=2, save_strategy="steps", save_steps=2).train()
    checkpoint = tmp_path / "run/checkpoint-2"
    noted = read_recipe(checkpoint)
    assert noted.model_class == "LlamaForCausalLM" and noted.model_type == "llama"
    assert noted.dtype == "bfloat16" and noted.config["vocab_size"] == 304
    assert "use_cache" not in noted.config  # the trainer has turned it off
    found = {key: noted.quantization[f"bnb_4bit_{key}"] for key in ("quant_type", "compute_dtype")}
    assert found == {"quant_type": "fp4", "compute_dtype": "bfloat16"}
    assert noted.quantization["bnb_4bit_use_double_quant"] is False
    theirs = callback.results[-1].path
    assert same(merge(checkpoint, tmp_path / "out"), load_file(theirs / "model.safetensors"))
    ours = MergeStore(tmp_path / "out").latest().path
    assert config_of(ours) == config_of(theirs)


def test_a_note_that_cannot_be_written_does_not_end_the_training(tmp_path, monkeypatch, caplog):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("merge_callback.recipe.write_recipe", full)
    run = sft(tmp_path, MergeOnSaveCallback(), max_steps=2, save_strategy="steps", save_steps=1)
    run.train()
    assert run.state.global_step == 2 and "No space left on device" in caplog.text


@pytest.mark.parametrize("kind", ["fp4", "nf4", "nf4-nested", "int8", "bfloat16", "float32"])
def test_a_base_is_loaded_as_it_was(tmp_path, kind):
    live = adapt(load_base(save_base(tmp_path / "base"), kind))
    checkpoint = saved(live, tmp_path / "adapter")
    assert torch.equal(logits(loaded(checkpoint)), logits(live))


OF_FP4 = ("--quant-type", "fp4", "--no-double-quant", "--compute-dtype", "bfloat16")


def test_what_nothing_says_of_4_bits_is_guessed_with_a_warning(tmp_path, caplog):
    live = adapt(load_base(save_base(tmp_path / "base"), "fp4"))
    checkpoint = saved(live, tmp_path / "adapter", noted=False)
    right = load_file(
        merge_adapter(live, tmp_path / "live", rounding="nearest", progress=False).path
        / "model.safetensors"
    )
    guessed = merge(checkpoint, tmp_path / "guessed", "--load-in-4bit")
    assert "say so with --quant-type, --no-double-quant, --compute-dtype" in caplog.text
    assert not same(guessed, right)
    caplog.clear()
    assert same(merge(checkpoint, tmp_path / "said", *OF_FP4), right)
    assert "say so with" not in caplog.text


def test_an_8_bit_base_is_asked_for(tmp_path, caplog):
    live = adapt(load_base(save_base(tmp_path / "base"), "int8"))
    checkpoint = saved(live, tmp_path / "adapter", noted=False)
    found = loaded(checkpoint, load_in_8bit=True)
    assert torch.equal(logits(found), logits(live))
    load_adapter(checkpoint)
    assert "--load-in-4bit or --load-in-8bit" in caplog.text


def test_options_go_before_what_was_noted(tmp_path, caplog):
    live = adapt(load_base(save_base(tmp_path / "base"), "fp4"))
    checkpoint = saved(live, tmp_path / "adapter")
    found = loaded(checkpoint, quant_type="nf4")
    assert found.config.quantization_config.bnb_4bit_quant_type == "nf4"
    assert "is nf4, and was fp4 in training" in caplog.text
    plain = loaded(checkpoint, load_in_4bit=False)
    assert not hasattr(plain.config, "quantization_config")


# Its vocabulary

RESIZED = {
    "grown": (306, {}),
    "grown and trained": (306, {"modules_to_save": ["embed_tokens"]}),
    "grown, new tokens trained": (306, {"trainable_token_indices": [304, 305]}),
    "shrunk": (301, {"modules_to_save": ["embed_tokens"]}),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("noted", [True, False])
@pytest.mark.parametrize("case", RESIZED)
def test_embeddings_are_resized_as_in_training(tmp_path, case, noted):
    rows, settings = RESIZED[case]
    base = load_base(save_base(tmp_path / "base"), "nf4-nested")
    base.resize_token_embeddings(rows)
    live = adapt(base, **settings)
    for name, parameter in live.named_parameters():
        if "trainable_tokens" in name or "modules_to_save" in name:
            parameter.data += 0.5
    checkpoint = saved(live, tmp_path / "adapter", noted=noted)
    found = loaded(checkpoint, load_in_4bit=True)
    assert found.config.vocab_size == rows and embeddings(found.get_base_model()).shape[0] == rows
    assert torch.equal(logits(found)[..., :301], logits(live)[..., :301])
    merged = merge(checkpoint, tmp_path / "out", "--load-in-4bit")
    assert merged["model.embed_tokens.weight"].shape[0] == rows


@pytest.mark.filterwarnings("ignore")
def test_embeddings_that_nobody_has_saved_are_named(tmp_path, caplog):
    base = load_base(save_base(tmp_path / "base"), "bfloat16")
    words = tokenizer()  # of 303
    words.add_tokens(["<a>", "<b>", "<c>"])
    base.resize_token_embeddings(len(words))
    live = adapt(base, trainable_token_indices=[304])
    live.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    found = load_adapter(tmp_path / "adapter", tokens=len(words))
    assert embeddings(found.get_base_model()).shape[0] == 306
    assert "2 tokens" in caplog.text and "1 of these embeddings are not saved" in caplog.text


def mllama():
    """It has 8 rows more than its vocabulary, for pictures."""
    text = {
        "vocab_size": 100,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 64,
        "cross_attention_layers": [1],
        "pad_token_id": 0,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    }
    vision = {
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_global_layers": 1,
        "attention_heads": 2,
        "intermediate_size": 64,
        "vision_output_dim": 64,
        "image_size": 28,
        "patch_size": 14,
        "intermediate_layers_indices": [0],
        "max_num_tiles": 1,
        "supported_aspect_ratios": [[1, 1]],
    }
    config = transformers.MllamaConfig(
        text_config=text, vision_config=vision, image_token_index=100
    )
    return transformers.MllamaForConditionalGeneration(config)


def without_rows(checkpoint):
    """As earlier versions wrote it."""
    path = checkpoint / RECIPE
    found = json.loads(path.read_text())
    del found["num_embeddings"]
    path.write_text(json.dumps(found))


@pytest.mark.parametrize("settings", [{}, {"modules_to_save": ["lm_head"]}])
@pytest.mark.parametrize("noted", ["rows", "vocabulary"])
def test_rows_beyond_the_vocabulary_stay(tmp_path, noted, settings):
    mllama().save_pretrained(tmp_path / "base")
    base = transformers.MllamaForConditionalGeneration.from_pretrained(tmp_path / "base")
    live = adapt(base, task_type=None, target_modules=r".*language_model.*\.q_proj", **settings)
    checkpoint = saved(live, tmp_path / "adapter")
    assert read_recipe(checkpoint).num_embeddings == 108
    if noted == "vocabulary":
        without_rows(checkpoint)
    found = load_adapter(checkpoint)
    assert torch.equal(embeddings(found.get_base_model()), embeddings(live.get_base_model()))
    assert found.config.text_config.vocab_size == 100


def test_a_vocabulary_that_was_noted_without_rows_is_resized_to(tmp_path):
    base = load_base(save_base(tmp_path / "base"), "bfloat16")
    base.resize_token_embeddings(306, mean_resizing=False)
    adapt(base).save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    write_recipe(base, tmp_path / "adapter")
    without_rows(tmp_path / "adapter")
    found = load_adapter(tmp_path / "adapter").get_base_model()
    assert found.config.vocab_size == embeddings(found).shape[0] == 306


def test_rows_of_adapted_embeddings_are_noted(tmp_path):
    base = load_base(save_base(tmp_path / "base", tied=False), "bfloat16")
    base.resize_token_embeddings(306, mean_resizing=False)
    live = adapt(base, target_modules=["embed_tokens", "q_proj"])
    (tmp_path / "adapter").mkdir()
    write_recipe(live, tmp_path / "adapter")
    assert read_recipe(tmp_path / "adapter").num_embeddings == 306


def test_an_adapter_of_a_model_without_embeddings_loads(tmp_path):
    config = transformers.Wav2Vec2Config(
        vocab_size=32,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        conv_dim=(16, 16),
        conv_stride=(5, 2),
        conv_kernel=(10, 3),
        num_feat_extract_layers=2,
        num_conv_pos_embeddings=16,
        num_conv_pos_embedding_groups=2,
    )
    transformers.Wav2Vec2ForCTC(config).save_pretrained(tmp_path / "base")
    base = transformers.Wav2Vec2ForCTC.from_pretrained(tmp_path / "base")
    live = adapt(base, task_type=None, target_modules=["q_proj", "v_proj"])
    checkpoint = saved(live, tmp_path / "adapter")
    assert read_recipe(checkpoint).num_embeddings is None
    found = load_adapter(checkpoint).eval()
    sound = torch.randn(1, 400)
    with torch.no_grad():
        assert torch.equal(found(sound).logits, live(sound).logits)


# Its head


def classifier(path, labels):
    names = {i: f"kind {i}" for i in range(labels)}
    base = AutoModelForSequenceClassification.from_pretrained(
        save_base(path), id2label=names, dtype=torch.bfloat16, pad_token_id=0
    )
    return adapt(base, task_type="SEQ_CLS")


@pytest.mark.parametrize("noted", [True, False])
@pytest.mark.parametrize("labels", [1, 5])
def test_a_head_has_as_many_labels_as_were_trained(tmp_path, labels, noted):
    live = classifier(tmp_path / "base", labels)
    found = load_adapter(saved(live, tmp_path / "adapter", noted=noted))
    assert found.config.num_labels == labels
    if noted:
        assert found.config.id2label == live.config.id2label and found.config.pad_token_id == 0
    head = found.get_base_model().score.modules_to_save["default"].weight
    assert torch.equal(head, live.get_base_model().score.modules_to_save["default"].weight)
    merged = merge(tmp_path / "adapter", tmp_path / "out")
    assert merged["score.weight"].shape == (labels, 128)
    config = AutoConfig.from_pretrained(MergeStore(tmp_path / "out").latest().path)
    assert config.num_labels == labels


def test_a_head_is_not_lost_in_another_class(tmp_path):
    checkpoint = saved(classifier(tmp_path / "base", 5), tmp_path / "adapter")
    with pytest.raises(MergeRefused, match=r"score\.weight.* with --model-class"):
        load_adapter(checkpoint, loading=Loading(model_class="AutoModelForCausalLM"))


def test_sizes_that_do_not_match_name_the_option(tmp_path):
    checkpoint = saved(classifier(tmp_path / "base", 5), tmp_path / "adapter", noted=False)
    with pytest.raises(MergeRefused, match="is said with --config KEY=VALUE"):
        load_adapter(checkpoint, loading=Loading(config={"num_labels": 3}))
    with pytest.raises(MergeRefused, match="is said with --config KEY=VALUE"):
        load_adapter(checkpoint, loading=Loading(config={"hidden_size": 64}))


def test_a_head_that_nobody_has_saved_is_not_made_up(tmp_path):
    base = AutoModelForSequenceClassification.from_pretrained(save_base(tmp_path / "base"))
    lora = LoraConfig(r=4, target_modules=["q_proj"])  # no task, so PEFT does not save the head
    get_peft_model(base, lora).save_pretrained(tmp_path / "adapter")
    with pytest.raises(MergeRefused, match=r"score\.weight and 0 others are neither in the base"):
        load_adapter(tmp_path / "adapter")


def vit(path, saved_parts):
    """A model of 7 labels on a base of 5."""
    config = transformers.ViTConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        image_size=32,
        patch_size=16,
        num_labels=5,
    )
    kind = transformers.ViTForImageClassification
    kind(config).save_pretrained(path)
    base = kind.from_pretrained(path, num_labels=7, ignore_mismatched_sizes=True)
    settings = {"target_modules": ["q_proj"], "modules_to_save": saved_parts}
    return adapt(base, task_type=None, **settings)


def test_a_head_of_another_size_than_the_base_has_is_the_adapters(tmp_path):
    live = vit(tmp_path / "base", ["classifier"])
    found = load_adapter(saved(live, tmp_path / "adapter"))
    picture = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        logits = [model(pixel_values=picture).logits for model in (live, found.eval())]
    assert logits[0].shape == (1, 7) and torch.equal(*logits)


def test_a_head_of_another_size_that_nobody_has_saved_is_not_made_up(tmp_path):
    live = vit(tmp_path / "base", None)
    with pytest.raises(MergeRefused) as caught:
        load_adapter(saved(live, tmp_path / "adapter"))
    assert caught.value.problems[0] == (
        f"classifier.bias and 1 others have other sizes in the base {tmp_path / 'base'}, [5] and "
        "not [7], and are not in the adapter; what training changed of the config is said with "
        "--config KEY=VALUE"
    )


def roberta(path):
    config = transformers.RobertaConfig(
        vocab_size=99,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
    )
    transformers.RobertaForMaskedLM(config).save_pretrained(path)
    return path


def test_a_pooler_that_no_checkpoint_has_is_named(tmp_path, caplog):
    base = transformers.AutoModel.from_pretrained(roberta(tmp_path / "base"))
    settings = {"task_type": "FEATURE_EXTRACTION", "target_modules": ["query"]}
    live = adapt(base, **settings)
    found = load_adapter(saved(live, tmp_path / "adapter")).eval()
    ids = torch.arange(4, 20)[None]
    with torch.no_grad():
        hidden = [model(input_ids=ids).last_hidden_state for model in (live, found)]
    assert torch.equal(*hidden)
    assert "pooler.dense.bias, pooler.dense.weight are neither in the base nor" in caplog.text


def test_layers_that_no_checkpoint_has_are_not_made_up(tmp_path):
    base = transformers.AutoModel.from_pretrained(roberta(tmp_path / "base"))
    live = adapt(base, task_type="FEATURE_EXTRACTION", target_modules=["query"])
    weights = load_file(tmp_path / "base/model.safetensors")
    left = {key: value for key, value in weights.items() if ".layer.1." not in key}
    save_file(left, tmp_path / "base/model.safetensors", {"format": "pt"})
    with pytest.raises(MergeRefused, match=r"encoder\.layer\.1\..* are neither in the base"):
        load_adapter(saved(live, tmp_path / "adapter"))


def test_an_adapter_without_a_task_says_its_class_or_is_guessed(tmp_path, caplog):
    live = adapt(load_base(save_base(tmp_path / "base"), "bfloat16"), task_type=None)
    checkpoint = saved(live, tmp_path / "adapter", noted=False)
    assert type(load_adapter(checkpoint).get_base_model()).__name__ == "LlamaForCausalLM"
    assert "--model-class" not in caplog.text
    path = checkpoint / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"auto_mapping": None}))
    load_adapter(checkpoint)
    assert "name the class with --model-class" in caplog.text


# Its config

ROPE = {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}


def test_settings_of_the_training_hold(tmp_path, caplog):
    config = AutoConfig.from_pretrained(save_base(tmp_path / "base"))
    config.rope_parameters = dict(ROPE)
    live = adapt(AutoModelForCausalLM.from_pretrained(tmp_path / "base", config=config))
    for noted, asked in ((True, {}), (False, {"rope_parameters": ROPE})):
        checkpoint = saved(live, tmp_path / f"{noted}", noted=noted)
        found = loaded(checkpoint, config=asked)
        assert found.config.rope_parameters == ROPE
        assert torch.equal(logits(found), logits(live))
    assert "--config" not in caplog.text
    assert loaded(checkpoint).config.rope_parameters != ROPE
    assert "(rope settings, say), merge with --config KEY=VALUE" in caplog.text
    options = ["rope_parameters.rope_type=linear", "rope_parameters.factor=4.0", "num_labels=3"]
    options = [part for option in options for part in ("--config", option)]
    merge(tmp_path / "False", tmp_path / "out", *options)
    merged = AutoConfig.from_pretrained(MergeStore(tmp_path / "out").latest().path)
    assert merged.rope_parameters == ROPE and merged.num_labels == 3


@pytest.mark.parametrize("text", ["rope", "=4", "a..b=1"])
def test_a_setting_is_a_key_and_a_value(text, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["merge", "x", "--config", text])
    assert ended.value.code == 2 and "must be KEY=VALUE" in capsys.readouterr().err


HOSTILE = {
    "": [None, [], "a", 5, {}, {"schema": 2}],
    "model_class": [None, 5, ["a"]],
    "dtype": [5, "int8", "__class__"],
    "num_embeddings": ["5", 0, -1, 1.0, True, 10**9],
    "quantization": [
        5,
        None,
        {"a": 1},
        {"load_in_4bit": "yes"},
        {"bnb_4bit_quant_type": "x"},
        {"llm_int8_skip_modules": [5]},
        {"bnb_4bit_compute_dtype": "load"},
    ],
    "config": [
        5,
        None,
        {"num_hidden_layers": 10**9},
        {"num_hidden_layers": 1e9},
        {"n_layer": 10**9},
        {"vision_config": {"depth": 10**9}},
        {"depths": [2, 10**9]},
        {"num_blocks": 10_001},
        {"quantization_config": {}},
        {"text_config": {"attn_implementation": "a/b"}},
        {"auto_map": {"AutoConfig": "code.C"}},
    ],
}


@pytest.mark.parametrize(
    ("field", "value"), [(field, value) for field, values in HOSTILE.items() for value in values]
)
def test_a_note_of_others_is_checked(tmp_path, capsys, field, value):
    live = adapt(load_base(save_base(tmp_path / "base"), "bfloat16"))
    path = saved(live, tmp_path / "adapter") / RECIPE
    path.write_text(json.dumps(json.loads(path.read_text()) | {field: value} if field else value))
    assert main(["merge", str(tmp_path / "adapter"), "--output-dir", str(tmp_path / "o")]) == 1
    assert f"{RECIPE} cannot be read: " in capsys.readouterr().err


@pytest.mark.parametrize("pattern", [r"([\w.]+)+!", "(a|a)*", "lm_head\n", "a*", ""])
def test_a_note_with_a_pattern_is_refused_untried(tmp_path, capsys, pattern):
    """The names that it would be tried on may be the author's, too."""
    live = adapt(load_base(save_base(tmp_path / "base"), "nf4"))
    path = saved(live, tmp_path / "adapter") / RECIPE
    save_file({"base_model.model.a": torch.ones(1)}, tmp_path / "adapter/adapter_model.safetensors")
    found = json.loads(path.read_text())
    found["quantization"]["llm_int8_skip_modules"] = ["lm_head", pattern]
    path.write_text(json.dumps(found))
    assert main(["merge", str(tmp_path / "adapter")]) == 1
    told = capsys.readouterr().err
    assert "has a pattern in llm_int8_skip_modules" in told and "one by one" in told


def test_modules_that_training_did_not_quantise_are_left_so(tmp_path):
    save_base(tmp_path / "base", tied=False)
    config = transformers.BitsAndBytesConfig(
        load_in_4bit=True, llm_int8_skip_modules=["lm_head", "layers.0.mlp", "k_proj"]
    )
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", quantization_config=config)
    found = loaded(saved(adapt(base), tmp_path / "adapter")).get_base_model()
    ours, theirs = (
        {name: parameter.dtype for name, parameter in model.named_parameters()}
        for model in (found, base)
    )
    assert ours == theirs
    assert ours["model.layers.1.self_attn.k_proj.base_layer.weight"] != torch.uint8
    assert ours["model.layers.1.self_attn.q_proj.base_layer.weight"] == torch.uint8


@pytest.mark.parametrize(
    ("key", "value"), [("n_layer", 10**9), ("depth", 1e9), ("depths", [10**9])]
)
def test_a_base_of_more_layers_than_can_be_made_does_not_load(tmp_path, key, value):
    live = adapt(load_base(save_base(tmp_path / "base"), "bfloat16"))
    checkpoint = saved(live, tmp_path / "adapter")
    path = tmp_path / "base/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    with pytest.raises(MergeRefused, match=f"its {key} is "):
        load_adapter(checkpoint)


def test_sizes_of_layers_are_no_numbers_of_layers():
    refuse_hostile_settings({"vocab_size_per_layer_input": 262_144})  # of Gemma 3n
    refuse_hostile_settings({"layer_rope_theta": [500_000.0, 0]})
    refuse_hostile_settings({"num_hidden_layers": 10_000, "layer_norm_eps": 1e-5, "n_layer": None})


# What the adapter took off it

KINDS = [
    ("bfloat16", {"init_lora_weights": "pissa"}),
    ("float32", {"init_lora_weights": "pissa"}),
    ("bfloat16", {"init_lora_weights": "olora"}),
    ("nf4-nested", {"init_lora_weights": "olora"}),
    ("bfloat16", {"kasa_config": KasaConfig()}),
]


@pytest.mark.parametrize(("kind", "settings"), KINDS)
def test_a_residual_that_can_be_found_again_is_exact(tmp_path, kind, settings):
    live = adapt(load_base(save_base(tmp_path / "base"), kind), **settings)
    found = load_adapter(saved(live, tmp_path / "adapter"))
    ours, theirs = (model.get_base_model().state_dict() for model in (found, live))
    assert same(dict(ours), dict(theirs))


def test_a_residual_of_chance_is_refused_and_the_adapter_still_known(tmp_path, capsys):
    live = adapt(
        load_base(save_base(tmp_path / "base"), "bfloat16"), init_lora_weights="pissa_niter_4"
    )
    checkpoint = saved(live, tmp_path / "adapter")
    version = merge_adapter(live, tmp_path / "live", progress=False).path
    assert main(["merge", str(checkpoint), "--output-dir", str(tmp_path / "out")]) == 1
    told = capsys.readouterr().err
    assert "init_lora_weights='pissa_niter_4'" in told and "MergeOnSaveCallback" in told
    assert not (tmp_path / "out").exists()
    assert main(["verify", str(version), "--against", str(checkpoint)]) == 0


# Where it is


def test_a_tilde_is_the_home_directory(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(os.sep)
    assert MergeStore("~/out").root == tmp_path / "out"
    live = adapt(load_base(save_base(tmp_path / "base"), "bfloat16"))
    saved(live, tmp_path / "adapter")
    assert merge_adapter(live, "~/one", progress=False).path == tmp_path / "one/merged"
    assert main(["merge", "~/adapter", "--base", "~/base", "--output-dir", "~/two"]) == 0
    assert main(["verify", "~/two/merged", "--against", "~/adapter"]) == 0
    assert main(["list", "~/two"]) == 0
    assert (tmp_path / "two/merged/model.safetensors").is_file()


@pytest.fixture(autouse=True)
def _levels():
    """What the command line sets for its own process."""
    own = logging.getLogger("merge_callback")
    level = own.level
    yield
    own.setLevel(level)
