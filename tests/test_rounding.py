"""Ways to round: exact where they are exact, better than what they began with where not."""

import math
from dataclasses import replace

import bitsandbytes.functional as bnb
import pytest
import torch

from merge_callback.rounding import calibrated as rounding
from merge_callback.rounding.calibrated import Rows, calibrated, solve
from merge_callback.rounding.grid import RUN, Codes, Grid
from merge_callback.rounding.nearest import nearest
from merge_callback.rounding.steps import Steps
from merge_callback.rounding.stochastic import stochastic

CPU = torch.device("cpu")
GRIDS = [
    Grid(quant_type=quant_type, blocksize=64, nested=nested)
    for quant_type in ("nf4", "fp4")
    for nested in (True, False)
]
ids = [f"{g.quant_type}{'-nested' if g.nested else ''}" for g in GRIDS]


OUTLIERS = [-1e30, 1e30, 0.0, -0.0, math.inf, -math.inf, math.nan]


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def base(grid, shape, seed=0):
    """A base weight as a loader has it, its own grid (with its offset), and its scales."""
    scales = nearest(normal(*shape, seed=seed), grid).scales
    offset = float(scales.mean()) if grid.nested else None
    own = Grid(
        quant_type=grid.quant_type, blocksize=grid.blocksize, nested=grid.nested, offset=offset
    )
    packed = nearest(normal(*shape, seed=seed), grid).packed
    stored = own.stored(scales)
    numel = torch.Size(shape).numel()
    return own.decode(packed, stored, numel, torch.float32).view(shape), own, stored


def decoded(rounded, grid, shape):
    numel = torch.Size(shape).numel()
    stored = grid.stored(rounded.scales)
    return grid.decode(rounded.packed, stored, numel, torch.float32).view(shape)


def moment(inputs, tokens=512, rank=None, seed=1):
    """Second moment of inputs that hang together, as those of layers do."""
    strength = 1 / (1 + torch.arange(rank or inputs))
    x = (normal(tokens, rank or inputs, seed=seed) * strength) @ normal(
        rank or inputs, inputs, seed=seed + 1
    )
    x = x + (0 if rank else 0.02 * normal(tokens, inputs, seed=seed + 2))
    return x.t() @ x / tokens


def error(weight, wanted, h):
    return float((((weight - wanted) @ h) * (weight - wanted)).sum())


@pytest.mark.parametrize("grid", GRIDS, ids=ids)
def test_packed_codes_are_those_of_bitsandbytes(grid):
    weight = normal(7, 64)
    codes, state = bnb.quantize_4bit(
        weight, blocksize=64, quant_type=grid.quant_type, compress_statistics=False
    )
    order = Codes(grid, CPU)
    places = order.nearest(weight / grid.spread(state.absmax, weight.shape))
    mine = grid.decode(order.pack(places), state.absmax, weight.numel(), torch.float32)
    assert torch.equal(mine, bnb.dequantize_4bit(codes, state).flatten())


@pytest.mark.parametrize("grid", GRIDS[1::2], ids=ids[1::2])
def test_numbers_at_next_to_and_beyond_a_boundary_are_on_its_right_side(grid):
    values = grid.table(CPU).sort().values
    middles = (values[1:] + values[:-1]) / 2
    for boundaries in (middles, values):
        down, up = (torch.nextafter(boundaries, torch.full((), end)) for end in (-9.0, 9.0))
        even = torch.linspace(-1.1, 1.1, 100_001)
        numbers = torch.cat([boundaries, down, up, even, torch.tensor(OUTLIERS)])
        found = Steps(boundaries).below(numbers)
        assert torch.equal(found, torch.bucketize(numbers, boundaries, out_int32=True))


