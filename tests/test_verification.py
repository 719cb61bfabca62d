"""Faults put in on purpose are found and named before anything is published; figures are exact."""

import json
import logging
import re
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from models import adapt, load_base, qlora, same, save_base, snapshot, tokenizer
from peft import AdaLoraConfig, LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from test_calibration import batches, quantised
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    BitsAndBytesConfig,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForSequenceClassification,
    MixtralConfig,
    MixtralForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainingArguments,
)

from merge_callback import (
    CorruptVersion,
    MergeError,
    MergeOnSaveCallback,
    MergeRefused,
    MergeStore,
    VerificationError,
    compare,
    merge_adapter,
)
from merge_callback.adapters import lora, tokens
from merge_callback.codecs import encode, plain
from merge_callback.codecs.bnb4 import Bnb4Weight
from merge_callback.export import check_merge
from merge_callback.live import Weight
from merge_callback.merging import Merging
from merge_callback.options import MergeOptions
from merge_callback.processes import PeerError
from merge_callback.rounding import grid
from merge_callback.stand_ins import without_adapters
from merge_callback.store import Draft
from merge_callback.verification import arithmetic, checks, limits, outputs, rebuilt, tensors
from merge_callback.verification.outputs import Speaker, compare_outputs
from merge_callback.verification.rebuilt import layer_by_layer, rebuild

METHODS = ["merged_4bit", "merged_16bit"]


@pytest.fixture
def model(tmp_path):
    return qlora(tmp_path)


def refused(tmp_path, model, error=VerificationError, **settings):
    """What is said of a merge that is not published."""
    with pytest.raises(error) as caught:
        merge_adapter(model, tmp_path / "out", progress=False, **settings)
    assert MergeStore(tmp_path / "out").versions() == []
    assert list((tmp_path / "out").iterdir()) == []
    return str(caught.value)


def before_sealing(monkeypatch, change):
    """Change a draft when it is whole, but for its report."""
    seal = Draft.seal

    def changed(self):
        if not (self.path / "merge_report.json").exists():
            change(self.path)
        seal(self)

    monkeypatch.setattr(Draft, "seal", changed)


# --- faults -------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["layers.1.mlp.up_proj.weight", "layers.0.input_layernorm.weight"])
def test_bytes_that_changed_on_the_disk(tmp_path, model, monkeypatch, method, name):
    def damage(path):
        file = path / "model.safetensors"
        data = bytearray(file.read_bytes())
        size = int.from_bytes(data[:8], "little")
        start, end = json.loads(data[8 : 8 + size])[f"model.{name}"]["data_offsets"]
        for index in range(8 + size + start, 8 + size + end):
            data[index] ^= 0x2A
        file.write_bytes(data)

    before_sealing(monkeypatch, damage)
    said = refused(tmp_path, model, CorruptVersion, save_method=method)
    assert "model.safetensors is not what was written" in said
    assert f"model.{name}" in said


@pytest.mark.parametrize("method", METHODS)
def test_an_adapter_that_is_left_out_of_one_layer(tmp_path, model, monkeypatch, method):
    left_out = model.get_base_model().model.layers[1].self_attn.k_proj
    whole = lora.updates
    monkeypatch.setattr(lora, "updates", lambda layer: () if layer is left_out else whole(layer))
    said = refused(tmp_path, model, save_method=method)
    assert "model.layers.1.self_attn.k_proj: what is merged differs" in said
    assert said.count("differs") == 1


@pytest.mark.parametrize("settings", [{}, {"use_dora": True}])
def test_a_scaling_that_is_wrong(tmp_path, monkeypatch, settings):
    model = qlora(tmp_path, **settings)
    scaled = model.get_base_model().model.layers[0].mlp.down_proj
    whole = lora.updates

    def wrong(layer):
        if layer is scaled:
            layer.scaling["default"] *= 1.1
        try:
            return whole(layer)
        finally:
            if layer is scaled:
                layer.scaling["default"] /= 1.1

    monkeypatch.setattr(lora, "updates", wrong)
    said = refused(tmp_path, model)
    assert "model.layers.0.mlp.down_proj: what is merged differs" in said
    assert said.count("differs") == 1


def test_shards_that_are_swapped(tmp_path, model, monkeypatch):
    def swap(path):
        one, other = sorted(path.glob("model-*.safetensors"))[:2]
        one.rename(path / "aside")
        other.rename(one)
        (path / "aside").rename(other)

    before_sealing(monkeypatch, swap)
    said = refused(
        tmp_path, model, CorruptVersion, save_method="merged_16bit", max_shard_size="200KB"
    )
    assert "model-00001-of-" in said


@pytest.mark.parametrize("method", METHODS)
def test_shards_that_are_written_as_each_other(tmp_path, model, monkeypatch, method):
    from merge_callback.shards import CheckpointWriter

    write, first = CheckpointWriter.write, {}

    def swapped(self, name, tensor):  # two weights of one shape change places
        if name.endswith(("gate_proj.weight", "up_proj.weight")):
            other = first.setdefault(name.split(".mlp.")[0], tensor)
            tensor = other
        write(self, name, tensor)

    monkeypatch.setattr(CheckpointWriter, "write", swapped)
    said = refused(tmp_path, model, save_method=method)
    assert re.search(r"not what was merged: model\.layers\.\d\.mlp\.(up|gate)_proj\.weight", said)


def test_a_conv1d_that_is_transposed(tmp_path, monkeypatch):
    config = GPT2Config(n_embd=128, n_layer=2, n_head=4, vocab_size=304, n_positions=64)
    torch.manual_seed(1)
    GPT2LMHeadModel(config).bfloat16().save_pretrained(tmp_path / "base")
    model = adapt(load_base(tmp_path / "base", "nf4"), target_modules=["c_attn", "c_fc"])
    merge_adapter(model, tmp_path / "right", save_method="merged_16bit")

    def untransposed(self, name, stored, device):
        weight = stored.decode(device)
        square = self.transposed and weight.shape[0] == weight.shape[1]
        turned = weight.t() if self.transposed and not square else weight
        return {name: turned.to(self.dtype).contiguous()}

    monkeypatch.setattr(plain.Plain, "copy", untransposed)
    said = refused(tmp_path, model, save_method="merged_16bit")
    assert "transformer.h.0.attn.c_proj.weight (off by 1.4)" in said
    assert "transformer.h.1.attn.c_proj.weight" in said and "c_fc" not in said


