"""Blocks of every kind are run alone; where one cannot be, the others are calibrated."""

import inspect
import itertools

import bitsandbytes
import pytest
import torch
from models import adapt, load_base, qlora, save_base
from safetensors.torch import load_file
from test_architectures import made
from test_calibration import SMALL, batches, groups_of, quantised
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    Gemma3nTextConfig,
    OPTConfig,
)

from merge_callback import MergeRefused, merge_adapter
from merge_callback.batches import model_inputs
from merge_callback.calibration import choice
from merge_callback.export import check_merge
from merge_callback.live import keep_cpu_weights_unpacked
from merge_callback.options import MergeOptions
from merge_callback.stand_ins import without_cache
from merge_callback.store import MergeStore


def made_to_differ(layer):
    """Runs otherwise each time, so that what it gives alone is not what it gave in the model."""
    calls = itertools.count(1)
    layer.register_forward_pre_hook(lambda module, args: (args[0] * next(calls), *args[1:]))


LAYERS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
LAYERS += ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")


def test_a_block_that_cannot_be_run_alone_is_left_out_with_its_reason(tmp_path, caplog):
    base = save_base(tmp_path / "base", tied=False, num_hidden_layers=3)
    model = adapt(load_base(base, "nf4-nested"), scale=0.01)
    made_to_differ(model.get_base_model().model.layers[1])
    result = merge_adapter(
        model, tmp_path / "out", rounding="calibrated", calibration_data=batches(), verify=False
    )
    assert result.manifest["rounding"] == "calibrated"
    left_out = result.manifest["calibration"]["left_out"]
    assert left_out.keys() == {f"model.layers.1.{name}" for name in LAYERS}
    (why,) = set(left_out.values())
    assert why.startswith("their block cannot be run alone (run alone it differs from the live mod")
    assert f"7 layers were rounded without data, since {why}: model.layers.1." in caplog.text
    report = (result.path / "merge_report.md").read_text()
    assert all(f"- {name}: {why}" in report for name in left_out)
    chance = merge_adapter(model, tmp_path / "out", rounding="stochastic", verify=False)
    one, other = (load_file(r.path / "model.safetensors") for r in (result, chance))
    for index, same_codes in enumerate((False, True, False)):
        for name in LAYERS:
            key = f"model.layers.{index}.{name}.weight"
            assert torch.equal(one[key], other[key]) is same_codes, key


@pytest.mark.parametrize("rounding", ["tuned", "auto"])
def test_where_no_block_can_be_run_alone_nothing_is_lost(tmp_path, rounding, caplog):
    """A training that has ended is worth a version without data, which says so."""
    model = qlora(tmp_path, tied=False, scale=0.01)
    for layer in model.get_base_model().model.layers:
        made_to_differ(layer)
    result = merge_adapter(
        model, tmp_path / "out", rounding=rounding, calibration_data=batches(), verify=False
    )
    assert result.manifest["rounding"] == "stochastic"
    assert len(result.manifest["calibration"]["left_out"]) == 14
    assert "none of 14 layers can be calibrated (model.layers.0" in caplog.text


def test_what_is_changed_in_place_is_calibrated_as_it_was(tmp_path):
    config = Gemma3nTextConfig(
        **SMALL | {"num_attention_heads": 2},
        num_key_value_heads=1,
        head_dim=64,
        vocab_size_per_layer_input=304,
        hidden_size_per_layer_input=64,
        laurel_rank=64,
        num_kv_shared_layers=0,
        layer_types=["sliding_attention", "full_attention"],
        sliding_window=8,
        activation_sparsity_pattern=[0.0, 0.0],
    )
    targets = ["q_proj", "down_proj", "per_layer_model_projection"]
    model = quantised(tmp_path, AutoModelForCausalLM.from_config(config), target_modules=targets)
    found = merge_adapter(
        model, tmp_path / "out", rounding="calibrated", calibration_data=batches(2), verify=False
    ).manifest
    assert found["rounding"] == "calibrated" and found["calibration"]["left_out"] == {}


def test_tokens_that_a_layer_takes_in_one_row_find_their_reader(tmp_path):
    config = OPTConfig(
        hidden_size=128, ffn_dim=192, num_hidden_layers=2, num_attention_heads=4, vocab_size=304,
        max_position_embeddings=64, word_embed_proj_dim=128,
    )  # fmt: skip
    model = quantised(tmp_path, AutoModelForCausalLM.from_config(config))
    _, groups = groups_of(model, batches(2))
    writers = {group.names[0]: group.reader for group in groups if group.reader is not None}
    assert [*writers] == ["self_attn.out_proj", "fc2"]


def test_nothing_is_cached_where_a_forward_is_told_so_beside_its_signature(tmp_path):
    model_class = made("llava", tmp_path / "base")
    model = model_class.from_pretrained(tmp_path / "base", dtype=torch.bfloat16).eval()
    assert "use_cache" not in inspect.signature(model_class.forward).parameters
    inputs = model_inputs(model, batches(1)[0])
    with without_cache(model), torch.no_grad():
        assert model(**inputs).past_key_values is None
    with torch.no_grad():
        assert model(**inputs).past_key_values is not None  # as users have it


def test_blocks_that_some_batches_do_not_reach_are_left_out_and_the_others_calibrated(tmp_path):
    model_class = made("llava", tmp_path / "base")
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.bfloat16)
    base = model_class.from_pretrained(
        tmp_path / "base", quantization_config=config, dtype=torch.bfloat16
    )
    keep_cpu_weights_unpacked(base)
    targets = r".*language_model.*q_proj|.*vision_tower.*q_proj"
    model = adapt(base, task_type=None, target_modules=targets)
    data = batches(3)
    data[0]["input_ids"][:, :4] = 303
    data[0]["pixel_values"] = torch.randn(4, 3, 32, 32, generator=torch.manual_seed(1))
    result = merge_adapter(
        model, tmp_path / "out", rounding="calibrated", calibration_data=data, verify=False
    )
    left_out = result.manifest["calibration"]["left_out"]
    assert len(left_out) == 2 and all("vision_tower" in name for name in left_out)
    why = "their block cannot be run alone (not all batches take the same way through the model)"
    assert set(left_out.values()) == {why}
    with torch.no_grad():  # what the first forward has installed is still there
        model(**model_inputs(model.get_base_model(), data[0]))


class Router(bitsandbytes.nn.Linear4bit):
    """A linear layer by its class, and more than a product by its forward."""

    def forward(self, inputs):
        return super().forward(inputs) * 2


@pytest.mark.parametrize("targets", ["all-linear", ["up_proj"]])
def test_layers_that_compute_more_than_a_product_are_known_before_training(
    tmp_path, targets, caplog
):
    base = load_base(save_base(tmp_path / "base", tied=False), "nf4-nested")
    for layer in base.model.layers:
        layer.mlp.up_proj.__class__ = Router
    model = adapt(base, scale=0.01, target_modules=targets)
    options = MergeOptions(rounding="calibrated", save_method="merged_4bit")
    store = MergeStore(tmp_path / "out")
    why = "their forward is more than a product with the weight"
    if targets == ["up_proj"]:
        with pytest.raises(MergeRefused, match=f"no layer can be calibrated, .*: {why}"):
            check_merge(model, store, options)
        return
    plan = check_merge(model, store, options)
    names = [f"model.layers.{index}.mlp.up_proj" for index in (0, 1)]
    assert f"2 of 14 layers will be rounded without data, since {why}" in caplog.text
    chosen = choice.choose(plan, options, batches(2), last=True)
    assert chosen.report["left_out"] == dict.fromkeys(names, why)
    assert len(chosen.rounded) == 12