@pytest.mark.parametrize("numel", [1, 63, 64, 65, RUN + 130])
@pytest.mark.parametrize("grid", GRIDS[1::2], ids=ids[1::2])
def test_nearest_codes_and_scales_are_those_of_bitsandbytes(grid, numel):
    weight = normal(numel) * torch.logspace(-40, 3, numel)  # subnormal ones too
    weight[numel // 2 :][:64] = 0
    if numel > RUN:  # every tie there is, at a scale that is a power of two
        values = grid.table(CPU).sort().values
        weight[:64] = torch.cat([values, (values[1:] + values[:-1]) / 2, torch.zeros(33)]) / 4
    codes, state = bnb.quantize_4bit(
        weight, blocksize=64, quant_type=grid.quant_type, compress_statistics=False
    )
    mine = nearest(weight, grid)
    assert torch.equal(mine.packed, codes) and torch.equal(mine.scales, state.absmax)


def test_an_odd_last_code_stands_in_the_high_half():
    order = Codes(GRIDS[0], CPU)
    packed = order.pack(torch.tensor([15, 0, 15]))
    assert packed.shape == (2, 1) and packed.flatten().tolist() == [0xF0, 0xF0]


@pytest.mark.parametrize("blocksize", [32, 64, 4096])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_under_the_offset_of_a_base_its_scales_stay_as_they_are(quant_type, blocksize):
    grid = Grid(quant_type=quant_type, blocksize=blocksize, nested=True)
    _, own, stored = base(grid, (96, 200))
    again = own.stored(stored)
    assert (again - stored).abs().max() <= 2**-22 * stored.abs().max()


@pytest.mark.parametrize("grid", GRIDS, ids=ids)
@pytest.mark.parametrize("shape", [(64, 128), (5, 70), (1, 1), (3, RUN // 2 + 64)])
def test_rounding_by_chance_leaves_what_lies_on_the_grid(grid, shape):
    weight, own, stored = base(grid, shape)
    rounded = stochastic(weight, own, stored)
    assert torch.allclose(decoded(rounded, own, shape), weight, rtol=1e-5, atol=0)


@pytest.mark.parametrize("grid", GRIDS, ids=ids)
def test_rounding_by_chance_goes_to_a_neighbour_and_loses_nothing_on_average(grid):
    shape = (256, 1024)
    weight, own, stored = base(grid, shape)
    wanted = weight + 0.01
    got = decoded(stochastic(wanted, own, stored), own, shape)
    spread = own.spread(own.stored(stored), torch.Size(shape))
    within = (wanted / spread).abs() < 1
    table = Codes(own, CPU).values
    gap = table.diff().max() * spread
    assert ((got - wanted).abs() <= gap)[within].all()
    kept = (got - weight)[within].mean() / 0.01
    by_nearest = decoded(nearest(wanted, grid), grid, shape)
    assert abs(kept - 1) < 0.1
    assert abs((by_nearest - weight)[within].mean() / 0.01) < 0.2


def test_rounding_by_chance_is_the_same_each_time_and_leaves_the_generator_alone():
    weight, own, stored = base(GRIDS[0], (64, 128))
    before = torch.get_rng_state()
    one, other = (stochastic(weight + 0.01, own, stored) for _ in range(2))
    assert torch.equal(one.packed, other.packed)
    assert torch.equal(before, torch.get_rng_state())


def test_no_two_weights_are_rounded_by_the_same_chances():
    grid = Grid(quant_type="nf4", blocksize=64, nested=False)
    weight, own, stored = base(grid, (64, 128))
    one = stochastic(weight + 0.01, own, stored)
    other = stochastic(2 * (weight + 0.01), own, 2 * stored)  # the same places between codes
    assert not torch.equal(one.packed, other.packed)


@pytest.mark.parametrize("rank", [None, 20, 0], ids=["full", "singular", "dead"])
@pytest.mark.parametrize("shape", [(48, 128), (10, 70), (3, 5)])
@pytest.mark.parametrize("grid", GRIDS, ids=ids)
def test_a_weight_that_needs_no_rounding_stays_as_it_is(grid, shape, rank):
    weight, own, stored = base(grid, shape)
    h = torch.zeros(shape[1], shape[1]) if rank == 0 else moment(shape[1], rank=rank)
    (rounded,) = calibrated([Rows(weight, own, stored)], h, 4096)
    assert torch.allclose(decoded(rounded, own, shape), weight, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("blocksize", [32, 64, 128, 4096])
@pytest.mark.parametrize("grid", GRIDS, ids=ids)
def test_outputs_change_far_less_than_by_rounding_to_nearest(grid, blocksize):
    grid = replace(grid, blocksize=blocksize)
    shape = (48, 192)
    weight, own, stored = base(grid, shape)
    wanted, h = weight + 0.01 * normal(48, 4, seed=5) @ normal(4, 192, seed=6), moment(192)
    got = decoded(calibrated([Rows(wanted, own, stored)], h, 4096)[0], own, shape)
    naive = decoded(nearest(wanted, grid), grid, shape)
    assert error(got, wanted, h) < 0.35 * error(naive, wanted, h)


def test_inputs_that_are_always_zero_do_no_harm():
    grid = GRIDS[0]
    weight, own, stored = base(grid, (16, 128))
    h = moment(128)
    h[::3] = h[:, ::3] = 0
    wanted = weight + 0.05 * normal(16, 128, seed=5)
    got = decoded(calibrated([Rows(wanted, own, stored)], h, 4096)[0], own, (16, 128))
    assert got.isfinite().all()
    assert error(got, wanted, h) < 0.5 * error(weight, wanted, h)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_moment_that_is_not_finite_is_an_error(bad):
    weight, own, stored = base(GRIDS[0], (4, 64))
    h = moment(64)
    h[3, 3] = bad
    with pytest.raises(FloatingPointError, match="not finite"):
        calibrated([Rows(weight, own, stored)], h, 4096)


def test_weights_with_the_same_inputs_are_rounded_as_each_alone():
    grid = GRIDS[0]
    h = moment(128)
    rows = []
    for seed, out in ((1, 32), (2, 16)):
        weight, own, stored = base(grid, (out, 128), seed)
        rows.append(Rows(weight + 0.02 * normal(out, 128, seed=9), own, stored))
    together = calibrated(rows, h, 4096)
    for part, row in zip(together, rows, strict=True):
        (alone,) = calibrated([row], h, 4096)
        assert part.packed.shape == alone.packed.shape
        assert (part.packed == alone.packed).float().mean() > 0.98  # sums in another order
        again = calibrated([row], h, 4096)[0]
        assert torch.equal(alone.packed, again.packed) and torch.equal(alone.scales, again.scales)


def test_without_coupling_feedback_rounds_to_nearest():
    wanted, codes = normal(8, 96), Codes(GRIDS[0], CPU)
    spread = torch.full_like(wanted, 2.0)
    h = torch.diag(torch.rand(96) + 0.1)
    order = h.diagonal().argsort(descending=True)
    places = rounding._feed_back(wanted, rounding._inverse_factor(h, order), order, spread, codes)
    assert torch.equal(places.int(), codes.nearest(wanted / spread))


def test_feedback_is_that_of_a_loop_over_single_columns():
    codes, h = Codes(GRIDS[0], CPU), moment(150).double()
    codes.values, codes._middles = codes.values.double(), Steps(codes._middles.boundaries.double())
    wanted, spread = normal(5, 150).double(), torch.full((5, 150), 2.0).double()
    order = h.diagonal().argsort(descending=True)
    factor = rounding._inverse_factor(h, order).double()
    places = rounding._feed_back(wanted, factor, order, spread, codes)
    left = wanted[:, order].clone()
    expected = torch.empty(5, 150, dtype=torch.long)
    for k in range(150):
        chosen = codes.nearest(left[:, k] / 2)
        error_of_column = (left[:, k] - 2 * codes.values[chosen]) / factor[k, k]
        left[:, k:] -= error_of_column[:, None] * factor[k, k:]
        expected[:, order[k]] = chosen
    assert torch.equal(places.long(), expected)


def test_few_tokens_move_a_weight_less():
    weight, own, stored = base(GRIDS[0], (32, 128))
    wanted, h = weight + 0.05 * normal(32, 128, seed=5), moment(128, rank=6)
    off = [
        (decoded(calibrated([Rows(wanted, own, stored)], h, tokens)[0], own, (32, 128)) - wanted)
        for tokens in (6, 1_000_000)
    ]
    assert off[0].norm() < 0.8 * off[1].norm()


def test_descent_ends_where_no_single_code_can_be_changed_for_the_better(monkeypatch):
    monkeypatch.setattr(rounding, "_SWEEPS", 60)
    codes, h = Codes(GRIDS[0], CPU), moment(96).double()
    wanted, spread = normal(5, 96).double(), torch.full((5, 96), 2.0).double()
    codes.values, codes._middles = codes.values.double(), Steps(codes._middles.boundaries.double())
    start = codes.nearest(wanted / spread).to(torch.uint8)
    places = rounding._descend(wanted, start, h, spread, codes)
    stored = codes.values[places.int()] * spread
    off = stored - wanted
    lowest = ((off @ h) * off).sum(1)
    assert lowest.sum() < 0.5 * error(codes.values[start.int()] * spread, wanted, h)
    for column in range(96):
        for value in codes.values:
            other = off.clone()
            other[:, column] = value * spread[:, column] - wanted[:, column]
            assert (((other @ h) * other).sum(1) >= lowest * (1 - 1e-9)).all()


def test_refitted_scales_are_those_of_least_squares(monkeypatch):
    monkeypatch.setattr(rounding, "_RIDGE", 0.0)
    grid = Grid(quant_type="nf4", blocksize=32, nested=False)
    wanted, h = normal(4, 96).double(), moment(96).double()
    codes = Codes(grid, CPU)
    values = codes.values.double()[codes.nearest(wanted.float() / 2)]
    old = torch.full((12,), 2.0).double()
    fitted = rounding._refit(Rows(wanted, grid, old), values, wanted @ h, h, old).view(4, 3)
    root = torch.linalg.cholesky(h)
    for row in range(4):
        blocks = torch.block_diag(*values[row].view(3, 32)).t()  # (96, 3)
        best = torch.linalg.lstsq(root.t() @ blocks, root.t() @ wanted[row, :, None]).solution
        assert torch.allclose(fitted[row], best.flatten(), rtol=1e-8)


def test_scales_of_blocks_that_cross_rows_are_kept():
    grid = Grid(quant_type="nf4", blocksize=64, nested=False)
    weight, own, stored = base(grid, (10, 70))
    (rounded,) = calibrated([Rows(weight + 0.02, own, stored)], moment(70), 4096)
    assert torch.equal(rounded.scales, stored)


def test_a_damped_system_is_solved_in_float64_and_damping_rises_where_it_must():
    h, right = moment(40), normal(7, 40)
    damped = h.double() + 0.02 * h.diagonal().mean().double() * torch.eye(40).double()
    expected = right.double() @ torch.linalg.inv(damped)
    assert torch.allclose(solve(h, right, 0.02).double(), expected, rtol=1e-5, atol=1e-7)
    indefinite = h - 2 * h.diagonal().mean() * torch.eye(40)
    assert solve(indefinite, right, 0.02).isfinite().all()
