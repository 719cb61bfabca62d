"""What a merge must not touch: data, generators, open files, modes, threads. Exactly as it was."""

import contextlib
import multiprocessing
import os
import random
import sys
import threading
import types
import warnings

import numpy
import pytest
import torch
from datasets import Dataset
from models import adapt, load_base, qlora, same, save_base, snapshot, tokenizer
from peft import LoraConfig, get_peft_model
from test_calibration import batches
from test_callback import losses, trainer
from torch import nn
from torch.utils.data import DataLoader
from transformers import (
    BertConfig,
    BertForMaskedLM,
    DataCollatorForLanguageModeling,
    GPT2Config,
    GPT2LMHeadModel,
    Trainer,
    TrainingArguments,
)

import merge_callback.exact_maths
import merge_callback.forked
import merge_callback.stand_ins
import merge_callback.undo
from merge_callback import MergeError, MergeOnSaveCallback, merge_adapter
from merge_callback.batches import Drawn, TrainingData
from merge_callback.cores import threads_of_one_core
from merge_callback.exact_maths import exact_maths
from merge_callback.forked import forked
from merge_callback.live import read_weights
from merge_callback.stand_ins import (
    evaluating,
    generators_kept,
    in_float32,
    standing_in,
    without_adapters,
)
from merge_callback.undo import Undone, hooked

MODEL = types.SimpleNamespace(main_input_name="input_ids")


# --- data -----------------------------------------------------------------------------------------


class Rows(torch.utils.data.Dataset):
    """Rows of a file that is opened on first use, as h5py's are; all readings are counted."""

    def __init__(self, path, count=200):
        path.write_bytes(b"".join(i.to_bytes(8, "little") for i in range(count)))
        self.path, self.count = path, count
        self.descriptor = None
        self.generator = numpy.random.default_rng(5)
        self.own = random.Random(6)
        self.reads = multiprocessing.Value("i", 0)

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        with self.reads.get_lock():
            self.reads.value += 1
        if self.descriptor is None:
            self.descriptor = os.open(self.path, os.O_RDONLY)
        os.lseek(self.descriptor, 8 * index, os.SEEK_SET)
        os.sched_yield()
        value = int.from_bytes(os.read(self.descriptor, 8), "little")
        noise = int(self.generator.integers(3, 300)), self.own.randrange(3, 300)
        return {"input_ids": torch.tensor([value, *noise]), "wanted": index}


def test_no_row_is_drawn_before_a_merge_and_no_open_file_is_shared(tmp_path):
    rows = Rows(tmp_path / "rows")
    loader = DataLoader(rows, batch_size=8, num_workers=2)
    data = TrainingData(MODEL, loader, batch_size=8, tokens=100)
    assert rows.reads.value == 0 and rows.descriptor is None
    read = [b for b in loader]
    assert all(torch.equal(b["input_ids"][:, 0], b["wanted"]) for b in read)
    drawn = list(data.batches())
    assert rows.reads.value == 400 and rows.descriptor is None
    assert sorted(i for b in drawn for i in b["wanted"].tolist()) == list(range(200))
    assert all(torch.equal(b["input_ids"][:, 0], b["wanted"]) for b in drawn)


def test_generators_of_a_dataset_and_a_collator_stay_where_they_are(tmp_path):
    rows = Rows(tmp_path / "rows")
    rows[0]
    state = rows.generator.bit_generator.state, rows.own.getstate()
    shared = random.Random(3)

    def collate(items):  # a generator that no attribute holds
        shared.random()
        return {"input_ids": torch.stack([item["input_ids"] for item in items])}

    before = shared.getstate()
    loader = DataLoader(rows, batch_size=4, collate_fn=collate)
    assert len(list(Drawn(MODEL, loader, 4))) == 50
    assert (rows.generator.bit_generator.state, rows.own.getstate()) == state
    assert shared.getstate() == before


def test_a_file_that_is_open_already_keeps_its_offset(tmp_path):
    rows = Rows(tmp_path / "rows")
    rows[3]
    assert os.lseek(rows.descriptor, 0, os.SEEK_CUR) == 32
    stream = open(tmp_path / "rows", "rb")
    stream.read(8)
    rows.stream = stream
    drawn = list(Drawn(MODEL, DataLoader(rows), 16))
    assert sum(len(b["wanted"]) for b in drawn) == 200
    assert all(torch.equal(b["input_ids"][:, 0], b["wanted"]) for b in drawn)
    assert os.lseek(rows.descriptor, 0, os.SEEK_CUR) == 32
    assert int.from_bytes(stream.read(8), "little") == 1
    stream.close()
    os.close(rows.descriptor)


