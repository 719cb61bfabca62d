"""Tune the scales of a rounded model until it speaks as the live one does; codes stay.

Minimises KL(live || merged) over the whole vocabulary, by Adam on the block scales. Double
quantisation is in the loop: the forward computes with the scales that are really stored, and the
gradient passes their rounding as if it were not there (Bengio et al. 2013). Scales move in units of
their own size, s = s_0 + |s_0| t. The better the start, the lower the rate must be: from a
calibrated start, 5e-4 raises the loss that 1.5e-4 lowers.
"""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from tqdm.auto import tqdm
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from merge_callback.batches import Batch, loss_mask, model_inputs, split_batch
from merge_callback.calibration.blocks import stream_dtype
from merge_callback.calibration.recording import final_input
from merge_callback.errors import MergeError
from merge_callback.live import Weight
from merge_callback.plan import Plan
from merge_callback.rounding.grid import Grid, Rounded
from merge_callback.stand_ins import (
    computing_dtype,
    in_float32,
    product,
    stand_in,
    standing_in,
)
from merge_callback.undo import Undone, hooked

logger = logging.getLogger(__name__)

_RATE = 1.5e-4
_BETAS = (0.9, 0.98)
_WARM_UP = 10  # steps
_EPOCHS = 2
_STEP_TOKENS = 1024
_HEAD_TOKENS = 256  # whose logits are held at once
_MOST_DIMENSIONS = 3  # of scores: rows, tokens, classes; images have others


@dataclass(frozen=True)
class Distilled:
    """What came of it; `before` and `after` are KL in nats per token, of the batches held back."""

    rounded: Mapping[str, Rounded]
    steps: int
    before: float
    after: float


def distil(
    plan: Plan,
    rounded: Mapping[str, Rounded],
    seen: Sequence[Batch],
    held: Sequence[Batch],
    *,
    deadline: float = math.inf,
    progress: bool = False,
) -> Distilled:
    """Tune what was rounded; a result that the batches held back show to be worse is not kept.

    Holds, beside the live model: one 4-bit copy of it, and half as much again for scales and their
    moments; one layer at a time in 16 bits; the live model's final hidden states in 16 bits; and
    what the backward pass of 1024 tokens, or of one sequence, needs of its forward: where training
    checkpoints gradients, little more than one block's.

    Args:
        rounded: weights to begin with; the others stay as they are in the live model.
        seen: batches to learn from.
        held: batches to judge by.
        deadline: of `time.monotonic`; the rate falls to 0 until then.

    Raises:
        MergeError: nothing is predicted in these batches.
    """
    weights = {n: w for n, w in plan.to_round().items() if w.key in rounded}
    layers = {n: _Layer(plan.grid(w), w, rounded[w.key]) for n, w in weights.items()}
    pieces = [piece for batch in seen for piece in split_batch(batch, _STEP_TOKENS)]
    pieces, held = (list(filter(_predicts, batches)) for batches in (pieces, held))
    if not pieces:
        raise MergeError("in these data no token is predicted")
    with _Models(plan, weights) as models:
        lessons, exam = (_Lessons(models, batches) for batches in (pieces, held or pieces))
        models.compute_with({name: layer.product for name, layer in layers.items()})
        before = exam.divergence()
        moves = [layer.move for layer in layers.values()]
        steps = 0
        for batch in _descent(moves, len(pieces), deadline, progress):
            lessons.learn(batch, moves)
            steps += 1
        after = exam.divergence()
    if not after < before:
        logger.info("distillation made it no better (%.5f, before %.5f): not kept", after, before)
        return Distilled(rounded, steps, before, after)
    tuned = {weights[name].key: layer.rounded() for name, layer in layers.items()}
    return Distilled({**rounded, **tuned}, steps, before, after)


def _predicts(batch: Batch) -> bool:
    mask = loss_mask(batch)
    return mask is None or bool(mask.any())


