"""Run by test_distributed in two processes that torchrun starts.

python distributed_child.py MODE ROOT, with a base in ROOT/base. The leader writes ROOT/told.json.
"""

import json
import os
import sys
import time
from functools import partial
from pathlib import Path

import models
import torch
import torch.distributed as dist

models.save_base = lambda path, **settings: path  # the test has made it, once for both

from models import adapt, qlora, same, tokenizer
from peft import LoraConfig, get_peft_model
from peft.utils.other import fsdp_auto_wrap_policy
from test_callback import COMMON, data, listing, sft, trainer
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    apply_activation_checkpointing,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
)

import merge_callback.behind
from merge_callback import MergeError, MergeOnSaveCallback, MergeStore, merge_adapter
from merge_callback.data import Data
from merge_callback.export import check_merge, export
from merge_callback.host_memory import return_freed_memory
from merge_callback.live import keep_cpu_weights_unpacked
from merge_callback.options import MergeOptions
from merge_callback.processes import Processes

RANK = int(os.environ["RANK"])
CPU = torch.device("cpu")
METHODS = ["merged_4bit", "merged_16bit", "lora"]


def weights(root, name):
    """sha256 of weight files and configs of a version; others have the time in them."""
    files = MergeStore(root).version(name).manifest["files"]
    kept = (".safetensors", "/config.json", "adapter_config.json")
    return {p: file["sha256"] for p, file in files.items() if p.endswith(kept)}


def gathered(value):
    told = [None, None]
    dist.all_gather_object(told, value)
    return told


def threads():
    """How many threads of gloo there are, which free what was exchanged."""
    names = [task.read_text().strip() for task in Path("/proc/self/task").glob("*/comm")]
    return sum("gloo" in name for name in names)


def ddp(root, make, **behind):
    """Train on two processes, merging at each save; then merge the same model in one."""
    settings = {"save_method": METHODS, "rounding": "stochastic"}
    callback = MergeOnSaveCallback(merge_on_save=True, **settings, **behind)
    run = make(root, callback, max_steps=4, save_strategy="steps", save_steps=2)
    before = threads()
    run.train()
    assert threads() == before > 0  # one that frees as the interpreter ends aborts it
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


def nodes(root):
    """Train on two nodes, each of which saves on a disk of its own."""
    callback = MergeOnSaveCallback(rounding="nearest", verify=False, keep_last=1)
    settings = {"max_steps": 2, "save_strategy": "steps", "save_steps": 2}
    settings |= {"save_on_each_node": True, "model": qlora(root)}
    run = trainer(root / str(RANK), callback, **settings)
    run.train()
    saved = (root / str(RANK) / "run" / "checkpoint-2").is_dir()
    told = gathered([run.args.should_save, saved, listing(root / str(RANK))])
    return {"told": told}


def outcome(run):
    """How a training ended, and how long that took."""
    start = time.monotonic()
    try:
        run.train()
        said = "trained"
    except (MergeError, OSError) as error:
        said = f"{type(error).__name__}: {error}"
    return [said, run.state.global_step, time.monotonic() - start < 60]


def failing_behind(root):
    """A merge behind the training fails, in the one process that makes it."""

    def fails(*args, **settings):
        raise MergeError("the disk is full")

    merge_callback.behind.export_snapshot = fails
    callback = MergeOnSaveCallback(merge_on_save=True, blocking=False, rounding="stochastic")
    settings = {"save_strategy": "steps", "save_steps": 2, "max_steps": 6}
    told = gathered(outcome(trainer(root, callback, **settings)))
    return {"told": told, "listing": listing(root)}


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
    return told


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
    return {"told": told, "listing": listing(root)}


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