@pytest.mark.parametrize("workers", [0, 2])
def test_losses_are_those_of_a_training_without_the_callback(tmp_path, workers):
    """With a collator and a dataset that have generators of their own."""

    def run(name, *callbacks):
        torch.manual_seed(0)
        words = tokenizer()
        words.add_special_tokens({"mask_token": "<mask>"})
        config = BertConfig(
            hidden_size=64, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64,
            vocab_size=310,
        )  # fmt: skip
        lora = LoraConfig(r=4, target_modules=["query", "value"])
        rows = Rows(tmp_path / name)
        collate = DataCollatorForLanguageModeling(words, mlm=True, seed=7)
        args = TrainingArguments(
            output_dir=str(tmp_path / f"run-{name}"), max_steps=6, use_cpu=True, report_to=[],
            disable_tqdm=True, per_device_train_batch_size=4, logging_steps=1, seed=4,
            save_strategy="steps", save_steps=2, learning_rate=5e-3,
            dataloader_num_workers=workers,
            # Otherwise the trainer itself draws from torch's generator for each new worker.
            dataloader_persistent_workers=workers > 0,
        )  # fmt: skip
        made = Trainer(
            model=get_peft_model(BertForMaskedLM(config), lora), args=args, train_dataset=rows,
            eval_dataset=rows, data_collator=collate, callbacks=list(callbacks),
        )  # fmt: skip
        made.train()
        return losses(made)

    callback = MergeOnSaveCallback(merge_on_save=True)
    assert run("with", callback) == run("without")
    figures = callback.results[-1].manifest["verification"]
    assert figures["checks"]["merged_16bit: outputs"] == "passed"


def test_an_iterator_of_the_users_is_not_read_before_a_merge_needs_it(tmp_path):
    read = []

    def one_by_one():
        for index in range(3, 40):
            read.append(index)
            yield {"input_ids": torch.full((1, 8), index)}

    class Watch(MergeOnSaveCallback):
        def on_step_end(self, *args, **settings):
            assert read == []
            super().on_step_end(*args, **settings)

    callback = Watch(verification_data=one_by_one(), verify_tokens=32, rounding="nearest")
    trainer(tmp_path, callback).train()
    assert read == [3, 4, 5, 6, 7]  # one more shows that there are enough
    assert callback.results[0].manifest["verification"]["data"] == "held-out data"


def test_what_goes_wrong_in_the_fork_is_told():
    def broken():
        yield {"input_ids": torch.ones(1, 2), "text": "kept", "odd": lambda: None}
        raise KeyError("column")

    found = forked(broken)
    first = next(found)
    assert first.keys() == {"input_ids", "text"} and first["text"] == "kept"
    with pytest.raises(MergeError, match="KeyError: 'column'"):
        next(found)

    def dying():
        os._exit(1)
        yield {}

    with pytest.raises(MergeError, match="the process that read it died"):
        next(forked(dying))
    with pytest.raises(MergeError, match="the collator gives a list, and a batch is a dict"):
        next(forked(lambda: [[1]]))


def test_a_fork_that_is_silent_is_given_up_and_ends(monkeypatch):
    monkeypatch.setattr(merge_callback.forked, "_SILENCE", 0.1)
    seen = multiprocessing.Value("i", 0)

    def hanging():
        seen.value = os.getpid()
        threading.Event().wait()
        yield {}

    with pytest.raises(MergeError, match=r"no batch came in 0 s"):
        next(forked(hanging))
    with pytest.raises(ProcessLookupError):
        os.kill(seen.value, 0)


def test_a_dataset_whose_columns_are_certain_is_not_watched(tmp_path):
    model = load_base(save_base(tmp_path / "base"), "float32")
    rows = Dataset.from_dict({"input_ids": [[3, 4]] * 8})
    known = DataCollatorForLanguageModeling(tokenizer(), mlm=False)
    for collate, watched in ((known, 0), (lambda rows: {}, 1)):
        data = TrainingData(model, DataLoader(rows, collate_fn=collate), batch_size=2, tokens=8)
        data.watch()
        assert len(model._forward_pre_hooks) == watched
        data.close()
    assert not model._forward_pre_hooks