def _descent(
    moves: Sequence[nn.Parameter], batches: int, deadline: float, progress: bool
) -> Iterator[int]:
    """Yield batches to learn, two epochs in an order of chance, and step after each.

    The rate rises for some steps and falls as a cosine, until the steps or the time are spent.
    """
    optimizer = torch.optim.Adam(moves, lr=_RATE, betas=_BETAS)
    generator = torch.Generator().manual_seed(0)
    order = [
        i for _ in range(_EPOCHS) for i in torch.randperm(batches, generator=generator).tolist()
    ]
    start = time.monotonic()
    for step, batch in enumerate(tqdm(order, desc="distil", unit="step", disable=not progress)):
        used = max(step / len(order), (time.monotonic() - start) / (deadline - start))
        if used >= 1:
            return
        rate = _RATE * min(1, (step + 1) / _WARM_UP) * (1 + math.cos(math.pi * used)) / 2
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.zero_grad()
        yield batch
        optimizer.step()


class _Layer:
    """A layer that is rounded, with scales that can move."""

    def __init__(self, grid: Grid, weight: Weight, rounded: Rounded):
        self._grid = grid
        self._shape = weight.stored.shape
        self._packed, self._start = rounded
        self._size = self._start.abs()
        self.move = nn.Parameter(torch.zeros_like(self._start))

    def product(self, inputs: Tensor) -> Tensor:
        out: Tensor = _Product.apply(inputs, self.move, self)  # type: ignore[no-untyped-call]
        return out

    def rounded(self) -> Rounded:
        return Rounded(self._packed, self._scales())

    def weight(self) -> Tensor:
        """As it is computed with, (out, in)."""
        return self._decode(self._grid.stored(self._scales()))

    def gradient(self, of_weight: Tensor) -> Tensor:
        """Of `move`, from that of the weight; straight through the rounding of scales."""
        table = self._decode(torch.ones_like(self._start))
        products = (of_weight * table).float().flatten()
        size = self._grid.blocksize
        padded = nn.functional.pad(products, (0, -products.numel() % size))
        return padded.view(-1, size).sum(1) * self._size

    def _scales(self) -> Tensor:
        return self._start + self._size * self.move.detach()

    def _decode(self, stored: Tensor) -> Tensor:
        dtype = computing_dtype(self._packed.device)
        flat = self._grid.decode(self._packed, stored, math.prod(self._shape), dtype)
        return flat.view(self._shape)


