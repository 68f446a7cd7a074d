"""The model of a checkpoint without its weights: modules, tied parameters, and the tensors of each parameter."""

from __future__ import annotations

import contextlib
from collections import defaultdict
from pathlib import Path
from typing import Any

from torch import nn

from ..files.folder import Checkpoint
from .config import is_model_class, making_model, read_config


def empty_model(checkpoint: Checkpoint, trust_remote_code: bool = False) -> Any:
    """The model of a checkpoint's config, on the meta device.

    Raises:
        TypeError: the checkpoint is quantized.
        ValueError: transformers does not have the class that the config names, or makes no model of the config; or the
            config names no class, and none has the checkpoint's tensors.
    """
    import transformers

    record = read_config(checkpoint)
    path = checkpoint.folder / "config.json"
    name = _class_name(record, path)
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
    if name is None:
        return _model_with_tensors(checkpoint, record, config)
    factory = getattr(transformers, name, None)
    if not is_model_class(factory):
        raise ValueError(
            f"{path} names the class {name}, which transformers {transformers.__version__} does not have"
            + ("; --trust-remote-code runs the class that comes with the checkpoint" if own else "")
        )
    with making_model(checkpoint, record):
        return factory(config)  # type: ignore[misc]


def _class_name(record: dict[str, Any], path: Path) -> str | None:
    """The class that a config names; None if it names none."""
    architectures = record.get("architectures")
    if not architectures:
        return None
    if not (isinstance(architectures, list) and isinstance(architectures[0], str)):
        raise ValueError(f"{path}: architectures is {architectures!r}; accepted is a list of names of classes")
    return architectures[0]


def _model_with_tensors(checkpoint: Checkpoint, record: dict[str, Any], config: Any) -> Any:
    """The model of the class whose parameters are the checkpoint's tensors, where the config names no class.

    The names of its modules are those of the model that people load, on which an adapter has to find its layers.

    Raises:
        ValueError: no class has them.
    """
    found = []
    for kind in _classes_of(config):
        try:
            with making_model(checkpoint, record):
                model = kind(config)
        except (ValueError, ImportError):  # a class for another use, which needs more than this config has
            continue
        if (renamed := _renamed(model, checkpoint)) is not None:
            found.append((renamed, model))
    if not found:
        kinds = ", ".join(kind.__name__ for kind in _classes_of(config)[:4])
        raise ValueError(
            f"{checkpoint.folder / 'config.json'} names no class, and none of model type {config.model_type!r} has the "
            f'checkpoint\'s tensors; add the class as "architectures" ({kinds}, …)'
        )
    return min(found, key=lambda candidate: candidate[0])[1]


def _renamed(model: Any, checkpoint: Checkpoint) -> int | None:
    """How many tensors the model loads under other names; None if they are not those of its parameters."""
    plain, transformed = tensors_of_parameters(model, checkpoint)
    loaded, values = plain.keys() | transformed.keys(), model.state_dict()
    if not loaded <= values.keys() or not dict(model.named_parameters()).keys() <= loaded:
        return None
    tensors = checkpoint.tensors()
    if any(tensors[key][1].shape != tuple(values[name].shape) for name, keys in plain.items() for key in keys):
        return None
    return sum(key != name for name, keys in plain.items() for key in keys)


def _classes_of(config: Any) -> list[type]:
    """The classes of transformers for a config. Of those with the same modules, the one for its own use comes first."""
    from transformers.models.auto import modeling_auto

    mappings = {name: getattr(modeling_auto, name) for name in dir(modeling_auto) if name.endswith("_MAPPING")}
    found: dict[type, None] = {}
    # an encoder with the head of a masked language model has a causal class too, with the same modules
    first = ("MODEL_FOR_MASKED_LM_MAPPING", "MODEL_FOR_CAUSAL_LM_MAPPING")
    order = sorted(
        mappings, key=lambda name: (first.index(name) if name in first else 2, name == "MODEL_MAPPING", name)
    )
    for name in order:
        with contextlib.suppress(KeyError, ImportError):
            kinds = mappings[name][type(config)]
            found |= dict.fromkeys(filter(is_model_class, kinds if isinstance(kinds, (tuple, list)) else (kinds,)))
    return list(found)


def tensors_of_parameters(model: Any, checkpoint: Checkpoint) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """Keys of the tensors that transformers loads into each parameter.

    Returns:
        By parameter: the tensors that it loads unchanged, and those that it transforms (such as experts that it fuses).
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, rename_source_key

    transforms = get_model_conversion_mapping(model)
    converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]
    renamings = [transform for transform in transforms if not isinstance(transform, WeightConverter)]
    parameters = model.state_dict()
    plain: dict[str, list[str]] = defaultdict(list)
    transformed: dict[str, list[str]] = defaultdict(list)
    for key in checkpoint.tensors():
        name, converter = rename_source_key(key, renamings, converters, model.base_model_prefix, parameters)
        (plain if converter is None else transformed)[name].append(key)
    return plain, transformed


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
