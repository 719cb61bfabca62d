"""How long training is held up by merges behind it, and how much its steps slow down.

    python benchmarks/stalls.py [--model 135M] [--threads 1]

A random Llama in NF4 is trained on one thread, so that a core is free, three times in turn, each in
a process of its own: without the callback, with blocking=False, and with blocking=True. Told are
seconds of start-up that the callback adds, seconds that each save held training up, the time that a
bare copy of the adapter takes, and the median of the steps while a merge was under way, against the
same steps of the run without. Exits with 1 when a goal is missed or losses differ.
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

SAVES, BETWEEN = 3, 10
STALL, SLOWER, START = 0.05, 1.1, 0.2  # seconds beyond the adapter's copy; ratio; seconds


def train(kind, base, output):
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

    model = live_model(base, quantise=False)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
    model.train()
    data = [{"input_ids": [i % 97 + j for j in range(32)]} for i in range(64)]
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
            merge_on_save=True, blocking=kind == "blocking", rounding="stochastic", verify_tokens=64
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


def run(kind, base, threads):
    with tempfile.TemporaryDirectory() as output:
        command = [sys.executable, __file__, "--one", kind, str(base), output]
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": threads},
        )
    if done.returncode:
        sys.exit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=MODELS, default="135M")
    parser.add_argument("--threads", default="1")
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(train(*arguments.one)))
        return
    with tempfile.TemporaryDirectory() as root:
        base = Path(root) / "base"
        make_base(base, *MODELS[arguments.model])
        kinds = ("without", "behind", "blocking")
        found = {kind: run(kind, base, arguments.threads) for kind in kinds}
    plain, behind = found["without"], found["behind"]
    during = [i for i, (_, busy) in enumerate(behind["steps"]) if busy and i % BETWEEN]
    slower = statistics.median(behind["steps"][i][0] / plain["steps"][i][0] for i in during)
    stall = max(behind["stalls"]) - behind["copy"]
    print(f"{arguments.model} on {machine()}, {arguments.threads} training thread(s)")
    print(f"start-up: {behind['start']:.3f} s in on_train_begin")
    print(f"held up: {', '.join(f'{s:.3f}' for s in behind['stalls'])} s at each save")
    print(f"a bare copy of the adapter: {behind['copy']:.3f} s")
    print(f"steps with a merge behind them: {len(during)}, {slower:.3f} of those without")
    for kind, told in found.items():
        median = statistics.median(step for step, _ in told["steps"])
        print(f"{kind}: {told['seconds']:.1f} s, step {median:.3f} s, {told['versions']} versions")
    problems = [
        f"{kind}: its losses are not those without the callback"
        for kind in ("behind", "blocking")
        if found[kind]["losses"] != plain["losses"]
    ]
    if stall > STALL:
        problems.append(f"training is held up {stall:.3f} s beyond the copy, goal {STALL}")
    if slower > SLOWER:
        problems.append(f"steps take {slower:.2f} of those without, goal {SLOWER}")
    if behind["start"] > START:
        problems.append(f"the start takes {behind['start']:.2f} s longer, goal {START}")
    if problems:
        sys.exit("\n".join(problems))


if __name__ == "__main__":
    main()