def fsdp2(model, *, leaves=False):
    """By layers, as accelerate does; or down to single layers, and the model below PEFT's too."""
    mesh = init_device_mesh("cpu", (2,))
    base = model.get_base_model()
    for layer in base.model.layers:
        if leaves:
            linear = layer.mlp.up_proj
            fully_shard(getattr(linear, "base_layer", linear), mesh=mesh)
            fully_shard(layer.self_attn.q_proj, mesh=mesh)
        fully_shard(layer, mesh=mesh)
    if leaves:
        fully_shard(base, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def fsdp1(model, *, original):
    """As accelerate wraps it: with flat parameters alone by PEFT's policy, or beside originals."""
    layer = type(model.get_base_model().model.layers[0])
    policy = ModuleWrapPolicy({layer}) if original else fsdp_auto_wrap_policy(model)
    settings = {"use_orig_params": original, "device_id": CPU, "auto_wrap_policy": policy}
    wrapped = FullyShardedDataParallel(model, **settings)
    if original:
        apply_activation_checkpointing(wrapped, check_fn=lambda module: isinstance(module, layer))
    return wrapped


def zero3(model):
    import deepspeed

    settings = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 1000},
        "bf16": {"enabled": True},
    }
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.0)
    settings |= {"zero_allow_untested_optimizer": True}
    return deepspeed.initialize(model=model, optimizer=optimizer, config=settings)[0]


def zero3_trainer(root, quantised):
    """A Trainer on DeepSpeed's engine, which the model is partitioned by from its loading on."""
    settings = {
        "train_micro_batch_size_per_gpu": "auto",
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
        "bf16": {"enabled": True},
        "zero_allow_untested_optimizer": True,
    }
    saves = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1, "learning_rate": 1e-2}
    args = TrainingArguments(str(root / "run"), deepspeed=settings, bf16=True, **COMMON | saves)
    callback = MergeOnSaveCallback(merge_on_save=True, save_method=["merged_16bit", "lora"])
    run = Trainer(
        model=bf16_model(root, quantised=quantised, resized=False),
        args=args,
        train_dataset=data(),
        processing_class=tokenizer(),
        callbacks=[callback],
    )
    run.train()
    assert type(run.model_wrapped).__name__ == "DeepSpeedEngine"
    told = gathered([result.version for result in callback.results])
    files = weights(root / "run" / "_merged", "step-00000002")
    return {"told": told, "files": files}


ENGINES = {
    "fsdp2": fsdp2,
    "fsdp2-leaves": partial(fsdp2, leaves=True),
    "fsdp1": lambda model: fsdp1(model, original=True),
    "fsdp1-flat": lambda model: fsdp1(model, original=False),
    "zero3": zero3,
}


def parts(model):
    """What this process holds of the parameters, in bits, and of which types these are."""
    found = {}
    for name, parameter in model.named_parameters():
        tensor = getattr(parameter, "ds_tensor", parameter)
        tensor = getattr(tensor, "_local_tensor", tensor)
        if tensor.untyped_storage().size():  # FSDP1 leaves freed views of Params4bit behind
            bits = tensor.detach().view(torch.int16).clone()  # NaNs too
            status = str(getattr(parameter, "ds_status", ""))
            found[name] = (type(parameter), id(parameter), status, bits)
    return found


ADAPTERS = {
    "lora": {},
    "dora": {"use_dora": True},
    "tokens": {"trainable_token_indices": [3, 7]},
    "embeddings": {"target_modules": ["embed_tokens", "q_proj"]},
    "head": {"modules_to_save": ["lm_head"]},
}


def bf16_model(root, *, quantised, adapter="lora", resized=True):
    """All of whose parameters are bfloat16, as engines want them, with an adapter."""
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
        bnb_4bit_quant_storage=torch.bfloat16,
    )
    settings = {"dtype": torch.bfloat16} | ({"quantization_config": config} if quantised else {})
    base = AutoModelForCausalLM.from_pretrained(root / "base", **settings)
    if resized:
        torch.manual_seed(0)
        base.resize_token_embeddings(306)  # PEFT saves them then
    model = adapt(base, **ADAPTERS[adapter])
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch.bfloat16)
    keep_cpu_weights_unpacked(model)
    return model


