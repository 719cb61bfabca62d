"""Save the adapter alone: what is left to do when a merge has failed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from peft import PeftModel
from torch import nn

from merge_callback.companions import save_adapter
from merge_callback.engines import WholeView
from merge_callback.live import active_adapters, adapted, is_sharded_model, trained_state
from merge_callback.manifest import libraries, now
from merge_callback.processes import ALONE, Processes
from merge_callback.store import MergeStore


def rescue(
    model: nn.Module,
    store: MergeStore,
    name: str,
    step: int,
    processes: Processes = ALONE,
    run: str | None = None,
) -> Path:
    """Save the active adapters of `model` as version `name`, which is no merged one."""
    peft_model = adapted(model)
    adapters = active_adapters(peft_model)
    with processes.alike():
        view = WholeView(model)
        with view.shown():
            state = trained_state(peft_model) if is_sharded_model(model) else None
        if not processes.leads:
            return processes.from_leader(Path())
        with view.shown():
            path = _save_alone(peft_model, adapters, store, name, step, state, run)
        return processes.from_leader(path)


def _save_alone(
    peft_model: PeftModel,
    adapters: tuple[str, ...],
    store: MergeStore,
    name: str,
    step: int,
    state: Mapping[str, torch.Tensor] | None,
    run: str | None,
) -> Path:
    with store.draft(name) as draft:
        save_adapter(peft_model, adapters, draft.path, state)
        draft.seal()
        manifest = {
            "kind": "adapter",
            "run": run,
            "created": now(),
            "step": step,
            "best_step": None,
            "adapters": list(adapters),
            "libraries": libraries(),
        }
        return store.publish(draft, name, manifest).path