# --- interrupts -----------------------------------------------------------------------------------

OURS = [m.__file__ for m in (merge_callback.stand_ins, merge_callback.undo,
                             merge_callback.exact_maths)]  # fmt: skip


def interrupted(work, at):
    """Raise KeyboardInterrupt at the line event of that number; how many there were."""
    count = 0

    def local(frame, event, arg):
        nonlocal count
        if event == "line":
            count += 1
            if count == at:
                raise KeyboardInterrupt
        return local

    def trace(frame, event, arg):
        return local if frame.f_code.co_filename in OURS else None

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        work()
    except KeyboardInterrupt:
        pass
    finally:
        sys.settrace(before)
    return count


def settings():
    backends = torch.backends
    return (
        torch.get_default_dtype(),
        backends.mkldnn.matmul.fp32_precision,
        backends.cuda.matmul.fp32_precision,
        torch.is_autocast_enabled("cpu"),
        random.getstate(),
        torch.get_rng_state(),
    )


def test_ctrl_c_at_any_line_leaves_model_and_settings_as_they_were(tmp_path):
    model = qlora(tmp_path, lora_dropout=0.5).train()
    base = model.get_base_model()

    def work():
        with generators_kept(), evaluating(base), exact_maths(["cpu"]), in_float32(base):
            torch.rand(1)
            with standing_in(base, {"lm_head": lambda x: x, "model.norm": lambda x: x}):
                with Undone(lambda undo: hooked(undo, base.lm_head)):
                    base.lm_head.register_forward_hook(lambda *_: None)
            with without_adapters(model):
                pass

    before, outside = snapshot(model), settings()
    total = interrupted(work, -1)
    assert total > 80
    for at in range(1, total + 1):
        interrupted(work, at)
        assert same(before, snapshot(model)) and same(outside, settings()), at


def test_an_undo_that_is_cut_off_goes_on():
    """All that was registered runs, whatever one of them raises."""
    left = {"a": 1}

    def raising():
        raise KeyboardInterrupt

    def change(undo):
        merge_callback.undo.put(undo, left, "a", 2)
        undo.callback(raising)
        merge_callback.undo.put(undo, left, "b", 3)

    with pytest.raises(KeyboardInterrupt), Undone(change):
        assert left == {"a": 2, "b": 3}
    assert left == {"a": 1}


# --- threads and devices --------------------------------------------------------------------------


@pytest.mark.parametrize("error", [RuntimeError("can't start new thread"), KeyboardInterrupt()])
def test_a_thread_that_does_not_start_keeps_no_other_waiting(monkeypatch, error):
    start, begun = threading.Thread.start, []

    def second_fails(self):
        begun.append(self)
        if len(begun) == 2:
            raise error
        start(self)

    before = torch.get_num_threads()
    monkeypatch.setattr(threading.Thread, "start", second_fails)
    expected = MergeError if isinstance(error, RuntimeError) else KeyboardInterrupt
    with pytest.raises(expected) as caught:
        threads_of_one_core(2, "few")
    if expected is MergeError:
        assert "no thread can be started (can't start new thread); raise the limit" in str(
            caught.value
        )
    begun[0].join(10)
    assert not begun[0].is_alive() and torch.get_num_threads() == before


def test_what_a_thread_does_first_may_fail():
    def broken():
        raise ValueError("no priority")

    with pytest.raises(ValueError, match="no priority"):
        threads_of_one_core(1, "one", broken)


@pytest.mark.parametrize("kind", ["nf4", "nf4-nested", "fp4"])
def test_a_weight_read_on_another_device_stays_where_it_is(tmp_path, kind):
    model = qlora(tmp_path, kind)
    layer = model.get_base_model().model.layers[0].self_attn.q_proj.base_layer
    stored = read_weights(model.get_base_model())["model.layers.0.self_attn.q_proj.weight"].stored
    before = snapshot(model)
    elsewhere = torch.device("meta")
    for ask in (stored.scales, stored.decode, stored.rows):
        try:
            ask(elsewhere)
        except Exception as error:  # of kernels that have no meta device
            assert "meta" in str(error).lower() or isinstance(error, NotImplementedError)
    state = layer.weight.quant_state
    parts = [
        layer.weight,
        state.absmax,
        state.code,
        *((state.offset, state.state2.absmax) if state.nested else ()),
    ]
    assert {part.device.type for part in parts} == {"cpu"}
    assert same(before, snapshot(model))


