"""Rounding with data: it keeps more, nothing else changes, and it finds its way."""

import logging
import random

import numpy
import pytest
import torch
from datasets import Dataset, IterableDataset
from models import adapt, load_base, qlora, same, save_base, snapshot
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    BitsAndBytesConfig,
    Gemma2Config,
    GPT2Config,
    GPTNeoXConfig,
    GraniteConfig,
    T5Config,
)

from merge_callback import MergeError, MergeRefused, merge_adapter, stand_ins
from merge_callback.batches import TrainingData, loss_mask, split_batch, take
from merge_callback.calibration import choice, distillation, recording, sequential
from merge_callback.calibration.recording import find_blocks, inputs_of, record
from merge_callback.live import keep_cpu_weights_unpacked
from merge_callback.options import MergeOptions
from merge_callback.planning import make_plan
from merge_callback.stand_ins import StandIn, evaluating, in_float32, standing_in

SMALL = {
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 304,
}
SWALLOWED = 1e-4  # the size of an adapter that rounding to nearest loses


def batches(count=8, rows=4, length=32, seed=0, vocabulary=300):
    generator = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(count):
        # Tokens that repeat in runs, so that inputs hang together.
        ids = torch.randint(3, vocabulary, (rows, length // 4), generator=generator)
        ids = ids.repeat_interleave(4, 1)
        made.append({"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    return made


def speech(path, seed=99):
    """What an exported model says, in float32."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    keep_cpu_weights_unpacked(model)
    for module in model.modules():
        if hasattr(module, "compute_dtype"):
            module.compute_dtype = torch.float32
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.float()
    with torch.no_grad():
        out = [model(input_ids=b["input_ids"]).logits for b in batches(4, seed=seed)]
    return torch.log_softmax(torch.cat(out).double(), -1)


def divergences(tmp_path, model, *roundings, **settings):
    """KL(live || merged) of each rounding, and of the base, against an exact export."""
    # A small model that has something to say, of inputs in few directions, as large ones have.
    base = model.get_base_model()
    base.get_output_embeddings().weight.data *= 20
    embedding = base.get_input_embeddings().weight
    few = torch.randn(12, embedding.shape[1], generator=torch.Generator().manual_seed(8))
    embedding.data = (0.1 * embedding.data[:, :12].float() @ few).to(embedding.dtype)
    exact = {"save_method": "merged_16bit", "dtype": "float32"}
    live = speech(merge_adapter(model, tmp_path / "exact", **exact).path)
    found = {}
    for rounding in roundings:
        result = merge_adapter(
            model,
            tmp_path / "out",
            save_method="merged_4bit",
            rounding=rounding,
            calibration_data=batches(32),
            verify=False,
            progress=False,
            **settings,
        )
        assert result.manifest["rounding"] == rounding
        if rounding in ("calibrated", "tuned"):
            assert result.manifest["calibration"]["left_out"] == {}
        found[rounding] = float((live.exp() * (live - speech(result.path))).sum(-1).mean())
    for layer in model.modules():
        if hasattr(layer, "lora_B"):
            for part in layer.lora_B.values():
                part.weight.data.zero_()
    base = speech(merge_adapter(model, tmp_path / "exact", **exact).path)
    return found, float((live.exp() * (live - base)).sum(-1).mean())


@pytest.fixture
def model(tmp_path):
    return qlora(tmp_path, tied=False, scale=0.01)


@pytest.mark.parametrize("kind", ["nf4-nested", "nf4", "fp4"])
def test_data_keeps_what_rounding_to_nearest_loses(tmp_path, kind):
    model = qlora(tmp_path, kind, tied=False, scale=SWALLOWED)
    roundings = ("nearest", "stochastic", "calibrated", "tuned")
    found, base = divergences(tmp_path, model, *roundings)
    assert found["nearest"] > 0.8 * base
    assert found["calibrated"] < 0.3 * found["nearest"]
    assert found["calibrated"] < 0.1 * found["stochastic"]
    assert found["tuned"] < 1.05 * found["calibrated"]


def test_other_bases_are_calibrated_too(tmp_path):
    model = qlora(tmp_path, "bfloat16", tied=False)
    found, _ = divergences(tmp_path, model, "nearest", "calibrated")
    assert found["calibrated"] < 0.6 * found["nearest"]


@pytest.mark.parametrize("settings", [{"use_dora": True}, {"target_modules": ["q_proj", "v_proj"]}])
def test_dora_and_adapters_of_few_layers_are_calibrated(tmp_path, settings):
    model = qlora(tmp_path, tied=False, scale=SWALLOWED, **settings)
    found, _ = divergences(tmp_path, model, "nearest", "calibrated")
    assert found["calibrated"] < 0.5 * found["nearest"]


@pytest.mark.parametrize("rounding", ["calibrated", "tuned"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_model_and_all_generators_are_as_they_were(tmp_path, rounding, checkpointing):
    model = qlora(tmp_path, lora_dropout=0.1).train()
    if checkpointing:
        model.get_base_model().activation_checkpointing_enable({"use_reentrant": False})
    model.get_base_model().model.layers[0].eval()
    before = snapshot(model), random.getstate(), str(numpy.random.get_state())
    merge_adapter(model, tmp_path / "out", rounding=rounding, calibration_data=batches())
    assert same(before[0], snapshot(model))
    assert before[1:] == (random.getstate(), str(numpy.random.get_state()))
    assert all(p.grad is None for p in model.parameters())


def test_distillation_runs_blocks_again_where_training_does(tmp_path, model):
    base, calls, files = model.get_base_model(), [0, 0], []
    for checkpointing in (0, 1):
        if checkpointing:
            base.activation_checkpointing_enable({"use_reentrant": False})

        def count(*args, index=checkpointing):
            calls[index] += 1

        handle = base.model.layers[0].input_layernorm.register_forward_pre_hook(count)
        result = merge_adapter(
            model, tmp_path / "out", rounding="tuned", calibration_data=batches()
        )
        handle.remove()
        files.append(load_file(result.path / "model.safetensors"))
    assert calls[1] - calls[0] == result.manifest["calibration"]["steps"]
    assert same(files[0], files[1])


def test_what_is_trained_whole_gets_no_gradient(tmp_path, monkeypatch):
    model = qlora(tmp_path, tied=False, modules_to_save=["embed_tokens"])
    embedding = model.get_base_model().model.embed_tokens.modules_to_save["default"].weight
    assert embedding.requires_grad
    monkeypatch.setattr(stand_ins, "SMALL", 1000)  # large enough to stay itself, as real ones are
    result = merge_adapter(model, tmp_path / "out", rounding="tuned", calibration_data=batches())
    assert result.manifest["rounding"] == "tuned" and embedding.grad is None


def test_data_that_draws_by_chance_moves_no_generator(tmp_path, model):
    def drawn():
        for batch in batches():
            torch.rand(1), random.random(), numpy.random.rand()
            yield batch

    before = torch.get_rng_state(), random.getstate(), str(numpy.random.get_state())
    merge_adapter(model, tmp_path / "out", rounding="calibrated", calibration_data=drawn())
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1:] == (random.getstate(), str(numpy.random.get_state()))


def test_blocks_are_skipped_only_where_their_calls_do_not_hang_on_them(model):
    def shared(change=None):
        blocks, _ = groups_of(model, batches(1))
        blocks[0].calls = [blocks[0].calls[0]._replace(kwargs={"angles": angles, "none": None})]
        blocks[1].calls = [blocks[1].calls[0]._replace(kwargs={"angles": angles})]
        if change is not None:
            change(blocks[1])
        return recording._calls_are_shared(blocks)

    angles = (torch.ones(2), torch.ones(3))
    assert shared()
    assert not shared(lambda block: setattr(block, "starts", True))
    assert not shared(lambda block: block.calls[0].kwargs.update(cache=object()))
    assert not shared(lambda block: block.calls[0].kwargs.update(its_own=torch.ones(1)))
    assert not shared(lambda block: setattr(block, "returns_tensor", False))


def test_the_same_data_gives_the_same_bytes(tmp_path, model):
    paths = [
        merge_adapter(model, tmp_path / "out", rounding="tuned", calibration_data=batches()).path
        for _ in range(2)
    ]
    one, other = ((path / "model.safetensors").read_bytes() for path in paths)
    assert one == other
    third = merge_adapter(
        model, tmp_path / "out", rounding="tuned", calibration_data=batches(seed=5)
    )
    assert (third.path / "model.safetensors").read_bytes() != one


def test_padding_does_not_count(tmp_path, model):
    found = []
    for filler in (3, 250):
        data = batches()
        for batch in data:
            batch["attention_mask"][:, 24:] = 0
            batch["input_ids"][:, 24:] = filler
        result = merge_adapter(
            model, tmp_path / "out", rounding="calibrated", calibration_data=data, verify=False
        )
        assert result.manifest["calibration"]["tokens"] == 8 * 4 * 24
        found.append((result.path / "model.safetensors").read_bytes())
    assert found[0] == found[1]


def test_a_label_stands_for_the_token_before_it():
    labels = torch.tensor([[-100, -100, 7, 8], [-100, 5, -100, -100]])
    mask = loss_mask({"input_ids": labels, "labels": labels})
    assert mask.tolist() == [[False, True, True, False], [True, False, False, False]]
    every = loss_mask({"input_ids": labels})
    assert every.tolist() == [[True, True, True, False]] * 2
    padded = loss_mask({"input_ids": labels, "attention_mask": torch.tensor([[1, 1, 0, 0]] * 2)})
    assert padded.tolist() == [[True, False, False, False]] * 2
    assert loss_mask({"input_ids": labels, "labels": torch.tensor([1, 0])}) is None
    assert loss_mask({"pixel_values": labels}) is None


@pytest.mark.parametrize("kind", ["no label counts", "single tokens"])
def test_data_in_which_nothing_is_predicted_is_not_called_tuned_or_verified(
    tmp_path, model, caplog, kind
):
    data = batches(8)
    if kind == "no label counts":
        data = [b | {"labels": torch.full_like(b["input_ids"], -100)} for b in data]
    else:
        data = [{"input_ids": b["input_ids"].reshape(-1, 1)} for b in data]
    result = merge_adapter(
        model, tmp_path / "out", rounding="tuned", calibration_data=data, progress=False
    )
    assert result.manifest["rounding"] == "calibrated"
    assert "in these data no token is predicted" in caplog.text
    found = result.manifest["verification"]
    why = "not run: there is nothing to compare: in these data no token is predicted"
    assert found["data"] is None and found["checks"]["outputs"] == why
    assert found["models"]["merged_4bit"].keys() == {"weights", "largest_error"}


def test_batches_are_cut_where_rows_are_sequences():
    batch = {"input_ids": torch.arange(12).view(4, 3), "attention_mask": torch.ones(4, 3)}
    assert [len(piece["input_ids"]) for piece in split_batch(batch, 6)] == [2, 2]
    assert [len(piece["input_ids"]) for piece in split_batch(batch, 1)] == [1, 1, 1, 1]
    picture = {**batch, "pixel_values": torch.zeros(9, 3)}
    assert split_batch(picture, 6) == [picture]


def test_data_is_taken_as_far_as_it_is_needed():
    taken = take(iter(batches(100)), 300)
    assert [batch["input_ids"].numel() for batch in taken] == [128] * 3


def groups_of(model, data):
    plan = make_plan(model, MergeOptions(rounding="calibrated", save_method="merged_4bit"))
    weights = plan.to_round()
    with evaluating(plan.model), torch.no_grad():
        blocks = record(plan.model, find_blocks(plan.model, list(weights)), data)
        live = {
            name: weights[full].merged(weights[full].decoded())
            for name, full in blocks[0].linears.items()
        }
        blocks[0].check()
        (start,) = inputs_of(plan.model, blocks[0], data[:1])
        with blocks[0].opened():
            blocks[0].check_with(live)
            return blocks, blocks[0].groups(start, live)


def test_layers_are_grouped_by_their_inputs_and_writers_of_the_stream_found(model):
    blocks, groups = groups_of(model, batches(3))
    assert [block.name for block in blocks] == ["model.layers.0", "model.layers.1"]
    assert [len(block.calls) for block in blocks] == [3, 3]
    assert [block.starts for block in blocks] == [True, False]
    names = [[name.rpartition(".")[2] for name in group.names] for group in groups]
    assert names == [
        ["q_proj", "k_proj", "v_proj"],
        ["o_proj"],
        ["gate_proj", "up_proj"],
        ["down_proj"],
    ]
    readers = [group.reader and group.reader.module for group in groups]
    assert readers == [None, "post_attention_layernorm", None, ""]
    assert groups[1].reader.factor == pytest.approx(1, abs=1e-3)


def test_what_passes_through_a_norm_is_no_writer(tmp_path):
    config = Gemma2Config(**SMALL, num_key_value_heads=2, head_dim=32)
    model = quantised(tmp_path, AutoModelForCausalLM.from_config(config))
    _, groups = groups_of(model, batches(2))
    assert [group.reader for group in groups] == [None] * 4


def quantised(tmp_path, model, auto=AutoModelForCausalLM, **settings):
    model.to(torch.bfloat16).save_pretrained(tmp_path / "other")
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.bfloat16)
    loaded = auto.from_pretrained(
        tmp_path / "other", quantization_config=config, dtype=torch.bfloat16
    )
    keep_cpu_weights_unpacked(loaded)
    return adapt(loaded, scale=SWALLOWED, **settings)


def test_conv1d_and_parallel_blocks_find_their_way(tmp_path, caplog):
    gpt2 = GPT2Config(n_embd=128, n_layer=2, n_head=4, vocab_size=304, n_positions=64)
    neox = GPTNeoXConfig(**SMALL)
    for config, writers in ((gpt2, 2), (neox, 2)):
        model = quantised(tmp_path, AutoModelForCausalLM.from_config(config))
        _, groups = groups_of(model, batches(2))
        assert sum(group.reader is not None for group in groups) == writers
        found, _ = divergences(tmp_path, model, "nearest", "tuned")
        assert found["tuned"] < 0.6 * found["nearest"]


def test_an_encoder_and_its_decoder_are_two_chains(tmp_path):
    config = T5Config(
        d_model=128, d_ff=192, d_kv=32, num_layers=2, num_heads=4, vocab_size=304,
        decoder_start_token_id=0,
    )  # fmt: skip
    model = quantised(tmp_path, AutoModelForSeq2SeqLM.from_config(config), AutoModelForSeq2SeqLM)
    data = [{**b, "decoder_input_ids": b["input_ids"]} for b in batches(4)]
    blocks, _ = groups_of(model, data)
    assert [block.starts for block in blocks] == [True, False, True, False]
    for given in (data, [{"input_ids": b["input_ids"], "labels": b["input_ids"]} for b in data]):
        result = merge_adapter(model, tmp_path / "out", rounding="tuned", calibration_data=given)
        assert result.manifest["rounding"] == "tuned"
        assert result.manifest["calibration"]["left_out"] == {}


def test_a_multiple_that_is_added_to_the_stream_is_known_by_its_factor(tmp_path):
    config = GraniteConfig(**SMALL, num_key_value_heads=2, residual_multiplier=0.22)
    model = quantised(tmp_path, AutoModelForCausalLM.from_config(config))
    _, groups = groups_of(model, batches(2))
    assert [g.reader and g.reader.module for g in groups] == [
        None,
        "post_attention_layernorm",
        None,
        "",
    ]
    assert groups[1].reader.factor == pytest.approx(0.22, rel=1e-3)


def test_time_that_is_up_leaves_layers_to_chance_and_says_so(tmp_path, model, caplog):
    result = merge_adapter(
        model, tmp_path / "out", rounding="tuned", rounding_minutes=1e-6, calibration_data=batches()
    )
    assert result.manifest["rounding"] == "calibrated"
    assert len(result.manifest["calibration"]["left_out"]) == 14
    assert "14 layers were rounded without data, since time was up" in caplog.text
    chance = merge_adapter(model, tmp_path / "out", rounding="stochastic")
    one, other = (load_file(r.path / "model.safetensors") for r in (result, chance))
    assert all(torch.equal(one[name], other[name]) for name in other)


def test_minutes_bound_the_distillation(tmp_path, model, monkeypatch):
    monkeypatch.setattr(distillation, "_EPOCHS", 10_000)
    result = merge_adapter(
        model,
        tmp_path / "out",
        rounding="tuned",
        rounding_minutes=0.2,
        calibration_data=batches(4),
    )
    assert 0 < result.manifest["calibration"]["steps"] < 30_000
    assert result.manifest["seconds"]["round"] < 20


def test_memory_bounds_the_tokens(tmp_path, model, caplog):
    result = merge_adapter(
        model,
        tmp_path / "out",
        rounding="calibrated",
        calibration_memory=8 * 128 * 200,
        calibration_data=batches(),
    )
    assert result.manifest["calibration"]["tokens"] == 256  # whole batches
    assert "calibrating with 200 tokens instead of 65536" in caplog.text


def test_tuned_scales_that_are_no_better_are_not_kept(tmp_path, model, monkeypatch):
    monkeypatch.setattr(distillation, "_RATE", 1.0)
    kept, plain = (
        merge_adapter(model, tmp_path / "out", rounding=rounding, calibration_data=data).path
        for rounding, data in (("tuned", batches(9)), ("calibrated", batches(8)))
    )
    one, other = (load_file(path / "model.safetensors") for path in (kept, plain))
    assert all(torch.equal(one[name], other[name]) for name in other)


def test_auto_falls_back_when_calibration_fails_and_explicit_rounding_does_not(
    tmp_path, model, monkeypatch, caplog
):
    def fail(*args, **kwargs):
        raise MergeError("no way through")

    monkeypatch.setattr(choice, "calibrate", fail)
    result = merge_adapter(model, tmp_path / "out", calibration_data=batches())
    assert result.manifest["rounding"] == "stochastic"
    assert "no way through" in caplog.text
    with pytest.raises(MergeError, match="no way through"):
        merge_adapter(model, tmp_path / "out", rounding="calibrated", calibration_data=batches())


def test_distillation_that_fails_keeps_what_was_calibrated(tmp_path, model, monkeypatch, caplog):
    def fail(*args, **kwargs):
        raise torch.OutOfMemoryError("none left")

    monkeypatch.setattr(choice, "distil", fail)
    result = merge_adapter(model, tmp_path / "out", calibration_data=batches())
    assert result.manifest["rounding"] == "calibrated"
    assert "none left" in caplog.text


@pytest.mark.parametrize("rounding", ["calibrated", "tuned"])
def test_an_adapter_that_changes_no_4bit_weight_has_nothing_to_round(tmp_path, rounding):
    base = load_base(save_base(tmp_path / "base", tied=False), "nf4")
    model = adapt(base, target_modules=["embed_tokens"])
    result = merge_adapter(
        model, tmp_path / "out", rounding=rounding, calibration_data=batches(2), progress=False
    )
    assert result.manifest["rounding"] == "nearest"
    assert result.manifest["calibration"] is None
    assert result.manifest["verification"]["problems"] == []


def test_rounding_that_needs_data_is_refused_without(tmp_path, model):
    with pytest.raises(MergeRefused, match="needs calibration_data"):
        merge_adapter(model, tmp_path / "out", rounding="tuned")
    with pytest.raises(MergeError, match="0 batches"):
        merge_adapter(model, tmp_path / "out", rounding="calibrated", calibration_data=[])


def test_values_that_are_not_finite_are_named(tmp_path, model):
    layer = model.get_base_model().model.layers[1].self_attn.o_proj
    layer.lora_B["default"].weight.data[0, 0] = float("nan")
    with pytest.raises(MergeError, match=r"layers\.1"):
        merge_adapter(model, tmp_path / "out", rounding="calibrated", calibration_data=batches())


def test_stand_ins_and_modes_are_undone_after_an_error(model):
    base = model.get_base_model().train()
    before = snapshot(model)
    stand = StandIn(None)
    with pytest.raises(ZeroDivisionError):
        with evaluating(base), in_float32(base), standing_in(base, {"model.layers.0": stand}):
            assert vars(base.model.layers[0])["forward"] is stand
            assert base.model.norm.weight.dtype == torch.float32 and not base.training
            raise ZeroDivisionError
    assert same(before, snapshot(model))


class Loader:
    def __init__(self, dataset, collate_fn):
        self.dataset, self.collate_fn = dataset, collate_fn


def collate(rows):
    return {"input_ids": torch.tensor([row["input_ids"] for row in rows])}


def test_a_dataset_is_drawn_from_in_an_order_of_our_own(model):
    rows = Dataset.from_dict({"input_ids": [[i, i] for i in range(3, 40)]})
    base = model.get_base_model()
    state = torch.get_rng_state()
    data = TrainingData(base, Loader(rows, collate), batch_size=4, tokens=64)
    first, again = ([b["input_ids"][:, 0].tolist() for b in data.batches()] for _ in range(2))
    drawn = [index for batch in first for index in batch]
    assert first == again and drawn != list(range(3, 40)) and sorted(drawn) == list(range(3, 40))
    assert torch.equal(state, torch.get_rng_state())
    assert not base._forward_pre_hooks


@pytest.mark.parametrize("source", ["stream", "foreign"])
def test_where_a_dataset_cannot_be_asked_the_last_batches_are_caught(model, source):
    rows = Dataset.from_dict({"input_ids": [[i, i] for i in range(3, 40)]})
    stream = IterableDataset.from_generator(lambda: iter(rows)) if source == "stream" else rows

    def preferences(items):
        return {"chosen_input_ids": collate(items)["input_ids"]}

    base = model.get_base_model()
    loader = Loader(stream, collate if source == "stream" else preferences)
    data = TrainingData(base, loader, batch_size=4, tokens=70)
    data.watch()
    model.train()
    for batch in batches(3, rows=1):
        model(**batch)
    model.eval()
    model(**batches(1)[0])  # an evaluation is no training
    assert [b["input_ids"].shape for b in data.batches()] == [(1, 32)] * 3
    assert base._forward_pre_hooks  # it goes on
    model.train()
    model(**batches(1, rows=2)[0])
    assert sum(b["input_ids"].numel() for b in data.batches()) == 96  # enough, and no more
    data.close()
    assert not base._forward_pre_hooks


def test_a_dataset_that_raises_does_not_stop_the_training(model):
    def broken(rows):
        raise KeyError("text")

    rows = Dataset.from_dict({"input_ids": [[3, 4]] * 8})
    data = TrainingData(model.get_base_model(), Loader(rows, broken), batch_size=4, tokens=64)
    assert list(data.batches()) == []
    data.close()


@pytest.mark.parametrize("data", [["text"], [{"labels": torch.ones(2, 3)}], [torch.ones(2, 3)]])
def test_data_that_is_no_batch_is_named(tmp_path, model, data):
    with pytest.raises(MergeError, match="batch 0 holds no tokens; give dicts of tensors"):
        merge_adapter(model, tmp_path / "out", rounding="calibrated", calibration_data=data)


@pytest.mark.parametrize("method", ["merged_4bit", "merged_16bit"])
@pytest.mark.parametrize("kind", ["nf4-nested", "int8"])
def test_the_original_base_is_what_was_quantised(tmp_path, kind, method):
    model = qlora(tmp_path, kind)
    settings = {"save_method": method, "rounding": "nearest", "dtype": "float32"}
    result = merge_adapter(model, tmp_path / "out", base="original", **settings)
    assert result.manifest["merged_into"] == "original"
    full = adapt(load_base(tmp_path / "base", "float32"))
    expected = merge_adapter(full, tmp_path / "full", **settings)
    one, other = (load_file(r.path / "model.safetensors") for r in (result, expected))
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        if "quant_state" not in name:
            assert torch.equal(tensor, other[name]), name


def test_another_original_or_none_is_refused(tmp_path):
    model = qlora(tmp_path)
    weights = tmp_path / "base" / "model.safetensors"
    other = load_file(weights)
    other["model.layers.0.mlp.up_proj.weight"] *= 1.02
    other["model.layers.0.mlp.up_proj.weight"] += 0.002
    save_file(other, weights, {"format": "pt"})
    with pytest.raises(MergeError, match=r"up_proj.* is not what was quantised; use base='live'"):
        merge_adapter(model, tmp_path / "out", base="original")
    weights.unlink()
    with pytest.raises(MergeRefused, match=r"checkpoint of .* is not here"):
        merge_adapter(model, tmp_path / "out", base="original")
    with pytest.raises(MergeRefused, match="it is its own original"):
        merge_adapter(adapt(load_base(save_base(tmp_path / "base"), "bfloat16")),
                      tmp_path / "out", base="original")  # fmt: skip


def test_data_that_is_missing_is_told(tmp_path, model, caplog):
    caplog.set_level(logging.INFO)
    assert merge_adapter(model, tmp_path / "out").manifest["rounding"] == "stochastic"
    assert "codes were chosen by chance, without data" in caplog.text


@pytest.mark.parametrize(("share", "counts"), [(0.49, True), (0.51, False), (torch.nan, False)])
def test_a_correction_that_outgrows_its_weight_does_not_count(share, counts):
    """It is solved for from few inputs; a weight that is mostly correction is another weight."""
    weight = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    found = sequential.bounded(share * weight, weight)
    assert torch.equal(found, share * weight if counts else torch.zeros(6, 4))
