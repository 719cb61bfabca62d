"""Whether this package can be installed beside frameworks that train, and changes nothing there.

Each framework is resolved alone, then with `merge-callback[bnb,trl]`: what was pinned stays so.
Needs uv and a network; run by make frameworks.
"""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
FRAMEWORKS = [
    "unsloth==2026.10.9 unsloth_zoo==2026.10.9",
    "axolotl==0.19.0",
    "ms-swift==4.6.0",
    "llamafactory==0.9.5",
]
SHOWN = ("torch", "transformers", "peft", "trl", "bitsandbytes", "accelerate", "huggingface-hub")


def resolved(*wanted):
    """Package -> version, as uv resolves them for Python 3.12."""
    told = subprocess.run(
        [Path(sys.executable).with_name("uv"), "pip", "compile", "--quiet", "--no-header",
         "--no-annotate", "--python-version", "3.12", "-"],
        input="\n".join(wanted), text=True, capture_output=True, check=False,
    )  # fmt: skip
    if told.returncode:
        raise SystemExit(told.stderr)
    lines = [line for line in told.stdout.splitlines() if "==" in line]
    return dict(line.split(" ")[0].split("==") for line in lines)


def main():
    print(f"| framework | {' | '.join(SHOWN)} | new | changed |")
    print("|---" * (len(SHOWN) + 3) + "|")
    broken = False
    for framework in FRAMEWORKS:
        alone = resolved(*framework.split())
        pins = [f"{name}=={version}" for name, version in alone.items()]
        ours = resolved(*pins, f"merge-callback[bnb,trl] @ {ROOT.as_uri()}")
        changed = [name for name in alone if ours.get(name) != alone[name]]
        new = sorted(ours.keys() - alone.keys() - {"merge-callback"})
        shown = " | ".join(ours.get(name, "") for name in SHOWN)
        told = ", ".join(changed) or "nothing"
        print(f"| {framework.split()[0]} | {shown} | {', '.join(new) or 'nothing'} | {told} |")
        broken = broken or bool(changed)
    sys.exit(broken)


if __name__ == "__main__":
    main()
