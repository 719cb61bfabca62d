"""docs/support.md: what merges, from the tests that ran. Used by `make support-matrix`."""

import datetime
import importlib.metadata

LIBRARIES = ("torch", "transformers", "peft", "trl", "bitsandbytes", "accelerate")


def write(path, cells):
    """Write the matrix. `cells`: (table, row, column, what came of it)."""
    tables = {}
    for table, row, column, found in cells:
        tables.setdefault(table, {}).setdefault(row, {})[column] = found
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in LIBRARIES)
    lines = [
        "# What merges",
        "",
        "Made by the tests, from what they ran: `make support-matrix`. Each *yes* is a real, tiny",
        "model; other cells say why not.",
        "",
        f"{datetime.date.today().isoformat()}, CPU: {versions}.",
    ]
    for table, rows in tables.items():
        columns = list(dict.fromkeys(column for row in rows.values() for column in row))
        lines += ["", f"## {table}", "", f"| | {' | '.join(columns)} |"]
        lines.append("|---" * (len(columns) + 1) + "|")
        for row, found in rows.items():
            lines.append(f"| {row} | {' | '.join(found.get(c, '') for c in columns)} |")
    with open(path, "w") as file:
        file.write("\n".join(lines) + "\n")
