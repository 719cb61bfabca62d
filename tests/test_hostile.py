"""Whatever lies where a version should: no crash, and no file is read or touched elsewhere."""

import io
import json
import logging
import math
import os
import pickle
import re
import resource
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from models import adapt, load_base, save_base, tokenizer
from safetensors.torch import load_file, save_file
from test_store import publish
from transformers import AutoModelForCausalLM

from merge_callback import CorruptVersion, MergeStore, compare, merge_adapter
from merge_callback.card import card_for_the_hub, write_card
from merge_callback.cli import main
from merge_callback.foreign import plain, slow_pattern
from merge_callback.report import report_text
from merge_callback.verification.rebuilt import rebuild
from merge_callback.versions import MANIFEST, read_version

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=8,
)
KEYS = ("schema", "kind", "created", "step", "best_step", "files", "save_methods", "verification")
PARTS = st.sampled_from(
    ["..", ".", "", "a", "config.json", "/", "\\", "\0", "../..", "step-1", "é"]
)
NAMES = st.lists(PARTS, min_size=1, max_size=4).map("/".join)
RECORDS = st.fixed_dictionaries(
    {"size": st.integers() | JSON, "sha256": st.text(max_size=4) | JSON}
)
few = settings(max_examples=150, derandomize=True, deadline=None, database=None)


def look(root):
    """All that reads versions; an error is one of ours."""
    store = MergeStore(root)
    store.latest(), store.pending()
    for version in store.versions():
        try:
            store.verify(version)
        except CorruptVersion:
            pass
        for name in version.records():
            try:
                inside = version.file(name)
            except CorruptVersion:
                continue
            assert inside.resolve().is_relative_to(version.path.resolve())
    assert main(["list", str(root)]) == 0
    assert main(["show", str(root / "step-1")]) in (0, 3)
    assert main(["prune", str(root), "--keep", "1"]) == 0
    store.prune(1, names=["step-1"], keep_steps=frozenset())


@given(raw=st.binary(max_size=64) | st.text(max_size=64).map(str.encode))
@few
def test_any_bytes_may_stand_in_a_manifest(tmp_path_factory, raw):
    root = tmp_path_factory.mktemp("hostile")
    (root / "step-1").mkdir()
    (root / "step-1" / MANIFEST).write_bytes(raw)
    look(root)
    assert MergeStore(root).versions() == []


@given(changed=st.dictionaries(st.sampled_from(KEYS), JSON), gone=st.sets(st.sampled_from(KEYS)))
@few
def test_any_values_may_stand_in_a_manifest(tmp_path_factory, changed, gone):
    root = tmp_path_factory.mktemp("hostile")
    version = publish(MergeStore(root), "step-1")
    found = {**json.loads((version.path / MANIFEST).read_text()), **changed}
    found = {key: value for key, value in found.items() if key not in gone}
    (version.path / MANIFEST).write_text(json.dumps(found))
    look(root)


@given(files=st.dictionaries(NAMES, RECORDS, max_size=4))
@few
def test_any_names_may_stand_in_a_manifest(tmp_path_factory, files):
    root = tmp_path_factory.mktemp("hostile")
    (root / "secret").write_text("secret")
    version = publish(MergeStore(root / "store"), "step-1")
    found = json.loads((version.path / MANIFEST).read_text())
    (version.path / MANIFEST).write_text(json.dumps({**found, "files": files}))
    look(root / "store")
    assert (root / "secret").read_text() == "secret"


def test_a_manifest_of_gigabytes_is_not_read(tmp_path):
    version = publish(MergeStore(tmp_path), "step-1")
    with open(version.path / MANIFEST, "r+b") as file:
        file.truncate(8 << 30)  # sparse
    assert read_version(version.path) is None


def test_a_deeply_nested_manifest_is_none(tmp_path):
    version = publish(MergeStore(tmp_path), "step-1")
    (version.path / MANIFEST).write_text("[" * 200_000)
    assert read_version(version.path) is None


