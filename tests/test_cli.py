"""The command line: what it prints, what it exits with, and that it does what the library does."""

import importlib
import json
import math
import os
import pkgutil
import shutil
import subprocess
import sys

import pytest
import torch
from models import qlora, same, tokenizer
from safetensors.torch import load_file, save_file
from test_callback import TEXTS, listing, sft
from test_store import publish

import merge_callback
from merge_callback import (
    Comparison,
    MergeOnSaveCallback,
    MergeRefused,
    MergeStore,
    merge_adapter,
)
from merge_callback.cli import main
from merge_callback.rows import read_batches


def said(capsys, *arguments):
    """Exit code and JSON of a command."""
    code = main([*map(str, arguments), "--json"])
    return code, json.loads(capsys.readouterr().out)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run with two checkpoints, and what the callback merged at each."""
    path = tmp_path_factory.mktemp("run")
    callback = MergeOnSaveCallback(merge_on_save=True, rounding="nearest")
    sft(path, callback, save_strategy="steps", save_steps=3).train()
    return path


@pytest.fixture
def exports(tmp_path):
    """Two versions of one model, in 4 and 16 bits."""
    model = qlora(tmp_path)
    for _ in range(2):
        merge_adapter(
            model, tmp_path / "out", save_method=["merged_4bit", "merged_16bit"], progress=False
        )
    return tmp_path / "out"


def test_a_checkpoint_is_merged_as_the_callback_merged_it(run, tmp_path, capsys):
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    code, found = said(
        capsys, "merge", run / "run/checkpoint-3", "--load-in-4bit", "--rounding", "nearest",
        "--output-dir", tmp_path / "out", "--data", data,
    )  # fmt: skip
    assert (code, found["version"]) == (0, "step-00000003")
    ours = tmp_path / "out/step-00000003"
    theirs = run / "run/_merged/step-00000003"
    assert found["paths"] == {"merged_4bit": str(ours)}
    assert same(*(load_file(path / "model.safetensors") for path in (ours, theirs)))
    assert {p.name for p in theirs.iterdir()} == {p.name for p in ours.iterdir()}
    assert found["manifest"]["verification"]["models"]["merged_4bit"]["rows"] > 0
    for version in (ours, theirs):
        code, told = said(capsys, "verify", version, "--against", run / "run/checkpoint-3")
        assert code == 0 and told["adapter"] == "same"
    other = run / "run/checkpoint-6"
    assert main(["verify", str(ours), "--against", str(other)]) == 3
    assert "was not made of the adapter in" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments, code, told",
    [
        (["merge", "{run}/run"], 1, "there is one in checkpoint-3, checkpoint-6"),
        (["merge", "{run}/run/checkpoint-3", "--rounding", "tuned"], 1, "needs --data"),
        (["merge", "{run}/run/checkpoint-3", "--base", "{run}/none"], 1, "does not load"),
        (["merge", "{run}/run/checkpoint-3", "--data", "{run}/none"], 1, "cannot be read"),
        (["merge", "{run}/run/checkpoint-3", "--model-class", "Nothing"], 1, "no class Nothing"),
        (["merge", "{run}/run/checkpoint-3", "--model-class", "Trainer"], 1, "no class Trainer"),
        (["merge", "{run}/run/checkpoint-3", "--max-kl", "1"], 1, "lost needs --data"),
        (["list", "{run}/none"], 1, "is no directory"),
        (["show", "{run}/run/checkpoint-3"], 3, "it is not a published version"),
        (["push", "{run}/run/_merged/step-00000003"], 1, "is pending; give a repo_id"),
        (["compare", "{run}", "{run}", "--data", "{run}/none"], 1, "has no config.json"),
    ],
)
def test_a_mistake_is_one_line_and_no_traceback(run, arguments, code, told, capsys):
    assert main([argument.format(run=run) for argument in arguments]) == code
    captured = capsys.readouterr()
    assert told in captured.err and captured.out == ""
    assert captured.err.startswith("merge-callback: ") and captured.err.count("\n") <= 2


@pytest.mark.parametrize(
    "row",
    [
        '{"no": 1}',
        "no json",
        '{"text": 5}',
        "[1]",
        '{"input_ids": ["a"]}',
        '{"input_ids": []}',
        '{"messages": 5}',
    ],
)
def test_a_row_that_cannot_be_used_is_named(run, tmp_path, row, capsys):
    data = tmp_path / "data.jsonl"
    data.write_text('{"text": "good"}\n\n' + row)
    checkpoint = str(run / "run/checkpoint-3")
    assert (
        main(["merge", checkpoint, "--data", str(data), "--output-dir", str(tmp_path / "o")]) == 1
    )
    assert f"{data}, line 3: " in capsys.readouterr().err
    assert not (tmp_path / "o").exists()


def test_what_a_prompt_says_is_no_label(tmp_path):
    words, data = tokenizer(), tmp_path / "data.jsonl"
    row = {"prompt": TEXTS[0], "completion": " " + TEXTS[1]}
    data.write_text(json.dumps(row) + "\n" + json.dumps({"text": TEXTS[0]}))
    talk = [{"role": "user", "content": TEXTS[0]}, {"role": "assistant", "content": TEXTS[1]}]
    more = [{"prompt": talk[:1], "completion": talk[1:]}, {"messages": talk}]
    with data.open("a") as file:
        file.writelines("\n" + json.dumps(row) for row in more)
    one, other, chat, messages = read_batches(data, words)
    assert torch.equal(chat["input_ids"], messages["input_ids"])
    asked = words.apply_chat_template(talk[:1], return_dict=True)["input_ids"]
    assert chat["labels"][0, : len(asked)].tolist() == [-100] * len(asked)
    assert torch.equal(chat["labels"][0, len(asked) :], chat["input_ids"][0, len(asked) :])
    assert torch.equal(messages["labels"], messages["input_ids"])
    before = len(words(TEXTS[0])["input_ids"])
    assert one["input_ids"][0].tolist() == words(TEXTS[0] + " " + TEXTS[1])["input_ids"]
    assert one["labels"][0, :before].tolist() == [-100] * before
    assert torch.equal(one["labels"][0, before:], one["input_ids"][0, before:])
    assert torch.equal(other["labels"], other["input_ids"])


def test_a_row_may_have_separators_of_lines_in_its_text(tmp_path):
    data = tmp_path / "data.jsonl"
    rows = [{"text": f"w1{separator}w2"} for separator in ("\u2028", "\x85", "\u2029")]
    text = "\r\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    data.write_bytes(text.encode())
    assert len(list(read_batches(data, tokenizer()))) == 3


def test_an_adapter_that_cannot_be_read_is_refused(tmp_path, capsys):
    (tmp_path / "adapter_config.json").write_text("{")
    assert main(["merge", str(tmp_path)]) == 1
    assert "adapter_config.json cannot be read" in capsys.readouterr().err


def test_versions_are_listed_shown_and_verified(exports, capsys):
    code, rows = said(capsys, "list", exports)
    assert code == 0 and [row["version"] for row in rows] == ["merged", "merged-v2"]
    assert rows[0]["methods"] == "merged_4bit,merged_16bit" and rows[0]["rounding"] == "stochastic"
    assert rows[0]["bytes"] > 1000 and rows[0]["push"] is None
    assert main(["list", str(exports)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split("\t") == list(rows[0]) and lines[1].startswith("merged\tmerged\t20")
    code, report = said(capsys, "show", exports / "merged")
    assert report == json.loads((exports / "merged/merge_report.json").read_text())
    assert main(["show", str(exports / "merged")]) == 0
    assert capsys.readouterr().out == (exports / "merged/merge_report.md").read_text()
    assert said(capsys, "verify", exports / "merged")[0] == 0
    file = exports / "merged/merged_4bit/model.safetensors"
    *rest, last = file.read_bytes()
    file.write_bytes(bytes([*rest, last ^ 1]))
    assert main(["verify", str(exports / "merged")]) == 3
    assert "merged_4bit/model.safetensors" in capsys.readouterr().err


def test_models_are_compared(exports, tmp_path, capsys):
    data = tmp_path / "data.jsonl"
    rows = [{"input_ids": [1 + i, 5, 9, 30, 2 + i]} for i in range(4)]
    data.write_text("\n".join(map(json.dumps, rows)))
    four, sixteen = exports / "merged/merged_4bit", exports / "merged/merged_16bit"
    code, same_model = said(capsys, "compare", four, four, "--data", data)
    assert code == 0 and same_model["kl"] == pytest.approx(0, abs=1e-12)
    assert same_model["rows"] == 16
    code, found = said(capsys, "compare", sixteen, four, "--data", data, "--max-kl", "1e-9")
    assert code == 3 and found["kl"] > 1e-9
    assert said(capsys, "compare", sixteen, four, "--data", data, "--max-kl", "9")[0] == 0
    assert main(["compare", str(sixteen), str(four), "--data", str(data)]) == 0
    assert "kl\t" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("rows", "told"),
    [
        ("", "has no rows"),
        ('{"input_ids": [5]}', "no token is predicted"),
        ('{"input_ids": [5, 99999]}', "the models do not run on these data"),
    ],
)
def test_a_comparison_of_nothing_is_none(exports, tmp_path, capsys, rows, told):
    data = tmp_path / "data.jsonl"
    data.write_text(rows)
    four = str(exports / "merged/merged_4bit")
    assert main(["compare", four, four, "--data", str(data), "--max-kl", "1"]) == 1
    assert told in capsys.readouterr().err


@pytest.mark.parametrize("broken", ["first", "second"])
def test_models_that_say_nothing_finite_are_not_alike(exports, tmp_path, capsys, broken):
    sound, nan = exports / "merged/merged_16bit", tmp_path / "nan"
    shutil.copytree(sound, nan)
    weights = load_file(nan / "model.safetensors")
    weights["model.norm.weight"].fill_(math.nan)
    save_file(weights, nan / "model.safetensors", {"format": "pt"})
    data = tmp_path / "data.jsonl"
    data.write_text('{"input_ids": [1, 2, 3]}')
    pair = (nan, sound) if broken == "first" else (sound, nan)
    assert main(["compare", *map(str, pair), "--data", str(data), "--max-kl", "9", "--json"]) == 3
    found = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert found["finite"] is False


def test_a_reader_that_leaves_changes_no_exit_code(exports, tmp_path):
    data = tmp_path / "data.jsonl"
    data.write_text('{"input_ids": [1, 2, 3]}')
    pair = [str(exports / f"merged/merged_{bits}") for bits in ("16bit", "4bit")]
    command = [sys.executable, "-m", "merge_callback", "compare", *pair, "--data", str(data)]
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run([*command, "--max-kl", "1e-9"], stdout=writer, stderr=subprocess.PIPE)
    os.close(writer)
    assert done.returncode == 3 and b"Traceback" not in done.stderr


def cut(path):
    path.write_bytes(path.read_bytes()[:99])


@pytest.mark.parametrize(
    ("harm", "told"),
    [
        (lambda place: cut(place / "adapter_model.safetensors"), "does not load on the base"),
        (lambda place: (place / "adapter_config.json").write_text("[]"), "cannot be read"),
        (lambda place: (place / "tokenizer.json").write_text("{"), "the tokenizer in"),
        (lambda place: (place / "tokenizer_config.json").write_text("[]"), "the tokenizer in"),
    ],
)
def test_a_damaged_checkpoint_is_refused(run, tmp_path, capsys, harm, told):
    checkpoint = tmp_path / "checkpoint-3"
    shutil.copytree(run / "run/checkpoint-3", checkpoint)
    harm(checkpoint)
    out = tmp_path / "out"
    assert main(["merge", str(checkpoint), "--load-in-4bit", "--output-dir", str(out)]) == 1
    assert told in capsys.readouterr().err and not MergeStore(out).versions()


def test_of_many_rows_as_many_are_drawn_as_are_needed(tmp_path):
    data = tmp_path / "data.jsonl"
    rows = [{"input_ids": [number, number]} for number in range(100)]
    data.write_text("\n".join(map(json.dumps, rows)))
    drawn = [int(batch["input_ids"][0, 0]) for batch in read_batches(data, None, 20)]
    assert len(drawn) == 10 == len(set(drawn)) and max(drawn) > 20
    assert drawn == [int(batch["input_ids"][0, 0]) for batch in read_batches(data, None, 20)]
    assert sorted(int(b["input_ids"][0, 0]) for b in read_batches(data, None, 999)) == [*range(100)]


def test_that_a_base_is_not_quantised_is_said(run, tmp_path, caplog):
    checkpoint = tmp_path / "checkpoint-3"
    shutil.copytree(run / "run/checkpoint-3", checkpoint)
    (checkpoint / "merge_callback.json").unlink()
    arguments = ["merge", str(checkpoint), "--output-dir", str(tmp_path / "out")]
    assert main(arguments) == 0
    assert "if it was, merge with --load-in-4bit or --load-in-8bit" in caplog.text
    caplog.clear()
    assert main([*arguments, "--no-load-in-4bit"]) == 0
    assert main([*arguments, "--load-in-4bit", "--rounding", "nearest"]) == 0
    assert "--load-in-8bit" not in caplog.text


def test_several_problems_have_a_head(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    code = main(
        [
            "merge",
            str(tmp_path),
            "--output-dir",
            "out",
            "--max-kl",
            "-1",
            "--dtype",
            "int8",
            "--data",
            "x",
        ]
    )
    assert code == 1
    head, *problems = capsys.readouterr().err.splitlines()
    assert head == "merge-callback: the merge is refused:" and len(problems) == 2


def test_a_damaged_base_is_refused(run, tmp_path, capsys):
    base = tmp_path / "base"
    shutil.copytree(run / "base", base)
    cut(base / "model.safetensors")
    arguments = ["merge", str(run / "run/checkpoint-3"), "--base", str(base)]
    assert main([*arguments, "--output-dir", str(tmp_path / "out")]) == 1
    assert f"the base {base} does not load" in capsys.readouterr().err


def test_a_name_is_refused_before_anything_is_computed(tmp_path):
    data = iter([{"input_ids": torch.arange(8)[None]}])
    with pytest.raises(MergeRefused, match="cannot name a version"):
        merge_adapter(qlora(tmp_path), tmp_path / "out", name="a/b", calibration_data=data)
    assert next(data, None) is not None


def test_a_report_is_shown_only_if_it_is_what_was_written(exports, capsys):
    for name, arguments in (("merge_report.md", []), ("merge_report.json", ["--json"])):
        report = exports / "merged" / name
        assert main(["show", str(exports / "merged"), *arguments]) == 0
        report.write_text(report.read_text() + " ")
        assert main(["show", str(exports / "merged"), *arguments]) == 3
        assert f"{name} is not what was written" in capsys.readouterr().err


def test_a_version_goes_by_its_links_and_its_parts(exports, tmp_path, capsys):
    (tmp_path / "newest").symlink_to(exports / "merged-v2")
    for place in (tmp_path / "newest", exports / "merged-v2/merged_4bit"):
        assert said(capsys, "verify", place)[1]["version"] == "merged-v2"
    (exports / "merged-v2/typo").mkdir()
    assert main(["verify", str(exports / "merged-v2/typo")]) == 3
    assert main(["verify", str(exports / "merged-v3")]) == 1


def test_what_a_version_does_not_name_is_told(exports, caplog):
    (exports / "merged/merged_4bit/adapter_config.json").write_text("{}")
    assert main(["verify", str(exports / "merged")]) == 0
    assert "none of this version: merged_4bit/adapter_config.json" in caplog.text


def test_where_there_are_no_versions_the_next_place_is_named(exports, capsys):
    assert main(["list", str(exports.parent)]) == 0
    assert "no versions in" in (told := capsys.readouterr()).err and "look into out" in told.err
    pair = [str(exports / "merged")] * 2
    assert main(["compare", *pair, "--data", "none"]) == 1
    assert "look into merged_16bit, merged_4bit" in capsys.readouterr().err


def test_models_without_scores_of_classes_are_not_within_a_limit(exports, tmp_path, monkeypatch):
    none = Comparison(4, None, None, None, None, None, None, 0.0, True)
    monkeypatch.setattr("merge_callback.comparing.compare", lambda *args: none)
    data = tmp_path / "data.jsonl"
    data.write_text('{"input_ids": [1, 2]}')
    four = str(exports / "merged/merged_4bit")
    assert main(["compare", four, four, "--data", str(data), "--max-kl", "1"]) == 3


def test_versions_are_pruned_when_it_is_said_twice(exports, tmp_path, capsys):
    code, rows = said(capsys, "prune", exports, "--keep", "1")
    assert code == 0 and rows == [{"version": "merged", "run": None, "removed": False}]
    assert listing(exports, "") == ["merged", "merged-v2"]
    assert said(capsys, "prune", exports, "--keep", "1", "--yes")[1][0]["removed"]
    assert listing(exports, "") == ["merged-v2"]
    model = qlora(tmp_path / "again")
    for name in ("step-1", "step-2"):
        merge_adapter(model, exports, name=name, progress=False, verify=False)
    told = {"step-1": 1, "step-2": 2}
    for name, step in told.items():
        manifest = json.loads((exports / name / "merge_manifest.json").read_text())
        manifest |= {"step": step, "best_step": 1 if step == 2 else None}
        (exports / name / "merge_manifest.json").write_text(json.dumps(manifest))
    rows = said(capsys, "prune", exports, "--keep", "1")[1]
    assert [row["version"] for row in rows] == ["merged-v2"]  # step 1 was the best
    with pytest.raises(SystemExit) as ended:
        main(["prune", str(exports), "--keep", "0"])
    assert ended.value.code == 2


def test_each_run_keeps_its_own_newest_and_its_own_best(tmp_path, capsys):
    store = MergeStore(tmp_path)
    for run, step, best in [("a", 1, None), ("b", 2, None), ("a", 2, None), ("a", 3, 1)]:
        publish(store, f"step-{step}", step=step, best_step=best, run=run)
    publish(store, "step-4", step=4)  # of no run
    publish(store, "step-5", step=5, best_step=2)
    rows = said(capsys, "list", tmp_path)[1]
    names = ["step-1", "step-2", "step-2-v2", "step-3", "step-4", "step-5"]
    assert [row["version"] for row in rows] == names
    assert [row["run"] for row in rows] == ["a", "b", "a", "a", None, None]
    # Step 1 is the best of run a; that 2 is the best of another saves step-2-v2 no more.
    found = [
        {"version": "step-2-v2", "run": "a", "removed": True},
        {"version": "step-4", "run": None, "removed": True},
    ]
    code, rows = said(capsys, "prune", tmp_path, "--keep", "1")
    assert code == 0 and rows == [row | {"removed": False} for row in found]
    assert said(capsys, "prune", tmp_path, "--keep", "1", "--yes") == (0, found)
    assert [v.name for v in store.versions()] == ["step-1", "step-2", "step-3", "step-5"]
    assert said(capsys, "prune", tmp_path, "--keep", "1", "--yes") == (0, [])


def test_a_version_is_pushed(exports, hub_client, capsys):
    code, found = said(capsys, "push", exports / "merged", "me/model")
    assert code == 0 and found["repo_id"] == "me/model" and found["tag"] == "merged"


def test_the_doctor_tells_versions(capsys):
    code, rows = said(capsys, "doctor")
    found = {row["check"]: row["found"] for row in rows}
    assert code == 0 and "Hub token" in found
    assert torch.__version__.startswith(found["torch"])  # which may be without "+cpu"


def test_it_runs_as_a_module_into_a_pipe_and_on_a_terminal(exports):
    command = [sys.executable, "-m", "merge_callback", "list", str(exports)]
    piped = subprocess.run(command, capture_output=True, text=True, check=True)
    assert len(piped.stdout.splitlines()) == 3
    leader, follower = os.openpty()
    subprocess.run(command, stdout=follower, check=True, env=os.environ | {"COLUMNS": "200"})
    os.close(follower)
    shown = os.read(leader, 100_000).decode()
    assert "merged-v2" in shown and "┃" in shown and "\t" not in shown


def test_what_needs_no_model_imports_no_torch(exports):
    commands = [["list", exports], ["show", exports / "merged"], ["verify", exports / "merged"]]
    commands += [["prune", exports, "--keep", "1"]]
    for command in [list(map(str, command)) for command in commands]:
        code = f"import sys; from merge_callback.cli import main; assert main({command}) == 0; "
        code += "assert not {'torch', 'transformers', 'peft'} & sys.modules.keys()"
        subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


def test_the_package_gives_what_it_names_whatever_was_imported_before():
    for module in pkgutil.walk_packages(merge_callback.__path__, "merge_callback."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    assert set(merge_callback.__all__) == merge_callback._MODULES.keys()
    for name in merge_callback.__all__:
        found = getattr(merge_callback, name)
        assert (found.__module__, found.__qualname__) == (
            f"merge_callback.{merge_callback._MODULES[name]}",
            name,
        )
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        merge_callback.nothing  # noqa: B018


def test_an_id_that_no_repository_has_leaves_no_push_behind(exports, capsys):
    assert main(["push", str(exports / "merged"), "a b/c"]) == 1
    assert "repo_id: " in capsys.readouterr().err
    assert MergeStore(exports).pending() == []


@pytest.mark.parametrize("keep", ["0", "-1", "all"])
def test_how_many_to_keep_is_a_number(exports, capsys, keep):
    with pytest.raises(SystemExit):
        main(["prune", str(exports), f"--keep={keep}"])
    assert "must be a number, at least 1" in capsys.readouterr().err


def test_wrong_usage_is_2_and_help_names_the_exit_codes(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["nothing"])
    assert ended.value.code == 2
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    assert ended.value.code == 0 and "exit codes" in capsys.readouterr().out


def test_a_terminal_shows_what_there_is_and_a_pipe_every_column(exports, capsys, monkeypatch):
    assert main(["list", str(exports)]) == 0
    lines = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    assert lines[0][-4:] == ["kl", "bytes", "push", "run"] and {len(line) for line in lines} == {11}
    assert len(lines[1][2]) == len("2026-11-26T15:06")
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.setenv("TERM", "dumb")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert main(["list", str(exports)]) == 0
    head, *rows = [
        line for line in capsys.readouterr().out.splitlines() if "┃" in line or "│" in line
    ]
    names = [cell.strip() for cell in head.strip("┃").split("┃")]
    assert "bytes" in names and "push" not in names and len(rows) == 2
