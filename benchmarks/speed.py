"""Wall time, CPU time, memory and bytes of a merge, against PEFT's own and a bare copy.

    python benchmarks/speed.py [--models 135M 0.5B 1.1B] [--large 3B] [--repeats 5] [--output docs]
    python benchmarks/speed.py --profile 1.1B

Each model is a random Llama in NF4 with double quantisation and a LoRA adapter (r=16) on all linear
layers. Each contender runs in a process of its own, loads the model, and is measured from there to
files that are synced. Rounds are interleaved: each of them runs every contender once. Contenders:

    4-bit, nearest   merge_adapter, rounding="nearest"
    4-bit            merge_adapter, rounding="stochastic", what `auto` does without data
    16-bit           merge_adapter
    all              merge_adapter, 4-bit (nearest), 16-bit and adapter in one pass
    all, verified    the same, files loaded and weights verified, no outputs compared; once alone
    PEFT 4-bit       merge_and_unload + save_pretrained, then fsync
    PEFT 16-bit      save the adapter, unload, dequantize, load the adapter, merge_and_unload,
                     save_pretrained, then fsync
    copy 4-bit       cp of the files that 4-bit wrote, then fsync
    copy 16-bit      cp of the files that 16-bit wrote, then fsync

Of the large model only memory is told, of one run each, to show how it grows. Memory is the peak of
resident memory beyond that before (Linux: VmHWM, reset before), on a CUDA device the peak of
allocated device memory too. Exits with 1 when a goal is missed.
"""

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
MIB = 1 << 20
# name -> hidden size, intermediate size, layers, vocabulary
MODELS = {
    "135M": (576, 1536, 30, 49152),
    "0.5B": (1024, 4096, 30, 32000),
    "1.1B": (2048, 5632, 22, 32000),
    "3B": (3072, 8192, 26, 32000),
}
FORMAT = {
    "load_in_4bit": True,
    "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_use_double_quant": True,
    "bnb_4bit_compute_dtype": "bfloat16",
}
SETTINGS = {
    "4-bit, nearest": {"save_method": "merged_4bit", "rounding": "nearest", "verify": False},
    "4-bit": {"save_method": "merged_4bit", "rounding": "stochastic", "verify": False},
    "16-bit": {"save_method": "merged_16bit", "verify": False},
    "all": {
        "save_method": ["merged_4bit", "merged_16bit", "lora"],
        "rounding": "nearest",
        "verify": False,
    },
}
SETTINGS["all, verified"] = SETTINGS["all"] | {"verify": True}
COPIES = {"copy 4-bit": "4-bit, nearest", "copy 16-bit": "16-bit"}
CONTENDERS = (*SETTINGS, "PEFT 4-bit", "PEFT 16-bit", *COPIES)
ONCE = "all, verified"  # in no ratio, and the longest
GROWTH = ("4-bit, nearest", "16-bit", "PEFT 4-bit")
# (what, against the slowest of what, at most): ratios of wall times
GOALS = (
    ("4-bit, nearest", ("PEFT 4-bit",), 0.5),
    ("all", ("16-bit", "4-bit, nearest"), 1.2),
    ("16-bit", ("copy 16-bit",), 1.5),
)
COPIES_IN_MEMORY, ROOM = 3, 64  # float32 copies of the largest weight that is merged, and MiB


def make_base(path, hidden, intermediate, layers, vocabulary):
    """Save a random base in 4 bits, as a hub has them, and what it was made of beside it."""
    import torch
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
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    LlamaForCausalLM(config).save_pretrained(f"{path}-16bit")
    model = AutoModelForCausalLM.from_pretrained(
        f"{path}-16bit", quantization_config=BitsAndBytesConfig(**FORMAT), dtype=torch.bfloat16
    )
    model.save_pretrained(path)


def live_model(path, *, quantise, dtype="bfloat16"):
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    from merge_callback.live import keep_cpu_weights_unpacked

    device = "cuda" if torch.cuda.is_available() else "cpu"
    settings = {"dtype": getattr(torch, dtype), "device_map": device}
    if quantise:
        path, settings["quantization_config"] = f"{path}-16bit", BitsAndBytesConfig(**FORMAT)
    model = AutoModelForCausalLM.from_pretrained(path, **settings)
    for module in model.modules():
        if hasattr(module, "compute_dtype"):
            module.compute_dtype = settings["dtype"]
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(settings["dtype"])
    keep_cpu_weights_unpacked(model)
    torch.manual_seed(1)
    lora = LoraConfig(r=16, target_modules="all-linear", init_lora_weights=False)
    return get_peft_model(model, lora).eval()