def sharded(root, engine, quantised, adapter="lora"):
    """Shard a model over both processes and merge it; then merge the same model in one."""
    methods = METHODS if quantised or "leaves" in engine else ["merged_16bit", "lora"]
    model = ENGINES[engine](bf16_model(root, quantised=quantised, adapter=adapter))
    inputs = torch.arange(32).reshape(2, 16)

    def step():
        loss = model(input_ids=inputs, labels=inputs).loss
        getattr(model, "backward", torch.Tensor.backward)(loss)
        return loss.item()

    before = step()
    held, modules = parts(model), dict(model.named_modules())
    attributes = {(n, a) for n, module in modules.items() for a in vars(module)}
    settings = {"save_method": methods, "rounding": "auto", "progress": False}
    talking = threads()
    result = merge_adapter(model, root / "together", processing_class=tokenizer(), **settings)
    assert threads() == talking > 0
    kept = same(held, parts(model)) and modules == dict(model.named_modules())
    kept &= attributes <= {(n, a) for n, module in modules.items() for a in vars(module)}
    told = gathered([result.version, kept and step() == before])
    if RANK:
        return None
    alone = bf16_model(root, quantised=quantised, adapter=adapter)
    merge_adapter(alone, root / "alone", processing_class=tokenizer(), **settings)
    return {
        "told": told,
        "together": weights(root / "together", "merged"),
        "alone": weights(root / "alone", "merged"),
    }


def memory(root, engine):
    """How far resident memory grows while a sharded model is merged, in MiB."""
    config = LlamaConfig(
        hidden_size=512,
        intermediate_size=2048,
        num_hidden_layers=12,
        num_attention_heads=8,
        num_key_value_heads=8,
        vocab_size=304,
        dtype="bfloat16",
    )
    model = adapt(LlamaForCausalLM(config).to(torch.bfloat16))
    size = sum(parameter.nbytes for parameter in model.parameters())
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.bfloat16)
    model = ENGINES[engine](model)
    settings = {"save_method": "merged_16bit", "verify": False, "progress": False}
    for name in ("warm-up", "measured"):
        return_freed_memory()
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak
        before = resident("VmRSS")
        merge_adapter(model, root / "versions", name=name, **settings)
    grown = gathered(resident("VmHWM") - before)
    return {"grown": grown, "model": size / 2**20}


def resident(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key)) / 1024


def refused(root):
    """What is said of models that are not merged."""
    parallel = AutoModelForCausalLM.from_pretrained(root / "base", tp_plan="auto")
    lora = LoraConfig(r=4, target_modules="all-linear")
    whole = adapt(AutoModelForCausalLM.from_pretrained(root / "base", dtype=torch.float32))
    told = {}
    for name, model in (
        ("tensor parallel", get_peft_model(parallel, lora)),
        ("whole wrapped model", fsdp1(whole, original=True).module),
    ):
        try:
            merge_adapter(model, root / "refused", save_method="merged_16bit")
        except MergeError as error:
            told[name] = gathered(str(error))
    return told


MODES = {
    "refused": refused,
    "trainer": lambda root: ddp(root, trainer),
    "sft": lambda root: ddp(root, sft),
    "nodes": nodes,
    "behind": lambda root: ddp(root, trainer, blocking=False),
    "behind-fails": failing_behind,
    "start": lambda root: failing(root, "start"),
    "merge": lambda root: failing(root, "merge"),
    "warn": warned,
    "calibrated": calibrated,
}
MODES |= {
    f"{engine}-{base}": partial(sharded, engine=engine, quantised=base == "nf4")
    for engine in ENGINES
    for base in ("nf4", "bf16")
}
MODES |= {
    f"{engine}-bf16-{adapter}": partial(sharded, engine=engine, quantised=False, adapter=adapter)
    for engine in ENGINES
    for adapter in ADAPTERS
}
MODES |= {
    "zero3-trainer-nf4": partial(zero3_trainer, quantised=True),
    "zero3-trainer-bf16": partial(zero3_trainer, quantised=False),
}
MODES |= {f"{engine}-memory": partial(memory, engine=engine) for engine in ENGINES}

if __name__ == "__main__":
    torch.set_num_threads(1)
    mode, root = sys.argv[1], Path(sys.argv[2])
    if mode.startswith("zero3") and "trainer" not in mode:
        import deepspeed

        deepspeed.init_distributed(dist_backend="gloo")
    elif mode.startswith("fsdp") or mode in ("calibrated", "refused"):
        dist.init_process_group("gloo")  # else a trainer starts it
    found = MODES[mode](root)
    if RANK == 0:  # in a file: what two processes print at once may stand in one line
        (root / "told.json").write_text(json.dumps(found))
    # SIGABRT ends a process whose peer leaves while it still reads from that one, and one in which
    # gloo still frees what the last barrier exchanged when the interpreter ends.
    dist.barrier()
    dist.destroy_process_group()  # though engines hold on to theirs
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
