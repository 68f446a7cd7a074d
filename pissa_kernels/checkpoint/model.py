"""The model of a checkpoint without its weights, and its tied parameters."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

from torch import nn

from ..files.folder import Checkpoint
from .classes import better_model, model_with_tensors
from .config import is_model_class, making_model, read_config


def empty_model(checkpoint: Checkpoint, trust_remote_code: bool = False, quantized: bool = False) -> Any:
    """The model of a checkpoint's config, on the meta device: of the class that fits the tensors, if another is named.

    Args:
        checkpoint: the checkpoint.
        trust_remote_code: whether to run the Python code that comes with it.
        quantized: whether it may be quantized. The model is not.

    Raises:
        TypeError: the checkpoint is quantized, and may not be.
        ValueError: transformers does not have the class that the config names, or makes no model of the config; or the
            config names no class, and none has the checkpoint's tensors.
    """
    import transformers

    record = read_config(checkpoint, quantized)
    path = checkpoint.folder / "config.json"
    name = class_name(record, path)
    auto_map = record.get("auto_map")
    codes = auto_map.items() if isinstance(auto_map, dict) else ()
    # the entry of a tokenizer is a list of two
    own = [auto for auto, code in codes if isinstance(code, str) and name and code.endswith(f".{name}")]
    with making_model(checkpoint, record):
        config = transformers.AutoConfig.from_pretrained(
            checkpoint.folder, local_files_only=True, trust_remote_code=trust_remote_code
        )
        if own and trust_remote_code:
            return getattr(transformers, own[0]).from_config(config, trust_remote_code=True)
    if str(getattr(config, "_attn_implementation", "")).startswith("flash"):
        config._attn_implementation = "eager"  # the same modules, on a machine without the kernels
    if name is None:
        return model_with_tensors(checkpoint, record, config)
    factory = getattr(transformers, name, None)
    if not is_model_class(factory):
        raise ValueError(
            f"{path} names the class {name}, which transformers {transformers.__version__} does not have"
            + ("; --trust-remote-code runs the class that comes with the checkpoint" if own else "")
        )
    with making_model(checkpoint, record):
        model = factory(config)  # type: ignore[misc]
    return better_model(model, checkpoint, record, config)


def class_name(record: dict[str, Any], path: Path) -> str | None:
    """The class that a config names; None if it names none."""
    architectures = record.get("architectures")
    if not architectures:
        return None
    if not (isinstance(architectures, list) and isinstance(architectures[0], str)):
        raise ValueError(f"{path}: architectures is {architectures!r}; accepted is a list of names of classes")
    return architectures[0]


def tied_weights(model: nn.Module) -> dict[str, str]:
    """By name of a module whose weight is shared: the name of another parameter that it is shared with."""
    groups: dict[int, list[str]] = defaultdict(list)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        groups[id(parameter)].append(name)
    return {
        name.removesuffix(".weight"): next(other for other in group if other != name)
        for group in groups.values()
        if len(group) > 1
        for name in group
    }
