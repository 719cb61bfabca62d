"""Train a new adapter on a merged 4-bit model, and merge again.

    python train_on.py DIRECTORY DATA.jsonl

The merged directory is a base like any other: the next round of training starts from it, and the
next version holds both.
"""

import sys

import torch
from datasets import load_dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM
from trl import SFTConfig, SFTTrainer

from merge_callback import MergeOnSaveCallback

directory, data = sys.argv[1:]
on_gpu = torch.cuda.is_available()
callback = MergeOnSaveCallback()
trainer = SFTTrainer(
    model=AutoModelForCausalLM.from_pretrained(directory),  # 4 bits, as it was saved
    args=SFTConfig(
        output_dir="next",
        max_steps=20,
        per_device_train_batch_size=4,
        report_to=[],
        bf16=on_gpu,
        use_cpu=not on_gpu,
    ),
    train_dataset=load_dataset("json", data_files=data, split="train"),
    peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"),
    callbacks=[callback],
)
trainer.train()
print(f"merged twice: {callback.results[-1].path}")
