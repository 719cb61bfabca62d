"""What a merge tells: the report, the picture, the model card, the trainer's loggers."""

import json
import re
import subprocess
import sys

import pytest
import torch
from datasets import Dataset, DatasetInfo
from huggingface_hub import ModelCard
from models import qlora, tokenizer
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_calibration import batches
from test_callback import data, sft, trainer

from merge_callback import MergeOnSaveCallback, MergeRefused, MergeStore, attach, merge_adapter
from merge_callback.batches import datasets_of
from merge_callback.plot import draw
from merge_callback.report import report_text

METHODS = ["merged_4bit", "merged_16bit", "lora"]


@pytest.fixture
def model(tmp_path):
    return qlora(tmp_path, scale=0.1)


def test_the_report_holds_what_was_measured(tmp_path, model):
    result = merge_adapter(
        model, tmp_path / "out", save_method=METHODS, verification_data=batches(4)
    )
    top = tmp_path / "out" / "merged"
    whole = json.loads((top / "merge_report.json").read_text())
    manifest = dict(result.manifest)
    tensors = whole.pop("tensors")
    assert whole == {k: v for k, v in manifest.items() if k not in ("schema", "files", "sequence")}
    assert tensors.keys() == {"merged_4bit", "merged_16bit"}
    for method, by_name in tensors.items():
        kept = manifest["retention"][method]["tensors"]
        assert {n: f["retention"] for n, f in by_name.items() if f["retention"] is not None} == kept
        errors = [found["error"] for found in by_name.values()]
        figures = manifest["verification"]["models"][method]
        assert len(errors) == figures["weights"] == 20 and max(errors) == figures["largest_error"]
    text = (top / "merge_report.md").read_text()
    figures = manifest["verification"]["models"]["merged_4bit"]
    row = next(line for line in text.splitlines() if line.startswith("| merged_4bit"))
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[1:4] == [f"{figures[k]:.4f}" for k in ("loss_base", "loss_live", "loss")]
    assert cells[4:] == [
        f"{figures['gain_kept']:.1%}", f"{figures['kl']:.5f}", f"{figures['agreement']:.1%}"
    ]  # fmt: skip
    assert (top / "merge_report.png").read_bytes()[:4] == b"\x89PNG"
    MergeStore(tmp_path / "out").verify("merged")
    told = {"merge_report.json", "merge_report.md", "merge_report.png"}
    assert told | {f"{method}/README.md" for method in METHODS} <= manifest["files"].keys()


def test_the_least_kept_comes_first():
    tensors = {f"w{i}": {"retention": value, "error": 0.0} for i, value in enumerate((0.9, 0.1))}
    manifest = {
        "step": 1, "base": {"id": "b"}, "save_methods": ["m"], "adapters": ["a"],
        "created": "now", "rounding": None, "seconds": {}, "libraries": {},
    }  # fmt: skip
    text = report_text(manifest, {"m": tensors})
    assert text.index("| w1 |") < text.index("| w0 |")


def test_a_report_without_figures_says_so(tmp_path, model):
    result = merge_adapter(model, tmp_path / "out", save_method="merged_16bit", verify=False)
    text = (result.path / "merge_report.md").read_text()
    assert "Outputs were not compared" in text
    assert "| model.layers." in text
    assert report_text(result.manifest, {"merged_16bit": {}}).count("changes no weight") == 1


def test_without_matplotlib_there_is_no_picture(tmp_path, model, monkeypatch):
    monkeypatch.delitem(sys.modules, "merge_callback.plot")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    result = merge_adapter(model, tmp_path / "out")
    assert not (result.path / "merge_report.png").exists()
    assert (result.path / "merge_report.json").exists()


@pytest.mark.parametrize("layers", [0, 2, 57])
def test_any_number_of_weights_is_drawn(tmp_path, layers):
    kinds = [f"k{i}" for i in range(12)]
    tensors = {
        f"model.layers.{layer}.mlp.{kind}.weight": {"retention": 0.9, "error": 0.1}
        for layer in range(layers)
        for kind in kinds
    }
    figures = {"loss_base": 4.0, "loss_live": 3.0, "loss": 3.1}
    manifest = {"verification": {"models": {"merged_4bit": figures}} if layers else None}
    draw(tmp_path / "x.png", manifest, {"merged_4bit": tensors} if layers else {})
    assert (tmp_path / "x.png").stat().st_size > 1000


