"""Unsloth's CPU backend, on its own versions: `make test-unsloth`."""

import ast
import copy
import inspect
import json
import shutil
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path

import pytest

unsloth = pytest.importorskip("unsloth", reason="Unsloth is not here; make test-unsloth has it")

import torch
from datasets import Dataset
from models import same, save_base, snapshot, tokenizer
from safetensors import safe_open
from test_docs import blocks, run_bash
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, Qwen3Config, Qwen3ForCausalLM
from trl import SFTConfig, SFTTrainer
from unsloth import FastLanguageModel, UnslothTrainer, UnslothTrainingArguments, get_chat_template
from unsloth_child import outputs

from merge_callback import MergeOnSaveCallback, merge_adapter
from merge_callback.migration import FOR_CALLBACK, FOR_MERGE_ADAPTER

pytestmark = pytest.mark.unsloth

ROOT = Path(__file__).resolve().parents[1]
TEXTS = [" ".join(f"w{(i * 7 + j * 3) % 100}" for j in range(24)) for i in range(64)]
IDS = [[3 + (i * 11 + j * 5) % 100 for j in range(32)] for i in range(8)]
FEW = {"calibration_tokens": 1024, "verify_tokens": 512}
# What a dynamic quantisation of Unsloth's leaves in 16 bits, as its config says it.
DYNAMIC = ["lm_head", "multi_modal_projector", "model.layers.1.self_attn", "model.layers.0.mlp"]


def prequantised(source, place, skipped=None, **more):
    """A directory of the shape of unsloth/*-bnb-4bit."""
    nf4 = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16, llm_int8_skip_modules=skipped,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(
        source, quantization_config=nf4, dtype=torch.bfloat16
    )
    model.save_pretrained(place)
    config = json.loads((place / "config.json").read_text())
    (place / "config.json").write_text(json.dumps(config | more))


def save_qwen3(place):
    torch.manual_seed(1)
    config = Qwen3Config(
        hidden_size=128, intermediate_size=192, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, vocab_size=304,
    )  # fmt: skip
    Qwen3ForCausalLM(config).to(torch.bfloat16).save_pretrained(place)


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    place = tmp_path_factory.mktemp("bases")
    save_base(place / "llama")
    save_qwen3(place / "qwen3")
    prequantised(place / "llama", place / "llama-bnb-4bit")
    fixed = {"unsloth_fixed": True, "unsloth_version": "2026.10.9"}
    prequantised(place / "llama", place / "llama-unsloth-bnb-4bit", DYNAMIC, **fixed)
    for path in place.iterdir():
        tokenizer().save_pretrained(path)
    return place


@pytest.fixture(scope="module")
def stock():
    """A call of `unsloth_child.outputs`, in its process."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        yield lambda path, text="w1 w2": pool.submit(outputs, str(path), IDS, text).result()


@dataclass
class Trained:
    """A model after its training, and what its callback made."""

    model: torch.nn.Module
    tokenizer: object
    callback: MergeOnSaveCallback = field(repr=False)

    @property
    def path(self):
        return self.callback.results[-1].path


def load(base):
    model, words = FastLanguageModel.from_pretrained(str(base), max_seq_length=64)
    return FastLanguageModel.get_peft_model(model, r=8, lora_alpha=16), words


def train(base, run, callback, trainer=SFTTrainer, config=SFTConfig, loaded=None, resume=False):
    model, words = loaded or load(base)
    args = config(
        output_dir=str(run), max_steps=8, save_steps=4, per_device_train_batch_size=4,
        learning_rate=1e-2, report_to="none", max_length=32, disable_tqdm=True,
    )  # fmt: skip
    data = Dataset.from_dict({"text": TEXTS})
    trainer = trainer(
        model=model, tokenizer=words, train_dataset=data, args=args, callbacks=[callback]
    )
    trainer.train(resume_from_checkpoint=resume)
    return Trained(model, words, callback)


def logits(model):
    with torch.no_grad():
        return model(input_ids=torch.tensor(IDS)).logits.double()


def divergence(live, other):
    """KL(live || other) in nats per token, of logits."""
    live, other = (torch.log_softmax(torch.as_tensor(x).double(), -1) for x in (live, other))
    return (live.exp() * (live - other)).sum(-1).mean().item()


def assert_near(model, merged, most=1e-3):
    """The outputs are the live model's, and not those of its base."""
    was = model.training
    live = logits(model.eval())
    with model.disable_adapter():
        base = logits(model)
    model.train(was)
    assert divergence(live, base) > 0.01
    assert divergence(live, merged) < most


