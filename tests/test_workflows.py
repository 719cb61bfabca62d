"""Workflows: what is shipped has all that the base had, and stops where it should."""

import json

import pytest
import torch
from models import adapt, load_base, qlora, save_base, tokenizer
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from test_calibration import batches
from test_callback import sft, trainer
from transformers import (
    AutoTokenizer,
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPVisionConfig,
    GenerationConfig,
    LlamaConfig,
    LlamaForQuestionAnswering,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

from merge_callback import MergeError, MergeOnSaveCallback, merge_adapter
from merge_callback.base_files import is_of_the_base
from merge_callback.cli import main
from merge_callback.data import Data
from merge_callback.verification.outputs import Speaker

QUICK = {"rounding": "nearest", "verify": False}


def config_of(result):
    return json.loads((result.path / "config.json").read_text())


# --- what stands beside the weights ---------------------------------------------------------------


def test_generation_stops_at_the_tokenizers_eos_whoever_merges(tmp_path):
    """A chat's end of turn that was made the EOS; all three ways give the same configs."""
    words = tokenizer()
    words.eos_token = "w7"
    end = words.eos_token_id
    callback = MergeOnSaveCallback(**QUICK)
    run = trainer(tmp_path, callback, words=words, save_strategy="steps", save_steps=4)
    run.train()
    by_hand = merge_adapter(
        qlora(tmp_path / "other"),
        tmp_path / "hand",
        processing_class=words,
        progress=False,
        **QUICK,
    )
    checkpoint = tmp_path / "run" / "checkpoint-4"
    words.save_pretrained(checkpoint)
    options = ["--load-in-4bit", "--rounding", "nearest", "--no-verify"]
    assert main(["merge", str(checkpoint), *options, "--output-dir", str(tmp_path / "cli")]) == 0
    (of_cli,) = (tmp_path / "cli").glob("step-*")
    for path in (callback.results[0].path, by_hand.path, of_cli):
        assert end in GenerationConfig.from_pretrained(path).eos_token_id
        assert json.loads((path / "config.json").read_text())["eos_token_id"] == end


def with_base_files(path, words):
    """A base with what a SentencePiece base and a processor have."""
    base = save_base(path)
    words.save_pretrained(base)
    for name in ("preprocessor_config.json", "processor_config.json", "chat_template.json"):
        (base / name).write_text("{}")
    (base / "tokenizer.model").write_bytes(b"pieces")
    (base / "secrets.txt").write_text("no companion")
    return base


def test_files_of_the_base_that_still_hold_are_carried_along(tmp_path):
    words = tokenizer()
    base = with_base_files(tmp_path / "base", words)
    result = merge_adapter(
        adapt(load_base(base, "nf4")), tmp_path / "out", processing_class=words, progress=False
    )
    names = {path.name for path in result.path.iterdir()}
    assert {"preprocessor_config.json", "processor_config.json", "tokenizer.model"} <= names
    assert (result.path / "tokenizer.model").read_bytes() == b"pieces"
    assert "chat_template.json" not in names  # the tokenizer has written a newer one
    assert "secrets.txt" not in names
    assert "tokenizer.model" in result.manifest["files"]


def test_a_vocabulary_that_no_longer_holds_is_left_behind(tmp_path):
    words = tokenizer()
    base = with_base_files(tmp_path / "base", words)
    other = words.train_new_from_iterator([["b", "a", "c"]], vocab_size=20)
    result = merge_adapter(
        adapt(load_base(base, "nf4")), tmp_path / "out", processing_class=other, progress=False
    )
    names = {path.name for path in result.path.iterdir()}
    assert "tokenizer.model" not in names and "preprocessor_config.json" in names


def test_without_a_tokenizer_the_bases_is_carried_along_while_its_rows_are_the_same(tmp_path):
    base = with_base_files(tmp_path / "base", tokenizer())
    model = load_base(base, "nf4")
    same_rows = merge_adapter(adapt(model), tmp_path / "same", progress=False, **QUICK)
    assert (same_rows.path / "tokenizer.json").read_bytes() == (
        base / "tokenizer.json"
    ).read_bytes()
    resized = load_base(base, "nf4")
    resized.resize_token_embeddings(310)
    more = merge_adapter(adapt(resized), tmp_path / "more", progress=False, **QUICK)
    assert not (more.path / "tokenizer.json").exists()


def test_no_file_from_outside_the_base_is_published(tmp_path):
    """A base may come from anybody, with links to what only this user can read."""
    base = with_base_files(tmp_path / "base", tokenizer())
    (tmp_path / "secret").write_text("token")
    for name in ("preprocessor_config.json", "tokenizer.model"):
        (base / name).unlink()
        (base / name).symlink_to(tmp_path / "secret")
    model = adapt(load_base(base, "nf4"))
    words = tokenizer()
    path = merge_adapter(model, tmp_path / "out", processing_class=words, progress=False).path
    names = {file.name for file in path.iterdir()}
    assert names.isdisjoint({"preprocessor_config.json", "tokenizer.model"})
    assert "processor_config.json" in names


def test_files_of_a_hub_cache_are_links_within_it(tmp_path):
    snapshot = tmp_path / "models--x--y" / "snapshots" / "abc"
    blobs = tmp_path / "models--x--y" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    (blobs / "1f").write_text("{}")
    (snapshot / "a.json").symlink_to("../../blobs/1f")
    (tmp_path / "b.json").write_text("{}")
    (snapshot / "b.json").symlink_to(tmp_path / "b.json")
    assert is_of_the_base(snapshot / "a.json", snapshot)
    assert not is_of_the_base(snapshot / "b.json", snapshot)


def test_a_version_behind_the_training_has_the_same_files(tmp_path):
    with_base_files(tmp_path / "base", tokenizer())
    model = adapt(load_base(tmp_path / "base", "nf4"))
    callback = MergeOnSaveCallback(**QUICK, merge_on_save=True, blocking=False)
    trainer(tmp_path, callback, model=model, save_strategy="steps", save_steps=2).train()
    files = [set(result.manifest["files"]) for result in callback.results]
    assert len(files) == 2 and files[0] == files[1] and "tokenizer.model" in files[0]


def test_a_tokenizer_that_is_not_the_bases_keeps_its_limits(tmp_path):
    base = save_base(tmp_path / "base")
    tokenizer().save_pretrained(base)
    other = tokenizer().train_new_from_iterator([["b", "a", "c"]], vocab_size=20)
    other.model_max_length = 77
    result = merge_adapter(
        adapt(load_base(base, "nf4")), tmp_path / "out", processing_class=other, progress=False
    )
    assert AutoTokenizer.from_pretrained(result.path).model_max_length == 77


def test_padding_side_and_lengths_are_those_of_the_base(tmp_path):
    words = tokenizer()
    words.padding_side, words.model_max_length = "right", 77
    words.init_kwargs["padding_side"] = "right"
    base = save_base(tmp_path / "base")
    words.save_pretrained(base)
    trained = AutoTokenizer.from_pretrained(base)
    trained.padding_side, trained.model_max_length = "left", 16
    trained(["w1 w2", "w3"], padding="max_length", truncation=True, max_length=16)
    result = merge_adapter(
        adapt(load_base(base, "nf4")), tmp_path / "out", processing_class=trained, progress=False
    )
    found = AutoTokenizer.from_pretrained(result.path)
    assert (found.padding_side, found.model_max_length) == ("right", 77)
    written = json.loads((result.path / "tokenizer.json").read_text())
    assert written["truncation"] is None and written["padding"] is None
    assert (trained.padding_side, trained.model_max_length) == ("left", 16)


# --- settings that trainers change ----------------------------------------------------------------


@pytest.mark.parametrize("at_hand", [True, False])
def test_a_callback_that_came_late_gives_the_cache_back(tmp_path, at_hand):
    late = MergeOnSaveCallback(**QUICK)
    run = trainer(tmp_path)
    if not at_hand:
        run.model.config._name_or_path = ""
    run.add_callback(late)
    assert run.model.config.use_cache is False
    run.train()
    assert config_of(late.results[0])["use_cache"] is True
    assert run.model.config.use_cache is True


def test_a_model_in_a_second_trainer_has_its_settings_back_each_time(tmp_path):
    model = qlora(tmp_path)
    model.config._name_or_path = ""  # the base is not at hand
    for number in range(2):
        callback = MergeOnSaveCallback(**QUICK)
        trainer(tmp_path / str(number), callback, model=model).train()
        assert config_of(callback.results[0])["use_cache"] is True


def test_a_trainer_leaves_nothing_around_the_text_config(tmp_path):
    """It sets use_cache in the config of a model of images, whose text has a config of its own."""
    vision = {
        "hidden_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 32,
        "patch_size": 16,
    }
    text = {
        "hidden_size": 128,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "vocab_size": 304,
        "intermediate_size": 192,
    }
    config = LlavaConfig(vision_config=CLIPVisionConfig(**vision), text_config=LlamaConfig(**text))
    torch.manual_seed(0)
    LlavaForConditionalGeneration(config).save_pretrained(tmp_path / "base")
    model = adapt(
        LlavaForConditionalGeneration.from_pretrained(tmp_path / "base"),
        target_modules=r".*language_model.*q_proj", task_type=None,
    )  # fmt: skip
    model.config.text_config.use_cache = False  # as training scripts do
    callback = MergeOnSaveCallback()
    run = trainer(tmp_path, callback, model=model)
    assert run.model.config.use_cache is False
    run.train()
    assert run.model.config.use_cache is run.model.config.text_config.use_cache is True
    written = config_of(callback.results[0])
    assert written.get("use_cache", True) is written["text_config"]["use_cache"] is True


def test_the_cache_comes_back_after_a_merge_that_failed(tmp_path):
    callback = MergeOnSaveCallback(max_kl=1e-12, rounding="nearest")
    run = trainer(tmp_path, callback)
    with pytest.raises(MergeError, match="max_kl"):
        run.train()
    assert run.model.config.use_cache is True


def test_the_same_trainer_trains_again_without_a_cache(tmp_path):
    seen = []

    class Watching(MergeOnSaveCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            seen.append(model.config.use_cache)

    run = trainer(tmp_path, Watching(**QUICK))
    run.train()
    run.train()
    assert set(seen) == {False}


# --- adapters and data ----------------------------------------------------------------------------


def test_an_adapter_of_add_adapter_merges_as_a_wrapped_one(tmp_path):
    base = save_base(tmp_path / "base")
    config = {"r": 4, "target_modules": ["q_proj", "up_proj"]}
    paths = []
    for wrap in (True, False):
        model = load_base(base, "nf4")
        if wrap:
            model = get_peft_model(model, LoraConfig(**config))
        else:
            model.add_adapter(LoraConfig(**config))
        generator = torch.Generator().manual_seed(1)
        named = {n.removeprefix("base_model.model."): p for n, p in model.named_parameters()}
        for name, parameter in sorted(named.items()):
            if "lora_" in name:
                parameter.data = torch.randn(parameter.shape, generator=generator) * 0.02
        result = merge_adapter(
            model, tmp_path / "out", save_method=["merged_16bit", "lora"], progress=False,
            verification_data=batches(2),
        )  # fmt: skip
        checks = result.manifest["verification"]["checks"]
        assert set(checks.values()) == {"passed"}
        paths.append(result.paths)
    for method, name in (("merged_16bit", "model"), ("lora", "adapter_model")):
        one, other = (load_file(p[method] / f"{name}.safetensors") for p in paths)
        assert one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


def test_a_trainer_merges_an_adapter_of_add_adapter(tmp_path):
    model = load_base(save_base(tmp_path / "base"), "nf4")
    model.add_adapter(LoraConfig(r=4, target_modules="all-linear"))
    callback = MergeOnSaveCallback(verify_tokens=100, calibration_tokens=300)
    trainer(tmp_path, callback, model=model).train()
    found = callback.results[0].manifest["verification"]
    assert found["problems"] == [] and found["data"]


def test_question_answering_is_compared(tmp_path):
    """Two scores for each token: which is the first of the answer, and which the last."""
    config = LlamaConfig(
        hidden_size=128, intermediate_size=192, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=304,
    )  # fmt: skip
    torch.manual_seed(0)
    LlamaForQuestionAnswering(config).save_pretrained(tmp_path / "base")
    model = LlamaForQuestionAnswering.from_pretrained(tmp_path / "base")
    model = adapt(model, target_modules=["q_proj", "up_proj"], task_type="QUESTION_ANS")
    data = [
        batch
        | {
            "start_positions": torch.tensor([1, 2, 3, 32]),
            "end_positions": torch.tensor([4, 5, 6, 32]),
        }
        for batch in batches(3)
    ]
    result = merge_adapter(model, tmp_path / "out", verification_data=data, progress=False)
    (found,) = result.manifest["verification"]["models"].values()
    assert found["rows"] == 3 * 2 * 3  # ends of answers; one of each batch lies beyond the text
    assert found["kl"] is not None and found["loss_live"] > 1.0
    assert result.manifest["verification"]["checks"]["merged_16bit: outputs"] == "passed"


def test_a_loss_is_no_output(tmp_path):
    """CLIP gives its loss first, where it is asked for one, and has no field of logits."""
    vision = CLIPVisionConfig(
        hidden_size=64, num_hidden_layers=1, num_attention_heads=2, image_size=32, patch_size=16
    )
    text = CLIPTextConfig(hidden_size=64, num_hidden_layers=1, num_attention_heads=2, vocab_size=99)
    model = CLIPModel(CLIPConfig(vision_config=vision, text_config=text)).eval()
    batch = {
        "input_ids": torch.arange(8).view(2, 4),
        "pixel_values": torch.zeros(2, 3, 32, 32),
        "return_loss": True,
    }
    outputs, are_logits = Speaker(model, torch.device("cpu")).outputs(batch)
    assert outputs.shape == (2, 2) and not are_logits


def test_no_gain_is_told_where_training_does_not_lower_this_loss():
    """What a trainer of preferences gives its model has no labels."""
    assert not Data(chosen=False).aims_at(batches(1))
    assert Data(chosen=False).aims_at(
        [batch | {"labels": batch["input_ids"]} for batch in batches(1)]
    )
    assert Data().aims_at(batches(1))  # somebody has chosen them to measure the loss on


# --- what is seen ---------------------------------------------------------------------------------


def test_where_the_version_lies_and_how_good_it_is_are_on_the_screen(tmp_path, capfd, caplog):
    caplog.set_level("WARNING", logger="merge_callback")
    callback = MergeOnSaveCallback(calibration_tokens=300)
    sft(tmp_path, callback).train()
    (line,) = [line for line in capfd.readouterr().out.splitlines() if "merged merged_4bit" in line]
    assert str(callback.results[0].path) in line
    assert "retention" in line and "gain kept" in line and "KL" in line
