"""How much of one adapter is left after Unsloth's 4-bit merge, and after this one?

    make bench-unsloth        # or, in an environment with Unsloth:
    python benchmarks/unsloth_merge.py [--steps N] [--tokens N] [--output DIR]

SmolLM2-135M-Instruct is trained on Python's help texts with FastLanguageModel and SFTTrainer, and
the callback merges it. Then the same adapter is merged by Unsloth: without a GPU its
save_pretrained_merged refuses 4 bits, so what that calls on a GPU is called here,
merge_and_overwrite_lora(save_method="merged_4bit"). Both directories are loaded by stock
transformers and scored on text that neither training nor calibration saw, as in fidelity.py.
"""

from unsloth import FastLanguageModel  # isort: skip  # it patches what is imported after it

import argparse
import datetime
import importlib.metadata
import platform
import shutil
import time
from pathlib import Path

import fidelity
import torch
from datasets import Dataset
from trl import SFTConfig, SFTTrainer
from unsloth_zoo.saving_utils import merge_and_overwrite_lora

from merge_callback import MergeOnSaveCallback, MergeStore

LIBRARIES = ("unsloth", "torch", "transformers", "trl", "peft", "bitsandbytes", "merge_callback")


def processor():
    """The name of this machine's CPU."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next(
        (line.split(":")[1].strip() for line in lines if "model name" in line), platform.processor()
    )


def train(base, rows, adapter, options):
    """What a user of Unsloth does."""
    model, tokenizer = FastLanguageModel.from_pretrained(str(base), max_seq_length=256)
    model = FastLanguageModel.get_peft_model(
        model, r=16, lora_alpha=32, use_gradient_checkpointing=False
    )
    SFTTrainer(
        model=model,
        processing_class=tokenizer,
        train_dataset=Dataset.from_dict({"input_ids": rows.tolist()}),
        args=SFTConfig(
            output_dir=str(options.output), max_steps=options.steps, learning_rate=1e-3,
            per_device_train_batch_size=4, logging_steps=5, save_strategy="no", report_to=[],
            disable_tqdm=True,
        ),
        callbacks=[MergeOnSaveCallback(rounding="calibrated", calibration_tokens=options.tokens)],
    ).train()  # fmt: skip
    model.save_pretrained(adapter)


def merge_theirs(adapter, place):
    """Seconds that Unsloth's merge takes."""
    model, tokenizer = FastLanguageModel.from_pretrained(str(adapter), max_seq_length=256)
    settings = model.config.quantization_config.to_dict()
    model.config.update({"quantization_config": settings})  # as its loader does on a GPU
    shutil.rmtree(place, ignore_errors=True)
    began = time.monotonic()
    merge_and_overwrite_lora(
        lambda name, **_: name, model, tokenizer, str(place), save_method="merged_4bit"
    )
    return time.monotonic() - began


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--tokens", type=int, default=4096, help="to calibrate with")
    parser.add_argument("--output", type=Path, default=Path("fidelity-output/unsloth"))
    options = parser.parse_args()
    base, adapter, theirs = (options.output / name for name in ("base", "adapter", "theirs"))
    if not base.exists():
        fidelity.save_base(base)
    texts = fidelity.help_texts(base)
    held = texts["heldout"]
    if not adapter.exists():
        train(base, texts["calibration"], adapter, options)
    ours = MergeStore(options.output / "_merged").latest()
    seconds = {"this one's": sum(ours.manifest["seconds"].values())}
    seconds["Unsloth's"] = merge_theirs(adapter, theirs)

    live = fidelity.load_live(base, adapter, torch.float32)
    head = live.get_output_embeddings().weight.detach().float()
    right = fidelity.hidden_states(live, held)
    found = {"live": fidelity.score(right, right, held, head)}
    with live.disable_adapter():
        found["base"] = fidelity.score(fidelity.hidden_states(live, held), right, held, head)
    del live
    for name, path in (("Unsloth's", theirs), ("this one's", ours.path)):
        hidden = fidelity.hidden_states(fidelity.load_merged(path), held)
        found[name] = fidelity.score(hidden, right, held, head)

    lost = found["base"][0] - found["live"][0]
    print("\n| 4-bit model | seconds | loss | gain kept | KL |\n|---|---|---|---|---|")
    for name in ("live", "base", "Unsloth's", "this one's"):
        loss, divergence = found[name]
        gain = 100 * (found["base"][0] - loss) / lost
        took = f"{seconds[name]:.0f}" if name in seconds else ""
        print(f"| {name} | {took} | {loss:.4f} | {gain:.1f} % | {divergence:.5f} |")
    told = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in LIBRARIES)
    threads = f"{torch.get_num_threads()} threads of {processor()}"
    print(f"\n{datetime.date.today().isoformat()}, {threads}, {told}")


if __name__ == "__main__":
    main()