def test_a_tokenizer_that_is_another_one(tmp_path, model, monkeypatch):
    given, other = tokenizer(), tokenizer()
    other.add_tokens(["w1 w2", "new"])
    monkeypatch.setattr(given, "save_pretrained", other.save_pretrained)
    said = refused(tmp_path, model, processing_class=given)
    assert "the tokenizer saved there is not the one of the training" in said


def test_a_tied_head_that_is_untied(tmp_path, model, monkeypatch):
    def untie(path):
        config = json.loads((path / "config.json").read_text())
        (path / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))

    before_sealing(monkeypatch, untie)
    assert "missing_keys: lm_head.weight" in refused(tmp_path, model)


def test_a_file_that_does_not_load(tmp_path, model, monkeypatch):
    before_sealing(monkeypatch, lambda path: (path / "config.json").write_text("{"))
    assert "does not load" in refused(tmp_path, model)


def test_a_broken_file_is_published_when_only_a_warning_is_wanted(
    tmp_path, model, monkeypatch, caplog
):
    monkeypatch.setattr(lora, "updates", lambda layer: ())
    result = merge_adapter(model, tmp_path / "out", verify="warn")
    assert len(result.manifest["verification"]["problems"]) == 14
    assert "what is merged differs" in caplog.text
    assert "Published in spite of" in (result.path / "merge_report.md").read_text()
    assert merge_adapter(model, tmp_path / "out", verify=False).manifest["verification"] is None


def test_the_base_written_instead_of_the_merge(tmp_path, monkeypatch):
    """The arithmetic is right, what is written is not; half of it is below 16 bits."""
    from merge_callback import weights

    model = qlora(tmp_path, scale=1e-4)
    whole = weights._encode_on

    def bare(plan, weight, device):
        for method, _, arrived in whole(plan, weight, device):
            container = plan.containers[method][weight.key]
            base = weight.decoded(device).float()
            yield method, encode(container, weight.key, base), arrived

    monkeypatch.setattr(weights, "_encode_on", bare)
    for settings in (
        {"save_method": "merged_16bit"},
        {"rounding": "stochastic"},
        {"rounding": "calibrated", "calibration_data": batches(2)},
    ):
        if settings.get("rounding") == "calibrated":
            from merge_callback.codecs.bnb4 import Bnb4

            monkeypatch.setattr(
                Bnb4,
                "encoded",
                lambda self, n, s, r, own=Bnb4.encoded: own(self, n, s, moved(self, r)),
            )
        assert "_proj.weight" in refused(tmp_path, model, **settings)


def moved(container, rounded):
    """One code in a hundred of those that were chosen moved by one."""
    if container.rounded is None:
        return rounded
    packed = rounded.packed.clone()
    packed[::100] ^= 1
    return rounded._replace(packed=packed)


def test_a_tensor_too_many_or_of_another_shape(tmp_path, model, monkeypatch):
    def one_more(path):
        tensors = load_file(path / "model.safetensors")
        tensors["model.extra.weight"] = torch.zeros(2)
        save_file(tensors, path / "model.safetensors", {"format": "pt"})

    def narrower(path):
        tensors = load_file(path / "model.safetensors")
        tensors["model.norm.weight"] = torch.zeros(64, dtype=torch.bfloat16)
        save_file(tensors, path / "model.safetensors", {"format": "pt"})

    monkeypatch.setattr(Draft, "verify", lambda self: None)  # the bytes are those of the writer
    for change, said in ((one_more, "model.extra.weight"), (narrower, "model.norm.weight")):
        with monkeypatch.context() as patch:
            before_sealing(patch, change)
            assert said in refused(tmp_path, model)


def test_what_is_rounded_away_by_a_loader_is_no_fault(tmp_path):
    """Small values in float16, float32 weights that a loader casts, rows of almost nothing."""
    model = qlora(tmp_path, "bfloat16", target_modules=["q_proj"])
    model.get_base_model().model.layers[0].mlp.up_proj.weight.data *= 1e-5
    merge_adapter(model, tmp_path / "out", dtype="float16", save_method="merged_16bit")
    model.get_base_model().model.float()
    merge_adapter(model, tmp_path / "out", save_method="merged_16bit")
    path = save_base(tmp_path / "half", dtype=torch.float16)
    tensors = load_file(path / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][:3] *= 1e-4
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    half = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float16)
    base = AutoModelForCausalLM.from_pretrained(path, quantization_config=half, dtype="auto")
    merge_adapter(adapt(base), tmp_path / "out", calibration_data=batches(4))


def test_memory_that_runs_out_moves_the_check_to_the_cpu(tmp_path, model, monkeypatch):
    whole, tried = arithmetic.detached, []

    def once(*args):
        tried.append(args)
        if len(tried) == 2:
            raise torch.OutOfMemoryError("none left")
        return whole(*args)

    monkeypatch.setattr(arithmetic, "detached", once)
    merge_adapter(model, tmp_path / "out")
    assert len(tried) == 15


CHECKS = {
    "adapter_findings": "adapter",
    "base_findings": "base",
    "config_problems": "merged_4bit: config",
    "generation_problems": "merged_4bit: generation config",
    "processor_problems": "merged_4bit: tokenizer",
    "deviations": "merged_4bit: weights",
    "tie_problems": "merged_4bit: ties",
    "buffer_problems": "merged_4bit: buffers",
    "compare_outputs": "outputs",
}


@pytest.mark.parametrize("check", CHECKS)
def test_a_check_that_breaks_down_has_found_something(tmp_path, model, monkeypatch, check):
    def fail(*args):
        raise TypeError("cannot copy a lock")

    monkeypatch.setattr(checks, check, fail)
    said = refused(tmp_path, model, verification_data=batches(1))
    assert "TypeError: cannot copy a lock" in said and said.count("\n") == 1
    settings = {"verify": "warn", "verification_data": batches(1), "progress": False}
    found = merge_adapter(model, tmp_path / "out", **settings).manifest["verification"]
    assert found["checks"].pop(CHECKS[check]) == "failed"
    assert len(found["problems"]) == 1 and set(found["checks"].values()) <= {"passed"}


