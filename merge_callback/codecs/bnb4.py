"""bitsandbytes 4-bit weights, NF4 and FP4, with and without double quantisation.

What values such a weight can take is in `rounding.grid`; here is how it lies in a file. Source:
bitsandbytes' `QuantState.as_dict`. Knows nothing of adapters, models or files.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from merge_callback.codecs import Encoder, Stored, TensorSpec, encode
from merge_callback.rounding.grid import NESTED_BLOCKSIZE, RUN, Grid, Rounded
from merge_callback.rounding.nearest import Nearest, nearest
from merge_callback.rounding.stochastic import Stochastic

if TYPE_CHECKING:
    from bitsandbytes.functional import QuantState

_ALL_BUT_TIES = 0.999
SETTINGS = ".quant_state.bitsandbytes__"  # behind a weight, before its quant_type
_LONGEST_FLOAT = -1.1754943508222875e-38  # no float32 has a longer decimal


@dataclass(frozen=True)
class Bnb4Weight:
    """A `Params4bit`."""

    packed: Tensor  # ((n + 1) // 2, 1), any storage dtype
    state: QuantState

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.state.shape)

    @property
    def dtype(self) -> torch.dtype:
        return self.state.dtype  # type: ignore[no-any-return]

    @property
    def device(self) -> torch.device:
        return self.packed.device

    @property
    def grid(self) -> Grid:
        """Its format, with the offset of its scales."""
        state = self.state
        offset = float(state.offset) if state.nested else None
        return Grid(
            quant_type=state.quant_type,
            blocksize=state.blocksize,
            nested=state.nested,
            offset=offset,
        )

    def scales(self, device: torch.device) -> Tensor:
        """The scales that it is decoded with, float32, one a block."""
        return _scales(_on(device, self.packed, self.state)[1])

    def came_from(self, weight: Tensor) -> bool:
        """Whether bitsandbytes makes these codes of `weight`, but for ties."""
        packed = nearest(weight.float(), self.grid).packed
        mine = self.packed.detach().view(torch.uint8).reshape(packed.shape)
        return bool((packed == mine.to(packed.device)).float().mean() > _ALL_BUT_TIES)

    @property
    def misread_on_cpu(self) -> bool:
        """Whether bitsandbytes' CPU kernels compute with other values than those that are stored.

        They do where rows are no whole blocks: 0.50.2 takes each row to begin a block of its own.
        """
        return self.device.type == "cpu" and bool(self.shape[-1] % self.state.blocksize)

    def decode(self, device: torch.device) -> Tensor:
        import bitsandbytes.functional as bnb

        packed, state = _on(device, self.packed, self.state)
        if device.type == "cpu" and self.shape[-1] % state.blocksize:
            flat = self.grid.decode(packed, _scales(state), prod(self.shape), state.dtype)
            return flat.view(self.shape)
        weight: Tensor = bnb.dequantize_4bit(packed, state)
        return weight

    def rows(self, device: torch.device) -> Callable[[slice], Tensor]:
        packed, state = _on(device, self.packed, self.state)
        flat, scales = packed.view(torch.uint8).reshape(-1, 1), _scales(state)
        row, size = prod(self.shape[1:]), self.state.blocksize

        def decode(part: slice) -> Tensor:
            start, end = part.start * row, part.stop * row
            codes = flat[start // 2 : -(-end // 2)]
            stored = scales[start // size : -(-end // size)]
            values = self.grid.decode(codes, stored, end - start, self.dtype)
            return values.view(-1, *self.shape[1:])

        return decode


@dataclass(frozen=True, kw_only=True)
class Bnb4:
    """The tensors that a stock bitsandbytes checkpoint has for a 4-bit weight, in uint8.

    Attributes:
        grid: its format.
        dtype: of what a loader decodes.
        base: the weight on whose scales it rounds by chance; None: it rounds to nearest.
        rounded: what it writes, whatever it is given; None: it rounds.
    """

    grid: Grid
    dtype: torch.dtype
    base: Bnb4Weight | None = None
    rounded: Rounded | None = None

    def specs(self, name: str, shape: tuple[int, ...]) -> dict[str, TensorSpec]:
        numel = prod(shape)
        blocks = -(-numel // self.grid.blocksize)
        specs = {
            name: TensorSpec(((numel + 1) // 2, 1), torch.uint8),
            f"{name}.quant_map": TensorSpec((16,), torch.float32),
            f"{name}.absmax": TensorSpec(
                (blocks,), torch.uint8 if self.grid.nested else torch.float32
            ),
        }
        if self.grid.nested:
            nested_blocks = -(-blocks // NESTED_BLOCKSIZE)
            specs[f"{name}.nested_absmax"] = TensorSpec((nested_blocks,), torch.float32)
            specs[f"{name}.nested_quant_map"] = TensorSpec((256,), torch.float32)
        # The offset's decimals are not known yet: room for the longest, and for 8-byte alignment.
        text = self.settings(shape)
        used = sum(spec.nbytes for spec in specs.values()) + len(text)
        specs[self._settings_name(name)] = TensorSpec((len(text) + -used % 8,), torch.uint8)
        return specs

    def settings(self, shape: tuple[int, ...]) -> bytes:
        """The packed JSON of a weight of this shape, at its longest."""
        return _settings_text(self._longest_state(shape))

    def encoder(self, name: str, shape: tuple[int, ...], device: torch.device) -> Encoder:
        return _Encoder(self, name, shape)

    def copy(self, name: str, stored: Stored, device: torch.device) -> dict[str, Tensor]:
        if not isinstance(stored, Bnb4Weight):
            return encode(self, name, stored.decode(device).float())
        packed = stored.packed.detach().view(torch.uint8).reshape(-1, 1)
        return self._tensors(name, packed, stored.state)

    def values(self, name: str, encoded: Mapping[str, Tensor], numel: int) -> Iterator[Tensor]:
        scales = _written_scales(name, encoded, nested=self.grid.nested)
        for start in range(0, numel, RUN):
            packed = encoded[name][start // 2 : (start + RUN) // 2]
            first, length = start // self.grid.blocksize, min(RUN, numel - start)
            stored = scales[first : first + -(-length // self.grid.blocksize)]
            yield self.grid.decode(packed, stored, length, torch.float32)

    def rounding(self, largest: Tensor, numel: int) -> Nearest | Stochastic:
        """How codes are chosen for a weight whose blocks have these largest magnitudes."""
        if self.base is None:
            return Nearest(self.grid, largest, numel)
        return Stochastic(self.grid, self.base.scales(largest.device), largest)

    def encoded(self, name: str, shape: tuple[int, ...], rounded: Rounded) -> dict[str, Tensor]:
        """The tensors of a weight of which codes and scales have been chosen."""
        return self._tensors(name, rounded.packed, self._state(shape, rounded.scales))

    def _state(self, shape: tuple[int, ...], scales: Tensor) -> QuantState:
        state: dict[str, Any] = {"absmax": scales}
        if self.grid.nested:
            codes, nested, offset = self.grid.nest(scales)
            state = {"absmax": codes, "offset": offset, "state2": nested}
        return self._quant_state(shape, code=self.grid.table(scales.device), **state)

    def _longest_state(self, shape: tuple[int, ...]) -> QuantState:
        import bitsandbytes.functional as bnb

        nothing = torch.empty(0)
        state: dict[str, Any] = {"absmax": nothing, "code": nothing}
        if self.grid.nested:
            state["offset"] = torch.tensor(_LONGEST_FLOAT)
            state["state2"] = bnb.QuantState(
                absmax=nothing, code=nothing, blocksize=NESTED_BLOCKSIZE, dtype=torch.float32
            )
        return self._quant_state(shape, **state)

    def _quant_state(self, shape: tuple[int, ...], **parts: Any) -> QuantState:
        import bitsandbytes.functional as bnb

        return bnb.QuantState(
            shape=torch.Size(shape),
            blocksize=self.grid.blocksize,
            quant_type=self.grid.quant_type,
            dtype=self.dtype,
            **parts,
        )

    def _settings_name(self, name: str) -> str:
        return f"{name}{SETTINGS}{self.grid.quant_type}"

    def _tensors(self, name: str, packed: Tensor, state: QuantState) -> dict[str, Tensor]:
        settings = self._settings_name(name)
        parts = {f"{name}.{key}": part for key, part in state.as_dict(packed=True).items()}
        room = self.specs(name, tuple(state.shape))[settings].shape[0]
        text = _settings_text(state).ljust(room)  # JSON may end in blanks
        parts[settings] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        return {name: packed, **parts}


class _Encoder:
    """Rounds rows that are whole blocks, as `row_parts` cuts them."""

    def __init__(self, container: Bnb4, name: str, shape: tuple[int, ...]):
        self._container = container
        self._name = name
        self._shape = shape
        self._largest: list[Tensor] = []
        self._packed: list[Tensor] = []
        self._rounding: Nearest | Stochastic | None = None
        self._stored: Tensor | None = None
        self._done = 0  # values
        if container.rounded is not None:
            self._stored = container.grid.stored(container.rounded.scales)

    @property
    def surveys(self) -> bool:
        return self._container.rounded is None

    def survey(self, part: Tensor) -> None:
        self._largest.append(self._container.grid.largest(part))

    def add(self, part: Tensor) -> Tensor:
        if self._stored is None:
            self._rounding = self._container.rounding(torch.cat(self._largest), prod(self._shape))
            self._stored = self._rounding.stored
        grid, count = self._container.grid, part.numel()
        first = self._done // grid.blocksize
        packed = self._pack(part.reshape(-1), first)
        stored = self._stored[first : first + -(-count // grid.blocksize)]
        self._done += count
        return grid.decode(packed, stored, count, torch.float32).view(part.shape)

    def _pack(self, run: Tensor, first: int) -> Tensor:
        if self._rounding is None:
            assert self._container.rounded is not None
            start, end = self._done, self._done + len(run)
            return self._container.rounded.packed[start // 2 : -(-end // 2)]
        self._packed.append(self._rounding.pack(run, first))
        return self._packed[-1]

    def tensors(self) -> dict[str, Tensor]:
        rounded = self._container.rounded
        if self._rounding is not None:
            rounded = Rounded(torch.cat(self._packed), self._rounding.scales)
        assert rounded is not None
        return self._container.encoded(self._name, self._shape, rounded)


def _settings_text(state: QuantState) -> bytes:
    """The packed JSON that bitsandbytes stores beside the tensors of `state`."""
    (text,) = (
        part for key, part in state.as_dict(packed=True).items() if key.startswith("quant_state.")
    )
    return bytes(text.cpu().numpy().tobytes())


def _written_scales(name: str, encoded: Mapping[str, Tensor], *, nested: bool) -> Tensor:
    """The float32 scales that a loader makes of what was encoded."""
    import bitsandbytes.functional as bnb

    if not nested:
        return encoded[f"{name}.absmax"]
    prefix = f"{name}."
    parts = {k.removeprefix(prefix): v for k, v in encoded.items() if k.startswith(prefix)}
    return _scales(bnb.QuantState.from_dict(parts, device=encoded[name].device))


def _scales(state: QuantState) -> Tensor:
    import bitsandbytes.functional as bnb

    if not state.nested:
        return torch.as_tensor(state.absmax).float()
    scales: Tensor = bnb.dequantize_blockwise(state.absmax, state.state2) + state.offset
    return scales.float()


def _on(device: torch.device, packed: Tensor, state: QuantState) -> tuple[Tensor, QuantState]:
    """A weight on another device; `to` of a `Params4bit`, or of its state, moves the live one."""
    import bitsandbytes.functional as bnb

    packed = packed.detach()  # a plain tensor
    if packed.device == device:
        return packed, state
    return packed.to(device), bnb.QuantState.from_dict(state.as_dict(packed=True), device=device)
