"""A weight in parts: what comes out is what the whole weight gives, and threads change no byte."""

import bitsandbytes.functional as bnb
import pytest
import torch
from models import QUANTISED, adapt, load_base, qlora, save_base
from safetensors.torch import load_file

from merge_callback import cores, merge_adapter
from merge_callback.adapters.lora import Dora, LowRank
from merge_callback.adapters.tokens import Rows
from merge_callback.codecs import encode, row_parts
from merge_callback.codecs.bnb4 import Bnb4, Bnb4Weight
from merge_callback.codecs.bnb8 import Bnb8Weight
from merge_callback.codecs.plain import Plain, PlainWeight
from merge_callback.live import Weight
from merge_callback.merging import Merging
from merge_callback.rounding.grid import LARGEST_BLOCK, RUN
from merge_callback.rounding.stochastic import stochastic

CPU = torch.device("cpu")
OUT, IN = 1400, 576  # more than one part, and rows that are no whole blocks of 4096


def stored(kind):
    weight = torch.randn(OUT, IN)
    if kind == "plain":
        return PlainWeight(weight.bfloat16())
    if kind == "int8":
        codes, scales, _ = bnb.int8_vectorwise_quant(weight.half())
        return Bnb8Weight(codes, scales)
    packed, state = bnb.quantize_4bit(
        weight.bfloat16(), compress_statistics=kind.endswith("nested"), quant_type=kind[:3]
    )
    return Bnb4Weight(packed, state)


@pytest.mark.parametrize("shape", [(7,), (5, 13), (OUT, IN), (3, 1 << 17), (3, 700, 500), (1, 1)])
def test_parts_are_all_rows_in_whole_blocks(shape):
    parts = list(row_parts(shape, CPU))
    row = torch.Size(shape[1:]).numel()
    assert [part.start for part in parts] == [0, *(part.stop for part in parts[:-1])]
    assert parts[-1].stop == shape[0]
    for part in parts[:-1]:
        assert (part.stop - part.start) * row % LARGEST_BLOCK == 0
    step = parts[0].stop * row
    assert step <= max(RUN, row * LARGEST_BLOCK) and len(list(row_parts((OUT, IN), CPU))) > 3


@pytest.mark.parametrize("kind", [*QUANTISED, "int8", "plain"])
def test_rows_decode_as_the_whole_weight_does(kind):
    weight = stored(kind)
    decode = weight.rows(CPU)
    parts = [decode(rows) for rows in row_parts(weight.shape, CPU)]
    assert len(parts) > 3
    assert torch.equal(torch.cat(parts), weight.decode(CPU))


def updates():
    a, b, down, up = (torch.randn(*s) for s in ((4, IN), (OUT, 4), (4, OUT), (IN, 4)))
    return {
        "lora": LowRank(a, b, 0.5),
        "lora, transposed": LowRank(down, up, 0.5, transposed=True),
        "dora": Dora(LowRank(a, b, 0.5), torch.rand(OUT)),
        "dora, transposed": Dora(LowRank(down, up, 0.5, transposed=True), torch.rand(IN)),
        "tokens": Rows((0, 455, 456, OUT - 1), torch.randn(4, IN)),
    }


@pytest.mark.parametrize("kind", updates())
def test_an_update_of_rows_is_that_of_the_whole_weight(kind):
    weight = Weight("w", stored("nf4-nested"), updates=(updates()[kind],))
    bases, merged = zip(*weight.in_parts(CPU), strict=True)
    assert len(merged) > 3
    base = weight.decoded()
    assert torch.equal(torch.cat(bases), base)
    whole = weight.merged(base)
    assert (whole - base).abs().max() > 0.1
    assert torch.allclose(torch.cat(merged), whole, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("rounding", ["nearest", "stochastic", "chosen", "16 bits"])
def test_what_is_added_is_what_a_loader_decodes(rounding):
    source = stored("nf4-nested")
    weight = Weight("w", source, updates=(updates()["lora"],))
    exact = weight.merged(weight.decoded())
    chosen = stochastic(exact, source.grid, source.scales(CPU)) if rounding == "chosen" else None
    container = {
        "nearest": Bnb4(grid=source.grid, dtype=torch.float32),
        "stochastic": Bnb4(grid=source.grid, dtype=torch.float32, base=source),
        "chosen": Bnb4(grid=source.grid, dtype=torch.float32, rounded=chosen),
        "16 bits": Plain(torch.bfloat16),
    }[rounding]
    merging = Merging(weight, {"here": container}, CPU)
    added = torch.cat([written["here"] for _, _, written in merging])
    tensors = merging.tensors("here")
    loaded = torch.cat(list(container.values("w", tensors, exact.numel()))).view(OUT, IN)
    assert torch.equal(added.float(), loaded)
    assert ((loaded - exact).norm() / exact.norm()) < (0.01 if rounding == "16 bits" else 0.3)
    whole = encode(container, "w", exact)
    assert all(torch.equal(tensors[name], whole[name]) for name in whole)


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_two_threads_write_the_bytes_of_one(tmp_path, monkeypatch, rounding):
    model = qlora(tmp_path)
    settings = {"save_method": ["merged_4bit", "merged_16bit"], "rounding": rounding}
    alone = merge_adapter(model, tmp_path / "out", verify=False, **settings)
    started, start = [], cores.one_core_each

    def counted(count):
        started.append(count)
        return start(count)

    monkeypatch.setattr(cores, "one_core_each", counted)
    torch.set_num_threads(2)
    try:
        together = merge_adapter(model, tmp_path / "out", verify=False, **settings)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)
    assert started == [2]
    for method, path in alone.paths.items():
        one, other = (load_file(p / "model.safetensors") for p in (path, together.paths[method]))
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_two_threads_are_verified_to_the_last_place_of_a_large_weight(tmp_path):
    """torch adds 32,768 numbers and more, the scales of 2 million weights, in as many parts as it
    has threads, and codes of scales next to a boundary go over it with the sum's last place."""
    base = save_base(tmp_path / "base", intermediate_size=32768, num_hidden_layers=1)
    model = adapt(load_base(base, "nf4-nested"))
    torch.set_num_threads(2)
    try:
        merge_adapter(model, tmp_path / "out", rounding="nearest", progress=False)
    finally:
        torch.set_num_threads(1)


def test_what_fails_in_a_thread_is_raised_and_publishes_nothing(tmp_path):
    from merge_callback import MergeError

    model = qlora(tmp_path)
    layer = model.get_base_model().model.layers[0].mlp.down_proj
    layer.lora_A["default"].weight.data[0, 0] = torch.nan
    torch.set_num_threads(2)
    try:
        with pytest.raises(MergeError, match=r"layers\.0\.mlp\.down_proj\.weight.*not finite"):
            merge_adapter(model, tmp_path / "out")
    finally:
        torch.set_num_threads(1)
    assert list((tmp_path / "out").iterdir()) == []


def test_threads_of_one_core_leave_others_theirs():
    torch.set_num_threads(2)
    try:
        with cores.one_core_each(2) as threads:
            assert {threads.submit(torch.get_num_threads).result() for _ in range(8)} == {1}
            assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)
