"""Every block of code in README and docs is run, and every error is in the troubleshooting."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import tomllib
import torch
from datasets import load_dataset
from messages import messages, pattern
from models import adapt, save_base, tokenizer
from packaging.requirements import Requirement
from peft import LoraConfig
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from trl import SFTConfig, SFTTrainer

from merge_callback import MergeOnSaveCallback

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
BASE = "HuggingFaceTB/SmolLM2-135M-Instruct"
QUESTIONS = ["w1 w2 w3 w4", "w5 w6 w7 w8", "w9 w10 w11 w12", "w13 w14 w15 w16"]


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, the file that it is the text of, and the text."""

    language: str
    title: str | None
    text: str


def blocks(page):
    found = re.findall(r"^( *)```(\w*)(?: title=\"([^\"\n]*)\")?\n(.*?)^ *```$", page, re.M | re.S)
    return [
        Block(language, title or None, re.sub(f"^{indent}", "", text, flags=re.M))
        for indent, language, title, text in found
    ]


PAGES = {
    str(path.relative_to(ROOT)): found
    for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md")))
    if path.parent.name != "example" and (found := blocks(path.read_text()))
}
PAGES.pop("docs/how-to/unsloth.md")  # run by test_unsloth.py
PAGES.pop("README.md")  # whose blocks are those of docs/index.md, see below


def four_bits(place):
    """A base as the pages' readers load it."""
    nf4 = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )  # fmt: skip
    return AutoModelForCausalLM.from_pretrained(
        place, quantization_config=nf4, dtype=torch.bfloat16
    )


def settings(**changes):
    return SFTConfig(
        output_dir="run", max_steps=4, save_steps=2, report_to=[], bf16=False, use_cpu=True,
        disable_tqdm=True, per_device_train_batch_size=2, **changes,
    )  # fmt: skip


LORA = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A directory with a base, some data, a run and what was merged of it."""
    place = tmp_path_factory.mktemp("world")
    save_base(place / BASE)
    words = tokenizer()
    words.save_pretrained(place / BASE)
    rows = [
        {
            "prompt": [{"role": "user", "content": question}],
            "completion": [{"role": "assistant", "content": " w20 w21 w22 w23"}],
        }
        for question in QUESTIONS
    ]
    (place / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (place / "examples").symlink_to(ROOT / "examples")
    before = Path.cwd()
    os.chdir(place)
    try:
        callback = MergeOnSaveCallback(save_method=["merged_4bit", "merged_16bit"])
        data = load_dataset("json", data_files="train.jsonl", split="train")
        SFTTrainer(
            four_bits(BASE), settings(), train_dataset=data, peft_config=LORA, callbacks=[callback]
        ).train()
    finally:
        os.chdir(before)
    return place


@pytest.fixture
def here(world, tmp_path, monkeypatch):
    """A copy of the world, as the current directory."""
    place = tmp_path / "here"
    shutil.copytree(world, place, symlinks=True)
    monkeypatch.chdir(place)
    return place


def namespace():
    """What a page calls `args`, `data`, `lora`, `tokenizer`, `batches`, and `result`."""
    callback = MergeOnSaveCallback("before", rounding="calibrated")
    data = load_dataset("json", data_files="train.jsonl", split="train")
    trainer = SFTTrainer(
        four_bits(BASE), settings(), train_dataset=data, peft_config=LORA, callbacks=[callback]
    )
    trainer.train()
    shutil.rmtree("run")
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(3, 50, (2, 16), generator=generator) for _ in range(4)]
    return {
        "args": settings(),
        "data": data,
        "lora": LORA,
        "tokenizer": tokenizer(),
        "batches": [{"input_ids": ids, "labels": ids} for ids in rows],
        "result": callback.results[-1],
    }


def run_python(block, names):
    if "merge_adapter(" in block.text:
        names["model"] = adapt(four_bits(BASE))
    elif "model=model" in block.text:
        names["model"] = four_bits(BASE)
    exec(compile(block.text, "<docs>", "exec"), names)


def run_bash(block, environment):
    lines = []
    for line in block.text.splitlines():
        if line.startswith("pip install "):
            for wanted in shlex.split(line)[2:]:
                check_requirement(Requirement(wanted))
        elif line.startswith("make "):
            check_target(line.split()[1])
        else:
            lines.append(line)
    script = "\n".join(lines)
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script], capture_output=True, text=True, timeout=300,
        env=os.environ | environment | {"PATH": f"{Path(sys.executable).parent}:{os.defpath}"},
    )  # fmt: skip
    assert done.returncode == 0, f"{script}\n{done.stdout}\n{done.stderr}"


def check_requirement(wanted):
    """Of ours: that there are such extras."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    if wanted.name == "merge-callback":
        assert wanted.extras <= extras["optional-dependencies"].keys()


def check_target(name):
    assert f"\n{name}:" in (ROOT / "Makefile").read_text(), name


@pytest.mark.filterwarnings("ignore")  # users see them, and go on
@pytest.mark.parametrize("page", PAGES)
def test_every_block_of_code_runs(page, here, server, hub_client):
    environment = {
        "OMP_NUM_THREADS": "1",
        "HF_ENDPOINT": server.url,
        "HF_HUB_OFFLINE": "0" if page.endswith("push.md") else "1",
        "HF_HUB_DISABLE_XET": "1",
    }
    names = namespace() if any(b.language == "python" and not b.title for b in PAGES[page]) else {}
    for block in PAGES[page]:
        if block.title:
            Path(block.title).write_text(block.text)
            assert any(block.title in b.text for b in PAGES[page] if b.language == "bash")
        elif block.language == "python":
            run_python(block, names)
        elif block.language == "bash":
            run_bash(block, environment)
        else:
            assert block.language == "text", f"{page}: {block}"


def test_the_blocks_of_the_readme_are_those_of_the_quickstart():
    readme = blocks((ROOT / "README.md").read_text())
    assert readme == PAGES["docs/index.md"] and len(readme) > 4


def test_the_readme_can_be_read_in_one_go():
    assert len((ROOT / "README.md").read_text().splitlines()) < 150


def test_every_error_is_in_the_troubleshooting():
    page = " ".join((DOCS / "troubleshooting.md").read_text().split())
    told = list(messages())
    assert len(told) > 120
    assert [f"{where}: {text}" for where, text in told if not re.search(pattern(text), page)] == []


def test_every_link_leads_somewhere():
    for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *DOCS.rglob("*.md")):
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", path.read_text()):
            assert (path.parent / target).exists(), f"{path}: {target}"


def test_nearly_every_architecture_is_right_and_none_fails_after_training():
    told = " ".join((DOCS / "support.md").read_text().split())
    run, right, wrong = (
        int(re.search(rf"(\d+) {what}", told)[1]) for what in ("run:", "are right", "wrong")
    )
    assert run >= 150 and right >= 0.95 * run and wrong == 0