@pytest.mark.parametrize("check", CHECKS)
def test_a_check_that_memory_is_too_short_for_is_noted(tmp_path, model, monkeypatch, caplog, check):
    def fail(*args):
        raise torch.OutOfMemoryError("none left")

    monkeypatch.setattr(checks, check, fail)
    result = merge_adapter(model, tmp_path / "out", verification_data=batches(1), progress=False)
    found = result.manifest["verification"]
    assert found["problems"] == []
    assert found["checks"].pop(CHECKS[check]) == "not run: memory is short: none left"
    assert set(found["checks"].values()) == {"passed"}
    assert f"{CHECKS[check]} not checked (memory is short: none left)" in caplog.text


def test_the_manifest_says_which_checks_ran(tmp_path, model):
    given = {"processing_class": tokenizer(), "save_method": [*METHODS, "lora"], "progress": False}
    plain = merge_adapter(model, tmp_path / "out", **given).manifest["verification"]
    both = {f"{m}: {what}" for m in METHODS for what in
            ("tokenizer", "config", "generation config", "weights", "ties", "buffers")}  # fmt: skip
    of_files = {"lora: tokenizer", "lora: adapter files"}
    assert plain["checks"] == {
        **dict.fromkeys({"adapter", "base", *both, *of_files}, "passed"),
        "outputs": "not run: there was nothing to compare outputs on",
    }
    seen = merge_adapter(model, tmp_path / "out", **given, verification_data=batches(2))
    outputs_too = {f"{m}: outputs" for m in METHODS}
    wanted = dict.fromkeys({"adapter", "base", *both, *of_files, *outputs_too}, "passed")
    assert seen.manifest["verification"]["checks"] == wanted


def test_hooks_are_not_copied(tmp_path, model):
    import threading

    class Hook:
        lock = property(lambda self: None)

        def __init__(self):
            self.held = threading.Lock()

        def seen(self, module, args):
            return None

    layer = model.get_base_model().model.layers[0].self_attn.q_proj
    layer.register_forward_pre_hook(Hook().seen)
    layer.get_base_layer().register_forward_pre_hook(Hook().seen)
    merge_adapter(model, tmp_path / "out")


# --- thresholds ---------------------------------------------------------------------------------


def test_less_than_what_was_asked_for_is_not_published(tmp_path):
    model = qlora(tmp_path, scale=2e-3)
    settings = {"rounding": "nearest", "verification_data": batches(4)}
    found = merge_adapter(model, tmp_path / "all", **settings).manifest["verification"]
    figures = found["models"]["merged_4bit"]
    assert found["data"] == "held-out data" and found["problems"] == []
    for limit in ({"min_gain_kept": figures["gain_kept"] + 0.01}, {"max_kl": figures["kl"] * 0.9}):
        said = refused(tmp_path, model, **settings, **limit)
        assert "model.layers." in said and "rounding='tuned'" in said
        assert len(said) < 1200  # one screen
    met = {"min_gain_kept": figures["gain_kept"] - 0.01, "max_kl": figures["kl"] * 1.1}
    merge_adapter(model, tmp_path / "out", **settings, **met)


def test_16_bits_that_keep_little_of_the_gain_are_not_published(tmp_path, monkeypatch):
    """A formula that is wrong in the same way for those who write and those who check."""
    model = qlora(tmp_path)
    monkeypatch.setattr(lora.LowRank, "add_to", lambda *args: None)
    monkeypatch.setattr(checks, "adapter_findings", lambda plan: arithmetic.Findings())
    settings = {"save_method": "merged_16bit", "verification_data": batches(4)}
    assert "of what training gained" in refused(tmp_path, model, **settings)


def keeping_little(monkeypatch):
    """Training gained 0.9 nats, of which 0.27 are left."""
    against = outputs._Sums.against
    losses = {"loss_base": 4.4, "loss_live": 3.5, "loss": 4.13, "gain_kept": 0.3, "gain_error": 0.0}
    monkeypatch.setattr(
        outputs._Sums, "against", lambda self, base: replace(against(self, base), **losses)
    )


def test_4_bits_that_keep_little_of_the_gain_are_said(tmp_path, monkeypatch, caplog):
    keeping_little(monkeypatch)
    merge_adapter(qlora(tmp_path), tmp_path / "out", verification_data=batches(4), progress=False)
    assert "merged_4bit keeps 30.0 % of what training gained" in caplog.text


@pytest.mark.parametrize("base", ["live", "original"])
def test_the_original_base_may_have_gained_less(tmp_path, monkeypatch, caplog, base):
    keeping_little(monkeypatch)
    settings = {"save_method": "merged_16bit", "verification_data": batches(4), "base": base}
    if base == "live":
        assert "of what training gained" in refused(tmp_path, qlora(tmp_path), **settings)
    else:
        merge_adapter(qlora(tmp_path), tmp_path / "out", progress=False, **settings)
        assert "merged_16bit keeps 30.0 % of what training gained" in caplog.text


def test_tokens_that_are_trained_are_among_those_that_are_asked(tmp_path, monkeypatch):
    base = load_base(save_base(tmp_path / "base", vocab_size=6080), "float32")
    model = adapt(base, trainable_token_indices=[6000, 6001])
    with torch.no_grad():
        base.model.embed_tokens.token_adapter.trainable_tokens_delta["default"].add_(1)
    monkeypatch.setattr(tokens.Rows, "add_to", lambda *args: None)
    said = refused(tmp_path, model, save_method="merged_16bit")
    assert "embed_tokens: what is merged differs from PEFT's own" in said


def test_figures_that_cannot_be_had_are_not_met(tmp_path, model):
    assert "nothing to compare outputs on" in refused(tmp_path, model, max_kl=1.0)
    one = [{"input_ids": torch.arange(3, 40)[None]}]
    unlabelled = [{**batch, "labels": torch.full_like(batch["input_ids"], -100)} for batch in one]
    said = refused(tmp_path, model, max_kl=1.0, verification_data=unlabelled)
    assert "no token is predicted), so min_gain_kept and max_kl cannot be met" in said
    said = refused(tmp_path, model, min_gain_kept=0.1, verification_data=one)
    assert "one sequence alone" in said
    with pytest.raises(MergeRefused, match="need verify=True"):
        merge_adapter(model, tmp_path / "out", verify=False, max_kl=1.0)


def test_outputs_that_are_not_finite_are_broken(tmp_path, model, monkeypatch):
    def overflow(place, kind, whole=rebuild, **given):
        made = whole(place, kind, **given)
        made.model.norm.variance_epsilon = float("nan")
        return made

    monkeypatch.setattr(checks, "rebuild", overflow)
    said = refused(tmp_path, model, verification_data=batches(1))
    assert "its outputs, or the live model's, are not finite" in said