@pytest.mark.parametrize("kind", ["link", "directory", "fifo"])
def test_a_manifest_that_is_no_file_makes_no_version(tmp_path, kind):
    version = publish(MergeStore(tmp_path / "store"), "step-1")
    path = version.path / MANIFEST
    path.rename(tmp_path / MANIFEST)
    make = {"link": lambda: path.symlink_to(tmp_path / MANIFEST), "directory": path.mkdir}
    make.get(kind, lambda: os.mkfifo(path))()
    assert MergeStore(tmp_path / "store").versions() == []


def test_a_pipe_among_the_files_is_not_waited_for(tmp_path):
    version = publish(MergeStore(tmp_path), "step-1")
    (version.path / "deep" / "file").unlink()
    os.mkfifo(version.path / "deep" / "file")
    with pytest.raises(CorruptVersion, match="is no file"):
        MergeStore(tmp_path).verify(version)


def test_a_version_that_is_a_link_is_none_and_is_not_pruned(tmp_path):
    elsewhere = publish(MergeStore(tmp_path / "elsewhere"), "step-1")
    store = MergeStore(tmp_path / "store")
    publish(store, "step-2")
    (store.root / "step-1").symlink_to(elsewhere.path)
    assert [version.name for version in store.versions()] == ["step-2"]
    store.prune(1, names=["step-1", "step-2"], keep_steps=frozenset())
    MergeStore(tmp_path / "elsewhere").verify("step-1")


# Models that others made


def a_model(root, kind="bfloat16"):
    """A directory as a merge writes it, and what is in its one weight file."""
    result = merge_adapter(
        adapt(load_base(save_base(root / "base"), kind)), root / "out", verify=False, progress=False
    )
    return result.path


def says(directory):
    """What is said of a directory that somebody else made."""
    with pytest.raises(CorruptVersion) as caught:
        compare(directory, directory, [{"input_ids": torch.arange(8)[None]}])
    return str(caught.value)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    root = tmp_path_factory.mktemp("made")
    return {kind: a_model(root / kind, kind) for kind in ("bfloat16", "nf4", "nf4-nested")}


@pytest.fixture
def hostile(made, tmp_path):
    """A copy of a model to spoil, and its weight file."""

    def copy(kind="bfloat16"):
        directory = tmp_path / kind
        shutil.copytree(made[kind], directory)
        weights = directory / "model.safetensors"
        weights.chmod(0o600)
        return directory, weights

    return copy


def with_header(weights, change):
    """Change the header of a safetensors file; its data stays."""
    raw = weights.read_bytes()
    size = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + size])
    change(header)
    text = json.dumps(header).encode()
    weights.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + size :])


def overlap(header):
    first, second, *_ = [name for name in header if name != "__metadata__"]
    header[second] = header[first]


def beyond(header):
    last = max(header, key=lambda name: header[name].get("data_offsets", [0])[0])
    start, end = header[last]["data_offsets"]
    header[last] |= {"data_offsets": [start, end + 2**40], "shape": [2**40]}


def test_a_header_of_an_exabyte_is_not_read(hostile):
    directory, weights = hostile()
    weights.write_bytes((2**60).to_bytes(8, "little") + weights.read_bytes()[8:])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert "does not load" in says(directory)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 * 1024


@pytest.mark.parametrize("change", [overlap, beyond])
def test_tensors_that_lie_where_they_cannot_do_not_load(hostile, change):
    directory, weights = hostile()
    with_header(weights, change)
    assert "does not load" in says(directory)


@given(at=st.integers(0, 400), byte=st.integers(0, 255), size=st.integers(0, 2**63))
@settings(max_examples=60, derandomize=True, deadline=None, database=None)
def test_any_byte_of_a_header_may_be_another(made, tmp_path_factory, at, byte, size):
    directory = tmp_path_factory.mktemp("bytes") / "model"
    shutil.copytree(made["bfloat16"], directory)
    weights = directory / "model.safetensors"
    weights.chmod(0o600)
    raw = bytearray(weights.read_bytes())
    raw[8 + at] = byte
    if at % 3 == 0:
        raw[:8] = size.to_bytes(8, "little")
    weights.write_bytes(raw)
    try:
        rebuild(directory)
    except CorruptVersion:
        pass


