"""Faults planted in code, config, tokenizer, files and data: none is published silently.

With data no fault of any kind is; without data none of config, tokenizer, buffers and files.
"""

import json
import logging
from contextlib import ExitStack
from types import SimpleNamespace

import bitsandbytes
import pytest
import torch
from models import adapt, load_base, save_base, tokenizer
from peft import PeftModel
from safetensors.torch import load_file, save_file
from test_calibration import batches
from test_verification import before_sealing

import merge_callback.codecs
from merge_callback import MergeError, merge_adapter
from merge_callback.adapters import lora, tokens
from merge_callback.calibration import choice, distillation, sequential
from merge_callback.codecs import bnb4, encode, plain
from merge_callback.rounding import grid
from merge_callback.shards import CheckpointWriter
from merge_callback.store import Draft
from merge_callback.verification import checks
from merge_callback.verification.outputs import Speaker

pytestmark = pytest.mark.faults

TABLE = "A fault planted before verification"
FIRST = "model.layers.0.mlp.up_proj"
FAULTS = []


def fault(kind, what, outcome="refused", **settings):
    """Note a fault. The function plants it: it is given a monkeypatch and the live model."""

    def note(plant):
        FAULTS.append(
            SimpleNamespace(kind=kind, what=what, plant=plant, outcome=outcome, settings=settings)
        )
        return plant

    return note


FOUR = {"rounding": "stochastic"}
NEAREST = {"rounding": "nearest"}
SIXTEEN = {"save_method": "merged_16bit"}
LORA = {"save_method": "lora"}


# --- code: what is merged -------------------------------------------------------------------------


@fault("code", "one layer's adapter is left out", **FOUR)
@fault("code", "one layer's adapter is left out of 16 bits", **SIXTEEN)
def _(patch, model):
    left_out = model.get_base_model().model.layers[1].self_attn.k_proj
    whole = lora.updates
    patch.setattr(lora, "updates", lambda layer: () if layer is left_out else whole(layer))


@fault("code", "every adapter is left out", **SIXTEEN)
def _(patch, model):
    patch.setattr(lora.LowRank, "add_to", lambda *args: None)


@fault("code", "a scaling is off by 10 %", **FOUR)
def _(patch, model):
    whole = lora._update

    def wrong(layer, name):
        found = whole(layer, name)
        return lora.LowRank(found.a, found.b, 1.1 * found.scaling, found.transposed)

    patch.setattr(lora, "_update", wrong)


@fault("code", "the adapter is missing from all rows but the first ones", **FOUR)
@fault("code", "the adapter is missing from all rows but the first ones, 16 bits", **SIXTEEN)
def _(patch, model):
    patch.setattr(merge_callback.codecs, "RUN", 4096)  # 32 rows of 128
    whole = lora.LowRank.add_to

    def first(self, merged, base, rows=slice(None)):
        if not rows.start:
            whole(self, merged, base, rows)

    patch.setattr(lora.LowRank, "add_to", first)


@fault("code", "rows are decoded from one part too early", **SIXTEEN)
@fault("code", "rows are decoded from one part too early, 4 bits", **FOUR)
def _(patch, model):
    patch.setattr(merge_callback.codecs, "RUN", 4096)
    whole = bnb4.Bnb4Weight.rows

    def early(self, device):
        decode = whole(self, device)
        return lambda part: decode(slice(part.start - 32, part.stop - 32) if part.start else part)

    patch.setattr(bnb4.Bnb4Weight, "rows", early)


@fault("code", "the offset of double quantisation is forgotten", **SIXTEEN)
def _(patch, model):
    def without(state):
        if not state.nested:
            return state.absmax.float()
        return bitsandbytes.functional.dequantize_blockwise(state.absmax, state.state2)

    patch.setattr(bnb4, "_scales", without)


