"""Peak memory of a merge beyond the live model, against the size of its largest weight.

    python benchmarks/memory.py [--output docs/memory.md]

Each model is a random Llama in NF4 with double quantisation and a LoRA adapter on all linear
layers, in a process of its own. Counted is the peak of resident host memory (Linux: VmHWM, reset
before the merge), on a CUDA device the peak of allocated device memory too. The merge writes 4-bit,
16-bit and adapter output in one pass. A second merge is verified on 1024 tokens: of
that the peak of anonymous memory is counted, sampled every 10 ms: the files it maps are pages of
the disk.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import threading
from importlib.metadata import version
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
MIB = 1 << 20
# name -> hidden size, intermediate size, layers, vocabulary
MODELS = {
    "20M": (256, 1024, 16, 8000),
    "135M": (576, 1536, 30, 49152),
    "0.5B": (1024, 4096, 30, 32000),
    "1.1B": (2048, 5632, 22, 32000),
}


def live_model(path, hidden, intermediate, layers, vocabulary):
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import (
        AutoModelForCausalLM,
        BitsAndBytesConfig,
        LlamaConfig,
        LlamaForCausalLM,
    )

    heads = hidden // 64
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        vocab_size=vocabulary,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        tie_word_embeddings=True,
    )
    torch.set_default_dtype(torch.bfloat16)
    LlamaForCausalLM(config).save_pretrained(path)
    torch.set_default_dtype(torch.float32)
    quantisation = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
    )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(
        path, quantization_config=quantisation, dtype=torch.bfloat16, device_map=device
    )
    lora = LoraConfig(r=16, target_modules="all-linear", init_lora_weights=False)
    return get_peft_model(model, lora)


def resident(key):
    """MiB, from /proc/self/status."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1]) / 1024
    raise KeyError(key)


def measure(name):
    import ctypes

    import torch

    from merge_callback import merge_adapter

    def merge(model, root, **settings):
        methods = ["merged_4bit", "merged_16bit", "lora"]
        merge_adapter(model, root, save_method=methods, progress=False, **settings)

    def verified(model, root):
        """The peak of anonymous memory beyond that before, MiB."""
        before, peaks, done = resident("RssAnon"), [0.0], threading.Event()

        def sample():
            while not done.wait(0.01):
                peaks.append(resident("RssAnon"))

        thread = threading.Thread(target=sample)
        thread.start()
        data = [{"input_ids": torch.randint(0, 100, (4, 256))}]
        merge(model, root, rounding="nearest", verification_data=data)
        done.set()
        thread.join()
        return max(peaks) - before

    with tempfile.TemporaryDirectory() as root:
        warm = live_model(f"{root}/warm", 128, 256, 1, 100)
        merge(warm, f"{root}/warm-merged", verify=False)
        verified(warm, f"{root}/warm-merged")
        model = live_model(f"{root}/base", *MODELS[name])
        for tensor in [*model.parameters(), *model.buffers()]:
            tensor.detach().reshape(-1).view(torch.uint8).sum()  # bring mapped files into memory
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        before = resident("VmRSS")
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
            device_before = torch.cuda.memory_allocated()
        merge(model, f"{root}/merged", rounding="nearest", verify=False)
        peak = resident("VmHWM")
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        with_verification = verified(model, f"{root}/merged")
    largest = max(
        module.in_features * module.out_features * 4 / MIB
        for module in model.modules()
        if type(module).__name__ == "Linear4bit" and hasattr(module, "quant_state")
    )
    row = {
        "model": name,
        "live": before,
        "largest": largest,
        "extra": peak - before,
        "limit": 3 * largest + 64,
        "verified": with_verification,
    }
    if torch.cuda.is_available():
        row["device_extra"] = (torch.cuda.max_memory_allocated() - device_before) / MIB
    return row


def table(rows):
    libraries = ", ".join(f"{n} {version(n)}" for n in ("torch", "transformers", "bitsandbytes"))
    device = any("device_extra" in row for row in rows)
    lines = [
        "# Memory of a merge",
        "",
        "Peak in MiB beyond the live model, while 4-bit, 16-bit and adapter output are written in",
        "one pass. The limit: three float32 copies of the largest weight plus 64 MiB. `verified`:",
        "the same with verification on 1024 tokens, anonymous memory alone; the logits of two",
        "models, and activations, come on top. Made by",
        f"`python benchmarks/memory.py` on {platform.machine()} with {libraries}.",
        "",
        "| model | process before | largest weight in float32 | extra, host | limit | verified |"
        + (" extra, device |" if device else ""),
        "|---|---|---|---|---|---|" + ("---|" if device else ""),
    ]
    for row in rows:
        figures = ("live", "largest", "extra", "limit", "verified")
        cells = [row["model"], *(f"{row[key]:.0f}" for key in figures)]
        if device:
            cells.append(f"{row['device_extra']:.0f}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path)
    parser.add_argument("--one", choices=MODELS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(measure(arguments.one)))
        return
    rows = []
    for name in MODELS:
        command = [sys.executable, __file__, "--one", name]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        rows.append(json.loads(done.stdout.splitlines()[-1]))
    text = table(rows)
    print(text)
    if arguments.output:
        arguments.output.write_text(text)
    over = [row["model"] for row in rows if row["extra"] > row["limit"]]
    over += [row["model"] for row in rows if row.get("device_extra", 0) > row["limit"]]
    if over:
        sys.exit(f"over the limit: {', '.join(over)}")


if __name__ == "__main__":
    main()
