"""Two processes of one training: one version, the files of one process, and one end for both."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from models import save_base
from safetensors.torch import load_file

CHILD = Path(__file__).with_name("distributed_child.py")


def together(mode, root):
    """What the leader of two processes tells."""
    save_base(root / "base")
    environment = {"PYTHONWARNINGS": "ignore", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2"]
    command += ["--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0", str(CHILD), mode, str(root)]
    done = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | environment, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return json.loads([line for line in done.stdout.splitlines() if line.startswith("{")][-1])


@pytest.mark.parametrize("mode", ["trainer", "sft"])
def test_ddp_writes_each_version_once_with_the_bytes_of_one_process(tmp_path, mode):
    found = together(mode, tmp_path)
    versions = ["step-00000002", "step-00000004"]
    assert found["told"] == [[versions, [2, 4]]] * 2
    assert found["listing"] == versions
    assert len(found["together"]) == 3 and found["together"] == found["alone"]


@pytest.mark.parametrize("base", ["nf4", "bf16"])
def test_fsdp2_writes_the_bytes_of_one_process_and_leaves_the_shards_alone(tmp_path, base):
    found = together(f"fsdp2-{base}", tmp_path)
    assert found["told"] == [["merged", True]] * 2
    assert len(found["together"]) == (3 if base == "nf4" else 2)
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


def test_engines_that_do_not_merge_are_refused_by_name_in_both(tmp_path):
    found = together("refused", tmp_path)
    assert found.keys() == {"tensor parallel", "FSDP1", "ZeRO-3"}
    for name, (one, other) in found.items():
        assert one == other and name in one and "this adapter cannot be merged" in one


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
