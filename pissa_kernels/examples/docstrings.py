"""Real text without a network: docstrings of installed packages."""

from __future__ import annotations

import ast
import importlib.util
import random
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

FAMILIES = ["the standard library", "numpy", "torch", "transformers"]
PER_FILE = 3
SKIPPED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idlelib", "__pycache__"}


def docstrings(family: str, count: int, seed: int = 0) -> list[str]:
    """Distinct docstrings of functions and classes, from the files of a package in random order.

    Args:
        family: one of ``FAMILIES``.
        count: the most docstrings to return.
        seed: seed of the order. The same seed and the same installed versions give the same texts.
    """
    root = _root(family)
    files = sorted(
        path for path in root.rglob("*.py") if not SKIPPED_FOLDERS.intersection(path.relative_to(root).parts)
    )
    random.Random(seed).shuffle(files)
    found: dict[str, None] = {}
    for path in files:
        fresh = [text for text in dict.fromkeys(_of_file(path)) if text not in found]
        found.update(dict.fromkeys(fresh[:PER_FILE]))
        if len(found) >= count:
            break
    return list(found)[:count]


def _root(family: str) -> Path:
    if family == "the standard library":
        return Path(sysconfig.get_path("stdlib"))
    spec = importlib.util.find_spec(family)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(f"{family} is not installed")
    return Path(spec.origin).parent


def _of_file(path: Path) -> Iterator[str]:
    """Yield the docstrings of a file that have a summary and a body."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escape sequences in the files' strings
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, ValueError):
            return
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            summary, _, body = (ast.get_docstring(node) or "").partition("\n\n")
            if len(summary) > 20 and len(body) > 40:
                yield f"{summary}\n\n{body}"