def test_a_merge_leaves_a_tokenizer_and_layers_that_never_ran_as_they_were(tmp_path):
    model = adapt(load_base(save_base(tmp_path / "base"), "nf4-nested"))
    words = tokenizer()
    words("w1 w2 w3", truncation=True, max_length=2, padding="max_length")
    backend = words.backend_tokenizer.to_str()
    layer = model.get_base_model().model.layers[0].mlp.up_proj.base_layer
    before = {k: v for k, v in vars(layer).items() if k.startswith("compute")}
    assert before["compute_type_is_set"] in (True, False)
    merge_adapter(model, tmp_path / "out", processing_class=words, progress=False)
    assert words.backend_tokenizer.to_str() == backend
    assert {k: v for k, v in vars(layer).items() if k.startswith("compute")} == before
    assert isinstance(model.get_base_model(), nn.Module)


# --- what the process has set ---------------------------------------------------------------------


@contextlib.contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


AROUND = {
    "inference mode": torch.inference_mode,
    "no grad": torch.no_grad,
    "grad": torch.enable_grad,
    "bfloat16 by default": lambda: default_dtype(torch.bfloat16),
    "float64 by default": lambda: default_dtype(torch.float64),
    "the meta device by default": lambda: torch.device("meta"),
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "tensors saved elsewhere": torch.autograd.graph.save_on_cpu,
    "deterministic algorithms": lambda: deterministic(),
    "warnings as errors": lambda: warnings.catch_warnings(action="error"),
}


@contextlib.contextmanager
def deterministic():
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A model, and what merges of it write where nothing is set."""
    root = tmp_path_factory.mktemp("plain")
    model = qlora(root)
    return model, {r: written(model, root / r, r) for r in ("stochastic", "tuned")}


def written(model, out, rounding):
    with torch.device("cpu"):
        data = {"verification_data": batches(2)}
        if rounding == "tuned":
            data["calibration_data"] = batches(4, seed=1)
    methods = ["merged_4bit", "merged_16bit"]
    result = merge_adapter(
        model, out, save_method=methods, rounding=rounding, processing_class=tokenizer(),
        progress=False, **data,
    )  # fmt: skip
    checks = result.manifest["verification"]["checks"]
    assert set(checks.values()) == {"passed"}, checks
    return [(result.paths[m] / "model.safetensors").read_bytes() for m in methods]


@pytest.mark.parametrize("rounding", ["stochastic", "tuned"])
@pytest.mark.parametrize("around", AROUND)
def test_what_the_process_has_set_changes_no_byte(tmp_path, plain, around, rounding):
    model, wanted = plain
    before = snapshot(model)
    with AROUND[around]():
        found = written(model, tmp_path / "out", rounding)
    assert found == wanted[rounding]
    assert same(before, snapshot(model))


@pytest.mark.parametrize("rounding", ["stochastic", "calibrated"])
def test_endless_data_ends(tmp_path, plain, rounding):
    def endless():
        while True:
            yield from batches(1)

    result = merge_adapter(
        plain[0], tmp_path / "out", rounding=rounding, calibration_data=endless(),
        verification_data=endless(), calibration_tokens=300, verify_tokens=300, progress=False,
    )  # fmt: skip
    assert result.manifest["verification"]["models"]["merged_4bit"]["rows"] == 3 * 4 * 31


def test_texts_that_are_too_long_for_the_model_are_said(tmp_path, caplog):
    """A model with learned positions has no answer for them, so there is nothing to compare."""
    config = GPT2Config(n_embd=128, n_layer=1, n_head=4, vocab_size=304, n_positions=16)
    torch.manual_seed(1)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "base")
    model = adapt(
        load_base(tmp_path / "base", "float32"), target_modules=["c_attn"], fan_in_fan_out=True
    )
    result = merge_adapter(model, tmp_path / "out", verification_data=batches(1), progress=False)
    found = result.manifest["verification"]
    assert found["data"] is None and found["problems"] == []
    assert found["checks"]["outputs"].startswith("not run: the live model does not run on these")
    assert "outputs not checked (the live model does not run on these data" in caplog.text
