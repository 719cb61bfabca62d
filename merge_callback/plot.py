"""The report as a picture. Needs matplotlib, the extra `plot`."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

_COLOURS = 10  # kinds of weights that can be told apart
_BASE, _LIVE, _MERGED = "#b0b0b0", "#3b6ea5", "#d1793b"


def draw(path: Path, manifest: Mapping[str, Any], tensors: Mapping[str, Any]) -> None:
    """Losses as bars; retention and error of each weight over the layers, one row a method."""
    methods = list(tensors)
    rows = max(1, len(methods))
    figure = Figure(figsize=(13, 3.9 * rows))
    FigureCanvasAgg(figure)
    # Places of its own: to have them found takes as long as all the drawing does.
    edge = {"bottom": 0.12 / rows, "top": 1 - 0.08 / rows, "hspace": 0.3}
    figure.subplots_adjust(left=0.05, right=0.86, wspace=0.3, **edge)
    axes = figure.subplots(rows, 3, squeeze=False, width_ratios=[1, 2, 2])
    models = (manifest.get("verification") or {}).get("models") or {}
    for row, method in zip(axes, methods, strict=False):
        _losses(row[0], models.get(method) or {}, method)
        _over_layers(row[1], tensors[method], "retention", "share of the adapter that arrived")
        _over_layers(row[2], tensors[method], "error", "|file - exact| / |exact|")
        handles, labels = row[1].get_legend_handles_labels()
        if handles:
            row[2].legend(
                handles, labels, fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5)
            )
    if not methods:
        for axis in axes[0]:
            axis.set_axis_off()
    figure.savefig(path, dpi=110)


def _losses(axis: Any, found: Mapping[str, Any], method: str) -> None:
    values = {name: found.get(key) for name, key in _BARS.items()}
    shown = {name: value for name, value in values.items() if value is not None}
    axis.set_title(method)
    if not shown:
        axis.set_axis_off()
        return
    bars = axis.bar(list(shown), list(shown.values()), color=[_COLOUR_OF[name] for name in shown])
    axis.bar_label(bars, fmt="%.3f", fontsize=9)
    axis.set_ylim(0.0, 1.15 * max(shown.values()) + 1e-9)
    axis.set_ylabel("loss")
    axis.spines[["top", "right"]].set_visible(False)


def _over_layers(axis: Any, tensors: Mapping[str, Any], figure: str, label: str) -> None:
    """One line for each kind of weight, the mean where a layer has several."""
    lines: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for name, found in tensors.items():
        if found["retention"] is not None and found[figure] is not None:
            layer = re.search(r"\.(\d+)\.", name)
            kind = re.sub(r"\.\d+(?=\.)", "", name).removesuffix(".weight")
            lines[kind][int(layer[1]) if layer else 0].append(found[figure])
    for index, (kind, points) in enumerate(lines.items()):
        if index == _COLOURS:
            axis.set_xlabel(f"layer ({len(lines) - _COLOURS} more kinds are not shown)")
            break
        layers = sorted(points)
        means = [sum(points[layer]) / len(points[layer]) for layer in layers]
        short = ".".join(kind.split(".")[-2:])
        axis.plot(layers, means, marker=".", linewidth=1, label=short, color=f"C{index}")
    if not axis.get_xlabel():
        axis.set_xlabel("layer")
    axis.set_title(figure)
    axis.set_ylabel(label)
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(alpha=0.3)


_BARS = {"base": "loss_base", "trained": "loss_live", "merged": "loss"}
_COLOUR_OF = {"base": _BASE, "trained": _LIVE, "merged": _MERGED}