# --- card ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["merged_4bit", "merged_16bit"])
def test_the_card_tells_how_to_use_the_model(tmp_path, model, method):
    (tmp_path / "base" / "README.md").write_text("---\nlicense: apache-2.0\n---\n# Base\n")
    result = merge_adapter(
        model,
        tmp_path / "out",
        save_method=method,
        processing_class=tokenizer(),
        verification_data=batches(2),
    )
    card = ModelCard.load(result.path / "README.md")
    assert card.data.license == "apache-2.0" and card.data.library_name == "transformers"
    assert card.data.get("base_model") is None  # a local directory is none on the Hub
    assert ("bitsandbytes" in card.data.tags) is (method == "merged_4bit")
    figures = result.manifest["verification"]["models"][method]
    assert f"{figures['kl']:.5f}" in card.text and method in card.text
    code = re.search(r"```python\n(.*?)```", card.text, re.S)[1]
    code = code.replace("path/to/this/directory", str(result.path))
    code = code.replace('device_map="auto"', 'device_map="cpu"').replace(
        "Once upon a time", "w1 w2"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0 and run.stdout.strip(), run.stderr


def test_the_card_names_a_base_on_the_hub_and_its_datasets(tmp_path, model):
    model.get_base_model().config._name_or_path = "org/base"
    checksums = {"hf://datasets/org/set@0123abc/data/train.parquet": {}, "https://x.y/z": {}}
    told = Dataset.from_dict({"a": [1]}, info=DatasetInfo(download_checksums=checksums))
    loader = torch.utils.data.DataLoader(told)
    assert datasets_of(loader) == ("org/set",)
    assert datasets_of(torch.utils.data.DataLoader([1])) == ()
    card = ModelCard.load(merge_adapter(model, tmp_path / "out").path / "README.md")
    assert card.data.base_model == "org/base" and card.data.base_model_relation == "finetune"


def test_a_run_tells_its_datasets(tmp_path):
    callback = MergeOnSaveCallback()
    run = trainer(tmp_path, callback, max_steps=1)
    checksums = {"hf://datasets/org/set@0123abc/data/train.parquet": {}}
    run.train_dataset.info.download_checksums = checksums
    run.train()
    card = ModelCard.load(callback.results[0].path / "README.md")
    assert card.data.datasets == ["org/set"]


def test_a_template_of_the_users(tmp_path, model, caplog):
    template = tmp_path / "mine.jinja"
    template.write_text("---\n{{ card_data }}\n---\nMine: {{ methods[0] }} of {{ base_model }}\n")
    result = merge_adapter(model, tmp_path / "out", card=template)
    assert "Mine: merged_4bit of base" in (result.path / "README.md").read_text()
    assert not (merge_adapter(model, tmp_path / "out", card=False).path / "README.md").exists()
    with pytest.raises(MergeRefused, match="is no file"):
        merge_adapter(model, tmp_path / "out", card="nowhere.jinja")
    template.write_text("{{ nothing.at.all }}")
    result = merge_adapter(model, tmp_path / "out", card=template)  # the model is worth more
    assert "the model card failed" in caplog.text
    MergeStore(tmp_path / "out").verify(result.version)


def test_a_card_that_is_there_stays(tmp_path, model):
    class Carded:
        def save_pretrained(self, path):
            (path / "README.md").write_text("written by hand")

    result = merge_adapter(model, tmp_path / "out", processing_class=Carded())
    assert (result.path / "README.md").read_text() == "written by hand"


# --- loggers ------------------------------------------------------------------------------------

FIGURES = {"merge/gain_kept", "merge/kl", "merge/agreement", "merge/seconds", "merge/bytes"}


def told(run):
    return [entry for entry in run.state.log_history if "merge/kl" in entry]


def test_figures_are_in_the_history_of_the_trainer(tmp_path):
    callback = MergeOnSaveCallback(merge_on_save=True, rounding="nearest")
    run = trainer(tmp_path, callback, save_strategy="steps", save_steps=2, learning_rate=0.1)
    run.train()
    assert [entry["step"] for entry in told(run)] == [2, 4]
    manifest = callback.results[-1].manifest
    figures = manifest["verification"]["models"]["merged_4bit"]
    assert told(run)[-1]["merge/kl"] == figures["kl"]
    assert told(run)[-1]["merge/gain_kept"] == figures["gain_kept"]
    assert told(run)[-1]["merge/bytes"] == sum(f["size"] for f in manifest["files"].values())
    assert FIGURES <= told(run)[-1].keys()


@pytest.mark.parametrize("given", ["constructor", "later"])
def test_figures_reach_tensorboard(tmp_path, given):
    callback = MergeOnSaveCallback(merge_on_save=True, rounding="nearest")
    settings = {"report_to": ["tensorboard"], "save_strategy": "steps", "save_steps": 2}
    run = trainer(tmp_path, *[callback] * (given == "constructor"), learning_rate=0.1, **settings)
    attach(run, callback)
    assert run.callback_handler.callbacks.index(callback) == 0
    assert run.callback_handler.callbacks.count(callback) == 1
    run.train()
    assert [entry["step"] for entry in told(run)] == [2, 4]
    files = list((tmp_path / "run").rglob("events.out.tfevents.*"))
    scalars = {}
    for file in files:
        events = EventAccumulator(str(file)).Reload()
        for tag in events.Tags()["scalars"]:
            if "merge/" in tag:
                scalars.setdefault(tag, []).extend((e.step, e.value) for e in events.Scalars(tag))
    assert {tag[tag.index("merge/") :] for tag in scalars} == FIGURES | {"merge/step"}
    (steps,) = (points for tag, points in scalars.items() if tag.endswith("merge/step"))
    assert steps == [(2, 2.0), (4, 4.0)]
    (kl,) = (points for tag, points in scalars.items() if tag.endswith("merge/kl"))
    wanted = [(entry["step"], entry["merge/kl"]) for entry in told(run)]
    assert [step for step, _ in kl] == [2, 4]
    assert [value for _, value in kl] == pytest.approx([value for _, value in wanted], rel=1e-6)


def test_an_sft_run_is_compared_on_data_that_calibration_did_not_see(tmp_path):
    callback = MergeOnSaveCallback()
    run = sft(tmp_path, callback)
    run.train()
    found = callback.results[0].manifest["verification"]
    assert found["data"] == "training data that calibration did not see"
    assert found["models"]["merged_4bit"]["loss_live"] > 0
    assert told(run)[0]["merge/kl"] == found["models"]["merged_4bit"]["kl"]


def test_a_logger_that_fails_fails_no_merge(tmp_path, caplog):
    callback = MergeOnSaveCallback(rounding="nearest", keep_last=1, merge_on_save=True)
    run = trainer(tmp_path, callback, save_strategy="steps", save_steps=2)

    def fail(figures):
        raise ConnectionError("the logger is down")

    attach(run, callback)
    callback._trainer_log = fail
    run.train()
    assert [result.version for result in callback.results] == ["step-00000002", "step-00000004"]
    assert [
        v.name for v in callback.results and MergeStore(tmp_path / "run/_merged").versions()
    ] == ["step-00000004"]
    assert "the logger is down" in caplog.text


def test_the_means_of_trl_stay_its_own(tmp_path):
    found = []
    for attached in (False, True):
        callback = MergeOnSaveCallback(rounding="nearest", merge_on_save=True)
        settings = {"save_strategy": "steps", "save_steps": 1, "logging_steps": 3}
        run = sft(tmp_path / str(attached), callback, **settings)
        if attached:
            attach(run, callback)
        run.train()
        history = [dict(entry) for entry in run.state.log_history if "loss" in entry]
        found.append(
            [{k: v for k, v in e.items() if "token" in k or k == "entropy"} for e in history]
        )
    assert found[0] == found[1] and found[0][0]


def test_an_iterator_of_verification_data_serves_every_merge(tmp_path):
    callback = MergeOnSaveCallback(
        rounding="nearest", merge_on_save=True, verification_data=iter(batches(2))
    )
    trainer(tmp_path, callback, save_strategy="steps", save_steps=2).train()
    rows = [r.manifest["verification"]["models"]["merged_4bit"]["rows"] for r in callback.results]
    assert rows == [2 * 4 * 31] * 2


def test_evaluation_data_is_preferred(tmp_path):
    callback = MergeOnSaveCallback(rounding="nearest")
    run = trainer(tmp_path, callback, eval_strategy="steps", eval_steps=2, save_strategy="no")
    run.train()
    found = callback.results[0].manifest["verification"]
    assert found["data"] == "held-out data"
    assert found["models"]["merged_4bit"]["rows"] == 4 * 11  # the evaluation set is four rows
    mine = MergeOnSaveCallback(rounding="nearest", verification_data=batches(1))
    run = trainer(tmp_path, mine, eval_strategy="steps", eval_steps=2, save_strategy="no")
    run.train()
    assert mine.results[0].manifest["verification"]["models"]["merged_4bit"]["rows"] == 4 * 31


def test_a_merge_that_keeps_too_little_saves_the_adapter(tmp_path):
    callback = MergeOnSaveCallback(rounding="nearest", max_kl=1e-12, on_error="warn")
    run = trainer(tmp_path, callback, max_steps=2)
    run.train()
    (failure,) = callback.failures
    assert "max_kl" in str(failure.error)
    names = [v.name for v in MergeStore(tmp_path / "run" / "_merged").versions()]
    assert names == ["step-00000002-adapter"]
    assert len(data()) == 16