@pytest.mark.parametrize("part", [".absmax", ".nested_absmax"])
def test_a_scale_that_is_no_number_is_named(hostile, part):
    directory, weights = hostile("nf4" if part == ".absmax" else "nf4-nested")
    tensors = load_file(weights)
    name = next(name for name in tensors if name.endswith(part))
    tensors[name][0] = math.nan
    save_file(tensors, weights, metadata={"format": "pt"})
    assert f"scales that are not finite: {name.removesuffix(part)}" in says(directory)


def test_a_pickle_is_not_opened(hostile, tmp_path):
    directory, weights = hostile()
    weights.unlink()

    class Payload:
        def __reduce__(self):
            return (open, (str(tmp_path / "run"), "w"))

    (directory / "pytorch_model.bin").write_bytes(pickle.dumps(Payload()))
    assert "model.safetensors" in says(directory) and not (tmp_path / "run").exists()


def test_code_that_came_with_a_model_is_not_run(hostile, tmp_path, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n"))  # should anybody ask
    directory, _ = hostile()
    (directory / "code.py").write_text(f"open({str(tmp_path / 'run')!r}, 'w')")
    config = json.loads((directory / "config.json").read_text())
    config |= {"model_type": "theirs", "auto_map": {"AutoConfig": "code.Config"}}
    (directory / "config.json").chmod(0o600)
    (directory / "config.json").write_text(json.dumps(config))
    assert "does not load" in says(directory) and not (tmp_path / "run").exists()


# Code that came with a model, an adapter or a tokenizer

CODE = """
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, ProcessorMixin

with open({ran!r}, "a") as file:
    file.write("x")


class Config(LlamaConfig):
    model_type = "theirs"


class Model(LlamaForCausalLM):
    config_class = Config


class Words(PreTrainedTokenizerFast):
    pass


class Both(ProcessorMixin):
    attributes = ["tokenizer"]
    tokenizer_class = "AutoTokenizer"
"""
CONFIG = {"model_type": "theirs", "architectures": ["Model"]}
CONFIG |= {"auto_map": {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}}
WORDS = {"tokenizer_class": "Words", "auto_map": {"AutoTokenizer": ["code.Words", "code.Words"]}}
BOTH = {"processor_class": "Both", "auto_map": {"AutoProcessor": "code.Both"}}


def change(path, **values):
    """Change a JSON file, or make it."""
    found = json.loads(path.read_text()) if path.exists() else {}
    path.unlink(missing_ok=True)
    path.write_text(json.dumps(found | values))


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """A base with a tokenizer, an adapter that names it, data, and a version made of both."""
    place = tmp_path_factory.mktemp("adapter")
    save_base(place / "base")
    tokenizer().save_pretrained(place / "base")
    tokenizer().save_pretrained(place / "adapter")
    adapt(load_base(place / "base", "bfloat16")).save_pretrained(place / "adapter")
    (place / "data.jsonl").write_text('{"text": "w1 w2 w3 w4"}\n')
    arguments = ["merge", place / "adapter", "--output-dir", place / "out"]
    assert main(list(map(str, arguments))) == 0
    return place


@pytest.fixture
def theirs(adapter, tmp_path, monkeypatch):
    """A copy of it, with code beside each part, and somebody who says yes to whatever is asked."""
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 99))
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    place = tmp_path / "theirs"
    shutil.copytree(adapter, place)
    change(place / "adapter/adapter_config.json", base_model_name_or_path=str(place / "base"))
    for part in ("base", "adapter", "out/merged"):
        (place / part / "code.py").write_text(CODE.format(ran=str(place / "ran")))
    return place


