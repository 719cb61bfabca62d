"""Two steps in every trainer that people use, and with the options that change what a model is."""

import pytest
import torch
from datasets import Dataset
from models import adapt, load_base, qlora, save_base, tokenizer
from peft import LoraConfig
from test_callback import COMMON, TEXTS, data
from transformers import (
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    DataCollatorForSeq2Seq,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainingArguments,
)
from trl import (
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    KTOConfig,
    KTOTrainer,
    RewardConfig,
    RewardTrainer,
    SFTConfig,
    SFTTrainer,
)

from merge_callback import MergeOnSaveCallback

pytestmark = pytest.mark.matrix

LORA = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"}
SETTINGS = COMMON | {"max_steps": 2, "save_strategy": "no"}


def base(tmp_path):
    return load_base(save_base(tmp_path / "base"), "nf4")


def plain(tmp_path, callback, **settings):
    args = TrainingArguments(str(tmp_path / "run"), **SETTINGS | settings)
    model = qlora(tmp_path, "nf4")
    return Trainer(model, args, train_dataset=data(), callbacks=[callback])


def seq2seq(tmp_path, callback, **settings):
    config = T5Config(
        d_model=128, d_kv=32, d_ff=192, num_layers=2, num_heads=4, vocab_size=304,
        decoder_start_token_id=0,
    )  # fmt: skip
    T5ForConditionalGeneration(config).save_pretrained(tmp_path / "base")
    model = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "base")
    model = adapt(model, task_type="SEQ_2_SEQ_LM", target_modules=["q", "v"])
    args = Seq2SeqTrainingArguments(str(tmp_path / "run"), **SETTINGS | settings)
    collator = DataCollatorForSeq2Seq(tokenizer(), model=model)
    return Seq2SeqTrainer(
        model, args, data_collator=collator, train_dataset=data(), callbacks=[callback]
    )


def sft(tmp_path, callback, **settings):
    args = SFTConfig(str(tmp_path / "run"), **SETTINGS | {"max_length": 16} | settings)
    return SFTTrainer(
        base(tmp_path), args, train_dataset=Dataset.from_dict({"text": TEXTS}),
        eval_dataset=Dataset.from_dict({"text": TEXTS[:4]}) if "eval_steps" in settings else None,
        peft_config=LoraConfig(**LORA), processing_class=tokenizer(), callbacks=[callback],
    )  # fmt: skip


def preferences():
    pairs = {"prompt": TEXTS, "chosen": [t[:20] for t in TEXTS], "rejected": [t[9:] for t in TEXTS]}
    return Dataset.from_dict(pairs)


def dpo(tmp_path, callback, **settings):
    args = DPOConfig(str(tmp_path / "run"), **SETTINGS | {"max_length": 32} | settings)
    return DPOTrainer(
        base(tmp_path), args=args, train_dataset=preferences(), processing_class=tokenizer(),
        peft_config=LoraConfig(**LORA), callbacks=[callback],
    )  # fmt: skip


def lengths(completions, **kwargs):
    return [float(len(completion)) for completion in completions]


def grpo(tmp_path, callback, **settings):
    args = GRPOConfig(
        str(tmp_path / "run"), **SETTINGS
        | {"num_generations": 2, "max_completion_length": 6, "per_device_train_batch_size": 2}
        | settings,
    )  # fmt: skip
    return GRPOTrainer(
        base(tmp_path), reward_funcs=lengths, args=args,
         train_dataset=Dataset.from_dict({"prompt": TEXTS}), processing_class=tokenizer(),
        peft_config=LoraConfig(**LORA), callbacks=[callback],
    )  # fmt: skip


def kto(tmp_path, callback, **settings):
    rows = {"prompt": TEXTS, "completion": [t[:20] for t in TEXTS], "label": [True, False] * 8}
    args = KTOConfig(str(tmp_path / "run"), **SETTINGS | {"max_length": 32} | settings)
    return KTOTrainer(
        base(tmp_path), args=args, train_dataset=Dataset.from_dict(rows),
        processing_class=tokenizer(), peft_config=LoraConfig(**LORA), callbacks=[callback],
    )  # fmt: skip


def reward(tmp_path, callback, **settings):
    args = RewardConfig(str(tmp_path / "run"), **SETTINGS | {"max_length": 32} | settings)
    path = save_base(tmp_path / "base", pad_token_id=0)
    model = AutoModelForSequenceClassification.from_pretrained(
        path, num_labels=1, dtype=torch.bfloat16
    )
    lora = LoraConfig(**LORA, task_type="SEQ_CLS", modules_to_save=["score"])
    return RewardTrainer(
        model, args=args, train_dataset=preferences(), processing_class=tokenizer(),
        peft_config=lora, callbacks=[callback],
    )  # fmt: skip


TRAINERS = [plain, seq2seq, sft, dpo, grpo, kto, reward]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("make", TRAINERS, ids=lambda make: make.__name__)
def test_a_trainer_ends_with_a_merged_model(tmp_path, make, support):
    callback = MergeOnSaveCallback(calibration_tokens=256, verify_tokens=128)
    run = make(tmp_path, callback)
    support("Trainers", type(run).__name__, "two steps")
    run.train()
    (result,) = callback.results
    assert result.version == "step-00000002"
    found = result.manifest["verification"]
    assert found["problems"] == [] and found["data"]
    if "merged_4bit" in result.paths:
        assert result.manifest["rounding"] == "tuned"
        assert result.manifest["calibration"]["left_out"] == {}


OPTIONS = {
    "gradient checkpointing": {"gradient_checkpointing": True},
    "torch.compile": {"torch_compile": True, "torch_compile_backend": "eager"},
    "NEFTune": {"neftune_noise_alpha": 5.0},
    "packing": {"packing": True, "packing_strategy": "wrapped"},
    "padding free": {"padding_free": True, "max_length": None},
    "assistant only, no": {"completion_only_loss": False},
    "resume": {"save_strategy": "steps", "save_steps": 1},
    "best model": {
        "save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1,
        "load_best_model_at_end": True,
    },
}  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("option", OPTIONS)
def test_an_option_of_sft_changes_nothing_of_that(tmp_path, option, support):
    support("Options of SFTTrainer", option, "two steps")
    callback = MergeOnSaveCallback(rounding="calibrated", calibration_tokens=256)
    run = sft(tmp_path, callback, **OPTIONS[option])
    run.train()
    (result,) = callback.results
    assert result.manifest["verification"]["problems"] == []
    assert result.manifest["calibration"]["left_out"] == {}
    if option == "resume":
        args = {"max_steps": 3} | OPTIONS[option]
        callback = MergeOnSaveCallback(rounding="nearest")
        again = sft(tmp_path, callback, **args)
        again.train(resume_from_checkpoint=True)
        assert [r.version for r in callback.results] == ["step-00000003"]


@pytest.mark.filterwarnings("ignore")
def test_without_a_tokenizer_there_is_none(tmp_path):
    callback = MergeOnSaveCallback(rounding="nearest")
    plain(tmp_path, callback).train()
    assert not (callback.results[0].path / "tokenizer.json").exists()