def test_a_live_model_that_says_nothing_finite_is_no_yardstick(tmp_path, model):
    model.get_base_model().config.rms_norm_eps = float("nan")
    for norm in (m for m in model.modules() if hasattr(m, "variance_epsilon")):
        norm.variance_epsilon = float("nan")
    said = refused(tmp_path, model, verification_data=batches(1), max_kl=9.0)
    assert "its outputs, or the live model's, are not finite" in said


def test_outputs_that_the_live_model_has_too_are_no_fault(tmp_path):
    """A head that forbids a word by an infinite bias."""
    model = qlora(tmp_path)
    head = model.get_base_model().get_output_embeddings()

    def forbid(self, batch, whole=Speaker.outputs):
        found, are_logits = whole(self, batch)
        return found.index_fill(-1, torch.tensor([299]), -torch.inf), are_logits

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(outputs.Speaker, "outputs", forbid)
        result = merge_adapter(model, tmp_path / "out", verification_data=batches(1), max_kl=1.0)
    figures = result.manifest["verification"]["models"]["merged_4bit"]
    assert figures["finite"] and 0 < figures["kl"] < 1 and head is not None


def test_a_model_that_does_not_run_is_not_published(tmp_path, model, monkeypatch):
    def silent(self, batch, whole=Speaker.outputs):
        if self.model is not model.get_base_model() and getattr(self.model, "is_quantized", False):
            raise RuntimeError("no kernel")
        return whole(self, batch)

    monkeypatch.setattr(outputs.Speaker, "outputs", silent)
    settings = {"save_method": METHODS, "verification_data": batches(1)}
    assert "merged_4bit: it does not run: no kernel" in refused(tmp_path, model, **settings)
    result = merge_adapter(model, tmp_path / "out", verify="warn", **settings)
    found = result.manifest["verification"]["models"]
    assert found["merged_16bit"]["kl"] is not None and "kl" not in found["merged_4bit"]


def test_a_comparison_that_fails_is_no_fault_of_the_files(tmp_path, model, monkeypatch, caplog):
    def fail(*args):
        raise torch.OutOfMemoryError("none left")

    monkeypatch.setattr(checks, "compare_outputs", fail)
    result = merge_adapter(model, tmp_path / "out", verification_data=batches(1))
    assert result.manifest["verification"]["data"] is None
    assert "none left" in caplog.text
    limits = {"max_kl": 1.0, "verification_data": batches(1)}
    (tmp_path / "new").mkdir()
    assert "could not be compared (memory is short: none left)" in refused(
        tmp_path / "new", model, **limits
    )


# --- what is compared ---------------------------------------------------------------------------


def test_the_live_model_is_as_it_was(tmp_path):
    model = qlora(tmp_path, lora_dropout=0.1).train()
    adapt(model, seed=5, name="other")
    model.set_adapter("default")
    model.train()
    for name, parameter in model.named_parameters():  # PEFT itself would set these anew
        if "other" in name:
            parameter.requires_grad_(True)
    before = snapshot(model)
    merge_adapter(model, tmp_path / "out", save_method=METHODS, verification_data=batches(2))
    assert same(before, snapshot(model))


def test_a_model_that_nobody_prepared_keeps_its_weights(tmp_path):
    """On some CPUs bitsandbytes repacks weights at the first forward in eval mode."""
    model = qlora(tmp_path)
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = True
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    data = {"calibration_data": batches(4), "verification_data": batches(1)}
    result = merge_adapter(model, tmp_path / "out", rounding="calibrated", **data)
    compare(model, result.path, batches(1))
    assert same(before, dict(model.named_parameters()))


def test_figures_are_those_of_the_models_themselves(tmp_path, model):
    data = batches(3)
    data[1]["attention_mask"][:, 20:] = 0
    data[2]["labels"] = data[2]["input_ids"].masked_fill(data[2]["input_ids"] % 2 == 0, -100)
    path = merge_adapter(model, tmp_path / "out", verify=False).path
    found = compare(model, path, data)
    other, rows, sums = rebuild(path), 0, torch.zeros(5, dtype=torch.float64)
    for batch in data:
        inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
        labels = batch.get("labels", batch["input_ids"])[:, 1:].clone()
        if "labels" not in batch:
            labels[batch["attention_mask"][:, 1:] == 0] = -100
        with torch.no_grad(), model.disable_adapter():
            base = model(**inputs).logits
        with torch.no_grad():
            logs = [
                torch.log_softmax(logits[:, :-1].double(), -1)
                for logits in (base, model(**inputs).logits, other(**inputs).logits)
            ]
        counted = labels != -100
        rows += int(counted.sum())
        for index, log in enumerate(logs):
            loss = -log.gather(2, labels.clamp(min=0)[..., None])[..., 0]
            sums[index] += loss[counted].sum()
        sums[3] += (logs[1].exp() * (logs[1] - logs[2])).sum(-1)[counted].sum()
        sums[4] += (logs[1].argmax(-1) == logs[2].argmax(-1))[counted].sum()
    wanted = (sums / rows).tolist()
    assert found.rows == rows
    mine = [found.loss_base, found.loss_live, found.loss, found.kl, found.agreement]
    assert torch.allclose(torch.tensor(mine), torch.tensor(wanted), rtol=1e-5, atol=1e-7)
    gain = (wanted[0] - wanted[2]) / (wanted[0] - wanted[1])
    assert found.gain_kept == pytest.approx(gain, rel=1e-3)


def test_a_gain_within_its_own_error_is_not_told(tmp_path):
    model = qlora(tmp_path, scale=1e-9)
    found = compare(model, merge_adapter(model, tmp_path / "out").path, batches(2))
    assert found.loss_base is not None and found.gain_kept is None
    one = [{"input_ids": torch.arange(3, 40)[None]}]  # one sequence says nothing of its error
    model = qlora(tmp_path, scale=0.1)
    assert compare(model, tmp_path / "out" / "merged", one).gain_kept is None


