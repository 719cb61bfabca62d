"""Unsloth's fast models, merged by the callback instead of save_pretrained_merged.

Not run by us: Unsloth needs a GPU. Its models are PEFT models on bitsandbytes bases and its
trainers are TRL's, which is all that the callback asks for.

    pip install unsloth 'merge-callback[bnb,trl]'
    python examples/unsloth_sft.py
"""

from unsloth import FastLanguageModel  # isort: skip  # it patches what is imported after it

from datasets import load_dataset
from trl import SFTConfig, SFTTrainer

from merge_callback import MergeOnSaveCallback

model, tokenizer = FastLanguageModel.from_pretrained(
    "unsloth/SmolLM2-135M-Instruct", max_seq_length=512, load_in_4bit=True
)
model = FastLanguageModel.get_peft_model(model, r=16, lora_alpha=32)
trainer = SFTTrainer(
    model=model,
    args=SFTConfig(output_dir="run", max_steps=60, report_to=[]),
    train_dataset=load_dataset("json", data_files="train.jsonl", split="train"),
    processing_class=tokenizer,
    callbacks=[MergeOnSaveCallback()],
)
trainer.train()
