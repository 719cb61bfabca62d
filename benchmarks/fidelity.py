"""How much of what was trained is left after each way to merge into 4 bits?

    python benchmarks/fidelity.py [--adapter DIR] [--tokens FILE]
        [--train all|attention|dora --steps N --rate R]
        [--quant-type nf4|fp4] [--single] [--rungs peft,...] [--output DIR]

SmolLM2-135M-Instruct in NF4 with double quantisation (--single: without), and a LoRA adapter: one
that is given, or one that is trained here on `calibration`. TOKENS: a safetensors file with
`calibration` and `heldout`, (sequences, length) each; without it, Python's own help texts are used.
Each rung is merged, loaded by stock transformers, and scored on `heldout` alone, in float32:

    gain kept = (loss(base) - loss(merged)) / (loss(base) - loss(live)),    KL(live || merged)

Rungs: `peft` (merge_and_unload), `requantised` (16-bit merge of the original base, then
load_in_4bit, the Unsloth recipe), `nearest`, `stochastic`, and `calibrated:N`, `tuned:N` with N
sequences. `live` and `base` are always there. Writes fidelity.md, fidelity.json and fidelity.png.
"""

import argparse
import datetime
import importlib.metadata
import json
import os
import pydoc_data.topics
import resource
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from quickstart import save_base
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from merge_callback import merge_adapter
from merge_callback.live import keep_cpu_weights_unpacked

RUNGS = "peft,requantised,nearest,stochastic,calibrated:64,tuned:256"
KINDS = {
    "all": {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"},
    "attention": {
        "r": 4,
        "lora_alpha": 8,
        "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"],
    },
    "dora": {"r": 16, "lora_alpha": 32, "target_modules": "all-linear", "use_dora": True},
}
LIBRARIES = ("torch", "transformers", "peft", "bitsandbytes", "merge_callback")


FORMAT = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}


def four_bit(dtype):
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=dtype, **FORMAT)


def load_base(path, dtype=torch.bfloat16):
    config = four_bit(dtype)
    model = AutoModelForCausalLM.from_pretrained(path, quantization_config=config, dtype=dtype)
    keep_cpu_weights_unpacked(model)
    return model


def load_live(base, adapter, dtype=torch.bfloat16):
    return PeftModel.from_pretrained(load_base(base, dtype), adapter).eval()


def load_merged(path, **settings):
    """What stock transformers makes of a directory, computing in float32."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, **settings).eval()
    keep_cpu_weights_unpacked(model)
    for module in model.modules():
        if hasattr(module, "compute_dtype"):
            module.compute_dtype = torch.float32
    return model


def help_texts(base):
    """Python's help topics as tokens."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    topics = sorted(pydoc_data.topics.topics.items())
    ids = tokenizer("\n\n".join(text for _, text in topics))["input_ids"]
    rows = torch.tensor(ids[: len(ids) // 256 * 256]).view(-1, 256)
    rows = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))]
    return {"calibration": rows[32:288], "heldout": rows[:32]}


def train(base, kind, rows, output, steps, rate):
    """An adapter of one kind, trained on `rows`."""
    torch.manual_seed(0)
    model = load_base(base)
    model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **KINDS[kind])).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=0.0)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1, (step + 1) / 10) * (1 - step / steps)
        batch = rows[torch.randint(0, len(rows), (4,))]
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % 20 == 0:
            print(f"step {step + 1}: loss {loss.item():.3f}", flush=True)
    model.save_pretrained(output)


@torch.no_grad()
def hidden_states(model, rows):
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    parts = [base.model(input_ids=part, use_cache=False)[0] for part in rows.split(8)]
    return torch.cat(parts).float()


@torch.no_grad()
def score(hidden, live, rows, head):
    """Loss, and KL(live || this), in nats per token."""
    loss = divergence = 0.0
    for mine, theirs, ids in zip(hidden, live, rows, strict=True):
        mine, theirs = (torch.log_softmax(h[:-1] @ head.t(), -1) for h in (mine, theirs))
        loss -= mine.gather(1, ids[1:, None]).sum().item()
        divergence += (theirs.exp() * (theirs - mine)).sum().item()
    count = rows.numel() - len(rows)
    return loss / count, divergence / count


def pick(rows, count):
    """The same sequences each time, in batches of 4."""
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))[:count]
    return [{"input_ids": part} for part in rows[order].split(4)]


