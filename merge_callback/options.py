"""The options of one merge, checked as a whole. Knows nothing of models or files."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeGuard

import torch
from huggingface_hub import split_torch_state_dict_into_shards

from merge_callback.errors import MergeRefused

if TYPE_CHECKING:
    from transformers import BitsAndBytesConfig

SAVE_METHODS = ("merged_4bit", "merged_16bit", "lora")
ROUNDINGS = ("auto", "nearest", "stochastic", "calibrated", "tuned")
BASES = ("live", "original")
# Unsloth's names, whose spelling it is loose about: "Merged 4bit-forced" is one, too.
_SYNONYMS = {"merged_4bit_forced": "merged_4bit", "forced_merged_4bit": "merged_4bit"}


def positive(value: object) -> TypeGuard[float]:
    """Whether it is a number above 0."""
    return isinstance(value, int | float) and value > 0  # NaN is not


@dataclass(frozen=True, kw_only=True)
class MergeOptions:
    """What to write, and how; the same for `merge_adapter` and the callback.

    Attributes:
        save_method: `"merged_4bit"`, `"merged_16bit"`, `"lora"`, or several, made in one pass.
            None: `"merged_4bit"` on a bitsandbytes 4-bit base, else `"merged_16bit"`. Unsloth's
            names and spellings are understood.
        rounding: how 4-bit codes are chosen.
            `"nearest"`: bitsandbytes' own; on a 4-bit base it rounds the training away.
            `"stochastic"`: up or down by chance, so that on average nothing is lost; needs no data;
            on a base that is not in 4 bits, with a warning, `"nearest"`.
            `"calibrated"`: so that the outputs change least on `calibration_tokens` tokens of data.
            `"tuned"`: calibrated, then block scales are distilled from the live model.
            `"auto"`: with data `"tuned"`, on a trainer's saves before the end `"calibrated"`;
            without data `"stochastic"` on a 4-bit base and `"nearest"` on others.
        base: what the adapter is added to: `"live"`, the weights that it was trained and evaluated
            on, or `"original"`, the 16-bit checkpoint that these were quantised from.
        calibration_tokens: how many tokens to calibrate with.
        calibration_memory: bytes for the streams of calibration, 8 a token and hidden dimension;
            None: a quarter of what is free on the model's device. Fewer tokens are used if need be.
        rounding_minutes: what calibrated and tuned rounding may take; the best reached by then is
            kept. None: as long as they need.
        dtype: dtype of the 16-bit output, a torch.dtype or its name. None: the dtype of the base.
        quantization_config: settings of the 4-bit output when the base is not 4-bit itself. None:
            NF4 with double quantisation.
        max_shard_size: largest weight file, in bytes or as `"5GB"`.
        safe_serialization: None or True, safetensors. False is refused.
        verify: read the files back before they are published, load them as anybody would, and
            compare weights and outputs with the live model. What is broken is not published;
            `"warn"` publishes it all the same, unless a file is not what was written. False: no.
        verify_tokens: how many tokens to compare outputs on.
        min_gain_kept: share of what training gained, in loss, that must be left. None: any.
        max_kl: largest KL(live || merged), in nats per token. None: any.
        card: write a model card beside each model, from our template, or from a Jinja file of
            yours (see `card.write_card`). False: none.
        progress: show a progress bar.

    Raises:
        MergeRefused: an option, or a combination of options, that cannot be honoured.
    """

    save_method: str | Sequence[str] | None = None
    rounding: str = "auto"
    base: str = "live"
    calibration_tokens: int = 65536
    calibration_memory: int | None = None
    rounding_minutes: float | None = None
    dtype: torch.dtype | str | None = None
    quantization_config: BitsAndBytesConfig | None = None
    max_shard_size: int | str = "5GB"
    safe_serialization: bool | None = None
    verify: bool | str = True
    verify_tokens: int = 8192
    min_gain_kept: float | None = None
    max_kl: float | None = None
    card: bool | str | os.PathLike[str] = True
    progress: bool = True

    def __post_init__(self) -> None:
        problems = [
            *self._method_problems(),
            *self._dtype_problems(),
            *self._shard_problems(),
            *self._quantization_problems(),
        ]
        for option, value, known in (
            ("rounding", self.rounding, ROUNDINGS),
            ("base", self.base, BASES),
            ("verify", self.verify, (True, False, "warn")),
        ):
            if value not in known:
                names = ", ".join(map(repr, known))
                problems.append(f"{option}={value!r} is not known; use one of {names}")
        if not isinstance(self.card, bool) and not os.path.isfile(self.card):
            problems.append(
                f"card={str(self.card)!r} is no file; use a Jinja template, True or False"
            )
        if not self.verify and (self.min_gain_kept is not None or self.max_kl is not None):
            problems.append("min_gain_kept and max_kl need verify=True, or 'warn'")
        for option in (
            "calibration_tokens",
            "calibration_memory",
            "rounding_minutes",
            "verify_tokens",
            "min_gain_kept",
            "max_kl",
        ):
            value = getattr(self, option)
            if value is not None and not positive(value):
                problems.append(f"{option}={value!r} must be a positive number")
        if positive(least := self.min_gain_kept) and least > 1:
            problems.append(f"min_gain_kept={least} is a share, from 0 to 1")
        if self.safe_serialization not in (None, True):
            problems.append(
                "safe_serialization=False would pickle the weights, which can run code when they "
                "are loaded; leave it out: safetensors is what every loader reads"
            )
        if problems:
            raise MergeRefused(problems)

    def methods(self, *, base_is_4bit: bool) -> tuple[str, ...]:
        """The save methods that were asked for, under their own names and without repeats."""
        asked = self.save_method
        if asked is None:
            return ("merged_4bit",) if base_is_4bit else ("merged_16bit",)
        names = (asked,) if isinstance(asked, str) else asked
        spelled = [name.lower().strip().replace("-", "_").replace(" ", "_") for name in names]
        return tuple(dict.fromkeys(_SYNONYMS.get(name, name) for name in spelled))

    @property
    def output_dtype(self) -> torch.dtype | None:
        """`dtype` as a torch.dtype."""
        if isinstance(self.dtype, str):
            found = getattr(torch, self.dtype.removeprefix("torch."))
            assert isinstance(found, torch.dtype)
            return found
        return self.dtype

    @property
    def wants_data(self) -> bool:
        """Whether the rounding that was asked for is better with data."""
        return self.rounding in ("auto", "calibrated", "tuned")

    @property
    def needs_data(self) -> bool:
        """Whether the rounding that was asked for cannot do without data."""
        return self.rounding in ("calibrated", "tuned")

    def _method_problems(self) -> list[str]:
        if self.save_method is None:
            return []
        if not isinstance(self.save_method, str | Sequence):
            return [f"save_method={self.save_method!r} must be a name or a list of names"]
        known = ", ".join(repr(name) for name in SAVE_METHODS)
        if not all(isinstance(name, str) for name in self.save_method):
            return [f"save_method={self.save_method!r} must be a name or a list of names"]
        methods = self.methods(base_is_4bit=True)
        if not methods:
            return [f"save_method is empty; use one or several of {known}"]
        unknown = [name for name in methods if name not in SAVE_METHODS]
        return [f"save_method {name!r} is not known; use one of {known}" for name in unknown]

    def _dtype_problems(self) -> list[str]:
        names = ("bfloat16", "float16", "float32")
        name = str(self.dtype).removeprefix("torch.")
        if self.dtype is None or name in names:
            return []
        return [f"dtype={self.dtype!r} cannot hold merged weights; use one of {', '.join(names)}"]

    def _shard_problems(self) -> list[str]:
        if not isinstance(self.max_shard_size, int | str):
            return [f"max_shard_size={self.max_shard_size!r} is no size; use bytes or e.g. '5GB'"]
        try:
            split_torch_state_dict_into_shards({}, max_shard_size=self.max_shard_size)
        except ValueError:
            return [f"max_shard_size={self.max_shard_size!r} is no size; use bytes or e.g. '5GB'"]
        if isinstance(self.max_shard_size, int) and self.max_shard_size <= 0:
            return [f"max_shard_size={self.max_shard_size} must be positive"]
        return []

    def _quantization_problems(self) -> list[str]:
        config = self.quantization_config
        if config is None or getattr(config, "load_in_4bit", False):
            return []
        return ["quantization_config must be a BitsAndBytesConfig(load_in_4bit=True, ...)"]
