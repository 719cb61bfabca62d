"""A training loop of your own with accelerate, no Trainer, and one model at its end.

    accelerate launch examples/accelerate_loop.py [--base BASE] [--data FILE.jsonl] [--steps 60]

Rows of the data have `prompt` and `completion`, as lists of messages, as in the quickstart.
"""

import argparse
import json
from pathlib import Path

import torch
from accelerate import Accelerator
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from merge_callback import merge_adapter


def load(base):
    """A 4-bit base with a LoRA adapter, and its tokenizer."""
    nf4 = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    model = AutoModelForCausalLM.from_pretrained(base, quantization_config=nf4, dtype="bfloat16")
    lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(model, lora), AutoTokenizer.from_pretrained(base)


def batches(path, tokenizer):
    """One row a batch, of shape (1, tokens)."""
    for line in Path(path).read_text().splitlines():
        row = json.loads(line)
        messages = row["prompt"] + row["completion"]
        ids = tokenizer.apply_chat_template(messages, return_tensors="pt", return_dict=True)
        yield {"input_ids": ids["input_ids"], "labels": ids["input_ids"]}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", default="HuggingFaceTB/SmolLM2-135M-Instruct")
    parser.add_argument("--data", default="train.jsonl")
    parser.add_argument("--steps", type=int, default=60)
    given = parser.parse_args()

    accelerator = Accelerator()
    model, tokenizer = load(given.base)
    rows = list(batches(given.data, tokenizer))
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-3)
    model, optimizer = accelerator.prepare(model, optimizer)
    model.train()
    for step in range(given.steps):
        batch = {k: v.to(accelerator.device) for k, v in rows[step % len(rows)].items()}
        loss = model(**batch).loss
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
    if accelerator.is_main_process:  # under FSDP or ZeRO-3: all processes, without this line
        result = merge_adapter(
            accelerator.unwrap_model(model),
            "exports",
            processing_class=tokenizer,
            name=f"step-{given.steps:08}",
            calibration_data=rows,
        )
        print(f"loss {loss.item():.3f}; the merged model is in {result.path}")
    accelerator.wait_for_everyone()
    accelerator.end_training()


if __name__ == "__main__":
    main()
