"""What transformers calls the tensors of a checkpoint, and the parameters that it loads them into."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Source:
    """A tensor that transformers loads into a parameter.

    Attributes:
        key: key of the tensor in the checkpoint.
        parameter: name of the parameter.
        pattern: the source pattern of the conversion that it is a part of; None if it is loaded unchanged.
        index: the number that stands for the ``*`` of the pattern, such as that of an expert; None if there is none.
    """

    key: str
    parameter: str
    pattern: str | None
    index: int | None


@dataclass(frozen=True)
class Conversion:
    """How transformers makes a parameter of several tensors, or of one that it changes.

    Attributes:
        operations: transformers' operations, in order.
        sources: the tensors of each source pattern, in the order in which the operations take them.
    """

    operations: tuple[Any, ...]
    sources: Mapping[str, tuple[Source, ...]]


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
    plain: dict[str, list[str]] = defaultdict(list)
    transformed: dict[str, list[str]] = defaultdict(list)
    for source in _sources(keys, model, _transforms(model), parameters):
        (plain if source.pattern is None else transformed)[source.parameter].append(source.key)
    return plain, transformed


def conversions_of_parameters(model: Any, keys: Iterable[str], parameters: Mapping[str, Any]) -> dict[str, Conversion]:
    """How transformers makes each parameter that it does not load unchanged. The arguments are as above."""
    from transformers.core_model_loading import dot_natural_key

    transforms = _transforms(model)
    converters = {pattern: converter for converter in transforms[1] for pattern in converter.source_patterns}
    found: dict[str, list[Source]] = defaultdict(list)
    # a converter stacks tensors in the order in which they are loaded, which is that of their keys
    for source in _sources(sorted(keys, key=dot_natural_key), model, transforms, parameters):
        if source.pattern is not None:
            found[source.parameter].append(source)
    conversions = {}
    for parameter, sources in found.items():
        converter = converters[sources[0].pattern]
        patterns = dict.fromkeys([*converter.source_patterns, *(source.pattern for source in sources)])
        conversions[parameter] = Conversion(
            tuple(converter.operations),
            {pattern: tuple(source for source in sources if source.pattern == pattern) for pattern in patterns},
        )
    return conversions


def _transforms(model: Any) -> tuple[list[Any], list[Any]]:
    """The renamings and the converters with which transformers loads a model."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter

    transforms = get_model_conversion_mapping(model)
    converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]
    return [transform for transform in transforms if not isinstance(transform, WeightConverter)], converters


def _sources(
    keys: Iterable[str], model: Any, transforms: tuple[list[Any], list[Any]], parameters: Mapping[str, Any]
) -> Iterator[Source]:
    from transformers.core_model_loading import apply_renamings, rename_source_key

    renamings, converters = transforms
    for key in keys:
        name, pattern = rename_source_key(key, renamings, converters, model.base_model_prefix, parameters)
        index = None
        if pattern is not None and pattern.count("*.") == 1:
            number = re.search(pattern.replace("*.", r"(\d+)\."), apply_renamings(key, renamings))
            index = int(number[1]) if number else None
        yield Source(key, name, pattern, index)
