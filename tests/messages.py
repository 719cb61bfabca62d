"""Every message of an error that users see, as it stands in the source."""

import ast
from collections.abc import Iterator
from pathlib import Path

import merge_callback
from merge_callback import errors

PACKAGE = Path(merge_callback.__file__).parent
OURS = {name for name, kind in vars(errors).items() if isinstance(kind, type)}


def messages() -> Iterator[tuple[str, str]]:
    """Where it stands, and its text with … for what is filled in."""
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            for text in _told(node):
                yield f"{path.relative_to(PACKAGE)}:{node.lineno}", text


def fragment(text: str) -> str:
    """The longest part of a message that is always the same."""
    return max(text.split("…"), key=len).strip(" ;:,.(")


def _told(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.Call) and getattr(node.func, "id", "") in OURS:
        yield from _texts(*node.args)
    elif isinstance(node, ast.Call) and _is_append(node) and _names_problems(node.func.value):
        yield from _texts(*node.args)
    elif isinstance(node, ast.AugAssign) and _names_problems(node.target):
        yield from _texts(node.value)
    elif isinstance(node, ast.FunctionDef) and node.name.endswith(("problems", "_misses", "unfit")):
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