def packed(directory):
    """The weights that lie in 4 bits there."""
    with safe_open(directory / "model.safetensors", "pt") as file:
        return {name for name in file.keys() if name.endswith("weight.absmax")}


def weights(directory):
    return (directory / "model.safetensors").read_bytes()


BATCHES = [{"input_ids": torch.tensor(IDS), "labels": torch.tensor(IDS)}]


@pytest.mark.parametrize(
    ("base", "rounding", "most"),
    [
        ("llama", "nearest", 5e-3),
        ("llama", "stochastic", 5e-3),
        ("llama", "calibrated", 1e-3),
        ("llama", "tuned", 1e-3),
        ("llama", "auto", 1e-3),
        ("qwen3", "calibrated", 1e-3),
        ("llama-bnb-4bit", "calibrated", 1e-3),
        ("llama-unsloth-bnb-4bit", "calibrated", 1e-3),
    ],
)
def test_stock_transformers_loads_what_unsloth_trained(
    base, rounding, most, bases, stock, tmp_path
):
    callback = MergeOnSaveCallback(rounding=rounding, **FEW)
    trained = train(bases / base, tmp_path, callback)
    manifest = callback.results[-1].manifest
    assert manifest["rounding"] == ("tuned" if rounding == "auto" else rounding)
    assert set(manifest["verification"]["checks"].values()) == {"passed"}
    found, told = stock(trained.path)
    assert_near(trained.model, found, most)
    assert told["use_cache"] and told["padding_side"] == tokenizer().padding_side
    assert told["model_max_length"] == tokenizer().model_max_length  # Unsloth makes it 64
    if base.endswith("bnb-4bit"):
        assert packed(trained.path) == packed(bases / base)
    assert bool(packed(trained.path)) and len(packed(trained.path)) <= 14


def test_a_merge_after_for_inference_leaves_the_model_as_it_is(bases, stock, tmp_path):
    trained = train(bases / "llama", tmp_path, MergeOnSaveCallback(rounding="nearest"))
    model = FastLanguageModel.for_inference(trained.model)
    prompt = torch.tensor(IDS[:1])
    spoken = model.generate(input_ids=prompt, max_new_tokens=4, do_sample=False)
    before = snapshot(model)
    result = merge_adapter(
        model, tmp_path / "out", processing_class=trained.tokenizer, rounding="calibrated",
        save_method=["Merged 4bit-forced", "merged 16bit", "LoRA"], calibration_data=BATCHES,
    )  # fmt: skip
    assert same(before, snapshot(model))
    assert trained.tokenizer.padding_side == "left"  # Unsloth's, for generation
    assert set(result.paths) == {"merged_4bit", "merged_16bit", "lora"}
    for method in ("merged_4bit", "merged_16bit"):
        found, told = stock(result.paths[method])
        assert_near(model, found)
        assert told["use_cache"] and told["padding_side"] == tokenizer().padding_side
    again = model.generate(input_ids=prompt, max_new_tokens=4, do_sample=False)
    assert torch.equal(spoken, again)
    assert FastLanguageModel.for_training(model).training


def test_a_resumed_training_is_merged_and_its_checkpoint_to_the_same_bytes(bases, stock, tmp_path):
    base = bases / "llama-bnb-4bit"
    kinds = (UnslothTrainer, UnslothTrainingArguments)
    first = train(base, tmp_path, MergeOnSaveCallback(rounding="nearest"), *kinds)
    shutil.rmtree(tmp_path / "checkpoint-8")  # as if it had been cut off before
    callback = MergeOnSaveCallback(rounding="nearest")
    resumed = train(base, tmp_path, callback, *kinds, resume=True)
    assert resumed.path.name == f"{first.path.name}-v2"
    found, _ = stock(resumed.path)
    assert_near(resumed.model, found, 5e-3)
    model, words = load(tmp_path / "checkpoint-8")
    result = merge_adapter(model, tmp_path / "out", rounding="nearest", processing_class=words)
    assert weights(result.path) == weights(resumed.path) != weights(first.path)


