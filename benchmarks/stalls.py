"""How long training is held up by merges behind it, and how much its steps slow down.

    python benchmarks/stalls.py [--models 135M 1.1B] [--tokens 32] [--threads 1] [--repeats 2]

A random Llama in NF4 is trained in float32 on one thread, so that a core is free, on one sequence a
step, without the callback and with blocking=False, in turns, each in a process of its own. Told are
seconds of start-up that the callback adds, seconds that each save held training up, the time that a
bare copy of the adapter takes, and the median of the steps while a merge was under way, against the
same step of the run without just before. Exits with 1 when a goal is missed or losses differ.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from speed import MODELS, live_model, machine, make_base

SAVES, BETWEEN = 3, 6
STALL, SLOWER, START = 0.05, 1.1, 0.2  # seconds beyond the adapter's copy; ratio; seconds


def train(kind, base, output, tokens):
    import torch
    from datasets import Dataset
    from transformers import Trainer, TrainerCallback, TrainingArguments

    from merge_callback import MergeOnSaveCallback

    class Watch(TrainerCallback):
        """When each step began and ended, and whether a merge was under way."""

        def __init__(self):
            self.steps = []

        def on_train_begin(self, *args, **kwargs):
            self.began = time.perf_counter()

        def on_step_begin(self, args, state, control, **kwargs):
            self.start = time.perf_counter()

        def on_step_end(self, args, state, control, **kwargs):
            self.steps.append([time.perf_counter() - self.start, busy()])

    def busy():
        behind = getattr(callback, "_behind", None)
        running = behind and behind._background._running
        return bool(running and not running.done())

    model = live_model(base, quantise=False, dtype="float32")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
    model.train()
    data = [{"input_ids": [i % 97 + j for j in range(int(tokens))]} for i in range(64)]
    rows = Dataset.from_list([row | {"labels": row["input_ids"]} for row in data])
    args = TrainingArguments(
        output, use_cpu=True, report_to=[], disable_tqdm=True, per_device_train_batch_size=1,
        max_steps=(SAVES + 1) * BETWEEN, save_strategy="steps", save_steps=BETWEEN,
        save_total_limit=1, logging_steps=1, learning_rate=1e-4,
    )  # fmt: skip
    watch, callback = Watch(), None
    callbacks = [watch]
    if kind != "without":
        callback = MergeOnSaveCallback(
            merge_on_save=True, blocking=False, rounding="stochastic", verify_tokens=16
        )
        callbacks = [callback, watch]
    began = time.perf_counter()
    trainer = Trainer(model=model, args=args, train_dataset=rows, callbacks=callbacks)
    made = time.perf_counter() - began
    start = 0.0
    if callback is not None:
        own = callback.on_train_begin

        def timed(*args, **kwargs):
            nonlocal start
            began = time.perf_counter()
            own(*args, **kwargs)
            start = time.perf_counter() - began

        callback.on_train_begin = timed
    trained = [p for p in model.parameters() if p.requires_grad]
    began = time.perf_counter()
    copies = [p.detach().clone() for p in trained]
    copy = time.perf_counter() - began
    del copies
    began = time.perf_counter()
    trainer.train()
    return {
        "losses": [e["loss"] for e in trainer.state.log_history if "loss" in e],
        "steps": watch.steps,
        "made": made,
        "start": start,
        "copy": copy,
        "stalls": list(getattr(callback, "stalls", {}).values()),
        "seconds": time.perf_counter() - began,
        "threads": torch.get_num_threads(),
        "versions": len(getattr(callback, "results", [])),
    }


def run(kind, base, tokens, threads):
    with tempfile.TemporaryDirectory() as output:
        command = [sys.executable, __file__, "--one", kind, str(base), output, tokens]
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": threads},
        )
    if done.returncode:
        sys.exit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def spread(values):
    values = list(values)
    return f"{statistics.median(values):.3f} ({min(values):.3f} to {max(values):.3f})"


def report(name, tokens, threads, repeats):
    """Print what was found of one model; the goals that it missed."""
    with tempfile.TemporaryDirectory() as root:
        base = Path(root) / "base"
        make_base(base, *MODELS[name])
        kinds = ("without", "behind")
        pairs = [[run(kind, base, tokens, threads) for kind in kinds] for _ in range(repeats)]
    slower, plain_steps = [], []
    for plain, behind in pairs:
        if behind["losses"] != plain["losses"]:
            yield f"{name}: losses are not those without the callback"
        during = [i for i, (_, busy) in enumerate(behind["steps"]) if busy and i % BETWEEN]
        ratios = (behind["steps"][i][0] / plain["steps"][i][0] for i in during)
        slower.append(statistics.median(ratios))
        plain_steps.append(statistics.median(step for step, _ in plain["steps"]))
    behinds = [behind for _, behind in pairs]
    stalls = [stall for behind in behinds for stall in behind["stalls"]]
    copy = statistics.median(behind["copy"] for behind in behinds)
    start = statistics.median(behind["start"] for behind in behinds)
    print(f"{name} on {machine()}, {threads} thread(s) to train, {tokens} tokens a step; "
          f"medians of {repeats} runs (lowest to highest)")  # fmt: skip
    print(f"start-up: {start:.3f} s in on_train_begin")
    print(f"held up: {spread(stalls)} s at each of {len(stalls)} saves")
    print(f"a bare copy of the adapter: {copy:.3f} s")
    print(f"a step without the callback: {spread(plain_steps)} s")
    print(f"a step with a merge behind it: {spread(slower)} of the same step without")
    for kind, runs in (("without", [plain for plain, _ in pairs]), ("with", behinds)):
        print(f"training {kind}: {spread(run['seconds'] for run in runs)} s")
    print(f"versions of a training: {behinds[0]['versions']}", flush=True)
    stall, slow = max(stalls) - copy, statistics.median(slower)
    if stall > STALL:
        yield f"{name}: training is held up {stall:.3f} s beyond the copy, goal {STALL}"
    if slow > SLOWER:
        yield f"{name}: steps take {slow:.2f} of those without, goal {SLOWER}"
    if start > START:
        yield f"{name}: the start takes {start:.2f} s longer, goal {START}"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=["135M", "1.1B"])
    parser.add_argument("--tokens", default="32", help="of a step")
    parser.add_argument("--threads", default="1")
    parser.add_argument("--repeats", type=int, default=2, help="of each model")
    parser.add_argument("--one", nargs=4, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(train(*arguments.one)))
        return
    rest = arguments.tokens, arguments.threads, arguments.repeats
    if missed := [told for name in arguments.models for told in report(name, *rest)]:
        sys.exit("\n".join(missed))


if __name__ == "__main__":
    main()
