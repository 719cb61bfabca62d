"""Two processes of one training: one version, the files of one process, and one end for both."""

import json
import os
import shutil
import socket
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from models import adapt, load_base, same, save_base
from peft import PeftModel
from peft.utils.other import fsdp_auto_wrap_policy
from safetensors.torch import load_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

from merge_callback import MergeStore, merge_adapter
from merge_callback.rescue import rescue
from merge_callback.sharding import Hidden, Unit

CHILD = Path(__file__).with_name("distributed_child.py")
DEEPSPEED = CHILD.parents[1] / ".deepspeed"
TORCHRUN = ["torch.distributed.run", "--nproc-per-node=2"]
TORCHRUN += ["--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"]
ACCELERATE = ["accelerate.commands.launch", "--multi_gpu", "--num_processes=2", "--num_machines=1"]
ACCELERATE += ["--mixed_precision=no", "--dynamo_backend=no", "--main_process_port=0"]


def together(mode, root, *launchers, **environment):
    """What the leader of two processes tells; one launcher for both, or one for each."""
    save_base(root / "base")
    environment = {"PYTHONWARNINGS": "ignore", "OMP_NUM_THREADS": "1"} | environment
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    running = [
        subprocess.Popen(
            [sys.executable, "-m", *launcher, str(CHILD), mode, str(root)],
            env=os.environ | environment,
            **pipes,
        )
        for launcher in launchers or [TORCHRUN]
    ]
    try:
        said = [process.communicate(timeout=150) for process in running]
    finally:
        for process in running:
            process.kill()
    assert not any(process.returncode for process in running), said
    return json.loads((root / "told.json").read_text())


@pytest.mark.parametrize("mode", ["trainer", "sft"])
def test_ddp_writes_each_version_once_with_the_bytes_of_one_process(tmp_path, mode):
    found = together(mode, tmp_path, TORCHRUN if mode == "trainer" else ACCELERATE)
    versions = ["step-00000002", "step-00000004"]
    assert found["told"] == [[versions, [2, 4]]] * 2
    assert found["listing"] == versions
    alike = found["together"].items() & found["alone"].items()
    # Two configs differ: the callback saw use_cache before the trainer turned it off.
    assert [p for p, _ in sorted(alike) if p.endswith(".safetensors")] == [
        "lora/adapter_model.safetensors",
        "merged_16bit/model.safetensors",
        "merged_4bit/model.safetensors",
    ]


def test_under_ddp_one_process_merges_behind_the_training_of_all(tmp_path):
    found = together("behind", tmp_path)
    versions = ["step-00000002", "step-00000004"]
    assert found["told"] == [[versions, [2, 4]]] * 2
    assert found["listing"] == versions


def test_a_merge_behind_the_training_that_fails_ends_it_in_all_processes(tmp_path):
    found = together("behind-fails", tmp_path)
    (one, *ended), (other, *alike) = found["told"]
    assert "the merge at step 2 failed: the disk is full" in one and "the disk is full" in other
    assert ended == alike == [4, True]


@pytest.mark.parametrize("base", ["nf4", "bf16"])
def test_a_trainer_on_deepspeed_publishes_what_one_process_makes_of_its_adapter(tmp_path, base):
    found = together(f"zero3-trainer-{base}", tmp_path, **needs("zero3"))
    assert found["told"] == [["step-00000001", "step-00000002"]] * 2
    loaded = load_base(tmp_path / "base", "nf4-nested" if base == "nf4" else "bfloat16")
    adapter = tmp_path / "run" / "_merged" / "step-00000002" / "lora"
    model = PeftModel.from_pretrained(loaded, adapter, autocast_adapter_dtype=False)
    merge_adapter(model, tmp_path / "alone", save_method="merged_16bit", progress=False)
    alone = MergeStore(tmp_path / "alone").version("merged").manifest["files"]
    sha256 = alone["model.safetensors"]["sha256"]
    assert found["files"]["merged_16bit/model.safetensors"] == sha256


@pytest.fixture
def alone_in_a_group(tmp_path):
    """torch.distributed with this process alone, as with one GPU and an engine's config."""
    dist.init_process_group(
        "gloo", init_method=f"file://{tmp_path / 'group'}", rank=0, world_size=1
    )
    yield
    dist.destroy_process_group()