def sync(root):
    for path in [*root.rglob("*"), root]:
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def work(contender, model, source, target):
    """Make what is measured."""
    if contender in COPIES:
        subprocess.run(["cp", "-r", source, target], check=True)
        sync(target)
    elif contender in SETTINGS:
        from merge_callback import merge_adapter

        merge_adapter(model, target, progress=False, **SETTINGS[contender])
    else:
        from peft import PeftModel

        if contender == "PEFT 16-bit":
            model.save_pretrained(f"{target}-adapter")
            base = model.unload()
            base.dequantize()
            model = PeftModel.from_pretrained(base, f"{target}-adapter")
            shutil.rmtree(f"{target}-adapter")
        merged = model.merge_and_unload()
        merged.save_pretrained(target)
        sync(target)


def resident(key):
    """MiB, from /proc/self/status."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1]) / 1024
    raise KeyError(key)


def measure(contender, base, source, target):
    import ctypes

    model = device_before = None
    if contender not in COPIES:
        import warnings

        import torch

        import merge_callback  # noqa: F401, its import is start-up, not merge

        warnings.simplefilter("ignore")
        # transformers 5.23 cannot save what PEFT merged where the base was loaded in 4 bits.
        model = live_model(base, quantise=contender.startswith("PEFT"))
        for tensor in [*model.parameters(), *model.buffers()]:
            tensor.detach().reshape(-1).view(torch.uint8).sum()  # bring mapped files into memory
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
            device_before = torch.cuda.memory_allocated()
    os.sync()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    wall, times = time.perf_counter(), os.times()
    work(contender, model, source, target)
    wall, ended = time.perf_counter() - wall, os.times()
    row = {
        "wall": wall,
        "cpu": sum(ended[:4]) - sum(times[:4]),
        "memory": resident("VmHWM") - before,
        "bytes": sum(path.stat().st_size for path in target.rglob("*") if path.is_file()),
    }
    if device_before is not None:
        row["device"] = (torch.cuda.max_memory_allocated() - device_before) / MIB
    return row


def profile(contender, base, target):
    """What torch does in a merge, in seconds summed over its threads, the costliest first."""
    import torch
    from torch._C._profiler import _ExperimentalConfig

    model = live_model(base, quantise=False)
    work(contender, model, None, target.with_name("warm"))
    activity = [torch.profiler.ProfilerActivity.CPU]
    everywhere = _ExperimentalConfig(profile_all_threads=True)
    times, began = os.times(), time.perf_counter()
    with torch.profiler.profile(activities=activity, experimental_config=everywhere) as found:
        work(contender, model, None, target)
        wall, ended = time.perf_counter() - began, os.times()
    rows = [(e.key, e.self_cpu_time_total / 1e6, e.count) for e in found.key_averages()]
    rows = [row for row in rows if not row[0].startswith("[")]
    cpu, torches = sum(ended[:4]) - sum(times[:4]), sum(row[1] for row in rows)
    print(
        f"{contender}: {wall:.1f} s, {cpu:.1f} CPU seconds; operations of torch {torches:.1f} s\n"
    )
    print("| operation | s | of torch's | calls |\n|---|---|---|---|")
    for key, seconds, count in sorted(rows, key=lambda row: -row[1])[:8]:
        print(f"| {key} | {seconds:.2f} | {seconds / torches:.0%} | {count} |")


def in_process(*arguments):
    command = [sys.executable, __file__, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed: {done.stderr}")
    return done.stdout.splitlines()[-1]


def run(models, repeats, root, contenders=CONTENDERS):
    """model -> contender -> rows."""
    found = {}
    for name in models:
        base = root / name
        in_process("--make", name, base)
        rows = found[name] = {contender: [] for contender in contenders}
        kept = {}
        for repeat in range(repeats):
            for contender in contenders:
                if contender == ONCE and repeat:
                    continue
                target = root / "target"
                source = kept.get(COPIES.get(contender), root)
                row = json.loads(in_process("--one", contender, base, source, target))
                rows[contender].append(row)
                print(name, repeat + 1, contender, f"{row['wall']:.2f} s", flush=True)
                if contender in COPIES.values() and contender not in kept:
                    kept[contender] = target.rename(root / f"kept-{contender}".replace(",", ""))
                else:
                    shutil.rmtree(target)
        for path in (base, f"{base}-16bit", *kept.values()):
            shutil.rmtree(path)
    return found


def median(rows, key):
    return statistics.median(row[key] for row in rows)


def ratio(rows, one, others):
    """Median of the ratios of one round, and the lowest and highest of them."""
    rounds = zip(*(rows[other] for other in others), strict=True)
    slowest = [max(row["wall"] for row in same) for same in rounds]
    pairs = [a["wall"] / b for a, b in zip(rows[one], slowest, strict=True)]
    return statistics.median(pairs), min(pairs), max(pairs)


def parameters(name):
    """Of a model, embeddings once."""
    hidden, intermediate, layers, vocabulary = MODELS[name]
    return layers * (4 * hidden * hidden + 3 * hidden * intermediate) + vocabulary * hidden


def allowed(name):
    """MiB that a merge may take beyond the live model."""
    hidden, intermediate, *_ = MODELS[name]
    return COPIES_IN_MEMORY * 4 * hidden * intermediate / MIB + ROOM


def plot(found, path):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axis = figure.subplots()
    sizes = [parameters(name) / 1e9 for name in found]
    for contender in GROWTH:
        memory = [median(rows[contender], "memory") for rows in found.values()]
        axis.plot(sizes, memory, marker="o", label=contender)
    axis.plot(sizes, [allowed(name) for name in found], "k:", label="3 copies of the largest, +64")
    axis.set(xlabel="parameters, billions", ylabel="MiB beyond the live model", yscale="log")
    axis.legend()
    axis.grid(alpha=0.3)
    figure.savefig(path, dpi=110)


def report(found, repeats):
    libraries = ("torch", "transformers", "peft", "bitsandbytes")
    versions = ", ".join(f"{name} {version(name)}" for name in libraries)
    lines = [
        f"Medians of {repeats}, on {machine()} with {versions}. Memory is beyond the live model.",
    ]
    for name, rows in found.items():
        lines += ["", f"### {name}", "", "| | wall, s | CPU, s | memory, MiB | written, MB |"]
        lines.append("|---|---|---|---|---|")
        for contender, measured in rows.items():
            spread = [row["wall"] for row in measured]
            lines.append(
                f"| {contender} | {median(measured, 'wall'):.2f} "
                f"({min(spread):.2f} to {max(spread):.2f}) | {median(measured, 'cpu'):.2f} "
                f"| {median(measured, 'memory'):.0f} | {median(measured, 'bytes') / 1e6:.0f} |"
            )
        lines += ["", "| | against | ratio of wall times | goal |", "|---|---|---|---|"]
        for one, others, goal in GOALS if rows.keys() >= set(CONTENDERS) else ():
            middle, low, high = ratio(rows, one, others)
            other = " or ".join(others)
            lines.append(f"| {one} | {other} | {middle:.2f} ({low:.2f} to {high:.2f}) | {goal} |")
    return "\n".join(lines) + "\n"


def machine():
    cpu = next(
        line.split(":")[1].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    )
    return f"{os.cpu_count()} cores of {cpu}, {platform.system()}"


def missed(found):
    for name, rows in found.items():
        for one, others, goal in GOALS if rows.keys() >= set(CONTENDERS) else ():
            if (taken := ratio(rows, one, others)[0]) > goal:
                yield f"{name}: {one} takes {taken:.2f} of {' or '.join(others)}, goal {goal}"
        for contender in rows.keys() & SETTINGS.keys() - {ONCE}:
            if (memory := median(rows[contender], "memory")) > allowed(name):
                yield f"{name}: {contender} takes {memory:.0f} MiB, goal {allowed(name):.0f}"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=["135M", "0.5B", "1.1B"])
    parser.add_argument("--large", choices=MODELS, help="for memory alone, e.g. 3B")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path, help="directory for performance.json and .png")
    parser.add_argument("--profile", choices=MODELS, help="tell what torch computes, and no more")
    parser.add_argument("--make", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--one", nargs=4, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.make:
        make_base(arguments.make[1], *MODELS[arguments.make[0]])
        print("made")
    elif arguments.one:
        contender, *paths = arguments.one
        print(json.dumps(measure(contender, *map(Path, paths))))
    elif arguments.profile:
        with tempfile.TemporaryDirectory() as root:
            base = Path(root) / "base"
            in_process("--make", arguments.profile, base)
            for contender in ("4-bit, nearest", "4-bit", "16-bit"):
                profile(contender, base, Path(root) / contender.replace(", ", "-"))
    else:
        with tempfile.TemporaryDirectory() as root:
            found = run(arguments.models, arguments.repeats, Path(root))
            if arguments.large:
                found |= run([arguments.large], 1, Path(root), GROWTH)
        print(report(found, arguments.repeats))
        if arguments.output:
            (arguments.output / "performance.json").write_text(json.dumps(found, indent=1))
            plot(found, arguments.output / "performance.png")
        if told := list(missed(found)):
            sys.exit("\n".join(told))


if __name__ == "__main__":
    main()
