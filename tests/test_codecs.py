"""Containers: what bitsandbytes reads, bit for bit; odd shapes included."""

import bitsandbytes.functional as bnb
import pytest
import torch

from merge_callback.codecs import encode
from merge_callback.codecs.bnb4 import Bnb4, Bnb4Weight
from merge_callback.codecs.plain import Plain, PlainWeight
from merge_callback.rounding.grid import RUN, Grid
from merge_callback.rounding.nearest import nearest

SHAPES = [(64, 128), (3, 70), (5, 13), (1, 1), (2, 31), (130, 64)]


def container(quant_type="nf4", nested=True, blocksize=64, dtype=torch.bfloat16):
    grid = Grid(quant_type=quant_type, nested=nested, blocksize=blocksize)
    return Bnb4(grid=grid, dtype=dtype)


def load(encoded, name="w"):
    parts = {k: v for k, v in encoded.items() if k != name}
    return encoded[name], bnb.QuantState.from_dict(parts, device="cpu")


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("blocksize", [32, 64, 4096])
@pytest.mark.parametrize("shape", SHAPES)
def test_encoding_is_that_of_bitsandbytes(shape, blocksize, nested, quant_type):
    weight = torch.randn(shape)
    codec = container(quant_type, nested, blocksize)
    encoded = encode(codec, "w", weight)
    codes, state = bnb.quantize_4bit(
        weight, blocksize=blocksize, compress_statistics=nested, quant_type=quant_type
    )
    state.dtype = torch.bfloat16
    packed, loaded = load(encoded)
    assert torch.equal(packed, codes)
    expected = state.as_dict(packed=True)
    for key, value in loaded.as_dict(packed=True).items():
        assert torch.equal(value, expected[key]), key
    specs = codec.specs("w", shape)
    assert {n: (tuple(t.shape), t.dtype) for n, t in encoded.items()} == {
        n: (s.shape, s.dtype) for n, s in specs.items()
    }
    assert sum(s.nbytes for s in specs.values()) % 8 == 0


@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_values_are_what_a_loader_decodes(shape, nested):
    codec = container(nested=nested, dtype=torch.float32)
    encoded = encode(codec, "w", torch.randn(shape))
    values = torch.cat(list(codec.values("w", encoded, torch.Size(shape).numel())))
    packed, state = load(encoded)
    assert torch.equal(values, bnb.dequantize_4bit(packed, state).reshape(-1))


def test_large_weights_are_handled_in_runs_that_change_nothing():
    weight = torch.randn(3, RUN // 2 + 64)
    packed, scales = nearest(weight, Grid(quant_type="nf4", blocksize=64, nested=True))
    codes, state = bnb.quantize_4bit(weight, quant_type="nf4")
    assert torch.equal(packed, codes) and torch.equal(scales, state.absmax)
    codec = container(nested=False, dtype=torch.float32)
    runs = list(codec.values("w", encode(codec, "w", weight), weight.numel()))
    assert [len(run) for run in runs] == [RUN, weight.numel() - RUN]
    assert torch.equal(torch.cat(runs), bnb.dequantize_4bit(codes, state).reshape(-1))


def test_the_longest_offset_has_room():
    codec = container()
    weight = torch.full((64, 64), -1.1754943508222875e-38)  # no float32 has a longer decimal
    packed, state = load(encode(codec, "w", weight))
    assert packed.shape == (2048, 1)
    assert state.offset == 1.1754943508222875e-38


@pytest.mark.parametrize("nested", [True, False])
def test_a_stored_weight_decodes_elsewhere_as_at_home(nested):
    codes, state = bnb.quantize_4bit(torch.randn(64, 64), compress_statistics=nested)
    stored = Bnb4Weight(codes, state)
    assert stored.shape == (64, 64) and stored.dtype == torch.float32
    meta = stored.decode(torch.device("meta"))
    assert meta.shape == (64, 64) and meta.device.type == "meta"
    assert state.absmax.device.type == "cpu"  # the live state stays where it is
    assert torch.equal(stored.decode(torch.device("cpu")), bnb.dequantize_4bit(codes, state))


def test_a_plain_copy_keeps_the_bytes_and_transposes_when_told():
    tensor = torch.randn(3, 5).bfloat16()
    stored = PlainWeight(tensor)
    assert torch.equal(Plain(torch.bfloat16).copy("w", stored, torch.device("cpu"))["w"], tensor)
    turned = Plain(torch.bfloat16, transposed=True)
    assert turned.specs("w", (3, 5))["w"].shape == (5, 3)
    encoded = turned.copy("w", stored, torch.device("cpu"))
    assert torch.equal(encoded["w"], tensor.t())
    assert torch.equal(torch.cat(list(turned.values("w", encoded, 15))), tensor.float().flatten())


def test_a_weight_fits_a_narrower_dtype_only_without_loss():
    weight = PlainWeight(torch.tensor([1.0, 0.5]))
    assert weight.fits(torch.bfloat16)
    assert not weight.fits(torch.float32)
    assert not PlainWeight(torch.tensor([1.0, 0.1])).fits(torch.bfloat16)
    assert not PlainWeight(torch.tensor([1, 2])).fits(torch.bfloat16)