@fault("code", "the last block of a weight has the first one's scale", **SIXTEEN)
def _(patch, model):
    whole = grid.Grid.decode

    def wrong(self, packed, stored, numel, dtype):
        stored = stored.clone()
        stored[-1] = 3 * stored[0]
        return whole(self, packed, stored, numel, dtype)

    patch.setattr(grid.Grid, "decode", wrong)


@fault("code", "DoRA's magnitude is ignored", model="dora", **SIXTEEN)
def _(patch, model):
    patch.setattr(lora.Dora, "add_to", lambda self, *args: self.low_rank.add_to(*args))


@fault("code", "trained tokens are left out", model="tokens", **SIXTEEN)
def _(patch, model):
    patch.setattr(tokens.Rows, "add_to", lambda *args: None)


@fault("code", "the base's head is written in place of the trained one", model="head", **SIXTEEN)
def _(patch, model):
    import merge_callback.live as live

    whole = live._walk

    def original(module, path, *, replaced):
        if isinstance(module, live.ModulesToSaveWrapper):
            yield from whole(module.original_module, path, replaced=True)
        else:
            yield from whole(module, path, replaced=replaced)

    patch.setattr(live, "_walk", original)


# --- code: how it is rounded ----------------------------------------------------------------------


@fault("code", "one code in sixteen is its mirror image", **NEAREST)
@fault("code", "one code in sixteen is its mirror image, stochastic", **FOUR)
def _(patch, model):
    whole = grid.Codes.pack

    def mirrored(self, places):
        places = places.clone()
        places.view(-1)[::16] = 15 - places.view(-1)[::16]
        return whole(self, places)

    patch.setattr(grid.Codes, "pack", mirrored)


@fault("code", "codes are rounded up always", **FOUR)
def _(patch, model):
    patch.setattr(torch, "rand", lambda *size, **settings: torch.zeros(*size))


@fault("code", "codes are rounded to nearest, back to the base", **FOUR)
def _(patch, model):
    patch.setattr(torch, "rand", lambda *size, **settings: torch.full(*size, 0.5))


@fault("code", "scales are a third too large", **NEAREST)
@fault("code", "scales are a third too large, stochastic", **FOUR)
def _(patch, model):
    whole = grid.Grid.largest
    patch.setattr(grid.Grid, "largest", lambda self, run: 1.33 * whole(self, run))


@fault("code", "codes are packed with the halves of a byte exchanged", **NEAREST)
def _(patch, model):
    whole = grid.Codes.pack

    def exchanged(self, places):
        packed = whole(self, places)
        return (packed >> 4) | (packed << 4)

    patch.setattr(grid.Codes, "pack", exchanged)


@fault("code", "16 bits are cut off and not rounded", **SIXTEEN)
def _(patch, model):
    def cut(self, part):
        place = self._rows[self._done : self._done + len(part)]
        self._done += len(part)
        short = (part.contiguous().view(torch.int32) & -65536).view(torch.float32)
        return place.copy_(short)

    patch.setattr(plain._Encoder, "add", cut)


@fault("code", "chosen codes are those of another layer", rounding="calibrated")
def _(patch, model):
    whole = choice.calibrate

    def exchanged(*args, **settings):
        done = whole(*args, **settings)
        gate, up = (f"model.layers.0.mlp.{n}_proj.weight" for n in ("gate", "up"))
        done.rounded[gate], done.rounded[up] = done.rounded[up], done.rounded[gate]
        return done

    patch.setattr(choice, "calibrate", exchanged)


@fault("code", "chosen columns are in the reverse order", rounding="calibrated")
def _(patch, model):
    whole = sequential.calibrated

    def reverse(rows, *args):
        for row, rounded in zip(rows, whole(rows, *args), strict=True):
            packed = rounded.packed.view(len(row.weight), -1).flip(1).reshape(-1, 1)
            yield rounded._replace(packed=packed)

    patch.setattr(sequential, "calibrated", reverse)


@fault("code", "tuned scales are twice too large", rounding="tuned")
def _(patch, model):
    whole = distillation._Layer.rounded

    def larger(self):
        found = whole(self)
        return found._replace(scales=2 * found.scales)

    patch.setattr(distillation._Layer, "rounded", larger)
    patch.setattr(distillation._Lessons, "divergence", iter_of(1.0, 0.5))


