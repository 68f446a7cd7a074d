"""``config.json``: read, and held against the tensors of the checkpoint before transformers makes a model of it."""

from __future__ import annotations

import contextlib
import json
import re
import threading
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as hooks

from ..files.folder import Checkpoint

# Keys of a number of modules, and of a length of a weight.
_COUNT = re.compile(r"^(num|n)_(.*_)?(layers?|blocks)$|_layers$|^depths?$")
_LENGTH = re.compile(r"(^|_)(size|dims?|heads?|embd|inner|model|ff|kv|channels|width)$")
# Below it, a length is not doubted: parts of a model that the checkpoint does not have keep the sizes of the default.
_SPARED = 1 << 24
# Lengths that no weight need have.
_OF_NO_WEIGHT = re.compile(r"max|window|chunk|image|cache|buffer|batch|block_size|crop|token")


def read_config(checkpoint: Checkpoint, quantized: bool = False) -> dict[str, Any]:
    """The contents of ``config.json``.

    Args:
        checkpoint: the checkpoint.
        quantized: whether it may be quantized.

    Raises:
        TypeError: the checkpoint is quantized, and may not be.
        ValueError: the file is not a JSON object, has an empty quantization_config, or describes a model with more
            layers or larger weights than the checkpoint can hold.
    """
    path = checkpoint.folder / "config.json"
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not the config of a model: {error}") from None
    if not isinstance(record, dict):
        raise ValueError(f"{path} is not the config of a model: it holds {type(record).__name__}, not an object")
    if (quantization := record.get("quantization_config")) and not quantized:
        method = quantization.get("quant_method") if isinstance(quantization, dict) else None
        raise TypeError(
            f"{checkpoint.folder} is quantized ({method or 'quantization_config'}); PiSSA takes the float checkpoint "
            "that it was made from"
        )
    if not quantization and quantization is not None:
        raise ValueError(f"{path}: quantization_config is empty, and transformers refuses it; delete the entry")
    tensors = [info for _, info in checkpoint.tensors().values()]
    elements = sum(torch.Size(info.shape).numel() for info in tensors)
    longest = max(elements, _SPARED)
    for key, value in _integers(record):
        name = key.rpartition(".")[2].partition("[")[0]
        if _COUNT.search(name) and value < 0 and name.startswith(("num_", "n_")):
            raise ValueError(f"{path}: {key} is {value}, which is negative")
        if _COUNT.search(name) and value > most_modules(checkpoint):
            raise ValueError(f"{path}: {key} is {value}, but the checkpoint has only {len(tensors)} tensors")
        if _LENGTH.search(name) and not _OF_NO_WEIGHT.search(name) and value > longest:
            raise ValueError(f"{path}: {key} is {value}, but all tensors together have only {elements} elements")
    return record


def most_modules(checkpoint: Checkpoint) -> int:
    """Number of modules and parameters that a model of the checkpoint can have. Some tensors are split on loading."""
    return 10_000 + 100 * sum(len(header.tensors) for header in checkpoint.shards.values())


@contextlib.contextmanager
def making_model(checkpoint: Checkpoint, record: dict[str, Any]) -> Iterator[None]:
    """Context in which transformers reads the config, or makes a model of it, on the meta device.

    Raises:
        ValueError: transformers fails, or the model comes to have more modules than the checkpoint can hold. The
            message names the file, and the field if it is known.
    """
    path = checkpoint.folder / "config.json"
    try:
        with torch.device("meta"), _at_most(most_modules(checkpoint)):
            yield
    except (OSError, ImportError, MemoryError):
        raise
    except (Exception, SystemExit) as error:  # remote code may raise anything
        reason = str(error).partition("\nException raised from")[0]
        if isinstance(error, KeyError) and error.args:
            found = [key for key, value in _values(record) if value == error.args[0]]
            reason = f"{found[0]} is {reason}, which it does not know" if found else f"it looks for {reason}"
        elif not isinstance(error, (TypeError, ValueError, RuntimeError)):
            reason = f"{type(error).__name__} {reason}"
        raise ValueError(f"{path}: transformers makes no model of it: {reason}") from error


@contextlib.contextmanager
def _at_most(number: int) -> Iterator[None]:
    """Context in which this thread registers at most so many modules and parameters."""
    thread, count = threading.get_ident(), 0

    def registered(*_: object) -> None:
        nonlocal count
        count += threading.get_ident() == thread
        if count > number:
            raise ValueError(f"it has more than {number} modules and parameters, and few tensors")

    with contextlib.ExitStack() as stack:
        for register in (
            hooks.register_module_parameter_registration_hook,
            hooks.register_module_module_registration_hook,
        ):
            stack.callback(register(registered).remove)
        yield


def _integers(record: object) -> Iterator[tuple[str, int]]:
    for key, value in _values(record):
        if type(value) is int:
            yield key, value


def _values(record: object, key: str = "") -> Iterator[tuple[str, object]]:
    """Every value of a JSON object that is none itself, by its path, as in ``text_config.hidden_size``."""
    waiting = [(key, record)]
    while waiting:
        key, value = waiting.pop()
        if isinstance(value, dict):
            waiting += [(f"{key}.{name}" if key else name, item) for name, item in value.items()]
        elif isinstance(value, list):
            waiting += [(f"{key}[{index}]", item) for index, item in enumerate(value)]
        else:
            yield key, value


def is_model_class(kind: object) -> bool:
    """Whether an attribute of transformers is the class of a model."""
    import transformers

    return isinstance(kind, type) and issubclass(kind, nn.Module) and issubclass(kind, transformers.PreTrainedModel)
