"""Draw what the quickstart found: the problem in one picture.

python benchmarks/picture.py quickstart-output/answers.json docs/problem.png
"""

import json
import sys
from pathlib import Path

from matplotlib.figure import Figure

ROWS = {
    "base, 4-bit": "the base, before training",
    "live adapter": "base + adapter, as trained",
    "PEFT merge, 4-bit": "merged into 4 bits by PEFT",
    "merged_4bit": "merged into 4 bits by merge_callback",
}
SHOWN = 1  # which of the questions


def draw(found, path):
    facts, rows = found["facts"], found["rows"]
    figure = Figure(figsize=(9, 3.1), layout="constrained")
    axis = figure.subplots()
    axis.set_title(facts[SHOWN]["question"], loc="left", fontsize=13, fontweight="bold")
    for place, (name, told) in enumerate(ROWS.items()):
        row = next(row for key, row in rows.items() if key.startswith(name))
        answers = zip(row["answers"], facts, strict=True)
        right = sum(answer.startswith(fact["answer"]) for answer, fact in answers)
        colour = "tab:green" if right == len(facts) else "tab:red"
        y = -place
        axis.barh(y - 0.28, right / len(facts), height=0.12, color=colour)
        axis.barh(y - 0.28, 1, height=0.12, color="0.9", zorder=0)
        axis.text(0, y + 0.2, told, fontsize=10, color="0.35", va="center")
        answer = row["answers"][SHOWN].splitlines()[0]
        answer = answer if len(answer) < 62 else answer[:60].rsplit(" ", 1)[0] + " …"
        axis.text(0, y - 0.04, f"“{answer}”", fontsize=12, color="black", va="center")
        score = f"{right}/{len(facts)}"
        axis.text(1.02, y - 0.04, score, fontsize=14, color=colour, va="center", weight="bold")
    axis.set(xlim=(0, 1.1), ylim=(-len(ROWS) + 0.45, 0.5))
    axis.axis("off")
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    source, target = sys.argv[1:]
    draw(json.loads(Path(source).read_text()), target)
