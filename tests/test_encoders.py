"""Models that take images or sounds and have no embedding of tokens."""

import numpy
import pytest
import torch
import transformers
from datasets import Dataset
from models import adapt
from test_calibration import quantised
from transformers import AutoModelForImageClassification, Trainer, TrainingArguments, ViTConfig

from merge_callback import MergeOnSaveCallback, merge_adapter
from merge_callback.batches import Drawn, split_batch, tokens_in

SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
         "num_attention_heads": 2}  # fmt: skip
IMAGES = SIZES | {"image_size": 32, "patch_size": 16, "num_labels": 3}
SOUNDS = SIZES | {
    "vocab_size": 32, "conv_dim": (32, 32), "conv_stride": (5, 4), "conv_kernel": (10, 8),
    "num_feat_extract_layers": 2, "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 2,
    "mask_time_prob": 0.0, "layerdrop": 0.0, "pad_token_id": 0, "ctc_zero_infinity": True,
}  # fmt: skip
SWIN = {"image_size": 32, "patch_size": 4, "embed_dim": 32, "depths": [1, 1], "num_heads": [2, 2],
        "window_size": 4, "num_labels": 3}  # fmt: skip
CLIP = {"vision_config": IMAGES, "text_config": SIZES | {"vocab_size": 99}, "num_labels": 3}
CONVNEXT = {"hidden_sizes": [16, 32, 32, 32], "depths": [1, 1, 1, 1], "num_labels": 3}
SEGFORMER = {"hidden_sizes": [16, 32, 32, 32], "depths": [1, 1, 1, 1], "num_labels": 3,
             "decoder_hidden_size": 32, "num_attention_heads": [1, 2, 2, 2]}  # fmt: skip
MODELS = {
    "ViTForImageClassification": IMAGES,
    "DeiTForImageClassification": IMAGES,
    "Dinov2ForImageClassification": IMAGES,
    "BeitForImageClassification": IMAGES,
    "SwinForImageClassification": SWIN,
    "CLIPForImageClassification": CLIP,
    "ConvNextForImageClassification": CONVNEXT,
    "SegformerForImageClassification": SEGFORMER,
    "Wav2Vec2ForCTC": SOUNDS,
    "HubertForCTC": SOUNDS,
    "WavLMForCTC": SOUNDS,
}


def rows(kind, count=12):
    generator = torch.Generator().manual_seed(3)
    if kind.endswith("CTC"):
        values = torch.randn(count, 2000, generator=generator)
        labels = torch.randint(4, 30, (count, 3), generator=generator)
        return [{"input_values": v, "labels": n} for v, n in zip(values, labels, strict=True)]
    values = torch.randn(count, 3, 32, 32, generator=generator)
    return [{"pixel_values": v, "labels": torch.tensor(i % 3)} for i, v in enumerate(values)]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", MODELS)
def test_an_encoder_is_merged_and_compared_by_the_callback_as_it_comes(tmp_path, kind):
    model_class = getattr(transformers, kind)
    torch.manual_seed(3)
    model_class(model_class.config_class(**MODELS[kind])).save_pretrained(tmp_path / "base")
    model = adapt(model_class.from_pretrained(tmp_path / "base"), task_type=None)
    callback = MergeOnSaveCallback()
    args = TrainingArguments(
        tmp_path / "run", max_steps=2, per_device_train_batch_size=2, learning_rate=1e-3,
        report_to=[], use_cpu=True, disable_tqdm=True, save_strategy="no",
    )  # fmt: skip
    Trainer(model, args, train_dataset=rows(kind), callbacks=[callback]).train()
    (result,) = callback.results
    found = result.manifest["verification"]
    assert found["problems"] == [] and found["data"] == "training data"
    assert found["checks"]["merged_16bit: outputs"] == "passed"
    if not kind.endswith("CTC"):
        assert found["models"]["merged_16bit"]["rows"] == 12  # one an image


def test_an_encoder_in_4_bits_is_calibrated_and_tuned(tmp_path):
    config = ViTConfig(**IMAGES)
    base = AutoModelForImageClassification.from_config(config)
    model = quantised(tmp_path, base, AutoModelForImageClassification, task_type=None)
    data = [
        {
            key: torch.stack([row[key] for row in rows("images")])
            for key in ("pixel_values", "labels")
        }
    ] * 4
    result = merge_adapter(
        model, tmp_path / "out", rounding="tuned", calibration_data=data, progress=False
    )
    assert result.manifest["rounding"] == "tuned"
    assert result.manifest["calibration"]["left_out"] == {}
    assert result.manifest["calibration"]["tokens"] == 2 * 12 * 4  # patches; two batches judge


def test_what_an_encoder_makes_of_a_row_counts_as_tokens():
    images = {"labels": torch.zeros(6, 9), "pixel_values": torch.zeros(6, 3, 32, 48)}
    assert tokens_in(images) == 6 * 2 * 3
    assert [len(piece["pixel_values"]) for piece in split_batch(images, 12)] == [2, 2, 2]
    assert tokens_in({"pixel_values_videos": torch.zeros(1, 8, 3, 32, 32)}) == 8 * 4
    assert tokens_in({"input_features": torch.zeros(2, 80, 3000)}) == 2 * 1500
    sound = {"input_values": torch.zeros(2, 3200)}
    assert tokens_in(sound) == 20
    half = torch.ones(2, 3200)
    half[:, 1600:] = 0
    assert tokens_in(sound | {"attention_mask": half}) == 10
    assert tokens_in({"past_values": torch.zeros(2, 64)}) == 128
    assert tokens_in({"labels": torch.zeros(2, 3)}) == 0


class Loader:
    def __init__(self, collate_fn):
        self.dataset, self.collate_fn = Dataset.from_dict({"x": numpy.arange(4)}), collate_fn


def test_examples_that_are_no_batch_give_none(tmp_path):
    model = AutoModelForImageClassification.from_config(ViTConfig(**IMAGES))
    model.main_input_name = ["pixel_values", "task_inputs"]  # as OneFormer has it
    assert list(Drawn(model, Loader(list), 2)) == []
    images = Drawn(model, Loader(lambda rows: {"pixel_values": torch.zeros(len(rows), 3)}), 2)
    assert len(list(images)) == 2 and not images.is_certain
