"""Seconds and memory of calibrated rounding for one layer, by its shape; prints a table.

    python benchmarks/rounding_cost.py [--shapes 512x512,1024x1024,...] [--threads 2]

Each shape runs in a process of its own, on random weights and inputs. `GiB` is the peak of resident
memory above that before the call; `float32 copies` the same in units of the weight. The moment of
inputs is given: to take it over T tokens costs 2 T in^2 operations more.
"""

import argparse
import multiprocessing
import resource
import time

import torch

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


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--shapes", default=SHAPES)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    print("| out | in | seconds | GiB | float32 copies |\n|---|---|---|---|---|", flush=True)
    context = multiprocessing.get_context("spawn")
    for text in options.shapes.split(","):
        shape = tuple(map(int, text.split("x")))
        with context.Pool(1) as pool:
            seconds, size = pool.apply(measure, (shape, options.threads))
        copies = size / (4 * shape[0] * shape[1])
        print(
            f"| {shape[0]} | {shape[1]} | {seconds:.1f} | {size / 2**30:.2f} | {copies:.1f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