def merge(rung, base, adapter, rows, work):
    """One rung: a model to score, what it takes on the disk, and what else is known of it."""
    method, _, count = rung.partition(":")
    if method == "peft":
        return load_live(base, adapter, torch.float32).merge_and_unload(), {}
    model = load_live(base, adapter)
    if method == "requantised":
        settings = {"save_method": "merged_16bit", "base": "original", "verify": False}
        path = merge_adapter(model, work, progress=False, name=method, **settings).path
        return load_merged(path, quantization_config=four_bit(torch.float32)), {}
    data = pick(rows, int(count)) if count else None
    result = merge_adapter(
        model,
        work,
        rounding=method,
        calibration_data=data,
        name=method,
        verify=False,  # scored here, and no data kept apart for it
        progress=False,
    )
    size = sum(f.stat().st_size for f in result.path.glob("*.safetensors"))
    calibration = result.manifest["calibration"]
    retention = result.manifest["retention"]["merged_4bit"]["overall"]
    return load_merged(result.path), {"MB": size / 1e6, "retention": retention} | (
        {"calibration": calibration} if calibration else {}
    )


def table(rows):
    lines = [
        "| rounding | seconds | loss | gain kept | KL | MB | peak RSS, GiB |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        size = f"{row['MB']:.1f}" if "MB" in row else ""
        lines.append(
            f"| {row['rung']} | {row['seconds']:.0f} | {row['loss']:.4f} | "
            f"{100 * row['gain']:.2f} % | {row['KL']:.5f} | {size} | {row['GiB']:.1f} |"
        )
    return "\n".join(lines)


def plot(rows, path):
    try:
        import matplotlib
    except ImportError:
        print("no plot: matplotlib is not installed")
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(10, 4), sharey=True)
    shown = [row for row in rows if row["rung"] not in ("live", "base")]
    for row in shown:
        tokens = row.get("calibration", {}).get("tokens", 0)
        for axis, x in zip(axes, (row["seconds"], tokens), strict=True):
            axis.plot(x, 100 * row["gain"], "o")
            axis.annotate(row["rung"], (x, 100 * row["gain"]), fontsize=7)
    axes[0].set(xlabel="seconds", ylabel="gain kept, %", xscale="symlog")
    axes[1].set(xlabel="calibration tokens", xscale="symlog")
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--base", type=Path)
    parser.add_argument("--adapter", type=Path)
    parser.add_argument("--tokens", type=Path)
    parser.add_argument("--train", choices=KINDS, default="all")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--rate", type=float, default=2e-4)
    parser.add_argument("--quant-type", choices=["nf4", "fp4"], default="nf4")
    parser.add_argument("--single", action="store_true", help="no double quantisation")
    parser.add_argument("--rungs", default=RUNGS)
    parser.add_argument("--output", type=Path, default=Path("fidelity-output"))
    options = parser.parse_args()
    FORMAT["bnb_4bit_quant_type"] = options.quant_type
    FORMAT["bnb_4bit_use_double_quant"] = not options.single
    options.output.mkdir(exist_ok=True, parents=True)
    base = options.base or options.output / "base"
    if not (base / "config.json").exists():
        save_base(base)
    tokens = load_file(options.tokens) if options.tokens else help_texts(base)
    tokens = {name: rows.long() for name, rows in tokens.items()}
    adapter = options.adapter
    if adapter is None:
        adapter = options.output / f"adapter-{options.train}-{options.rate:g}"
        if not adapter.exists():
            rows = tokens["calibration"]
            train(base, options.train, rows, adapter, options.steps, options.rate)
    held = tokens["heldout"]
    model = load_live(base, adapter, torch.float32)
    head = model.get_output_embeddings().weight.detach().float()
    live = hidden_states(model, held)
    loss_live, _ = score(live, live, held, head)
    with model.disable_adapter():
        loss_base, divergence = score(hidden_states(model, held), live, held, head)
    del model

    def row(rung, loss, divergence, seconds=0.0, **more):
        gain = (loss_base - loss) / (loss_base - loss_live)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        found = {"rung": rung, "seconds": seconds, "loss": loss, "gain": gain, "KL": divergence}
        return found | {"GiB": peak} | more

    rows = [row("live", loss_live, 0.0), row("base", loss_base, divergence)]
    print(table(rows), flush=True)
    for rung in options.rungs.split(","):
        with tempfile.TemporaryDirectory(dir=options.output) as work:
            start = time.monotonic()
            model, more = merge(rung, base, adapter, tokens["calibration"], work)
            seconds = time.monotonic() - start
            found = score(hidden_states(model, held), live, held, head)
            del model
        rows.append(row(rung, *found, seconds, **more))
        print(table(rows[-1:]).splitlines()[-1], more.get("calibration", ""), flush=True)
    versions = {name: importlib.metadata.version(name) for name in LIBRARIES}
    about = {
        "date": datetime.date.today().isoformat(),
        "threads": torch.get_num_threads(),
        "format": FORMAT,
        "versions": versions,
        "rows": rows,
    }
    (options.output / "fidelity.json").write_text(json.dumps(about, indent=2) + "\n")
    told = ", ".join(f"{name} {version}" for name, version in versions.items())
    text = f"{table(rows)}\n\n{about['date']}, {about['threads']} threads, {told}\n"
    (options.output / "fidelity.md").write_text(text)
    plot(rows, options.output / "fidelity.png")
    print(text)


if __name__ == "__main__":
    main()
