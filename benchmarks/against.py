"""Merges of this checkout against those of another, in turns: are they slower?

    python benchmarks/against.py OTHER_CHECKOUT [--pairs 5]

Each merge is a process of its own, on one core. A Llama of random weights (12 layers, hidden size
576, vocabulary 16,000) is merged without data. Prints the ratio of the times, median and range.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent.parent
MERGES = {
    "stochastic": {"rounding": "stochastic"},
    "nearest": {"rounding": "nearest"},
    "16 bits": {"save_method": "merged_16bit"},
}
CHILD = """
import json, sys, tempfile, time
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from peft import LoraConfig, get_peft_model
from merge_callback import merge_adapter
torch.set_num_threads(1)
torch.manual_seed(0)
config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4",
    bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.float32)
base = AutoModelForCausalLM.from_pretrained(sys.argv[1], quantization_config=config)
model = get_peft_model(base, LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM"))
for name, parameter in model.named_parameters():
    if "lora_B" in name:
        torch.nn.init.normal_(parameter, std=1e-3)
told = {}
for name, settings in json.loads(sys.argv[2]).items():
    with tempfile.TemporaryDirectory() as out:
        began = time.perf_counter()
        merge_adapter(model, out, progress=False, **settings)
        told[name] = time.perf_counter() - began
print(json.dumps(told))
"""


def base(path):
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=12,
        num_attention_heads=9,
        num_key_value_heads=3,
        vocab_size=16000,
    )
    torch.manual_seed(1)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(path)


def seconds(checkout, path):
    """Merge -> seconds, with the package of a checkout."""
    environment = os.environ | {"PYTHONPATH": str(checkout), "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(path), json.dumps(MERGES)],
        capture_output=True,
        text=True,
        check=True,
        env=environment,
        cwd=checkout,
    )
    return json.loads(done.stdout.splitlines()[-1])


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("other", type=Path)
    parser.add_argument("--pairs", type=int, default=5)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as root:
        base(root)
        pairs = [
            (seconds(HERE, root), seconds(given.other.resolve(), root)) for _ in range(given.pairs)
        ]
    print(f"{platform.processor() or platform.machine()}, {given.pairs} pairs, one core")
    for name in MERGES:
        ratios = sorted(mine[name] / other[name] for mine, other in pairs)
        here, there = (statistics.median(pair[i][name] for pair in pairs) for i in (0, 1))
        told = f"{here:.2f} s, {there:.2f} s there, ratio {statistics.median(ratios):.2f}"
        print(f"{name}: {told} ({ratios[0]:.2f} to {ratios[-1]:.2f})")


if __name__ == "__main__":
    main()