def iter_of(*values):
    given = iter(values)
    return lambda self: next(given)


# --- code: how it is written ----------------------------------------------------------------------


@fault("code", "two weights of one shape change places", **SIXTEEN)
@fault("code", "two weights of one shape change places, 4 bits", **FOUR)
def _(patch, model):
    write, first = CheckpointWriter.write, {}

    def exchanged(self, name, tensor):
        if name.endswith(("gate_proj.weight", "up_proj.weight")):
            tensor = first.setdefault(name.split(".mlp.")[0], tensor)
        write(self, name, tensor)

    patch.setattr(CheckpointWriter, "write", exchanged)


@fault("code", "the base is written in place of the merge", **SIXTEEN)
@fault("code", "the base is written in place of the merge, 4 bits", **FOUR)
def _(patch, model):
    from merge_callback import weights

    whole = weights._encode_on

    def bare(plan, weight, device):
        for method, _, arrived in whole(plan, weight, device):
            container = plan.containers[method][weight.key]
            base = weight.decoded(device).float()
            yield method, encode(container, weight.key, base), arrived

    patch.setattr(weights, "_encode_on", bare)


@fault("code", "an untouched norm is written as ones", **FOUR)
def _(patch, model):
    whole = plain.Plain.copy

    def ones(self, name, stored, device):
        found = whole(self, name, stored, device)
        return {k: torch.ones_like(v) if "layernorm" in k else v for k, v in found.items()}

    patch.setattr(plain.Plain, "copy", ones)


# --- config, generation config, tokenizer ---------------------------------------------------------


def edit(file, **changes):
    """Plants other fields in a JSON file; None takes one out."""

    def plant(patch, model):
        def change(path):
            fields = json.loads((path / file).read_text())
            for name, value in changes.items():
                inner, _, last = name.rpartition("__")
                place = fields.setdefault(inner, {}) if inner else fields
                place[last] = value
                if value is None:
                    del place[last]
            (path / file).write_text(json.dumps(fields))

        before_sealing(patch, change)

    return plant


for what, changes in {
    "rope theta": {"rope_parameters__rope_theta": 5000.0},
    "rope scaling": {"rope_parameters__rope_type": "linear", "rope_parameters__factor": 2.0},
    "epsilon of the norms": {"rms_norm_eps": 1e-3},
    "number of heads": {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 64},
    "longest input": {"max_position_embeddings": 64},
    "activation": {"hidden_act": "gelu"},
    "class": {"architectures": ["MistralForCausalLM"]},
    "no class": {"architectures": None},
    "dtype": {"dtype": "float16"},
    "no cache": {"use_cache": False},
    "end token": {"eos_token_id": 5},
    "tie flag": {"tie_word_embeddings": False},
    "dropout": {"attention_dropout": 0.5},
    "start of the weights": {"initializer_range": 0.5},
    "vocabulary": {"vocab_size": 305},
    "scores": {"logits_to_keep": 1},
    "compute dtype": {"quantization_config__bnb_4bit_compute_dtype": "float16"},
    "flag of double quantisation": {"quantization_config__bnb_4bit_use_double_quant": False},
    "4-bit type": {"quantization_config__bnb_4bit_quant_type": "fp4"},
    "storage dtype": {"quantization_config__bnb_4bit_quant_storage": "float32"},
    "skip list": {"quantization_config__llm_int8_skip_modules": ["up_proj", "lm_head"]},
    "no quantisation": {"quantization_config": None},
}.items():
    fault("config", f"config.json: {what}", **FOUR)(edit("config.json", **changes))
fault("config", "config.json: quantised 16 bits", **SIXTEEN)(
    edit("config.json", quantization_config={"load_in_4bit": True, "quant_method": "bitsandbytes"})
)
for what, changes in {
    "end token": {"eos_token_id": 5},
    "sampling": {"do_sample": True, "temperature": 0.3},
    "pad token": {"pad_token_id": 7},
}.items():
    planted = edit("generation_config.json", **changes)
    fault("config", f"generation_config.json: {what}", **FOUR)(planted)


