"""Round a weight so that its outputs change least. Knows nothing of where the inputs come from.

With W (out, in) the weight that is wanted, Q the one that is stored and x the inputs it will meet,

    E |(Q - W) x|^2 = tr (Q - W) H (Q - W)^T,    H = E[x x^T]

falls apart into one problem for each row, coupled by double quantisation alone. Three steps:

1. `_feed_back`: column by column, most active first, each rounded to the nearest code, its error
   put into the columns not yet rounded (GPTQ, Frantar et al. 2022, algorithm 1).
2. `_refit`: for fixed codes the best scales of a row solve A s = b, one unknown a block,
   A_bc = sum_ij t_bi H_bi,cj t_cj and b_b = sum_i t_bi (H w)_bi with t the table's values.
3. `_descend`: coordinate descent on the codes against the scales that are really stored. The best
   value of column k, all others fixed, is q_k - g_k / H_kk, with g the gradient (Q - W) H.

2 and 3 are repeated in turn. The grid to begin with is the one that the base lies on: what must be
added to it, the adapter's change, is smaller than the error that any fresh grid begins with.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from merge_callback.rounding.grid import Codes, Grid, Rounded

logger = logging.getLogger(__name__)

_COLUMNS = 64  # rounded before their errors reach the columns behind
_ROUNDS = 4  # of scales, then codes
_SWEEPS = 2  # over all codes, in each round
_RIDGE = 1e-3  # of the scales, towards the old ones
_DAMPING = 3e-3  # of H, in units of its mean diagonal, and at least
_LARGEST_DAMPING = 1e6
_DAMPING_OF_FEW = 0.05  # times the inputs to a token: few tokens say nothing of most directions
_REFIT_VALUES = 1 << 24  # of the matrices A at once


class Rows(NamedTuple):
    """One of the weights that meet the same inputs.

    Attributes:
        weight: the values wanted, (out, in) float32.
        grid: its format.
        scales: to begin with, float32, one a block, as a loader would have them.
    """

    weight: Tensor
    grid: Grid
    scales: Tensor


def calibrated(weights: Sequence[Rows], moment: Tensor, tokens: int) -> list[Rounded]:
    """Round weights that meet the same inputs.

    Args:
        weights: of one `quant_type`.
        moment: H, (in, in) float32, symmetric.
        tokens: how many inputs it was taken over.

    Returns:
        For each weight its codes and scales. Deterministic. Time grows with out * in^2; memory is
        about ten float32 copies of a square weight, its moment's included (rounding_cost.py).

    Raises:
        FloatingPointError: a weight or the moment is not finite.
    """
    wanted = torch.cat([rows.weight for rows in weights])
    scales = [rows.scales for rows in weights]
    codes = Codes(weights[0].grid, wanted.device)
    order = moment.diagonal().argsort(descending=True)
    moment = _decompose(moment, max(_DAMPING, _DAMPING_OF_FEW * len(moment) / tokens))[0]
    factor = _inverse_factor(moment, order)
    places = _feed_back(wanted, factor, order, _spread(weights, scales), codes)
    for _ in range(_ROUNDS):
        values = codes.values[places.int()]
        moved = wanted @ moment  # H w for each row
        scales = [
            _refit(rows, part, target, moment, old)
            for rows, part, target, old in zip(
                weights, _split(weights, values), _split(weights, moved), scales, strict=True
            )
        ]
        stored = [r.grid.stored(s) for r, s in zip(weights, scales, strict=True)]
        places = _descend(wanted, places, moment, _spread(weights, stored), codes)
    parts = _split(weights, places)
    return [Rounded(codes.pack(part), s) for part, s in zip(parts, scales, strict=True)]


def solve(moment: Tensor, right: Tensor, damping: float) -> Tensor:
    """right (H + c I)^-1 in float64, c in units of the mean diagonal, raised where it has to be.

    Args:
        moment: H, (in, in) float32.
        right: (out, in) float32.

    Raises:
        FloatingPointError: the moment is not finite.
    """
    lower = _decompose(moment, damping)[1]
    solution: Tensor = torch.cholesky_solve(right.double().t(), lower)
    return solution.t().float()


def _decompose(moment: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    """The damped moment, float32, and its lower Cholesky factor, float64."""
    if not moment.isfinite().all():
        raise FloatingPointError("the second moment of the inputs is not finite")
    mean = float(moment.diagonal().abs().mean()) or 1.0  # 0: the weight alone decides
    while True:
        damped = moment.double()
        damped.diagonal().add_(damping * mean)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            return damped.float(), lower
        if damping > _LARGEST_DAMPING:
            raise FloatingPointError("the second moment of the inputs is no second moment")
        damping *= 10
        logger.info("damping raised to %g: the inputs span too few directions", damping)


def _inverse_factor(moment: Tensor, order: Tensor) -> Tensor:
    """Upper triangular U, float32, with U^T U the inverse of the reordered moment."""
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(moment[order][:, order].double()))
    upper: Tensor = torch.linalg.cholesky(inverse, upper=True)
    return upper.float()


def _split(weights: Sequence[Rows], rows: Tensor) -> tuple[Tensor, ...]:
    return torch.split(rows, [len(part.weight) for part in weights])


def _spread(weights: Sequence[Rows], scales: Sequence[Tensor]) -> Tensor:
    """The scale of each value, (out, in)."""
    return torch.cat(
        [r.grid.spread(s, r.weight.shape) for r, s in zip(weights, scales, strict=True)]
    )


def _feed_back(
    wanted: Tensor, factor: Tensor, order: Tensor, spread: Tensor, codes: Codes
) -> Tensor:
    """Step 1: places of the codes, (out, in) uint8."""
    left = wanted.t()[order].contiguous()  # (in, out), as an input's work is then contiguous
    scales = spread.t()[order].contiguous()
    places = torch.empty(left.shape, dtype=torch.uint8, device=left.device)
    for start in range(0, len(left), _COLUMNS):
        end = min(start + _COLUMNS, len(left))
        errors = torch.empty_like(left[start:end])
        for k in range(start, end):
            chosen = codes.nearest(left[k] / scales[k])
            places[k] = chosen
            errors[k - start] = error = (left[k] - codes.values[chosen] * scales[k]) / factor[k, k]
            left[k + 1 : end].addr_(factor[k, k + 1 : end], error, alpha=-1)
        left[end:].addmm_(factor[start:end, end:].t(), errors, alpha=-1)
    return places[order.argsort()].t().contiguous()


def _refit(rows: Rows, values: Tensor, moved: Tensor, moment: Tensor, old: Tensor) -> Tensor:
    """Step 2: the best scales of one weight; the old ones where blocks cross rows.

    Args:
        values: the table's values that were chosen, (out, in).
        moved: W H, (out, in).
    """
    out, inputs = values.shape
    size = rows.grid.blocksize
    if inputs % size:
        return old
    blocks = inputs // size
    scales = []
    at_once = max(1, _REFIT_VALUES // max(blocks * blocks, inputs))
    for part, right, before in zip(
        torch.split(values, at_once),
        torch.split(moved, at_once),
        torch.split(old.view(out, blocks), at_once),
        strict=True,
    ):
        by_block = (len(part), blocks, size)
        columns = [
            ((part[:, i : i + size] @ moment[i : i + size]) * part).view(by_block).sum(2)
            for i in range(0, inputs, size)
        ]
        matrix = torch.stack(columns, 1)  # (rows, blocks, blocks)
        own = matrix.diagonal(dim1=1, dim2=2)
        # A block whose values are all 0 has any scale; it keeps its own.
        ridge = torch.where(own > 0, _RIDGE * own, torch.ones_like(own))
        right = (right * part).view(by_block).sum(2) + ridge * before
        scales.append(torch.linalg.solve(matrix + torch.diag_embed(ridge), right))
    return torch.cat(scales).flatten()


def _descend(
    wanted: Tensor, places: Tensor, moment: Tensor, spread: Tensor, codes: Codes
) -> Tensor:
    """Step 3: places of better codes, (out, in) uint8."""
    scales, places = spread.t().contiguous(), places.t().contiguous()
    stored = codes.values[places.int()] * scales
    gradient = moment @ (stored - wanted.t())
    for start in [*range(0, len(moment), _COLUMNS)] * _SWEEPS:
        end = min(start + _COLUMNS, len(moment))
        within = moment[start:end, start:end]
        local, before = gradient[start:end].clone(), stored[start:end].clone()
        for k in range(start, end):
            i = k - start
            best = stored[k] - local[i] / within[i, i]
            places[k] = chosen = codes.nearest(best / scales[k])
            value = codes.values[chosen] * scales[k]
            local.addr_(within[i], value - stored[k])
            stored[k] = value
        gradient += moment[:, start:end] @ (stored[start:end] - before)
    return places.t().contiguous()
