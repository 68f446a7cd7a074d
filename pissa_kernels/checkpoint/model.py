"""The model of a checkpoint without its weights: modules, tied parameters, and the tensors of each parameter."""

from __future__ import annotations

import json
from collections import defaultdict
from typing import Any

import torch
from torch import nn

from ..files.folder import Checkpoint


def empty_model(checkpoint: Checkpoint, trust_remote_code: bool = False) -> Any:
    """The model of a checkpoint's config, on the meta device.

    Raises:
        ValueError: transformers does not have the class that the config names.
    """
    import transformers

    config = transformers.AutoConfig.from_pretrained(
        checkpoint.folder, local_files_only=True, trust_remote_code=trust_remote_code
    )
    name = (getattr(config, "architectures", None) or ["AutoModel"])[0]
    with torch.device("meta"):
        own = [auto for auto, code in (getattr(config, "auto_map", None) or {}).items() if code.endswith(f".{name}")]
        if own and trust_remote_code:
            return getattr(transformers, own[0]).from_config(config, trust_remote_code=True)
        if name == "AutoModel":
            return transformers.AutoModel.from_config(config)
        if not hasattr(transformers, name):
            raise ValueError(
                f"{checkpoint.folder / 'config.json'} names the class {name}, which transformers "
                f"{transformers.__version__} does not have"
                + ("; --trust-remote-code runs the class that comes with the checkpoint" if own else "")
            )
        return getattr(transformers, name)(config)


def refuse_quantized(checkpoint: Checkpoint) -> None:
    """Refuse a checkpoint whose config says that it is quantized.

    Raises:
        TypeError: it is.
        ValueError: ``config.json`` is not a JSON object.
    """
    path = checkpoint.folder / "config.json"
    try:
        record: dict[str, Any] = dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} is not the config of a model: {error}") from None
    quantization = record.get("quantization_config")
    if quantization:
        raise TypeError(
            f"{checkpoint.folder} is quantized ({quantization.get('quant_method', 'quantization_config')}); PiSSA "
            "takes the float checkpoint that it was made from"
        )


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