def remove(name):
    def plant(patch, model):
        before_sealing(patch, lambda path: (path / name).unlink())

    return plant


for name in ("config.json", "generation_config.json"):
    fault("config", f"{name} is missing", **FOUR)(remove(name))
for name in ("tokenizer.json", "tokenizer_config.json"):
    fault("tokenizer", f"{name} is missing", **FOUR)(remove(name))
for what, changes in {
    "end token": {"eos_token": "w5"},
    "padding side": {"padding_side": "left"},
    "truncation side": {"truncation_side": "left"},
    "longest text": {"model_max_length": 17},
    "inputs": {"model_input_names": ["input_ids"]},
    "an added token": {"extra_special_tokens": ["<new>"]},
}.items():
    planted = edit("tokenizer_config.json", **changes)
    fault("tokenizer", f"tokenizer_config.json: {what}", **FOUR)(planted)


@fault("tokenizer", "the chat template is another one", **FOUR)
def _(patch, model):
    before_sealing(patch, lambda path: (path / "chat_template.jinja").write_text("{{ messages }}"))


@fault("tokenizer", "two words have changed places", **LORA)
@fault("tokenizer", "two words have changed places, beside 4 bits", **FOUR)
def _(patch, model):
    def change(path):
        fields = json.loads((path / "tokenizer.json").read_text())
        words = fields["model"]["vocab"]
        words["w1"], words["w2"] = words["w2"], words["w1"]
        (path / "tokenizer.json").write_text(json.dumps(fields))

    before_sealing(patch, change)


@fault("tokenizer", "an added token is cut out of words", **FOUR)
def _(patch, model):
    def change(path):
        fields = json.loads((path / "tokenizer.json").read_text())
        fields["added_tokens"][0]["lstrip"] = True
        (path / "tokenizer.json").write_text(json.dumps(fields))

    before_sealing(patch, change)


# --- buffers --------------------------------------------------------------------------------------


@fault("buffers", "rotary frequencies of the loaded model are others", **FOUR)
@fault("buffers", "rotary frequencies of the loaded model are others, 16 bits", **SIXTEEN)
def _(patch, model):
    whole = checks.rebuild

    def other(*args, **given):
        made = whole(*args, **given)
        made.model.rotary_emb.inv_freq *= 1.01
        return made

    patch.setattr(checks, "rebuild", other)


# --- files ----------------------------------------------------------------------------------------


def retouch(patch, change, file="model.safetensors"):
    """Change tensors before they are hashed: what the writer wrote is wrong."""

    def changed(path):
        found = load_file(path / file)
        change(found)
        save_file(found, path / file, {"format": "pt"})

    patch.setattr(Draft, "verify", lambda self: None)
    before_sealing(patch, changed)


def settings_of(tensors, **changes):
    """Other values in the packed JSON of a quant state."""
    (name,) = (n for n in tensors if n.startswith(f"{FIRST}.weight.quant_state"))
    fields = json.loads(bytes(tensors[name].numpy()))
    text = json.dumps(fields | changes).encode()
    tensors[name] = torch.frombuffer(bytearray(text), dtype=torch.uint8)


def rolled(tensors, name):
    tensors[name] = tensors[name].roll(1)