def test_the_error_of_the_gain_is_that_of_sequences():
    sums = outputs._Sums(rows=8, losses=[(1.0, 3.0, 2), (2.0, 7.0, 4), (1.0, 1.5, 2)])
    live, base = (torch.tensor([part[i] for part in sums.losses]) for i in (0, 1))
    mean = float((base - live).sum() / 8)
    spread = base - live - mean * torch.tensor([2.0, 4.0, 2.0])
    wanted = float((spread.pow(2).sum() * 3 / 2).sqrt() / 8)
    assert sums.error_of_the_difference() == pytest.approx(wanted, rel=1e-6)


def test_dropout_is_off_while_models_are_compared(tmp_path):
    model = qlora(tmp_path, lora_dropout=0.5).train()
    result = merge_adapter(
        model, tmp_path / "out", save_method="merged_16bit", verification_data=batches(1)
    )
    assert result.manifest["verification"]["models"]["merged_16bit"]["kl"] < 1e-4


def test_equal_models_are_equal(tmp_path, model):
    path = merge_adapter(model, tmp_path / "out").path
    found = compare(path, path, batches(2))
    assert (found.kl, found.agreement, found.error) == (0.0, 1.0, 0.0)
    assert found.loss == found.loss_live and found.loss_base is None


def test_each_model_runs_once_over_the_data(tmp_path, model, monkeypatch):
    answered, data = [], batches(4)
    monkeypatch.setattr(
        outputs.Speaker,
        "outputs",
        lambda self, batch, whole=Speaker.outputs: answered.append(self) or whole(self, batch),
    )
    monkeypatch.setattr(outputs, "_PIECE", 64)  # two sequences
    merge_adapter(model, tmp_path / "out", save_method=METHODS, verification_data=data)
    assert [answered.count(speaker) for speaker in answered] == [8] * 4 * 8
    assert len({id(speaker) for speaker in answered}) == 4  # live, base, and two others


def test_layers_that_are_copied_when_they_compute_say_the_same(tmp_path, model):
    paths = merge_adapter(model, tmp_path / "out", save_method=METHODS).paths
    for path in paths.values():
        other = rebuild(path)
        before = {name: p.data_ptr() for name, p in other.named_parameters()}
        inputs = batches(1)[0]["input_ids"]
        with torch.no_grad():
            plain_logits = other(inputs).logits
            with layer_by_layer(other, torch.device("cpu")):
                assert torch.equal(other(inputs).logits, plain_logits)
        assert before == {name: p.data_ptr() for name, p in other.named_parameters()}
        assert not any("forward" in vars(module) for module in other.modules())


def test_one_layer_is_there_at_a_time(tmp_path, model, monkeypatch):
    other = rebuild(merge_adapter(model, tmp_path / "out").path)
    alive, most = set(), []
    visit = rebuilt.copy.deepcopy

    def watched(layer, *args):
        made = visit(layer, *args)
        if isinstance(layer, torch.nn.Module) and not args:
            key = object()
            alive.add(key)
            weakref.finalize(made, alive.discard, key)
            most.append(len(alive))
        return made

    monkeypatch.setattr(rebuilt.copy, "deepcopy", watched)
    with torch.no_grad(), layer_by_layer(other, torch.device("cpu")):
        other(batches(1)[0]["input_ids"])
    assert len(most) >= 5 and max(most) == 1  # embedding, two blocks, norm, head and more


def test_a_rebuilt_model_lies_on_the_disk(tmp_path):
    """Its weights are the mapped file: nothing is copied to memory."""
    path = save_base(tmp_path / "base", hidden_size=512, intermediate_size=4096, vocab_size=4096)
    size = (path / "model.safetensors").stat().st_size
    model = rebuild(path)
    maps = [line for line in Path("/proc/self/maps").read_text().splitlines() if str(path) in line]
    ranges = [[int(end, 16) for end in line.split()[0].split("-")] for line in maps]
    inside = sum(
        parameter.nbytes
        for parameter in model.parameters()
        if any(low <= parameter.data_ptr() < high for low, high in ranges)
    )
    assert inside > 0.99 * size


def test_a_part_of_the_training_data_is_kept_apart(tmp_path, model):
    seen = merge_adapter(
        model, tmp_path / "out", rounding="calibrated", calibration_data=batches(16)
    ).manifest
    assert seen["verification"]["data"] == "training data that calibration did not see"
    rows = seen["verification"]["models"]["merged_4bit"]["rows"]
    assert rows == 2 * 4 * 31  # an eighth
    assert seen["calibration"]["tokens"] == 14 * 4 * 32
    plain = merge_adapter(model, tmp_path / "out", rounding="nearest", calibration_data=batches(16))
    assert plain.manifest["verification"]["data"] == "training data"


def test_data_that_cannot_be_used_costs_the_comparison_alone(tmp_path, model, caplog):
    result = merge_adapter(model, tmp_path / "out", verification_data=["no batch"])
    assert result.manifest["verification"]["data"] is None
    assert "evaluation data cannot be used" in caplog.text


# --- other tasks --------------------------------------------------------------------------------

TINY = {
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 304,
}


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_sequence_classification(tmp_path, kind):
    torch.manual_seed(2)
    if kind == "llama":
        config = LlamaConfig(**TINY, num_labels=3, pad_token_id=0)
        whole = LlamaForSequenceClassification(config)
    else:
        whole = BertForSequenceClassification(BertConfig(**TINY, num_labels=3))
    targets = ["q_proj", "v_proj"] if kind == "llama" else ["query", "value"]
    whole.save_pretrained(tmp_path / "base")
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base")
    adapter = LoraConfig(task_type="SEQ_CLS", r=4, target_modules=targets)
    model = get_peft_model(loaded, adapter)
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    data = [{**batch, "labels": torch.tensor([0, 1, 2, 1])} for batch in batches(6)]
    result = merge_adapter(model, tmp_path / "out", verification_data=data)
    found = result.manifest["verification"]["models"]["merged_16bit"]
    assert found["rows"] == 24 and found["kl"] < 1e-7 and found["agreement"] == 1.0
    own = [model(**batch).loss.item() for batch in data]
    assert found["loss_live"] == pytest.approx(sum(own) / 6, rel=1e-5)
    assert abs(found["loss_base"] - found["loss_live"]) > 1e-3