@pytest.mark.filterwarnings("ignore:FSDP is switching to use `NO_SHARD`", "ignore::FutureWarning")
@pytest.mark.parametrize("engine", ["fsdp2", "fsdp1", "fsdp1-flat"])
def test_an_engine_with_one_process_merges_as_none(tmp_path, engine, alone_in_a_group):
    def model():
        base = load_base(save_base(tmp_path / "base", tied=False), "bfloat16")
        made = adapt(base)
        for parameter in made.parameters():
            parameter.data = parameter.data.to(torch.bfloat16)
        return made

    def wrapped(made):
        if engine == "fsdp2":
            return fully_shard(made, mesh=init_device_mesh("cpu", (1,)))
        settings = {"use_orig_params": engine == "fsdp1", "device_id": torch.device("cpu")}
        policy = fsdp_auto_wrap_policy(made)
        return FullyShardedDataParallel(made, auto_wrap_policy=policy, **settings)

    sharded = wrapped(model())
    settings = {"save_method": ["merged_16bit", "lora"], "progress": False}
    for name, given in (("sharded", sharded), ("plain", model())):
        merge_adapter(given, tmp_path / "out", name=name, **settings)
    store = MergeStore(tmp_path / "out")
    files = [store.version(name).manifest["files"] for name in ("sharded", "plain")]
    for name in ("merged_16bit/model.safetensors", "lora/adapter_model.safetensors"):
        assert files[0][name]["sha256"] == files[1][name]["sha256"]
    rescued = rescue(sharded, store, "rescued", 1)
    plain = load_file(tmp_path / "out" / "plain" / "lora" / "adapter_model.safetensors")
    assert same(load_file(rescued / "adapter_model.safetensors"), plain)
    with pytest.raises(TypeError, match="kept in parts"):
        Hidden(torch.ones(2), torch.Size([2]), Unit(nullcontext), lambda: None, 0).add(1)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peaks are Linux's")
@pytest.mark.parametrize("engine", ["fsdp2", "fsdp1", "zero3"])
def test_a_process_holds_little_more_than_its_part(tmp_path, engine):
    # Groups of 8 MiB; the leader holds a few float32 copies of a weight (4 MiB) too.
    found = together(f"{engine}-memory", tmp_path, **needs(engine))
    assert found["model"] > 98 and max(found["grown"]) < found["model"] / 2


def test_of_nodes_that_each_save_on_their_own_the_first_alone_merges(tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    at = ["torch.distributed.run", "--nnodes=2", f"--master-port={port}"]
    found = together("nodes", tmp_path, [*at, "--node-rank=0"], [*at, "--node-rank=1"])
    assert found["told"] == [[True, True, ["step-00000002"]], [True, True, []]]


def needs(engine):
    """The environment that an engine needs."""
    if engine != "zero3":
        return {}
    if not (DEEPSPEED / "deepspeed").is_dir() or not shutil.which("c++"):
        pytest.skip("DeepSpeed is not installed (make test does it), or has no compiler")
    path = os.pathsep.join([str(DEEPSPEED / "bin"), os.environ["PATH"]])
    return {"PYTHONPATH": str(DEEPSPEED), "DS_ACCELERATOR": "cpu", "PATH": path}


SHARDED = [
    *(f"{engine}-{base}" for engine in ("fsdp2", "fsdp1", "zero3") for base in ("nf4", "bf16")),
    "fsdp1-flat-nf4",
    "fsdp1-flat-bf16-head",
    "fsdp2-leaves-bf16-embeddings",
    "fsdp2-bf16-dora",
    "fsdp1-bf16-tokens",
]


@pytest.mark.parametrize("mode", SHARDED)
def test_shards_give_the_bytes_of_one_process_and_are_left_alone(tmp_path, mode):
    found = together(mode, tmp_path, **needs(mode.partition("-")[0]))
    assert found["told"] == [["merged", True]] * 2
    assert len(found["together"]) == (6 if "nf4" in mode or "leaves" in mode else 4)
    assert found["together"] == found["alone"]


@pytest.mark.parametrize("where", ["start", "merge"])
def test_what_fails_in_one_process_fails_in_both_and_at_once(tmp_path, where):
    found = together(where, tmp_path)
    for rank in (0, 1):
        (own, step, soon), (other, other_step, other_soon) = (
            found[str(rank)] if rank == 0 else found[str(rank)][::-1]
        )
        assert soon and other_soon and step == other_step == (0 if where == "start" else 2)
        assert "here" in own and f"process {rank} failed: " in other and "here" in other
        left = [] if where == "start" else ["step-00000002-adapter"]
        assert found[f"{rank} left"] == left


def test_a_merge_that_fails_in_one_process_is_left_out_by_both(tmp_path):
    found = together("warn", tmp_path)
    assert found["told"] == [[["trained", 4, True], [2]]] * 2
    assert found["listing"] == ["step-00000004"]


def test_what_does_not_merge_is_refused_by_name_in_both(tmp_path):
    found = together("refused", tmp_path)
    assert found.keys() == {"tensor parallel", "whole wrapped model"}
    for name, (one, other) in found.items():
        assert one == other and name in one and "the merge is refused" in one


def test_calibration_looks_at_the_data_of_both(tmp_path):
    found = together("calibrated", tmp_path)
    assert found["tokens"] == 8 * 2 * 64
    names = ("together", "alone", "half")
    files = {n: load_file(tmp_path / n / "merged" / "model.safetensors") for n in names}

    def equal(one, other):
        # Of the first layers that see the data: later ones go their own ways with the last bit.
        codes = [f"model.layers.0.self_attn.{p}_proj.weight" for p in "qkv"]
        same = sum(int((files[one][n] == files[other][n]).sum()) for n in codes)
        return same / sum(files[one][n].numel() for n in codes)

    assert equal("together", "alone") > 0.999 and equal("half", "alone") < 0.95
