"""Modules that compute with the weight of a child instead of calling the child, and so bypass its adapter.

torch's own are listed here. Others are found in the source of their methods: ``self.proj.weight`` anywhere but where
only its dtype, device or shape is asked for.
"""

from __future__ import annotations

import ast
import functools
import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

# Names of weights; the second is that of torch's attention.
WEIGHTS = frozenset(("weight", "in_proj_weight"))
# Attributes that say nothing of the values.
DESCRIPTIONS = frozenset(("device", "dtype", "is_meta", "ndim", "requires_grad", "shape", "size"))
# Methods that set weights before training, or tie them.
SETTING_UP = ("__init__", "_init", "init_", "_reset", "reset_", "_tie", "tie_", "post_init", "resize_", "set_")
# Methods that run only where a caller asks for it, as in ``fuse_projections`` of diffusers.
ON_REQUEST = ("fuse_",)
# Base classes whose many methods never read a particular child.
GENERAL = ("builtins.", "torch.nn.modules.module.", "transformers.modeling_utils.", "transformers.generation.")


class Reader(NamedTuple):
    """A module that reads the weight of a module inside it.

    Attributes:
        name: its name in the model; "" for the model itself.
        kind: its class.
        always: False where the statement depends on a condition.
    """

    name: str
    kind: str
    always: bool

    @property
    def is_attention(self) -> bool:
        """Whether the reader is torch's attention, which reads its ``out_proj``."""
        return self.kind == nn.MultiheadAttention.__name__

    @property
    def owner(self) -> str:
        """The module in messages."""
        return f"{self.kind} {self.name!r}" if self.name else f"the model ({self.kind})"


def reading(reader: Reader) -> str:
    """What a reader does to the adapter of a layer, as a clause for messages."""
    return (
        f"{reader.owner} reads the weight of this layer without calling the layer, so it would compute with the "
        "residual and without the adapter"
    )


def reader_of(model: nn.Module, name: str) -> Reader | None:
    """The first module around ``name`` that reads its weight, those that always do before the others; or None.

    Args:
        model: the model.
        name: the name of a module in it.
    """
    found = sorted(_readers(model, name.split(".")), key=lambda reader: not reader.always)
    return found[0] if found else None


def _readers(model: nn.Module, parts: list[str]) -> Iterator[Reader]:
    module = model
    for depth, part in enumerate(parts):
        reads = reads_in_torch(module)
        path = ".".join(parts[depth:])
        if reads is None:
            kind: Any = type(module)
            reads = weight_reads(kind)
        if path in reads:
            yield Reader(".".join(parts[:depth]), type(module).__name__, reads[path])
        child = module._modules.get(part)
        if child is None:
            return
        module = child


def reads_in_torch(module: nn.Module) -> dict[str, bool] | None:
    """As :func:`weight_reads`, for torch's modules; None for the others."""
    if isinstance(module, nn.MultiheadAttention):
        return {"out_proj": True}
    if isinstance(module, nn.TransformerEncoderLayer):  # its fast path, in eval mode
        return {"linear1": True, "linear2": True, "self_attn": True, "self_attn.out_proj": True}
    return {} if type(module).__module__.startswith("torch.nn.") else None


@functools.lru_cache(maxsize=4096)
def weight_reads(kind: type) -> dict[str, bool]:
    """Dotted names of the modules whose weights the methods of a class read.

    Args:
        kind: the class of a module.

    Returns:
        For each name whether a statement reads it that no condition precedes, in a method that is not called on
        request only. Empty where the source is not known.
    """
    reads: dict[str, bool] = {}
    overridden: set[str] = set()
    for cls in kind.__mro__:
        if f"{cls.__module__}.".startswith(GENERAL):
            continue
        here = set()
        for method in _methods(cls):
            here.add(method.name)
            if method.name in overridden or method.name.startswith(SETTING_UP):
                continue
            on_request = method.name.startswith(ON_REQUEST)
            for path, always in _reads_of(method):
                reads[path] = reads.get(path, False) or (always and not on_request)
        overridden |= here
    return reads


def _methods(cls: type) -> list[ast.FunctionDef]:
    try:
        path = inspect.getsourcefile(cls)
        classes = _classes(path) if path else {}
    except (TypeError, OSError, SyntaxError, ValueError):
        return []
    return classes.get(cls.__qualname__.rpartition(".")[2], [])


@functools.lru_cache(maxsize=256)
def _classes(path: str) -> dict[str, list[ast.FunctionDef]]:
    """The methods of every class in a file, by the name of the class."""
    return {
        node.name: [member for member in node.body if isinstance(member, ast.FunctionDef)]
        for node in ast.walk(ast.parse(Path(path).read_text(encoding="utf-8")))
        if isinstance(node, ast.ClassDef)
    }


def _reads_of(method: ast.FunctionDef) -> Iterator[tuple[str, bool]]:
    """Names of the modules whose weights a method reads, and whether it reads them under no condition."""
    # node, the node around it, and whether a condition precedes
    waiting: list[tuple[ast.AST, ast.AST, bool]] = [(child, method, False) for child in method.body]
    while waiting:
        node, around, conditional = waiting.pop()
        if isinstance(node, ast.Attribute) and node.attr in WEIGHTS and isinstance(node.ctx, ast.Load):
            path = _path(node.value)
            if path and not _only_describes(around):
                yield path, not conditional
        within = conditional or isinstance(node, (ast.If, ast.IfExp))
        waiting += [(child, node, within) for child in ast.iter_child_nodes(node)]


def _path(node: ast.AST) -> str:
    """``a.b`` of ``self.a.b``; "" for any other expression."""
    parts: list[str] = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    return ".".join(reversed(parts)) if isinstance(node, ast.Name) and node.id == "self" else ""


def _only_describes(around: ast.AST) -> bool:
    if isinstance(around, ast.Attribute):
        return around.attr in DESCRIPTIONS
    asking = isinstance(around, ast.Call) and isinstance(around.func, ast.Name)
    return asking and around.func.id in ("isinstance", "hasattr", "type", "getattr")  # type: ignore[attr-defined]