FOREIGN = {
    "merge, the base": ("merge", {"base/config.json": CONFIG}),
    "merge, a tokenizer": ("merge", {"adapter/tokenizer_config.json": WORDS}),
    "merge, the base's tokenizer": ("merge", {"base/tokenizer_config.json": WORDS}),
    "merge, a processor": ("merge", {"adapter/processor_config.json": BOTH}),
    "verify, the base": ("verify", {"base/config.json": CONFIG}),
    "compare, a model": ("compare", {"out/merged/config.json": CONFIG}),
    "compare, a tokenizer": ("compare", {"out/merged/tokenizer_config.json": WORDS}),
}


def command_on(place, command):
    data = ["--data", place / "data.jsonl"]
    arguments = {
        "merge": ["merge", place / "adapter", "--output-dir", place / "new"],
        "verify": ["verify", place / "out/merged", "--against", place / "adapter"],
        "compare": ["compare", place / "out/merged", place / "base", *data],
    }
    return list(map(str, arguments[command]))


@pytest.mark.parametrize("case", FOREIGN)
def test_code_runs_if_it_is_said_to_be_trusted_and_nobody_is_asked(theirs, capsys, case):
    command, changes = FOREIGN[case]
    if case == "merge, the base's tokenizer":
        for path in (theirs / "adapter").glob("tokenizer*"):
            path.unlink()
    for path, values in changes.items():
        change(theirs / path, **values)
    if command == "verify":  # the version stays as its manifest has it
        (theirs / "out/merged/code.py").unlink()
    arguments = command_on(theirs, command)
    assert main(arguments) in (1, 3)
    told = capsys.readouterr()
    assert not (theirs / "ran").exists() and not (theirs / "new").exists()
    assert "does not load" in told.err and "[y/N]" not in told.out + told.err
    if "processor" not in case:
        assert main([*arguments, "--trust-remote-code"]) == 0, capsys.readouterr().err
        assert (theirs / "ran").exists()


def test_a_model_that_its_user_loaded_with_its_code_is_merged_and_verified(theirs, tmp_path):
    change(theirs / "base/config.json", **CONFIG)
    model = AutoModelForCausalLM.from_pretrained(theirs / "base", trust_remote_code=True)
    result = merge_adapter(adapt(model), tmp_path / "out", progress=False)
    assert result.manifest["verification"]["problems"] == []
    (theirs / "ran").unlink()
    with pytest.raises(CorruptVersion, match="does not load"):
        compare(result.path, result.path, [{"input_ids": torch.arange(8)[None]}])
    assert not (theirs / "ran").exists()


@pytest.mark.parametrize(
    "name", ["pipeline", "AutoTokenizer", "AutoConfig", "Trainer", "models", "GPT2TokenizerFast"]
)
def test_a_class_that_makes_no_models_is_not_called(theirs, capsys, name):
    arguments = command_on(theirs, "merge")
    assert main([*arguments, "--model-class", name]) == 1
    assert f"transformers has no class {name} that makes models" in capsys.readouterr().err
    change(theirs / "out/merged/config.json", architectures=[name])
    assert main(command_on(theirs, "compare")) == 3
    assert "names no class of transformers" in capsys.readouterr().err


def test_a_processor_that_is_a_model_is_none(theirs, capsys):
    change(theirs / "adapter/processor_config.json", processor_class="LlamaForCausalLM")
    save_base(theirs / "model")
    for path in (theirs / "model").iterdir():
        shutil.copy(path, theirs / "adapter")
    main(command_on(theirs, "merge"))
    assert not list(theirs.glob("new/*/adapter_config.json"))


def test_a_kernel_from_the_hub_is_code(theirs, capsys):
    change(theirs / "base/config.json", attn_implementation="somebody/kernel")
    assert main(command_on(theirs, "merge")) == 1
    assert "its attn_implementation is code from the Hub" in capsys.readouterr().err


# What a terminal shows

ESCAPES = "\x1b]0;owned\x07\x1b[2J\x9b31m\x7f\u202e\u2066\r\b"
UNSEEN = set(ESCAPES) - set("]0;owned[2J31m") | {"\t", "\u2028", "\u200f"}


def on_a_terminal(monkeypatch):
    """As if all went to one."""
    monkeypatch.setenv("COLUMNS", "400")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)


