"""Run by test_distributed in two processes that torchrun starts.

python distributed_child.py MODE ROOT, with a base in ROOT/base. The leader prints one JSON line.
"""

import json
import os
import sys
import time
from pathlib import Path

import models
import torch
import torch.distributed as dist

models.save_base = lambda path, **settings: path  # the test has made it, once for both

from models import adapt, qlora, tokenizer
from peft import LoraConfig, get_peft_model
from test_callback import listing, sft, trainer
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from merge_callback import MergeError, MergeOnSaveCallback, MergeStore, merge_adapter
from merge_callback.data import Data
from merge_callback.export import check_merge, export
from merge_callback.live import keep_cpu_weights_unpacked
from merge_callback.options import MergeOptions
from merge_callback.processes import Processes

RANK = int(os.environ["RANK"])
CPU = torch.device("cpu")
METHODS = ["merged_4bit", "merged_16bit", "lora"]


def weights(root, name):
    """sha256 of the weight files of a version; the others have the time in them."""
    files = MergeStore(root).version(name).manifest["files"]
    return {p: file["sha256"] for p, file in files.items() if p.endswith(".safetensors")}


def gathered(value):
    told = [None, None]
    dist.all_gather_object(told, value)
    return told


def ddp(root, make):
    """Train on two processes, merging at each save; then merge the same model in one."""
    settings = {"save_method": METHODS, "rounding": "stochastic"}
    callback = MergeOnSaveCallback(merge_on_save=True, **settings)
    run = make(root, callback, max_steps=4, save_strategy="steps", save_steps=2)
    run.train()
    assert type(run.model_wrapped).__name__ == "DistributedDataParallel"
    logged = [entry["step"] for entry in run.state.log_history if "merge/seconds" in entry]
    told = gathered([[result.version for result in callback.results], logged])
    if RANK:
        return None
    settings |= {"processing_class": tokenizer(), "name": "step-00000004", "progress": False}
    merge_adapter(run.model, root / "alone", **settings)
    return {
        "told": told,
        "listing": listing(root),
        "together": weights(root / "run" / "_merged", "step-00000004"),
        "alone": weights(root / "alone", "step-00000004"),
    }


def outcome(run):
    """How a training ended, and how long that took."""
    start = time.monotonic()
    try:
        run.train()
        said = "trained"
    except (MergeError, OSError) as error:
        said = f"{type(error).__name__}: {error}"
    return [said, run.state.global_step, time.monotonic() - start < 60]


def failing(root, where):
    """Let one process alone fail, at the start or in a merge."""
    told = {}
    for rank in (0, 1):
        callback = MergeOnSaveCallback(rounding="nearest", verify=False)
        run = trainer(root / str(rank), callback, max_steps=2, model=qlora(root))
        if RANK == rank:
            broken = "_begin" if where == "start" else "_data_for"

            def fail(*args, broken=broken):
                raise OSError(f"no {broken} here")

            setattr(callback, broken, fail)
        told[rank] = gathered(outcome(run))
        told[f"{rank} left"] = listing(root / str(rank))
    return told if RANK == 0 else None


def warned(root):
    """A merge that fails in one process while on_error='warn' lets training go on."""
    callback = MergeOnSaveCallback(merge_on_save=True, rounding="nearest", on_error="warn")
    settings = {"save_strategy": "steps", "save_steps": 2}
    run = trainer(root, callback, max_steps=4, model=qlora(root), **settings)
    merge = callback._merge

    def fail_once(moment):
        if RANK == 1 and moment.state.global_step == 2:
            callback._data_for, kept = None, callback._data_for
            try:
                merge(moment)
            finally:
                callback._data_for = kept
        else:
            merge(moment)

    callback._merge = fail_once
    told = gathered([outcome(run), [failure.step for failure in callback.failures]])
    return {"told": told, "listing": listing(root)} if RANK == 0 else None


