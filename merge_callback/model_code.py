"""What the code of a model does with its layers' weights beside calling the layers.

The source of the classes is read, since only some inputs may take that way. Knows no outputs.
"""

from __future__ import annotations

import ast
import functools
import inspect
import re
import textwrap
from collections.abc import Callable
from typing import Any, NamedTuple, cast

from torch import nn

# Not its dtype or device alone, nor rows of it.
_READ = re.compile(r"self\.(\w+)\.weight(?!\w|\.(?:dtype|device|shape|size|data)\b|\[|, torch\.)")
_CAST_TO = re.compile(r"\.to\((?:dtype=)?self\.(\w+)\.weight\.dtype\)")


def used_outside_their_layers(model: nn.Module) -> set[str]:
    """Weights that the model reads itself, as `self.router.weight`, or casts inputs to.

    Packed into 4 bits they have another shape and dtype there.
    """
    return _named(model, lambda used: used.read | used.cast_to)


def cast_to(model: nn.Module) -> set[str]:
    """Weights to whose dtype the model casts inputs, whether they are packed or not."""
    return _named(model, lambda used: used.cast_to_unasked)


class _Used(NamedTuple):
    """Members of a module by what its methods do with their weights."""

    read: frozenset[str]
    cast_to: frozenset[str]
    cast_to_unasked: frozenset[str]  # without a look at uint8, which packed weights are of


def _named(model: nn.Module, choose: Callable[[_Used], frozenset[str]]) -> set[str]:
    return {
        f"{name}.{child}.weight" if name else f"{child}.weight"
        for name, module in model.named_modules()
        for child in choose(_used_by(cast(Any, type(module))))
        if isinstance(getattr(module, child, None), nn.Module)
    }


@functools.cache
def _used_by(kind: type[nn.Module]) -> _Used:
    texts = []
    for owner in kind.__mro__:
        if owner.__module__.startswith(("torch.", "peft.")) or owner is object:
            continue
        for name, method in vars(owner).items():
            if inspect.isfunction(method) and "init" not in name and _names_weights(method):
                texts.append(_source_at_inference(method))
    whole = "\n".join(texts)
    unasked = "\n".join(text for text in texts if "uint8" not in text)
    return _Used(
        frozenset(_READ.findall(whole)),
        frozenset(_CAST_TO.findall(whole)),
        frozenset(_CAST_TO.findall(unasked)),
    )


def _names_weights(method: Any) -> bool:
    return "weight" in inspect.unwrap(method).__code__.co_names


def _source_at_inference(method: Callable[..., Any]) -> str:
    """Without comments, and without what only runs in training, as fused kernels do."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(method)))
    except (OSError, TypeError, SyntaxError):  # made by code
        return ""
    return ast.unparse(_Inference().visit(tree))


class _Inference(ast.NodeTransformer):
    def visit_If(self, node: ast.If) -> Any:
        self.generic_visit(node)
        return node.orelse or ast.Pass() if "self.training" in ast.unparse(node.test) else node