def test_sequence_to_sequence(tmp_path):
    torch.manual_seed(2)
    config = T5Config(
        d_model=128, d_kv=32, d_ff=192, num_layers=2, num_heads=4, vocab_size=304,
        decoder_start_token_id=0,
    )  # fmt: skip
    T5ForConditionalGeneration(config).save_pretrained(tmp_path / "base")
    loaded = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "base")
    model = get_peft_model(
        loaded, LoraConfig(task_type="SEQ_2_SEQ_LM", r=4, target_modules=["q", "v"])
    )
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    model.eval()
    data = [{**batch, "labels": batch["input_ids"][:, :7].clone()} for batch in batches(4)]
    data[0]["labels"][:, 5:] = -100
    result = merge_adapter(model, tmp_path / "out", verification_data=data)
    found = result.manifest["verification"]["models"]["merged_16bit"]
    assert found["rows"] == 3 * 28 + 20 and found["kl"] < 1e-7
    own = [model(**batch).loss.item() for batch in data]
    wanted = sum(loss * rows for loss, rows in zip(own, (20, 28, 28, 28), strict=True)) / 104
    assert found["loss_live"] == pytest.approx(wanted, rel=1e-5)


def test_a_model_that_sees(tmp_path):
    from transformers import (
        CLIPImageProcessor,
        CLIPVisionConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
    )

    vision = CLIPVisionConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
        image_size=32, patch_size=16,
    )  # fmt: skip
    config = LlavaConfig(
        text_config=LlamaConfig(**TINY, pad_token_id=0),
        vision_config=vision,
        image_token_index=303,
        image_seq_length=4,
    )
    torch.manual_seed(2)
    model = quantised(
        tmp_path, LlavaForConditionalGeneration(config), LlavaForConditionalGeneration
    )
    data = batches(4, vocabulary=303)
    for index, batch in enumerate(data):
        batch["input_ids"][:, 2:6] = 303
        generator = torch.Generator().manual_seed(index)
        batch["pixel_values"] = torch.randn(4, 3, 32, 32, generator=generator)
    words = tokenizer()
    words.add_special_tokens({"additional_special_tokens": ["<image>"]})
    pictures = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    processor = LlavaProcessor(pictures, words, patch_size=16, image_token="<image>")
    result = merge_adapter(
        model,
        tmp_path / "out",
        save_method=METHODS,
        verification_data=data,
        processing_class=processor,
    )
    assert type(LlavaProcessor.from_pretrained(result.path)) is LlavaProcessor
    assert "AutoProcessor" in (result.path / "README.md").read_text()
    found = result.manifest["verification"]
    assert found["data"] == "held-out data"
    assert found["models"]["merged_16bit"]["kl"] < 1e-3
    assert found["models"]["merged_16bit"]["rows"] == 4 * 4 * 31


def test_outputs_without_classes_have_an_error_alone(tmp_path):
    from transformers import AutoModel, BertModel

    torch.manual_seed(2)
    BertModel(BertConfig(**TINY)).save_pretrained(tmp_path / "base")
    loaded = AutoModel.from_pretrained(tmp_path / "base")
    model = get_peft_model(
        loaded,
        LoraConfig(task_type="FEATURE_EXTRACTION", r=4, target_modules=["query", "value"]),
    )
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    result = merge_adapter(model, tmp_path / "out", verification_data=batches(1))
    found = result.manifest["verification"]["models"]["merged_16bit"]
    assert 0 < found["error"] < 1e-5
    assert found["kl"] is found["loss"] is found["gain_kept"] is None


def test_the_verification_is_told(tmp_path, model, caplog):
    caplog.set_level(logging.INFO)
    merge_adapter(model, tmp_path / "out", verification_data=batches(2))
    assert "KL" in caplog.text


def test_compare_refuses_what_does_not_load(tmp_path, model):
    (tmp_path / "nothing").mkdir()
    with pytest.raises(CorruptVersion, match="does not load"):
        compare(model, tmp_path / "nothing", batches(1))
    assert issubclass(CorruptVersion, MergeError)


def test_speakers_compare_any_models(model):
    live = Speaker(model.get_base_model(), torch.device("cpu"))
    found = compare_outputs(live, None, {"same": live}, batches(1))["same"]
    assert found.kl == 0.0 and found.loss_base is None


def test_rows_that_are_no_whole_blocks_are_written_as_the_format_has_them(tmp_path, caplog):
    """On the CPU bitsandbytes itself misreads them, in the live model as in the file."""
    import bitsandbytes.functional as bnb

    base = load_base(save_base(tmp_path / "base", intermediate_size=160), "nf4")
    result = merge_adapter(adapt(base, scale=0.01), tmp_path / "out", rounding="nearest")
    assert "rows that are no whole blocks" in caplog.text
    name = "model.layers.0.mlp.down_proj.weight"
    weight = base.get_parameter(name.replace(".weight", ".base_layer.weight"))
    flat = bnb.QuantState(
        absmax=weight.quant_state.absmax, shape=torch.Size([128 * 160]), blocksize=64,
        quant_type="nf4", dtype=torch.float32,
    )  # fmt: skip
    values = bnb.dequantize_4bit(weight.data, flat).view(128, 160)
    kept = result.manifest["retention"]["merged_4bit"]["tensors"][name]
    tensors = load_file(result.path / "model.safetensors")
    layer = base.get_submodule(name.removesuffix(".weight"))
    delta = 2 * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    state = bnb.QuantState(
        absmax=tensors[f"{name}.absmax"], shape=torch.Size([128 * 160]), blocksize=64,
        quant_type="nf4", dtype=torch.float32,
    )  # fmt: skip
    written = bnb.dequantize_4bit(tensors[name], state).view(128, 160)
    wanted = values.bfloat16().float() + delta
    assert float((written - wanted).detach().norm() / wanted.detach().norm()) < 0.12
    assert kept == pytest.approx(
        float(((written - values) * delta).detach().sum() / (delta * delta).detach().sum()),
        abs=0.02,
    )


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_a_code_next_to_a_boundary_may_be_on_its_other_side(tmp_path, rounding):
    """As on a device that adds in another order. A code beyond its neighbours may not."""
    import bitsandbytes.functional as bnb

    model = qlora(tmp_path)
    plan = check_merge(model, MergeStore(tmp_path / "out"), MergeOptions(rounding=rounding))
    key = "model.layers.0.mlp.up_proj.weight"
    weight, container = plan.weights[key], plan.containers["merged_4bit"][key]
    merging = Merging(weight, {"": container}, torch.device("cpu"))
    with torch.no_grad():
        exact = torch.cat([merged.reshape(-1) for _, merged, _ in merging])
        encoded = merging.tensors("")
    parts = {k.removeprefix(f"{key}."): v for k, v in encoded.items() if k != key}
    state = bnb.QuantState.from_dict(parts, device="cpu")
    packed = encoded[key].reshape(-1)
    codes = torch.stack([packed >> 4, packed & 15], 1).reshape(-1)
    scales = bnb.dequantize_blockwise(state.absmax, state.state2) + state.offset
    if rounding == "nearest":
        scales = exact.abs().view(-1, 64).amax(1)
    ratios = exact / scales.repeat_interleave(64)
    table = bnb.get_4bit_type("nf4", device="cpu")  # in order of its values
    edges = (table[1:] + table[:-1]) / 2 if rounding == "nearest" else table[1:-1]
    apart, edge = (ratios[:, None] - edges).abs().min(1)
    index = int(apart.argmin())
    # What rounds to below the edge, and what to above it; a table value is a neighbour of both.
    ends = (edge[index], edge[index] + (1 if rounding == "nearest" else 2))
    other = ends[0] if ratios[index] > edges[edge[index]] else ends[1]

    def broken(index, code):
        changed = codes.clone()
        changed[index] = code
        pairs = changed.view(-1, 2)
        again = ((pairs[:, 0] << 4) | pairs[:, 1]).view(-1, 1)
        found = Weight(key, Bnb4Weight(again, state))
        return tensors._deviation(weight, container, found).broken

    assert apart[index] < 1e-4 and codes[index] != other
    beyond = int((codes == 7).nonzero()[0])  # 0 has the smallest gaps
    assert [broken(0, codes[0]), broken(index, other), broken(beyond, 9)] == [False, False, True]


