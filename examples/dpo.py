"""Preference training with TRL, merged at its end: the callback is the one of SFTTrainer.

    python examples/dpo.py [--base DIR_OR_ID] [--steps 60]

KTO, GRPO and reward trainers take it in the same place.
"""

import argparse

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
from trl import DPOConfig, DPOTrainer

from merge_callback import MergeOnSaveCallback

PAIRS = [
    {
        "prompt": [{"role": "user", "content": f"Is {n} an even number?"}],
        "chosen": [{"role": "assistant", "content": "Yes." if n % 2 == 0 else "No."}],
        "rejected": [{"role": "assistant", "content": "No." if n % 2 == 0 else "Yes."}],
    }
    for n in range(16)
]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", default="HuggingFaceTB/SmolLM2-135M-Instruct")
    parser.add_argument("--steps", type=int, default=60)
    given = parser.parse_args()

    on_gpu = torch.cuda.is_available()
    nf4 = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    callback = MergeOnSaveCallback()
    trainer = DPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(
            given.base, quantization_config=nf4, dtype=torch.bfloat16
        ),
        args=DPOConfig(
            output_dir="dpo",
            max_steps=given.steps,
            per_device_train_batch_size=4,
            report_to=[],
            bf16=on_gpu,
            use_cpu=not on_gpu,
        ),
        train_dataset=Dataset.from_list(PAIRS),
        processing_class=AutoTokenizer.from_pretrained(given.base),
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"),
        callbacks=[callback],
    )
    trainer.train()
    print(f"the merged model is in {callback.results[-1].path}")


if __name__ == "__main__":
    main()