def spoiled(root, text):
    """A version with `text` wherever a manifest has one."""
    version = publish(MergeStore(root), "step-1")
    report = (version.path / "merge_report.md", version.path / "merge_report.json")
    report[0].write_bytes(f"# Merge of {text}\n\n&#x202e; <b>\n".encode("utf-8", "replace"))
    report[1].write_text(json.dumps({"base": text}))
    found = json.loads((version.path / MANIFEST).read_text())
    store = MergeStore(root)
    with store.draft("step-2") as draft:
        for path in report:
            path.rename(draft.path / path.name)
        draft.seal()
        changes = {"created": text, "rounding": text, "save_methods": [text], "kind": text}
        return store.publish(draft, "step-2", {**found, **changes})


@pytest.mark.parametrize("shown", ["list", "show"])
@pytest.mark.parametrize("form", ["terminal", "pipe", "json"])
def test_no_control_character_of_others_is_shown(tmp_path, capsys, monkeypatch, shown, form):
    version = spoiled(tmp_path, ESCAPES + "\t\n\u2028")
    if form == "terminal":
        on_a_terminal(monkeypatch)
    place = {"list": tmp_path, "show": version.path}[shown]
    assert main([shown, str(place), *(["--json"] if form == "json" else [])]) == 0
    told = capsys.readouterr().out
    told = re.sub(r"\x1b\[[\d;]*m", "", told)  # styles, which are ours
    if (form, shown) == ("pipe", "list"):
        told = told.replace("\t", "")
    assert not UNSEEN & set(told), repr(told)
    if form == "pipe" and shown == "list":
        assert len(told.splitlines()) == 3
    if form == "json":
        json.loads(told)


def test_a_cell_is_no_markup(tmp_path, capsys, monkeypatch):
    on_a_terminal(monkeypatch)
    for name in ("runs/[v1]/merged", "out[/tmp]", "[bold]x", "[link=http://a]b[/link]"):
        spoiled(tmp_path / "a", name)
        assert main(["list", str(tmp_path / "a")]) == 0
        assert name in capsys.readouterr().out
        shutil.rmtree(tmp_path / "a")


def test_a_directory_may_be_called_like_markup(adapter, tmp_path, capsys, monkeypatch):
    on_a_terminal(monkeypatch)
    out = tmp_path / "[v1]" / "out[" / "tmp]"
    assert main([*command_on(adapter, "merge")[:-1], str(out), "--no-verify"]) == 0
    assert f"{out}/merged" in capsys.readouterr().out.replace("\n", "")


def test_what_an_error_and_a_warning_say_is_plain(tmp_path, capsys):
    place = tmp_path / f"a\n{ESCAPES.replace('/', '')}\nmerge-callback: all is well"
    assert main(["verify", str(place)]) == 1
    place.mkdir()
    (place / "config.json").write_text("{}")
    assert main(["compare", str(place), str(place), "--data", str(tmp_path / "none")]) in (1, 3)
    told = capsys.readouterr().err
    assert "all is well" in told and "\nmerge-callback: all" not in told
    assert not (UNSEEN - {"\t"}) & set(told), repr(told)


