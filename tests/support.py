"""docs/support.md and docs/reliability.md, from the tests that ran. Used by make."""

import datetime
import importlib.metadata
import os

INTRODUCTIONS = {
    "support.md": [
        "# What merges",
        "",
        "Made by the tests, from what they ran: `make support-matrix`. Each *yes* is a real, tiny",
        "model; other cells say why not.",
        "",
        "The tests ran on Linux. What Windows lacks and does otherwise was simulated there:",
        "without fcntl, O_DIRECTORY, fork and sysconf, with directories that cannot be opened,",
        "and files that cannot be moved or removed while they are open, every module is",
        "imported, versions are published, recovered after a process was ended, and pruned,",
        "processes race, and a QLoRA model is trained, calibrated, merged and verified",
        "(`tests/test_portability.py`). Nothing was run on Windows or macOS.",
    ],
    "reliability.md": [
        "# What a fault leaves",
        "",
        "Made by the tests, from what they ran: `make test-faults`. A version is there whole or",
        "not at all: the manifest, which names every file with its sha256, is the last file of",
        "a draft, and a draft becomes a version by one rename onto a directory that an",
        "exclusive mkdir has claimed. Where directories cannot be renamed so, its files are",
        "moved one by one, the manifest last.",
        "",
        "For each cell a process was forked for each system call of the step (mkdir, open,",
        "write, fsync, chmod, rename, unlink, rmdir), and the fault put in there. The cell says",
        "which versions were there afterwards, their sha256 verified. The next run went on in",
        "every case, and removed what a process that died, or a removal that failed, had left.",
        "Within a training the steps are those of the merge at step 2, checkpoints are as they",
        "were, and what went on, the process itself or a new one, came from checkpoint-2 to the",
        "weights of a run that met no fault.",
        "",
        "Object stores that are mounted as file systems (s3fs, gcsfuse, goofys) copy a",
        "directory to rename it, and lock nothing: drafts of other hosts are left alone there,",
        "and a process that dies while the copy is made leaves a directory without a manifest,",
        "which is no version. Write to a local disk, and push or copy from there, if you can.",
        "",
        "The table of planted faults says what verification makes of a fault in the code that",
        "merges, rounds and writes, in configs, tokenizer, buffers, files and data: *refused*,",
        "*said* in a warning, or *published*. The same fault is planted with data to compare",
        "outputs on and without.",
    ],
}
PAIRS = ("Causal language models", "Images and text")  # each of an architecture and a base
LIBRARIES = ("torch", "transformers", "peft", "trl", "bitsandbytes", "accelerate")


def write(path, cells):
    """Write the matrix. `cells`: (table, row, column, what came of it)."""
    tables = {}
    for table, row, column, found in cells:
        tables.setdefault(table, {}).setdefault(row, {})[column] = found
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in LIBRARIES)
    lines = [
        *INTRODUCTIONS[os.path.basename(path)],
        "",
        f"{datetime.date.today().isoformat()}, CPU: {versions}.",
    ]
    if PAIRS[0] in tables:
        lines += ["", *summary([found for table, _, _, found in cells if table in PAIRS])]
    for table, rows in tables.items():
        columns = list(dict.fromkeys(column for row in rows.values() for column in row))
        lines += ["", f"## {table}", "", f"| | {' | '.join(columns)} |"]
        lines.append("|---" * (len(columns) + 1) + "|")
        for row, found in rows.items():
            lines.append(f"| {row} | {' | '.join(found.get(c, '') for c in columns)} |")
    with open(path, "w") as file:
        file.write("\n".join(lines) + "\n")


def summary(cells):
    """How many pairs of an architecture and a base are right, and what became of the others."""

    def count(*starts):
        return sum(cell.startswith(starts) for cell in cells)

    return [
        f"Of {len(cells)} pairs of an architecture of transformers and a base,",
        f"{count('yes', 'refused', 'FAILED')} run: {count('yes')} are right,",
        f"{count('refused')} refused when planned, {count('FAILED')} wrong.",
        f"{count('unusable')} are unusable without a merge too, {count('not tried')} not tried.",
    ]