def test_unsloth_loads_an_export_and_trains_on_it(bases, stock, tmp_path):
    callback = MergeOnSaveCallback(rounding="calibrated", **FEW)
    first = train(bases / "llama", tmp_path / "first", callback)
    model, words = load(first.path)
    found, _ = stock(first.path)
    with model.disable_adapter():
        assert torch.equal(logits(model.eval()), torch.tensor(found))
    callback = MergeOnSaveCallback(rounding="calibrated", **FEW)
    second = train(None, tmp_path / "second", callback, loaded=(model.train(), words))
    found, _ = stock(second.path)
    assert_near(second.model, found)


def test_a_chat_template_and_patched_saves_of_unsloth_are_exported(
    bases, stock, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)  # where it puts unsloth_compiled_cache
    from unsloth.save import patch_saving_functions  # it patches all of transformers' models

    model, words = load(bases / "llama")
    plain = words(TEXTS[0])["input_ids"]
    words = get_chat_template(words, chat_template="chatml", map_eos_token=False)
    words.eos_token = "w299"
    patch_saving_functions(model)
    patch_saving_functions(words)
    assert model.save_pretrained.__name__ != "save_pretrained"
    saves = copy.copy(vars(model))
    callback = MergeOnSaveCallback(rounding="nearest", save_method=["merged_4bit", "lora"])
    trained = train(None, tmp_path, callback, loaded=(model, words))
    assert vars(model)["save_pretrained"] is saves["save_pretrained"]
    paths = callback.results[-1].paths
    found, told = stock(paths["merged_4bit"], TEXTS[0])
    assert_near(trained.model, found, 5e-3)
    eos = words.convert_tokens_to_ids("w299")
    assert told["ids"] == plain and told["template"] == words.chat_template
    assert told["eos"] == "w299" and told["config_eos"] == eos
    assert told["generation_eos"] == trained.model.generation_config.eos_token_id == [eos, 2]
    assert sorted(p.name for p in paths["lora"].glob("adapter_*")) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]


def parameters_of_unsloth():
    """Arguments of each function of its save.py that merges for a user."""
    source = (Path(unsloth.__file__).parent / "save.py").read_text()
    wanted = ("save_pretrained_merged", "push_to_hub_merged")
    return {
        node.name: [a.arg for a in node.args.args if a.arg != "self"]
        for node in ast.parse(source).body
        if isinstance(node, ast.FunctionDef) and node.name.endswith(wanted)
    }


@pytest.mark.parametrize(
    ("ours", "known"), [(MergeOnSaveCallback, FOR_CALLBACK), (merge_adapter, FOR_MERGE_ADAPTER)]
)
def test_every_argument_of_unsloth_has_an_answer(ours, known):
    found = parameters_of_unsloth()
    assert len(found) == 4 and all(len(names) > 15 for names in found.values())
    asked = {name for names in found.values() for name in names}
    assert asked - inspect.signature(ours).parameters.keys() - known.keys() == set()


@pytest.mark.parametrize("method", ["merged_4bit", "merged_4bit_forced", "merged_16bit"])
def test_unsloth_itself_merges_no_4_bit_base_without_a_gpu(method, bases, tmp_path):
    model, words = load(bases / "llama")
    with pytest.raises(NotImplementedError, match="not supported on CPU"):
        model.save_pretrained_merged(str(tmp_path / "out"), words, save_method=method)


def test_the_page_on_unsloth_runs(bases, stock, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    page = blocks((ROOT / "docs/how-to/unsloth.md").read_text())
    shutil.copytree(bases / "llama-unsloth-bnb-4bit", "unsloth/Qwen3-0.6B-unsloth-bnb-4bit")
    for block in page:
        if block.title:
            Path(block.title).write_text(block.text)
        else:
            run_bash(block, {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"})
    assert [block.title for block in page if block.title] == ["train.py", "ask.py"]
    assert stock(tmp_path / "run/_merged/step-00000060")[1]["eos"] == tokenizer().eos_token