def test_what_other_libraries_log_is_plain():
    code = """if True:
        import logging, sys, warnings
        from merge_callback import cli
        other = logging.getLogger("transformers")
        other.addHandler(logging.StreamHandler())
        def run(given):
            other.warning("of %s", "\\x1b[2J")
            logging.getLogger("merge_callback.x").info("ours %s", "\\x9b\\nmerge-callback: fine")
            warnings.warn("warned \\x1b[2J")
            return 0
        cli._list = run
        sys.exit(cli.main(["list", "x"]))
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("\\x1b[2J") >= 2 and "ours \\x9b\n  merge-callback" in done.stderr
    assert "\x1b" not in done.stderr and "\x9b" not in done.stderr


def test_plain_text_stays_as_it_is():
    for text in ("model.layers.0.self_attn", "über 日本語 🙂", "a  b", "[v1] <b> | `x`", ""):
        assert plain(text) == text
    assert plain("\x1b\x00\x7f\x85\u202e\t\n\ud800") == (r"\x1b\x00\x7f\x85\u202e\t\n\ud800")


def test_log_records_are_as_they_were_after_a_command(tmp_path):
    before = logging.getLogRecordFactory()
    main(["list", str(tmp_path)])
    assert logging.getLogRecordFactory() is before


# Markdown and YAML

MARKUP = "a|b`c`<script>x</script>[d](http://e)\n---\nlicense: {{ 7 * 7 }}\n| f | # g: *h*\x1b[2J"


def test_a_report_is_one_table_whatever_names_are_in_it(made):
    manifest = json.loads((made["bfloat16"] / MANIFEST).read_text())
    tensors = {"merged_16bit": {"w": {"retention": 0.5, "error": 0.0}}}
    clean = report_text(manifest, tensors)
    manifest["base"]["id"], manifest["adapters"] = MARKUP, [MARKUP]
    manifest["verification"] = {"problems": [MARKUP]}
    dirty = report_text(manifest, {"merged_16bit": {MARKUP: tensors["merged_16bit"]["w"]}})
    assert len(dirty.splitlines()) - len(clean.splitlines()) == 4  # the list of problems
    assert not {"<", "`", "[", "]", "\x1b", "\\"} & set(dirty.replace("\\|", ""))
    rows = [line for line in dirty.splitlines() if line.startswith("|")]
    assert {line.count("|") for line in rows} == {4}


@pytest.mark.parametrize("name", [MARKUP, "a\n---\nb/c", "{{ 7*7 }}/b: c", "\ud800/x"])
def test_the_header_of_a_card_says_what_was_asked_whatever_names_are_in_it(made, tmp_path, name):
    model = load_base(made["bfloat16"], "bfloat16")
    manifest = json.loads((made["bfloat16"] / MANIFEST).read_text())
    manifest["base"], manifest["adapters"] = {"id": name, "revision": "1"}, [name]
    model.config._name_or_path = str(tmp_path)
    hostile = {"license": "mit\n---\nx", "license_name": ["a"], "license_link": "b: c"}
    (tmp_path / "README.md").write_text(f"---\n{yaml.safe_dump(hostile)}---\n" + "\n" * 300_000)
    (tmp_path / "card").mkdir()
    datasets = ["me/data", "a\n---\nb: c", "{{ x }}"]
    write_card(tmp_path / "card", model, manifest, ("merged_16bit",), datasets=datasets)
    text = (tmp_path / "card/README.md").read_text()
    _, header, body = text.split("---\n", 2)
    assert yaml.safe_load(header) == {
        "library_name": "transformers",
        "datasets": ["me/data"],
        "tags": ["merge_callback", "lora"],
        "license_link": "b: c",
    }
    assert "\n---" not in body and "49" not in body and "<" not in body
    assert card_for_the_hub(text, "me/model").count("---\n") == text.count("---\n")


# Values that none expects

DEEP = "[" * 200_000


def spoil(path, text):
    path.unlink(missing_ok=True)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())


SPOILED = {
    "adapter_config.json": "cannot be read",
    "trainer_state.json": "cannot be read",
    "tokenizer_config.json": "does not load",
    "tokenizer.json": "does not load",
    "../base/config.json": "does not load",
    "../base/model.safetensors": "does not load",
    "../data.jsonl": "line 1",
}


@pytest.mark.parametrize("file", SPOILED)
@pytest.mark.parametrize(
    "text", [DEEP, '{"a":' * 100_000, b"\xff\xfe\x00{", "5", "[]", '{"r": 1' + "0" * 5000 + "}"]
)
def test_any_file_of_an_adapter_may_hold_anything(theirs, capsys, file, text):
    spoil(theirs / "adapter" / file, text)
    arguments = [*command_on(theirs, "merge"), "--data", str(theirs / "data.jsonl")]
    start = time.monotonic()
    assert main(arguments) == 1
    told = capsys.readouterr().err
    known = (SPOILED[file], "cannot be read", "has no rows")
    assert any(words in told for words in known) and "Traceback" not in told
    assert time.monotonic() - start < 10 and not list(theirs.glob("new/*"))


@pytest.mark.parametrize(
    "step", ["Infinity", "NaN", "1e400", "-1", "true", '"1"', "1.5", "null", "1" + "0" * 30, "[1]"]
)
def test_a_step_that_is_none_is_refused(theirs, capsys, step):
    spoil(theirs / "adapter/trainer_state.json", f'{{"global_step": {step}}}')
    assert main(command_on(theirs, "merge")) == 1
    assert "has a global_step that is none" in capsys.readouterr().err


@pytest.mark.parametrize("base", [5, ["a"], {"a": 1}, True, "a\0b", "a\nb", "\ud800"])
def test_a_base_that_is_no_name_is_refused(theirs, capsys, base):
    change(theirs / "adapter/adapter_config.json", base_model_name_or_path=base)
    assert main(command_on(theirs, "merge")) == 1
    assert "which cannot be one" in capsys.readouterr().err


@pytest.mark.parametrize("base", ["-x", "--help", "../../etc", "/dev", "/", "~", "a" * 5000, "."])
def test_a_base_with_an_odd_name_does_not_load(theirs, capsys, base, monkeypatch):
    monkeypatch.chdir(theirs)
    change(theirs / "adapter/adapter_config.json", base_model_name_or_path=base)
    assert main(command_on(theirs, "merge")) == 1
    assert "does not load" in capsys.readouterr().err


VALUES = {
    "peft_type": ["NONE", 5, None, ["LORA"], "XLORA"],
    "task_type": ["NONE", ["a"], 5],
    "r": [-1, 0, "8", 1e400, 10**12, None],
    "lora_alpha": ["x", None, {}],
    "target_modules": [5, {"a": 1}, [5], "(", None],
    "rank_pattern": ["x", {"(": 1}, {"q_proj": -1}],
    "modules_to_save": [5, ["("]],
}


@pytest.mark.parametrize(
    ("field", "value"), [(field, value) for field, values in VALUES.items() for value in values]
)
def test_any_value_may_stand_in_the_config_of_an_adapter(theirs, capsys, field, value):
    change(theirs / "adapter/adapter_config.json", **{field: value})
    code = main([*command_on(theirs, "merge"), "--no-verify"])
    assert code in (0, 1) and (code == 0 or "merge-callback: " in capsys.readouterr().err)


SLOW = "(.*.*)*" + "(.*a)" * 25 + "!"
PATTERNS = [
    {"target_modules": SLOW},
    {"target_modules": r"(\w+\.?)+!"},
    {"exclude_modules": r"([\w.]+)+!"},
    {"rank_pattern": {r"([\w.]+)+!": 2}},
    {"alpha_pattern": {r"([\w.]+)+!": 2}},
    {"modules_to_save": [r"([\w.]+)+!"]},
    {"layers_pattern": r"([\w.]+)+!", "layers_to_transform": [0]},
]


@pytest.mark.parametrize("values", PATTERNS, ids=lambda values: next(iter(values)))
def test_a_pattern_that_takes_for_ever_is_refused_in_time(theirs, capsys, monkeypatch, values):
    monkeypatch.setattr("merge_callback.foreign._LONGEST_MATCH", 1.0)
    change(theirs / "adapter/adapter_config.json", **values)
    start = time.monotonic()
    assert main(command_on(theirs, "merge")) == 1
    assert time.monotonic() - start < 10
    assert "has a pattern that is none, or takes for ever: " in capsys.readouterr().err


def test_a_config_with_a_pattern_that_takes_for_ever_does_not_load(theirs, capsys, monkeypatch):
    monkeypatch.setattr("merge_callback.foreign._LONGEST_MATCH", 1.0)
    quantised = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    quantised["llm_int8_skip_modules"] = [r"([\w.]+)+!"]
    for place, command in (("base", "merge"), ("out/merged", "compare")):
        change(theirs / place / "config.json", quantization_config=quantised)
        assert main(command_on(theirs, command)) in (1, 3)
        assert "has a pattern that takes for ever" in capsys.readouterr().err


def test_patterns_of_adapters_that_are_sound_are_let_through(theirs):
    names = [f"model.layers.{i}.self_attn.q_proj" for i in range(1000)]
    sound = [r".*\.(q|k|v)_proj", "all-linear", r"model\.layers\.\d+\.mlp\..*", "q_proj"]
    assert slow_pattern(sound, names) is None
    assert slow_pattern([*sound, r"(a|a)*(", "x+"], names) == r"(a|a)*("
    change(theirs / "adapter/adapter_config.json", target_modules=r".*\.(layers).*(_proj)")
    assert main([*command_on(theirs, "merge"), "--no-verify"]) == 0


@pytest.mark.parametrize(
    "file", ["adapter/tokenizer_config.json", "adapter/tokenizer.json", "adapter/x.bin",
             "adapter/adapter_config.json", "adapter/adapter_model.safetensors",
             "adapter/trainer_state.json", "adapter/additional_chat_templates/a.jinja",
             "base/config.json", "base/model.safetensors", "base/generation_config.json",
             "base/README.md"],
)  # fmt: skip
@pytest.mark.parametrize("kind", ["fifo", "device", "directory"])
def test_a_pipe_or_a_device_beside_an_adapter_is_not_opened(theirs, file, kind):
    path = theirs / file
    path.parent.mkdir(exist_ok=True)
    path.unlink(missing_ok=True)
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        path.mkdir()
    signal.alarm(30)  # what waits for a pipe ends with it
    try:
        code = main([*command_on(theirs, "merge"), "--no-verify"])
    finally:
        signal.alarm(0)
    assert code == 1 or kind == "directory"


@pytest.mark.parametrize("number", [10**9, 10**400])
@pytest.mark.parametrize("place", ["base", "out/merged"])
def test_a_model_of_more_layers_than_can_be_made_does_not_load(theirs, capsys, number, place):
    change(theirs / place / "config.json", num_hidden_layers=number)
    assert main(command_on(theirs, "merge" if place == "base" else "compare")) in (1, 3)
    assert "its num_hidden_layers is 1000" in capsys.readouterr().err


@pytest.mark.parametrize("row", ["[1.5]", "[true]", "[-1]", "[1e400]", "[1" + "0" * 30 + "]"])
def test_ids_that_are_none_are_named(theirs, capsys, row):
    spoil(theirs / "data.jsonl", f'{{"input_ids": {row}}}')
    assert main(command_on(theirs, "compare")) == 1
    told = capsys.readouterr().err
    assert "line 1" in told or "not run on these data" in told


@pytest.mark.parametrize("report", ["merge_report.md", "merge_report.json"])
@pytest.mark.parametrize("content", [DEEP.encode(), b"\xff\xfe", b"no json", b"["])
def test_a_report_may_hold_anything(tmp_path, capsys, report, content):
    store = MergeStore(tmp_path)
    with store.draft("step-1") as draft:
        (draft.path / report).write_bytes(content)
        draft.seal()
        said = {"kind": "merged", "created": "2026", "step": 1, "best_step": None}
        store.publish(draft, "step-1", said)
    code = main(["show", str(tmp_path / "step-1"), *(["--json"] if "json" in report else [])])
    assert code == (3 if "json" in report or b"\xff" in content else 0)
    assert "Traceback" not in capsys.readouterr().err


def test_a_manifest_that_nests_too_deep_to_be_shown_is_said(tmp_path, capsys):
    version = publish(MergeStore(tmp_path), "step-1")
    found = (version.path / MANIFEST).read_text()
    deep = "[" * 900 + "]" * 900
    (version.path / MANIFEST).write_text(found.replace("{", f'{{"rounding": {deep},', 1))
    for form in ([], ["--json"]):
        assert main(["list", str(tmp_path), *form]) in (0, 1)
        assert main(["show", str(version.path), *form]) in (0, 1)
