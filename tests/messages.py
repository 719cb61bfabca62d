"""Every message of an error that users see, as it stands in the source."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import merge_callback
from merge_callback import errors

PACKAGE = Path(merge_callback.__file__).parent
_ENDS = ("problems", "misses", "unfit", "unusable")
_FILES = ("bases", "checkpoints", "recipe", "rows")  # what is wrong in one is a ValueError
OURS = {name for name, kind in vars(errors).items() if isinstance(kind, type)}


def messages() -> Iterator[tuple[str, str]]:
    """Where it stands, and its text with … for what is filled in."""
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            for text in _told(node, path.stem):
                yield f"{path.relative_to(PACKAGE)}:{node.lineno}", text


def pattern(text: str) -> str:
    """The words of a message in a cell of a table, where … may stand for more, or be filled in."""
    words = [part for part in text.split("…") if re.search(r"\w", part)]
    return "[^|]*?".join(re.escape(part.strip(" ;:")) for part in words)


def _told(node: ast.AST, module: str) -> Iterator[str]:
    raised = OURS | {"ValueError"} if module in _FILES else OURS
    if isinstance(node, ast.Call) and getattr(node.func, "id", "") in raised:
        yield from _texts(*node.args)
    elif isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") in (
        "_CURES",
        "_LATER",
        "_ODD",
    ):
        yield from _texts(*getattr(node.value, "values", [node.value]))
    elif isinstance(node, ast.Call) and _is_append(node) and _names_problems(node.func.value):
        yield from _texts(*node.args)
    elif isinstance(node, ast.AugAssign) and _names_problems(node.target):
        yield from _texts(node.value)
    elif isinstance(node, ast.FunctionDef) and node.name.endswith(_ENDS):
        for inner in ast.walk(node):
            if isinstance(inner, ast.Yield | ast.Return) and inner.value is not None:
                yield from _texts(inner.value)
            elif isinstance(inner, ast.Call) and _is_append(inner):
                yield from _texts(*inner.args)


def _is_append(node: ast.Call) -> bool:
    return isinstance(node.func, ast.Attribute) and node.func.attr == "append"


def _names_problems(node: ast.AST) -> bool:
    return "problems" in (getattr(node, "id", ""), getattr(node, "attr", ""))


def _texts(*nodes: ast.AST) -> Iterator[str]:
    """Strings that are said, not looked up or compared."""
    for node in nodes:
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and " " in node.value:
            yield node.value
        elif isinstance(node, ast.JoinedStr):
            parts = (part.value if isinstance(part, ast.Constant) else "…" for part in node.values)
            if " " in (text := "".join(parts)):
                yield text
        elif isinstance(node, ast.List | ast.ListComp | ast.GeneratorExp | ast.Tuple | ast.IfExp):
            yield from _texts(*ast.iter_child_nodes(node))
