"""What transformers calls the tensors of a checkpoint, and the parameters that it loads them into."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any


def tensors_of_parameters(
    model: Any, keys: Iterable[str], parameters: Mapping[str, Any]
) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """Keys of the tensors that transformers loads into each parameter.

    Args:
        model: a model of transformers.
        keys: keys of a checkpoint's tensors.
        parameters: the model's parameters by name, as in its state dict.

    Returns:
        By parameter: the tensors that it loads unchanged, and those that it transforms (such as experts that it fuses).
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, rename_source_key

    transforms = get_model_conversion_mapping(model)
    converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]
    renamings = [transform for transform in transforms if not isinstance(transform, WeightConverter)]
    plain: dict[str, list[str]] = defaultdict(list)
    transformed: dict[str, list[str]] = defaultdict(list)
    for key in keys:
        name, converter = rename_source_key(key, renamings, converters, model.base_model_prefix, parameters)
        (plain if converter is None else transformed)[name].append(key)
    return plain, transformed