def calibrated(root):
    """Calibrate on two processes, and in one with all data, with half of it, and with none."""
    dist.barrier()
    model = qlora(root, scale=0.1)
    generator = torch.Generator().manual_seed(7)
    batches = [{"input_ids": torch.randint(0, 300, (2, 64), generator=generator)} for _ in range(8)]
    options = MergeOptions(rounding="calibrated", progress=False, verify=False)

    def merge(name, data, **settings):
        store = MergeStore(root / name)
        plan = check_merge(model, store, options)
        export(plan, store, options, name="merged", data=Data(training=data), **settings)

    merge("together", batches, processes=Processes(60))
    if RANK:
        return None
    merge("alone", batches)
    merge("half", batches[::2])
    manifest = MergeStore(root / "together").version("merged").manifest
    return {"tokens": manifest["calibration"]["tokens"]}


def fsdp2(root, quantised):
    """Shard a model over both processes and merge it; then merge the same model in one."""
    path = root / "base"
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
        bnb_4bit_quant_storage=torch.bfloat16,
    )

    def make():
        settings = {"quantization_config": config} if quantised else {}
        model = adapt(AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16, **settings))
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.to(torch.bfloat16)
        keep_cpu_weights_unpacked(model)
        return model

    methods = METHODS if quantised else ["merged_16bit", "lora"]
    model = make()
    mesh = init_device_mesh("cpu", (2,))
    for layer in model.get_base_model().model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    inputs = torch.arange(32).reshape(2, 16)
    model(input_ids=inputs, labels=inputs).loss.backward()
    local = {n: p._local_tensor.clone() for n, p in model.named_parameters()}
    settings = {"save_method": methods, "rounding": "auto", "progress": False}
    result = merge_adapter(model, root / "together", processing_class=tokenizer(), **settings)
    kept = all(
        torch.equal(local[n].view(torch.int16), p._local_tensor.view(torch.int16))  # NaNs too
        for n, p in model.named_parameters()
    )
    model(input_ids=inputs, labels=inputs).loss.backward()
    told = gathered([result.version, kept])
    if RANK:
        return None
    merge_adapter(make(), root / "alone", processing_class=tokenizer(), **settings)
    return {
        "told": told,
        "together": weights(root / "together", "merged"),
        "alone": weights(root / "alone", "merged"),
    }


def refused(root):
    """What is said of engines that are not merged."""
    from torch.distributed.fsdp import FullyShardedDataParallel

    plain = AutoModelForCausalLM.from_pretrained(root / "base", dtype=torch.float32)
    parallel = AutoModelForCausalLM.from_pretrained(root / "base", tp_plan="auto")
    lora = LoraConfig(r=4, target_modules="all-linear")
    fsdp1 = FullyShardedDataParallel(adapt(plain), use_orig_params=True, device_id=CPU)
    zero3 = adapt(AutoModelForCausalLM.from_pretrained(root / "base"))
    for parameter in zero3.parameters():  # what DeepSpeed marks them with
        parameter.ds_id = 0
    told = {}
    for name, model in (
        ("tensor parallel", get_peft_model(parallel, lora)),
        ("FSDP1", fsdp1),
        ("ZeRO-3", zero3),
    ):
        try:
            merge_adapter(model, root / "refused", save_method="merged_16bit")
        except MergeError as error:
            told[name] = gathered(str(error))
    return told if RANK == 0 else None


MODES = {
    "refused": refused,
    "trainer": lambda root: ddp(root, trainer),
    "sft": lambda root: ddp(root, sft),
    "start": lambda root: failing(root, "start"),
    "merge": lambda root: failing(root, "merge"),
    "warn": warned,
    "calibrated": calibrated,
    "fsdp2-nf4": lambda root: fsdp2(root, True),
    "fsdp2-bf16": lambda root: fsdp2(root, False),
}

if __name__ == "__main__":
    torch.set_num_threads(1)
    mode, root = sys.argv[1], Path(sys.argv[2])
    if mode in (
        "fsdp2-nf4",
        "fsdp2-bf16",
        "calibrated",
        "refused",
    ):  # a trainer starts it by itself
        dist.init_process_group("gloo")
    found = MODES[mode](root)
    if found is not None:
        print(json.dumps(found), flush=True)
    dist.destroy_process_group()
