"""What a merge is going to do: every tensor that is written, its names, and how.

Knows nothing of files, nor of how it was decided.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel

from merge_callback.codecs import Container, TensorSpec
from merge_callback.codecs.bnb4 import Bnb4
from merge_callback.codecs.plain import Plain
from merge_callback.conversions import CheckpointNames
from merge_callback.engines import WholeView
from merge_callback.live import (
    Weight,
    any_4bit,
    trained_state,
)
from merge_callback.originals import Unloaded
from merge_callback.processes import ALONE, Processes
from merge_callback.rounding.grid import Grid, Rounded
from merge_callback.sharding import storage, whole

_THREADS = 2  # each more would hold one more weight
_ADAPTERS = "<adapters>"  # announced in place of a weight's name


@dataclass(frozen=True)
class Group:
    """Weights that are converted together, and what each method writes of them, in file order.

    `carried`: what is copied of the base's checkpoint instead; then there are no weights.
    """

    weights: tuple[Weight, ...]
    specs: Mapping[str, Mapping[str, TensorSpec]]  # method -> name in the checkpoint -> spec
    carried: Unloaded | None = None

    @property
    def name(self) -> str:
        return self.weights[-1].key if self.carried is None else self.carried.name


@dataclass(frozen=True)
class Plan:
    """All that a merge is going to do; no tensor has been computed yet.

    Attributes:
        model: the live model, without its adapter's wrapper.
        peft_model: the live model as it was given.
        adapters: names of the active adapters.
        methods: save methods, under their own names.
        groups: what to write, in the order of the files.
        containers: method -> weight -> how to write it.
        names: from names in memory to names in a checkpoint.
        dtype: dtype of the 16-bit output.
        tied_names: weights that are not written, since they equal another one.
        ties_broken: tied weights that the adapter pulled apart, so that every weight is written.
        quantization_config: what was asked for, for 4-bit output of a base of more bits.
        weights: all weights that are written, by name.
        view: the live model as if it were whole.
        sharded: each process holds a part of the weights alone.
        processes: those of the training, if it is.
    """

    model: PreTrainedModel
    peft_model: PeftModel
    adapters: tuple[str, ...]
    methods: tuple[str, ...]
    groups: tuple[Group, ...]
    containers: Mapping[str, Mapping[str, Container]]
    names: CheckpointNames
    dtype: torch.dtype
    tied_names: tuple[str, ...]
    ties_broken: tuple[str, ...]
    quantization_config: Any
    weights: Mapping[str, Weight] = field(repr=False)
    view: WholeView
    sharded: bool = False
    processes: Processes = ALONE

    @property
    def carried(self) -> tuple[Unloaded, ...]:
        """What is copied of the base's checkpoint, since transformers does not load it."""
        return tuple(group.carried for group in self.groups if group.carried is not None)

    def whole(self, weight: Weight) -> Weight:
        """For the leader: a weight with what other processes, which are `giving`, hold of it."""
        if not self.sharded:
            return weight
        self.processes.announce(weight.key)
        return whole(weight)

    def adapter_state(self) -> dict[str, Tensor] | None:
        """What was trained, with what other processes hold of it; None: it is all here already."""
        if not self.sharded:
            return None
        self.processes.announce(_ADAPTERS)
        with self.view.shown():
            return trained_state(self.peft_model)

    def finish(self) -> None:
        """For the leader: nothing more is asked for."""
        self.processes.announce(None)

    def giving(self) -> None:
        """For all but the leader: take part in what it asks for, until it has finished."""
        for key in self.processes.listening():
            if key == _ADAPTERS:
                with self.view.shown():
                    trained_state(self.peft_model)
            else:
                whole(self.weights[key])

    @property
    def threads(self) -> int:
        """How many weights are computed at a time, on one core each; 1: one, on all cores.

        Several on the CPU, where each takes little memory. How many cores a weight has decides
        about the last places of sums, so whoever wants the same values again has to ask.
        """
        weights = self.weights.values()
        on_cpu = all(weight.stored.device.type == "cpu" for weight in weights)
        whole = any(update.whole for weight in weights for update in weight.updates)
        several = on_cpu and not whole and not self.sharded  # those are gathered in one order
        return _THREADS if several and torch.get_num_threads() >= _THREADS else 1

    @property
    def base_is_4bit(self) -> bool:
        return any_4bit(self.weights.values())

    @property
    def on_a_grid(self) -> bool:
        """Whether some of what is rounded to 4 bits lies on a 4-bit grid but for its adapter."""
        return any(weight.on_a_grid for weight in self.to_round().values())

    @property
    def from_original(self) -> bool:
        return any(weight.original is not None for weight in self.weights.values())

    @property
    def nbytes(self) -> int:
        """Bytes of all weight files, the adapter's included."""
        specs = [spec for g in self.groups for named in g.specs.values() for spec in named.values()]
        shared = {storage(t): t.nbytes for w in self.weights.values() for t in w.trained}
        adapter = sum(shared.values()) if "lora" in self.methods else 0
        return sum(spec.nbytes for spec in specs) + adapter

    def to_round(self) -> dict[str, Weight]:
        """Linear layer -> its weight, for all that `merged_4bit` has to round."""
        containers = self.containers.get("merged_4bit", {})
        return {
            key.removesuffix(".weight"): weight
            for key, weight in self.weights.items()
            if isinstance(containers.get(key), Bnb4) and (weight.updates or not weight.on_a_grid)
        }

    def grid(self, weight: Weight) -> Grid:
        """The format that `merged_4bit` rounds a weight to."""
        return self._bnb4(weight.key).grid

    def with_rounded(self, rounded: Mapping[str, Rounded]) -> Plan:
        """The same plan with 4-bit codes that have been chosen already, by weight."""
        if not rounded:
            return self
        chosen = {key: replace(self._bnb4(key), rounded=codes) for key, codes in rounded.items()}
        named = {**self.containers["merged_4bit"], **chosen}
        return replace(self, containers={**self.containers, "merged_4bit": named})

    def _bnb4(self, key: str) -> Bnb4:
        container = self.containers["merged_4bit"][key]
        assert isinstance(container, Bnb4)
        return container

    def unquantised_linears(self, method: str) -> list[str]:
        """Names of the linear layers that `method` leaves in 16 bits."""
        containers = self.containers[method]
        kept = [
            weight.key
            for weight in self.weights.values()
            if weight.linear and isinstance(containers[weight.key], Plain)
        ]
        return sorted(key.removesuffix(".weight") for key in (*kept, *self.tied_names))
