"""bitsandbytes 4-bit weights, NF4 and FP4, with and without double quantisation.

A weight of n values in row-major order is cut into blocks; block b has one float32 scale, and each
value is `table[code] * scale_b`. With double quantisation the scales are stored as 8-bit codes:
`scale = dynamic_map[code] * nested_scale + offset`, one nested scale to 256 scales. Sources:
Dettmers et al. 2023, sections 3 and 4; the file format: bitsandbytes' `QuantState.as_dict`.
Knows nothing of adapters, models or files.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from merge_callback.codecs import Stored, TensorSpec
from merge_callback.rounding import ROUNDINGS
from merge_callback.rounding.nearest import RUN

if TYPE_CHECKING:
    from bitsandbytes.functional import QuantState

_NESTED_BLOCKSIZE = 256  # what bitsandbytes always uses
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

    def decode(self, device: torch.device) -> Tensor:
        return _dequantize(self.packed.detach(), self.state, device)


@dataclass(frozen=True, kw_only=True)
class Bnb4:
    """The tensors that a stock bitsandbytes checkpoint has for a 4-bit weight, in uint8."""

    quant_type: str
    blocksize: int
    nested: bool
    dtype: torch.dtype
    rounding: str = "nearest"

    @classmethod
    def like(cls, stored: Bnb4Weight, rounding: str = "nearest") -> Bnb4:
        """The container of a live weight: its own settings."""
        state = stored.state
        return cls(
            quant_type=state.quant_type,
            blocksize=state.blocksize,
            nested=state.nested,
            dtype=state.dtype,
            rounding=rounding,
        )

    def specs(self, name: str, shape: tuple[int, ...]) -> dict[str, TensorSpec]:
        numel = prod(shape)
        blocks = -(-numel // self.blocksize)
        specs = {
            name: TensorSpec(((numel + 1) // 2, 1), torch.uint8),
            f"{name}.quant_map": TensorSpec((16,), torch.float32),
            f"{name}.absmax": TensorSpec((blocks,), torch.uint8 if self.nested else torch.float32),
        }
        if self.nested:
            nested_blocks = -(-blocks // _NESTED_BLOCKSIZE)
            specs[f"{name}.nested_absmax"] = TensorSpec((nested_blocks,), torch.float32)
            specs[f"{name}.nested_quant_map"] = TensorSpec((256,), torch.float32)
        # The offset's decimals are not known yet: room for the longest, and for 8-byte alignment.
        text = _settings_text(self._longest_state(shape))
        used = sum(spec.nbytes for spec in specs.values()) + len(text)
        specs[self._settings_name(name)] = TensorSpec((len(text) + -used % 8,), torch.uint8)
        return specs

    def encode(self, name: str, weight: Tensor) -> dict[str, Tensor]:
        packed, scales = ROUNDINGS[self.rounding](
            weight, quant_type=self.quant_type, blocksize=self.blocksize
        )
        return self._tensors(name, packed, self._state(weight.shape, scales))

    def copy(self, name: str, stored: Stored, device: torch.device) -> dict[str, Tensor]:
        if not isinstance(stored, Bnb4Weight):
            return self.encode(name, stored.decode(device).float())
        packed = stored.packed.detach().view(torch.uint8).reshape(-1, 1)
        return self._tensors(name, packed, stored.state)

    def values(self, name: str, encoded: Mapping[str, Tensor], numel: int) -> Iterator[Tensor]:
        scales = _nested_scales(name, encoded) if self.nested else encoded[f"{name}.absmax"]
        for start in range(0, numel, RUN):
            packed = encoded[name][start // 2 : (start + RUN) // 2]
            run = self._decode_run(packed, scales[start // self.blocksize :])
            yield run[: numel - start]

    def _decode_run(self, packed: Tensor, scales: Tensor) -> Tensor:
        import bitsandbytes.functional as bnb

        numel = 2 * packed.numel()
        state = bnb.QuantState(
            absmax=scales[: -(-numel // self.blocksize)].contiguous(),
            shape=torch.Size((numel,)),
            blocksize=self.blocksize,
            quant_type=self.quant_type,
            dtype=torch.float32,
        )
        run: Tensor = bnb.dequantize_4bit(packed, state)
        return run.reshape(-1)

    def _state(self, shape: torch.Size, scales: Tensor) -> QuantState:
        import bitsandbytes.functional as bnb

        state: dict[str, Any] = {"absmax": scales}
        if self.nested:
            offset = scales.mean()
            codes, nested = bnb.quantize_blockwise(scales - offset, blocksize=_NESTED_BLOCKSIZE)
            state = {"absmax": codes, "offset": offset, "state2": nested}
        table = bnb.get_4bit_type(self.quant_type, device=scales.device)
        return self._quant_state(shape, code=table, **state)

    def _longest_state(self, shape: tuple[int, ...]) -> QuantState:
        import bitsandbytes.functional as bnb

        nothing = torch.empty(0)
        state: dict[str, Any] = {"absmax": nothing, "code": nothing}
        if self.nested:
            state["offset"] = torch.tensor(_LONGEST_FLOAT)
            state["state2"] = bnb.QuantState(
                absmax=nothing, code=nothing, blocksize=_NESTED_BLOCKSIZE, dtype=torch.float32
            )
        return self._quant_state(shape, **state)

    def _quant_state(self, shape: tuple[int, ...], **parts: Any) -> QuantState:
        import bitsandbytes.functional as bnb

        return bnb.QuantState(
            shape=torch.Size(shape),
            blocksize=self.blocksize,
            quant_type=self.quant_type,
            dtype=self.dtype,
            **parts,
        )

    def _settings_name(self, name: str) -> str:
        return f"{name}.quant_state.bitsandbytes__{self.quant_type}"

    def _tensors(self, name: str, packed: Tensor, state: QuantState) -> dict[str, Tensor]:
        settings = self._settings_name(name)
        parts = {f"{name}.{key}": part for key, part in state.as_dict(packed=True).items()}
        room = self.specs(name, tuple(state.shape))[settings].shape[0]
        text = _settings_text(state).ljust(room)  # JSON may end in blanks
        parts[settings] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        return {name: packed, **parts}


def _settings_text(state: QuantState) -> bytes:
    """The packed JSON that bitsandbytes stores beside the tensors of `state`."""
    (text,) = (
        part for key, part in state.as_dict(packed=True).items() if key.startswith("quant_state.")
    )
    return bytes(text.cpu().numpy().tobytes())


def _nested_scales(name: str, encoded: Mapping[str, Tensor]) -> Tensor:
    """The float32 scales that a loader makes of the 8-bit ones."""
    import bitsandbytes.functional as bnb

    prefix = f"{name}."
    parts = {k.removeprefix(prefix): v for k, v in encoded.items() if k.startswith(prefix)}
    state = bnb.QuantState.from_dict(parts, device=encoded[name].device)
    scales: Tensor = bnb.dequantize_blockwise(state.absmax, state.state2) + state.offset
    return scales


def _dequantize(packed: Tensor, state: QuantState, device: torch.device) -> Tensor:
    import bitsandbytes.functional as bnb

    if packed.device != device:
        parts = state.as_dict(packed=True)  # `state.to` would move the live one
        packed, state = packed.to(device), bnb.QuantState.from_dict(parts, device=device)
    weight: Tensor = bnb.dequantize_4bit(packed, state)
    return weight
