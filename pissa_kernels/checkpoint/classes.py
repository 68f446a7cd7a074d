"""The class of a checkpoint's model where config.json names none, or one whose parameters have other names."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from ..adapter.tensors import Conversion, conversions_of_parameters
from ..adapter.tensors import tensors_of_parameters as tensors_of
from ..files.folder import Checkpoint
from ..files.header import TensorInfo
from .config import is_model_class, making_model


class _Fit(NamedTuple):
    """How the parameters of a model fit the tensors of a checkpoint.

    Attributes:
        prefixed: whether tensors are loaded with the prefix of the class added or removed, as transformers does for a
            model with a head from a checkpoint without one, and the reverse.
        unfit: number of tensors and parameters without a counterpart.
        renamed: number of tensors that are loaded under another name.
        shapes: whether all shapes agree.
    """

    prefixed: bool
    unfit: int
    renamed: int
    shapes: bool


def model_with_tensors(checkpoint: Checkpoint, record: dict[str, Any], config: Any) -> Any:
    """The model of the class whose parameters are the checkpoint's tensors, where the config names no class.

    The names of its modules are those of the model that people load, on which an adapter has to find its layers.

    Raises:
        ValueError: no class has them.
    """
    found = [
        (fit.renamed, model)
        for model in _models(checkpoint, record, config)
        if (fit := _fit(model, checkpoint)).shapes and not fit.unfit
    ]
    if not found:
        kinds = ", ".join(kind.__name__ for kind in _classes_of(config)[:4])
        raise ValueError(
            f"{checkpoint.folder / 'config.json'} names no class, and none of model type {config.model_type!r} has the "
            f'checkpoint\'s tensors; add the class as "architectures" ({kinds}, …)'
        )
    return min(found, key=lambda candidate: candidate[0])[1]


def better_model(model: Any, checkpoint: Checkpoint, record: dict[str, Any], config: Any) -> Any:
    """The model of the class that fits better than the one that the config names, or ``model`` itself.

    A model with a head in the file, and the class without it in the config, or the reverse: people load the class of
    the tensors, where the adapter of the named class would find none of its layers.
    """
    named = _fit(model, checkpoint)
    if not named.prefixed:
        return model
    best, unfit = model, named.unfit
    for other in _models(checkpoint, record, config):
        fit = _fit(other, checkpoint)
        if fit.shapes and not fit.prefixed and fit.unfit < unfit:
            best, unfit = other, fit.unfit
    return best


def _models(checkpoint: Checkpoint, record: dict[str, Any], config: Any) -> Iterator[Any]:
    for kind in _classes_of(config):
        try:
            with making_model(checkpoint, record):
                model = kind(config)
        except (ValueError, ImportError):  # a class for another use, which needs more than this config has
            continue
        yield model


def _fit(model: Any, checkpoint: Checkpoint) -> _Fit:
    plain, transformed = tensors_of_parameters(model, checkpoint)
    loaded, values, tensors = plain.keys() | transformed.keys(), model.state_dict(), checkpoint.tensors()
    missing = dict(model.named_parameters()).keys() - loaded
    prefix = f"{model.base_model_prefix}."
    pairs = [(key, name) for name, keys in plain.items() for key in keys]
    return _Fit(
        prefixed=any(key != name and (key == prefix + name or name == prefix + key) for key, name in pairs),
        unfit=len(missing) + len(loaded - values.keys()),
        renamed=sum(key != name for key, name in pairs),
        shapes=all(tensors[key][1].shape == tuple(values[name].shape) for key, name in pairs if name in values),
    )


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
    """:func:`pissa_kernels.adapter.tensors.tensors_of_parameters` of a checkpoint's tensors."""
    return tensors_of(model, checkpoint.tensors(), model.state_dict())


@dataclass(frozen=True)
class Loading:
    """How transformers loads the tensors of a checkpoint into a model.

    Attributes:
        folder: of the checkpoint.
        tensors: shard and place of every tensor, by name.
        plain, transformed: by parameter, keys of the tensors that it is loaded from, unchanged or not.
        conversions: by parameter, how it is made of the latter.
    """

    folder: Path
    tensors: Mapping[str, tuple[str, TensorInfo]]
    plain: Mapping[str, list[str]]
    transformed: Mapping[str, list[str]]
    conversions: Mapping[str, Conversion]


def loading_of(model: Any, checkpoint: Checkpoint) -> Loading:
    """How transformers loads the tensors of a checkpoint into a model."""
    plain, transformed = tensors_of_parameters(model, checkpoint)
    tensors = checkpoint.tensors()
    conversions = conversions_of_parameters(model, tensors, model.state_dict()) if transformed else {}
    return Loading(checkpoint.folder, tensors, plain, transformed, conversions)