def test_that_a_peer_failed_is_not_taken_for_a_damaged_weight(tmp_path, monkeypatch):
    plan = check_merge(qlora(tmp_path), MergeStore(tmp_path / "out"), MergeOptions())
    result = merge_adapter(qlora(tmp_path), tmp_path / "out", verify=False, progress=False)

    def failing(*_):
        raise PeerError("process 1 failed")

    monkeypatch.setattr(checks, "deviations", failing)
    with pytest.raises(PeerError):
        checks.broken_weights(plan, {"merged_4bit": result.path})


@pytest.mark.filterwarnings("ignore")
def test_a_wrong_change_of_experts_is_found(tmp_path, monkeypatch):
    """They answer only within their model, so PEFT's own sum of their factors is asked."""
    path = tmp_path / "base"
    torch.manual_seed(1)
    settings = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1}
    config = MixtralConfig(
        **settings, num_attention_heads=4, num_key_value_heads=2, vocab_size=304,
        num_local_experts=4,
    )  # fmt: skip
    MixtralForCausalLM(config).save_pretrained(path)
    base = AutoModelForCausalLM.from_pretrained(path)
    fused = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    model = adapt(base, target_modules=["q_proj"], target_parameters=fused)
    whole = lora.Experts.add_to

    def without_the_last(self, merged, base, rows=lora.ALL):
        kept = merged[-1].clone()
        whole(self, merged, base, rows)
        merged[-1] = kept

    merge_adapter(model, tmp_path / "right", progress=False)
    monkeypatch.setattr(lora.Experts, "add_to", without_the_last)
    said = refused(tmp_path, model)
    assert "model.layers.0.mlp.experts: what is merged differs from PEFT's own by 0.5" in said


def figures(**changes):
    gain = changes.get("gain_kept", 1.0)
    settings = {
        "rows": 900, "loss_base": 4.4, "loss_live": 3.5,
        "loss": 4.4 - 0.9 * (1.0 if gain is None else gain), "gain_kept": 1.0, "kl": 1e-4,
        "agreement": 1.0, "error": 0.01, "finite": True, "gain_error": 0.01, "kl_base": 0.9,
        "error_base": 0.3,
    }  # fmt: skip
    return outputs.Comparison(**settings | changes)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, None),
        ({"gain_kept": 1.31}, "keeps 131.0% of what training gained"),
        ({"gain_kept": 0.69}, "keeps 69.0% of what training gained"),
        ({"gain_kept": 1.27}, None),  # a quarter, and three standard errors of 0.01
        ({"gain_kept": -0.4, "gain_error": 0.6}, None),  # of two steps at 1e-6: noise
        # The loss has moved by less than the noise of 16 bits, so the quotient tells nothing.
        ({"gain_kept": -0.45, "loss_base": 3.51, "loss": 3.5145}, None),
        ({"gain_kept": -1.3, "loss_base": 3.51, "loss": 3.523}, "keeps -130.0% of what training"),
        ({"gain_kept": 0.4, "kl": None, "loss_base": 3.9, "loss": 3.74}, None),  # a squared error
        ({"gain_kept": -0.2, "kl": None, "loss_base": 3.9, "loss": 3.98}, "keeps -20.0% of what"),
        ({"gain_kept": None, "kl": 0.07}, "KL 0.07 nats, and 16-bit rounding explains 0.065"),
        ({"gain_kept": None, "kl": 0.06}, None),
        ({"kl_base": None, "kl": 0.021}, "16-bit rounding explains 0.02"),
        (
            {"kl": None, "error": 0.1151},
            "outputs are off by 0.12, and 16-bit rounding explains 0.12",
        ),
        ({"kl": None, "error": 0.11}, None),
        ({"kl": None, "error_base": None, "error": 0.11}, "16-bit rounding explains 0.1"),
        # Of scores the KL is the sharper measure.
        ({"error": 0.41}, None),
        ({"error": 0.42}, "outputs are off by 0.42, and 16-bit rounding explains 0.42"),
        ({"finite": False}, "are not finite"),
    ],
)
def test_16_bits_are_bounded_from_both_sides(changes, said):
    found = list(limits.misses("merged_16bit", figures(**changes), MergeOptions(), {}))
    assert len(found) == (said is not None)
    assert said is None or said in found[0]
    on_original = MergeOptions(base="original")
    if said is None or "finite" not in said:
        assert not list(limits.misses("merged_16bit", figures(**changes), on_original, {}))
        assert not list(limits.misses("merged_4bit", figures(**changes), MergeOptions(), {}))


