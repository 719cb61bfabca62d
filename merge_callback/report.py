"""Figures of a merge, as a table and as JSON. Knows nothing of models.

Names of models, adapters and weights may be anything: in Markdown they are `inline`.

`manifest` is what stands in merge_manifest.json, `tensors` method -> weight -> its figures.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from merge_callback.foreign import plain

Manifest = Mapping[str, Any]
Tensors = Mapping[str, Mapping[str, Mapping[str, float | None]]]

_FIGURES = {"gain_kept": "gain kept {:.1%}", "kl": "KL {:.5f}"}
_SHOWN = 10  # tensors in the table
_MARKUP = {ord(character): f"&#{ord(character)};" for character in "&<>`|*[]\\"}


def inline(text: object) -> str:
    """A text within a line or a cell of Markdown, in which nothing is markup."""
    return plain(text).translate(_MARKUP)


def write_report(directory: Path, manifest: Manifest, tensors: Tensors) -> None:
    """Write merge_report.json and merge_report.md, and merge_report.png where matplotlib is."""
    whole = {**manifest, "tensors": tensors}
    (directory / "merge_report.json").write_text(json.dumps(whole, indent=2) + "\n", "utf-8")
    (directory / "merge_report.md").write_text(report_text(manifest, tensors), "utf-8")
    try:
        from merge_callback.plot import draw
    except ImportError:  # the extra `plot` is not installed
        return
    draw(directory / "merge_report.png", manifest, tensors)


def figures_table(manifest: Manifest) -> str:
    """Losses of base, live and merged models, and how near the last two are; Markdown."""
    checked = manifest.get("verification") or {}
    models = checked.get("models") or {}
    rows = [
        f"| {inline(method)} | {_number(found['loss_base'])} | {_number(found['loss_live'])} | "
        f"{_number(found['loss'])} | {_percent(found['gain_kept'])} | "
        f"{_number(found['kl'], 5)} | {_percent(found['agreement'])} |"
        for method, found in models.items()
        if "rows" in found
    ]
    if not rows:
        return "Outputs were not compared with the live model's."
    head = (
        "| | loss, base | loss, trained | loss, merged | gain kept | KL | same first choice |\n"
        "|---|---|---|---|---|---|---|"
    )
    count = next(found["rows"] for found in models.values() if "rows" in found)
    note = (
        f"Measured on {count} predictions of {checked['data']}. KL(trained \\|\\| merged) is in "
        "nats a prediction; gain kept is (base - merged) / (base - trained), in loss, and is left "
        "out where training gained less than the measurement can tell, or on one sequence alone."
    )
    return "\n".join([head, *rows, "", note])


def summary(manifest: Manifest, path: str | os.PathLike[str]) -> str:
    """One line: where a version lies, how large it is, and how near its models come."""
    size = sum(file["size"] for file in manifest["files"].values())
    seconds = sum(manifest["seconds"].values())
    parts = [
        f"{method} retention {found['overall']:.3f}"
        for method, found in manifest["retention"].items()
        if found["overall"] is not None
    ]
    for method, found in ((manifest["verification"] or {}).get("models") or {}).items():
        for name, told in _FIGURES.items():
            if found.get(name) is not None:
                parts.append(f"{method} {told.format(found[name])}")
    figures = f"; {', '.join(parts)}" if parts else ""
    methods = ", ".join(manifest["save_methods"])
    return f"merged {methods} into {path}: {size / 1e9:.2f} GB in {seconds:.1f} s{figures}"


def metrics(manifest: Manifest) -> dict[str, float]:
    """The figures of a merge, by the names that loggers show; those of its first method."""
    models = (manifest["verification"] or {}).get("models") or {}
    found: dict[str, float | None] = next(iter(models.values()), {})
    figures = {f"merge/{name}": found.get(name) for name in ("gain_kept", "kl", "agreement")}
    figures["merge/seconds"] = sum(manifest["seconds"].values())
    figures["merge/bytes"] = sum(file["size"] for file in manifest["files"].values())
    return {name: float(value) for name, value in figures.items() if value is not None}


def report_text(manifest: Manifest, tensors: Tensors) -> str:
    """The report for people, Markdown."""
    base = manifest["base"]["id"] or "a base made in memory"
    parts = [
        f"# Merge of step {manifest['step']}" if manifest["step"] is not None else "# Merge",
        f"{', '.join(manifest['save_methods'])} of {inline(base)}, adapter "
        f"{inline(', '.join(manifest['adapters']))}, {manifest['created']}"
        + (f", rounding {manifest['rounding']}" if manifest["rounding"] else "")
        + ".",
        figures_table(manifest),
    ]
    problems = (manifest.get("verification") or {}).get("problems") or ()
    if problems:
        lines = "\n".join(f"- {inline(problem)}" for problem in problems)
        parts.append(f"**Published in spite of:**\n\n{lines}")
    checks = (manifest.get("verification") or {}).get("checks") or {}
    if checks:
        passed = [what for what, found in checks.items() if found == "passed"]
        others = "".join(
            f"; {what}: {found}" for what, found in checks.items() if found != "passed"
        )
        parts.append(f"Checks that passed: {', '.join(passed) or 'none'}{others}.")
    left_out = (manifest.get("calibration") or {}).get("left_out") or {}
    if left_out:
        lines = "".join(f"- {inline(name)}: {inline(why)}\n" for name, why in left_out.items())
        parts.append(f"Rounded without data:\n\n{lines}".rstrip())
    for method, by_name in tensors.items():
        parts.append(f"## {method}\n\n{_tensor_table(by_name)}")
    seconds = ", ".join(f"{stage} {spent:.1f} s" for stage, spent in manifest["seconds"].items())
    versions = ", ".join(f"{name} {version}" for name, version in manifest["libraries"].items())
    parts.append(f"{seconds}.\n\n{versions}")
    return "\n\n".join(parts) + "\n"


def _tensor_table(tensors: Mapping[str, Mapping[str, float | None]]) -> str:
    trained = {key: found for key, found in tensors.items() if found["retention"] is not None}
    ordered = sorted(trained, key=lambda key: trained[key]["retention"] or 0.0)
    rows = [
        f"| {inline(key)} | {_number(found['retention'], 3)} | {_number(found['error'], 4)} |"
        for key, found in ((key, trained[key]) for key in ordered[:_SHOWN])
    ]
    if not rows:
        return "The adapter changes no weight."
    said = (
        f"{len(tensors)} weights, {len(trained)} of them changed by the adapter; those that kept "
        "least of it first. Retention is how much of the change arrived, error how far the file is "
        "from the exact sum, as a share of it."
    )
    return "\n".join([said, "", "| weight | retention | error |", "|---|---|---|", *rows])


def _number(value: float | None, digits: int = 4) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:.1%}"
