"""Seconds and memory of calibrated rounding: for one weight by its shape, for a model by its depth.

    python benchmarks/rounding_cost.py [--shapes 512x512,...] [--layers 2,4,8] [--threads 2]

Prints two tables. Each shape runs in a process of its own, on random weights and inputs. `GiB` is
the peak of resident memory above that before the call; `float32 copies` the same in units of the
weight. The moment of inputs is given: to take it over T tokens costs 2 T in^2 operations more. The
models are random Llamas, hidden size 512, NF4, and calibrate on 8,192 tokens.
"""

import argparse
import multiprocessing
import resource
import tempfile
import time

import torch
from peft import LoraConfig, get_peft_model
from transformers import BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

from merge_callback import merge_adapter
from merge_callback.rounding.calibrated import Rows, calibrated
from merge_callback.rounding.grid import Grid
from merge_callback.rounding.nearest import nearest

SHAPES = "512x512,1024x1024,2048x2048,4096x4096,8192x512,512x8192,8192x8192"


def measure(shape, threads):
    """(seconds, bytes)"""
    torch.set_num_threads(threads)
    out, inputs = shape
    torch.manual_seed(0)
    grid = Grid(quant_type="nf4", blocksize=64, nested=True, offset=0.05)
    weight = 0.02 * torch.randn(out, inputs)
    moment = torch.zeros(inputs, inputs)
    for _ in range(4):
        x = torch.randn(2048, inputs)
        moment.addmm_(x.t(), x)
    scales = grid.stored(nearest(weight, grid).scales)
    del x
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.monotonic()
    calibrated([Rows(weight, grid, scales)], moment, 8192)
    seconds = time.monotonic() - start
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return seconds, (after - before) * 1024


def merge(layers, threads):
    """Seconds that `merge_adapter` takes for calibrated rounding of a model of so many layers."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=512,
        intermediate_size=1536,
        num_hidden_layers=layers,
        num_attention_heads=8,
        vocab_size=1000,
    )
    nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.bfloat16)
    with tempfile.TemporaryDirectory() as work:
        LlamaForCausalLM(config).bfloat16().save_pretrained(work)
        model = LlamaForCausalLM.from_pretrained(work, quantization_config=nf4)
        model = get_peft_model(model, LoraConfig(r=8, target_modules="all-linear"))
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=1e-3)
        data = [{"input_ids": torch.randint(0, 1000, (4, 256))} for _ in range(8)]
        result = merge_adapter(
            model, work, rounding="calibrated", calibration_data=data, verify=False, progress=False
        )
    return result.manifest["seconds"]["round"]


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--shapes", default=SHAPES)
    parser.add_argument("--layers", default="2,4,8")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    print("| out | in | seconds | GiB | float32 copies |\n|---|---|---|---|---|", flush=True)
    context = multiprocessing.get_context("spawn")
    for text in filter(None, options.shapes.split(",")):
        shape = tuple(map(int, text.split("x")))
        with context.Pool(1) as pool:
            seconds, size = pool.apply(measure, (shape, options.threads))
        copies = size / (4 * shape[0] * shape[1])
        print(
            f"| {shape[0]} | {shape[1]} | {seconds:.1f} | {size / 2**30:.2f} | {copies:.1f} |",
            flush=True,
        )
    print("\n| layers | seconds | seconds a layer |\n|---|---|---|", flush=True)
    for layers in map(int, options.layers.split(",")):
        with context.Pool(1) as pool:
            seconds = pool.apply(merge, (layers, options.threads))
        print(f"| {layers} | {seconds:.1f} | {seconds / layers:.2f} |", flush=True)


if __name__ == "__main__":
    main()