@pytest.mark.parametrize(
    ("changes", "little"),
    [
        ({"gain_kept": 0.3}, True),
        ({"gain_kept": 0.49, "gain_error": 0.01}, False),  # within three standard errors of a half
        ({"gain_kept": -0.45, "gain_error": 0.4}, False),
        ({"gain_kept": -0.45, "loss_base": 3.51}, False),  # training gained 0.01 nats: noise
        ({"gain_kept": 0.3, "loss_base": 3.2}, False),  # training raised the loss
        ({"gain_kept": None}, False),
    ],
)
def test_a_small_gain_is_no_reason_to_warn(changes, little):
    assert limits.keeps_little(vars(figures(**changes))) is little


def test_4_bits_further_from_the_live_model_than_any_rounding_are_refused():
    for kl, refusal in ((2.79, 0), (2.81, 1)):
        found = list(limits.misses("merged_4bit", figures(kl=kl), MergeOptions(), {}))
        assert len(found) == refusal


def test_the_figures_of_the_base_are_its_own(tmp_path, model):
    data = batches(3)
    path = merge_adapter(model, tmp_path / "out", progress=False).path
    found = compare(model, path, data)
    live = Speaker(model.get_base_model(), torch.device("cpu"))
    base = replace(live, within=lambda: without_adapters(model))
    own = compare_outputs(live, None, {"base": base}, data)["base"]
    assert (found.kl_base, found.error_base) == (own.kl, own.error)
    assert found.kl_base > 0 and own.kl_base is None and own.error_base is None


# --- what is right is published ------------------------------------------------------------------


def test_a_config_without_a_cache_that_a_trainer_turns_off_is_no_difference(tmp_path):
    """The key that Trainer sets is written, and dropped when the config is loaded."""
    config = DistilBertConfig(dim=64, n_layers=1, n_heads=2, hidden_dim=96, vocab_size=304)
    torch.manual_seed(1)
    DistilBertForSequenceClassification(config).save_pretrained(tmp_path / "base")
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base")
    model = get_peft_model(loaded, LoraConfig(task_type="SEQ_CLS", target_modules=["q_lin"]))
    rows = Dataset.from_dict({"input_ids": [[3, 4, 5]] * 8, "labels": [0, 1] * 4})
    callback = MergeOnSaveCallback()
    args = TrainingArguments(
        output_dir=str(tmp_path / "run"), max_steps=2, use_cpu=True, report_to=[],
        disable_tqdm=True, per_device_train_batch_size=2,
    )  # fmt: skip
    Trainer(model=model, args=args, train_dataset=rows, callbacks=[callback]).train()
    assert model.config.use_cache is False
    assert callback.results[0].manifest["verification"]["problems"] == []


def test_sides_that_a_tokenizer_does_not_save_are_no_difference(tmp_path, model):
    words = tokenizer()
    words.padding_side = words.truncation_side = "left"
    merge_adapter(model, tmp_path / "out", processing_class=words, progress=False)
    assert words.padding_side == words.truncation_side == "left"


@pytest.mark.parametrize("settings", [{"use_dora": True}, {}])
def test_weights_that_grow_along_themselves_are_published(tmp_path, settings):
    """Values at the ends of the table cannot move outwards, whatever the dice say."""
    base = load_base(save_base(tmp_path / "base", intermediate_size=1024), "nf4-nested")
    model = adapt(base, scale=1e-4, **settings)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "magnitude" in name:
                parameter.mul_(1.03)
    merge_adapter(model, tmp_path / "out", rounding="stochastic", progress=False)


def test_rows_of_nothing_and_of_little_are_published(tmp_path):
    model = qlora(tmp_path, "bfloat16")
    weight = model.get_base_model().model.layers[0].mlp.up_proj.base_layer.weight
    with torch.no_grad():
        weight[:32] = 0
        weight[32:64] *= 1e-3
        weight[64:96] *= 3e-2
    merge_adapter(model, tmp_path / "out", save_method="merged_4bit", progress=False)


def test_a_model_of_float16_is_published(tmp_path):
    base = load_base(save_base(tmp_path / "base", rope_theta=1e6), "float32").half()
    assert base.model.rotary_emb.inv_freq.dtype == torch.float16
    merge_adapter(adapt(base), tmp_path / "out", progress=False)


@pytest.mark.filterwarnings("ignore")
def test_experts_with_an_adapter_of_16_bits_are_published(tmp_path):
    torch.manual_seed(1)
    config = MixtralConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=304, num_local_experts=4,
    )  # fmt: skip
    MixtralForCausalLM(config).save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    fused = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    model = adapt(base, target_modules=["q_proj"], target_parameters=fused, lora_alpha=11)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.bfloat16()
    merge_adapter(model, tmp_path / "out", progress=False)
    assert {p.dtype for n, p in model.named_parameters() if "lora_" in n} == {torch.bfloat16}


def test_an_adapter_whose_scaling_is_its_own_is_published(tmp_path):
    base = load_base(save_base(tmp_path / "base"), "float32")
    settings = AdaLoraConfig(task_type="CAUSAL_LM", total_step=10, target_modules=["q_proj"])
    model = get_peft_model(base, settings)
    merge_adapter(model, tmp_path / "out", save_method="lora", progress=False)


@pytest.mark.parametrize("kind", ["nf4", "nf4-nested"])
def test_a_scale_that_is_off_by_little_is_found(tmp_path, model, monkeypatch, kind):
    model = qlora(tmp_path, kind)
    nest, stored = grid.Grid.nest, grid.Grid.stored

    def wrong(self, scales):
        return nest(self, 1.02 * scales)

    with monkeypatch.context() as patch:
        patch.setattr(grid.Grid, "nest", wrong)
        if kind == "nf4":
            patch.setattr(
                grid.Grid, "largest", lambda self, run, own=grid.Grid.largest: 1.02 * own(self, run)
            )
        assert "_proj.weight" in refused(tmp_path, model, rounding="nearest")
    assert grid.Grid.stored is stored


def test_an_outlier_hides_no_wrong_value_of_32_bits(tmp_path, monkeypatch):
    model = qlora(tmp_path, "float32")
    weight = model.get_base_model().model.layers[0].mlp.up_proj.base_layer.weight
    with torch.no_grad():
        weight[0, 0] = 1000.0

    def off(path):
        found = load_file(path / "model.safetensors")
        found["model.layers.0.mlp.up_proj.weight"][5] *= 1.01
        save_file(found, path / "model.safetensors", {"format": "pt"})

    monkeypatch.setattr(Draft, "verify", lambda self: None)
    before_sealing(monkeypatch, off)
    assert "layers.0.mlp.up_proj.weight" in refused(tmp_path, model)