for what, change in {
    "a tensor is missing": lambda t: t.pop(f"{FIRST}.weight"),
    "a tensor too many": lambda t: t.update({"model.extra.weight": torch.zeros(2)}),
    "a norm is shorter": lambda t: t.update({"model.norm.weight": torch.ones(64)}),
    "a norm's values are rolled by one": lambda t: rolled(t, "model.norm.weight"),
    "one code in a hundred is its neighbour's neighbour": (
        lambda t: t[f"{FIRST}.weight"].view(-1)[::100].bitwise_xor_(0x20)
    ),
    "scales are rolled by one block": lambda t: rolled(t, f"{FIRST}.weight.absmax"),
    "codes are rolled by one byte": lambda t: rolled(t, f"{FIRST}.weight"),
    "the scales' own scales are doubled": (lambda t: t[f"{FIRST}.weight.nested_absmax"].mul_(2)),
    "the offset of the scales is 0": lambda t: settings_of(t, nested_offset=0.0),
    "the blocksize is doubled": lambda t: settings_of(t, blocksize=128),
    "a weight decodes to another dtype": lambda t: settings_of(t, dtype="float16"),
    "the embedding's first rows are exchanged": (
        lambda t: t["model.embed_tokens.weight"][:2].copy_(
            t["model.embed_tokens.weight"][:2].flip(0)
        )
    ),
}.items():
    fault("files", what, **FOUR)(lambda patch, model, change=change: retouch(patch, change))
for what, change in {
    "16 bits: one row is another's": lambda t: t[f"{FIRST}.weight"][3].copy_(
        t[f"{FIRST}.weight"][4]
    ),
    "16 bits: one weight is transposed": lambda t: t.update(
        {
            "model.layers.0.self_attn.q_proj.weight": t["model.layers.0.self_attn.q_proj.weight"]
            .t()
            .contiguous()
        }
    ),
    "16 bits: one value is off by 5 %": lambda t: t[f"{FIRST}.weight"][0, :1].mul_(1.05),
    "16 bits: a value is not finite": lambda t: t[f"{FIRST}.weight"][0, :1].fill_(torch.inf),
    "16 bits: two layers have changed places": lambda t: t.update(
        {
            f"model.layers.{i}.mlp.down_proj.weight": t[
                f"model.layers.{1 - i}.mlp.down_proj.weight"
            ].clone()
            for i in (0, 1)
        }
    ),
}.items():
    fault("files", what, **SIXTEEN)(lambda patch, model, change=change: retouch(patch, change))


@fault("files", "a byte changes on the disk", **FOUR)
def _(patch, model):
    verify = Draft.verify

    def damaged(self):
        data = bytearray((self.path / "model.safetensors").read_bytes())
        data[-1] ^= 1
        (self.path / "model.safetensors").write_bytes(data)
        verify(self)

    patch.setattr(Draft, "verify", damaged)


Q = "base_model.model.model.layers.0.self_attn.q_proj"
for what, change in {
    "lora: one value is another": lambda t: t[f"{Q}.lora_B.weight"][0, :1].add_(1e-3),
    "lora: a factor is missing": lambda t: t.pop(f"{Q}.lora_B.weight"),
    "lora: factors are in another dtype": lambda t: t.update(
        {f"{Q}.lora_A.weight": t[f"{Q}.lora_A.weight"].half()}
    ),
}.items():
    fault("files", what, **LORA)(
        lambda patch, model, change=change: retouch(patch, change, "adapter_model.safetensors")
    )
for what, changes in {
    "alpha": {"lora_alpha": 16},
    "rsLoRA": {"use_rslora": True},
    "target modules": {"target_modules": ["q_proj"]},
    "a pattern of ranks": {"rank_pattern": {"q_proj": 2}},
    "DoRA": {"use_dora": True},
}.items():
    fault("files", f"lora: adapter_config.json: {what}", **LORA)(
        edit("adapter_config.json", **changes)
    )


@fault("files", "lora: the live adapter's scaling is in no file", **LORA)
def _(patch, model):
    layer = model.get_base_model().model.layers[0].self_attn.q_proj
    patch.setitem(layer.scaling, "default", 3.0)


# --- data -----------------------------------------------------------------------------------------


@fault("data", "no label counts", "said", **FOUR)
def _(patch, model):
    return [b | {"labels": torch.full_like(b["input_ids"], -100)} for b in batches(2)]


@fault("data", "each text is one token", "said", **FOUR)
def _(patch, model):
    return [{"input_ids": torch.full((4, 1), 7)}]