class _Product(torch.autograd.Function):
    """Inputs times the weight of a layer, which is built anew for the backward pass."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, move: Tensor, layer: _Layer) -> Tensor:
        weight = layer.weight()
        narrow = inputs.to(weight.dtype)
        ctx.layer = layer
        ctx.save_for_backward(narrow)
        ctx.dtype = inputs.dtype
        return nn.functional.linear(narrow, weight)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        (inputs,) = ctx.saved_tensors
        outer = gradients[0].to(inputs.dtype)
        of_weight = outer.flatten(0, -2).t() @ inputs.flatten(0, -2)  # (out, in)
        return (outer @ ctx.layer.weight()).to(ctx.dtype), ctx.layer.gradient(of_weight), None


def _live_product(weight: Weight) -> Callable[[Tensor], Tensor]:
    """Inputs times the merged weight of the live model, built anew each time."""

    def compute(inputs: Tensor) -> Tensor:
        merged = weight.merged(weight.decoded())
        return product(inputs, merged.to(computing_dtype(merged.device)))

    return compute


class _Models(Undone):
    """The live model computing with its own merged weights, or with others."""

    def __init__(self, plan: Plan, weights: Mapping[str, Weight]):
        super().__init__(self._open)
        self.model = plan.model
        # None: what the model gives are scores of classes already.
        self.head: nn.Module | None = plan.model.get_output_embeddings()  # type: ignore[no-untyped-call]
        self._stand_ins = {n: stand_in(plan.model.get_submodule(n)) for n in weights}
        for name, weight in weights.items():
            self._stand_ins[name].product = _live_product(weight)

    def _open(self, undo: contextlib.ExitStack) -> None:
        embedding = _embedding(self.model)
        kept_out = (
            *self._stand_ins,
            *(n for n, m in self.model.named_modules() if m in (embedding, self.head)),
        )
        undo.enter_context(standing_in(self.model, self._stand_ins))
        undo.enter_context(standing_in(self.model, _checkpointed(self.model)))
        undo.enter_context(torch.enable_grad())
        if stream_dtype(self.model, kept_out) == torch.float32:
            undo.enter_context(in_float32(self.model))
            if embedding is not None:
                hooked(undo, embedding)
                embedding.register_forward_hook(_in_float32)

    def compute_with(self, products: Mapping[str, Callable[[Tensor], Tensor]]) -> None:
        for name, compute in products.items():
            self._stand_ins[name].product = compute

    def final(self, batch: Batch) -> Tensor:
        """Inputs of the output layer for the tokens that count, (tokens, hidden size)."""
        hidden = _scores(self.model, batch) if self.head is None else final_input(self.model, batch)
        mask = loss_mask(batch)
        flat = hidden.flatten(0, -2)
        if mask is None or mask.numel() != len(flat):  # of an encoder, these are its decoder's
            return flat
        return flat[mask.flatten().to(flat.device)]

    def logits(self, hidden: Tensor) -> Tensor:
        if self.head is None:
            return hidden.float()
        dtype = next(self.head.parameters()).dtype
        out: Tensor = self.head(hidden.to(dtype))
        return out.float()


def _embedding(model: PreTrainedModel) -> nn.Module | None:
    """What the stream comes from; None: the model takes sounds, or does not tell."""
    try:
        return model.get_input_embeddings()
    except NotImplementedError:
        return None


def _in_float32(_: nn.Module, __: tuple[Any, ...], output: Any) -> Tensor | None:
    return output.float() if isinstance(output, Tensor) else None


def _scores(model: PreTrainedModel, batch: Batch) -> Tensor:
    """What a model without an output layer says of the classes of each row, (..., classes)."""
    found = getattr(model(**model_inputs(model, batch)), "logits", None)
    if not isinstance(found, Tensor) or found.dim() > _MOST_DIMENSIONS:
        raise MergeError("the model's outputs are no scores of classes")
    return found


def _checkpointed(model: nn.Module) -> dict[str, Callable[..., Any]]:
    """Forwards that keep nothing for their backward pass, of the layers that training runs so."""
    return {
        name: partial(checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False)
        for name, layer in model.named_modules()
        if isinstance(layer, GradientCheckpointingLayer) and layer.gradient_checkpointing
    }


class _Lessons:
    """Batches, and what the live model makes of them."""

    def __init__(self, models: _Models, batches: Sequence[Batch]):
        self._models = models
        self._batches = batches
        with torch.no_grad():
            dtype = computing_dtype(models.model.device)
            self._live = [models.final(batch).to(dtype) for batch in batches]

    def learn(self, index: int, moves: Sequence[Tensor]) -> None:
        """Add the gradients of one batch to `moves`, and to nothing else that is trained."""
        hidden = self._models.final(self._batches[index])
        _, gradient = self._compare(hidden, self._live[index])
        torch.autograd.backward(hidden, gradient, inputs=moves)

    @torch.no_grad()
    def divergence(self) -> float:
        """KL(live || merged) in nats per token."""
        total = tokens = 0.0
        for batch, live in zip(self._batches, self._live, strict=True):
            total += self._compare(self._models.final(batch), live)[0]
            tokens += len(live)
        return total / max(1, tokens)

    def _compare(self, hidden: Tensor, live: Tensor) -> tuple[float, Tensor]:
        """The summed divergence, and the gradient of its mean with respect to `hidden`."""
        total = 0.0
        gradients: list[Tensor] = []
        for part, wanted in zip(
            torch.split(hidden.detach(), _HEAD_TOKENS), torch.split(live, _HEAD_TOKENS), strict=True
        ):
            part.requires_grad_(torch.is_grad_enabled())
            with torch.no_grad():
                target = torch.log_softmax(self._models.logits(wanted), -1)
            spoken = torch.log_softmax(self._models.logits(part), -1)
            kl = nn.functional.kl_div(spoken, target, reduction="sum", log_target=True)
            total += float(kl.detach())
            if kl.requires_grad:
                gradients += torch.autograd.grad(kl / len(hidden), part)
        return total, torch.cat(gradients) if gradients else hidden