@fault("data", "the model cannot take it", "said", **FOUR)
def _(patch, model):
    return [{"input_ids": torch.full((1, 4), 100000)}]


@fault("data", "the live model's outputs are not finite", **FOUR)
def _(patch, model):
    patch.setattr(model.get_base_model().model.norm, "variance_epsilon", float("nan"))


@fault("data", "the merged model does not run on it", **FOUR)
def _(patch, model):
    whole = Speaker.outputs

    def silent(self, batch):
        if self.model is not model.get_base_model():
            raise RuntimeError("no kernel")
        return whole(self, batch)

    patch.setattr(Speaker, "outputs", silent)


# --- the law --------------------------------------------------------------------------------------

KINDS = {
    None: {},
    "dora": {"use_dora": True},
    "tokens": {"trainable_token_indices": [5, 6]},
    "head": {"modules_to_save": ["lm_head"]},
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    made = {}

    def model(kind):
        if kind not in made:
            path = save_base(tmp_path_factory.mktemp("base"), tied=kind != "head")
            base = load_base(path, "nf4-nested")
            made[kind] = adapt(base, scale=1e-4, **KINDS[kind])
            with torch.no_grad():
                for name, parameter in made[kind].named_parameters():
                    if "modules_to_save" in name or "tokens_delta" in name:
                        parameter.add_(0.02 * torch.randn(parameter.shape))
                    if "magnitude" in name:
                        parameter.mul_(1.1)
        return made[kind]

    return model


def outcome(model, out, caplog, settings):
    """What becomes of a merge: refused, said in a warning, or published silently."""
    caplog.clear()
    caplog.set_level(logging.WARNING, logger="merge_callback")
    try:
        merge_adapter(model, out, processing_class=tokenizer(), progress=False, **settings)
    except MergeError:
        return "refused"
    expected = ("codes were chosen by chance", "rounding to 4 bits kept")  # of this rounding always
    told = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
    return "said" if any(not any(e in t for e in expected) for t in told) else "published"


def test_nothing_is_said_of_what_is_right(tmp_path, models, caplog):
    for kind in KINDS:
        for settings in (FOUR, NEAREST, SIXTEEN, LORA):
            for data in ({}, {"verification_data": batches(2)}):
                found = outcome(models(kind), tmp_path / "out", caplog, {**settings, **data})
                # Rounding to nearest loses what was trained, and says so where that shows.
                told = settings == NEAREST and data and "of what training gained" in caplog.text
                assert found == ("said" if told else "published"), (kind, settings, caplog.text)


@pytest.mark.parametrize("planted", FAULTS, ids=lambda f: f.what)
def test_a_planted_fault_is_not_published_silently(
    tmp_path, models, monkeypatch, caplog, planted, support
):
    settings = dict(planted.settings)
    model = models(settings.pop("model", None))
    assert isinstance(model, PeftModel)
    found = {}
    for column, data in (("without data", None), ("with data", batches(2))):
        with ExitStack() as stack:
            patch = stack.enter_context(pytest.MonkeyPatch.context())
            other = planted.plant(patch, model)
            given = settings if data is None else {**settings, "verification_data": other or data}
            if settings.get("rounding") in ("calibrated", "tuned"):
                given = given | {"calibration_data": batches(4, seed=1)}
                if data is None:
                    patch.setattr(checks, "_compare", lambda *args: "left out")
            found[column] = outcome(model, tmp_path / column, caplog, given)
            if found[column] == "refused":
                assert list((tmp_path / column).iterdir()) == []
    if planted.kind == "data":
        found["without data"] = ""
    support(TABLE, f"{planted.kind}: {planted.what}", "with data", "without data")
    support.found(found["with data"], found["without data"])
    assert found["with data"] == planted.outcome
    if planted.kind != "data":
        assert found["without data"] == "refused"


def test_there_are_enough():
    assert len(FAULTS) >= 40 and len({f.what for f in FAULTS}) == len(FAULTS)
