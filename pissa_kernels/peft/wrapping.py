"""Around PEFT's wrapping of one module, and of all modules of an injection."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from ..adapter.layers import lora_layers
from ..adapter.patterns import rank_of, with_rank, with_ranks
from ..checks import layer_context
from .additions import check_active_variant
from .notices import Notices
from .quantized import is_quantized, matrix_shape
from .record import records
from .scope import Injection
from .targets import base_of, check_options, check_target

PATTERNS = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora")


@contextlib.contextmanager
def wrapping(
    injection: Injection,
    model: nn.Module,
    config: Any,
    adapter: str,
    name: str,
    target: nn.Module,
    parameter: str | None,
) -> Iterator[None]:
    """Context in which PEFT creates the PiSSA adapter of one module.

    The module is checked first. Afterwards the LoRA layer is in every place where the model holds the module.

    Args:
        injection: the call that PEFT is in.
        model: the model that PEFT adapts.
        config: the ``LoraConfig``.
        adapter: name of the adapter.
        name: name of the module in the model, with the parameter's where one is targeted.
        target: the module, or the LoRA layer that gets another adapter.
        parameter: name of a parameter of the module (``target_parameters``); None for the module.

    Raises:
        ValueError: an option or a module that PiSSA is not right for. Nothing has been changed.
    """
    check_options(config)
    if injection.ranks is None:  # PEFT has prepared the config by now
        injection.ranks = settings_of(config)
    check_target(model, config, name, target, parameter, injection.notices)
    if hasattr(target, "lora_variant"):
        with layer_context(f"layer {name!r}"):
            check_active_variant(target, adapter)
    if not isinstance(base_of(target), nn.Embedding):
        limit_rank(config, name, target, injection.notices)
    holders = list(injection.ties.holders(target))
    yield
    layer = model.get_submodule(name)
    if layer is target:
        return
    for holder, attribute in holders:
        if holder is not layer and holder._modules[attribute] is target:
            holder._modules[attribute] = layer
    injection.wrapped.append((holders, layer, target))


@contextlib.contextmanager
def injected(injection: Injection, config: Any, model: nn.Module, adapter: str) -> Iterator[None]:
    """Context of PEFT's part of an injection, before the layers are initialized.

    After an exception the model has the modules that it had, unless one of their layers is initialized already.

    Args:
        injection: the call.
        config: the adapter's config.
        model: the model that PEFT adapts.
        adapter: name of the adapter.
    """
    try:
        yield
        if injection.ranks is not None:
            settle_ranks(config, injection.ranks, model, adapter)
    except BaseException:
        if not any(records(layer) for _, layer, _ in injection.wrapped):
            injection.unwrap()
        if injection.ranks is not None:
            _set(config, injection.ranks)
        raise
    injection.notices.warn()


def limit_rank(config: Any, name: str, target: nn.Module, notices: Notices) -> None:
    """Give a layer whose weight is smaller than the rank all the rank that it has, with the same scaling.

    The config says so from then on, so that the adapter can be saved, loaded and converted by PEFT as well.

    Args:
        config: the ``LoraConfig``; its ``rank_pattern`` and ``alpha_pattern`` get an entry for the layer.
        name: name of the layer in the model.
        target: the module, or the LoRA layer that gets another adapter.
        notices: collects the warning.
    """
    base: Any = base_of(target)
    weight: Tensor = base.weight
    shape = tuple(getattr(weight, "ds_shape", matrix_shape(base)))
    settings = settings_of(config)
    rank = rank_of(settings, name)
    readable = weight.is_floating_point() or is_quantized(base)
    if len(shape) != 2 or not readable or not 0 < min(shape) < rank:
        return
    _set(config, with_rank(settings, name, min(shape)))
    notices.limited.append(f"layer {name!r}, weight {shape}: rank {min(shape)} instead of {rank}")


def settings_of(config: Any) -> dict[str, Any]:
    """A copy of the ranks and alphas of a ``LoraConfig``."""
    return {name: copy.copy(getattr(config, name)) for name in PATTERNS}


def settle_ranks(config: Any, before: dict[str, Any], model: nn.Module, adapter: str) -> None:
    """Write patterns that do not depend on their order, which PEFT changes when it saves a config.

    Args:
        config: the ``LoraConfig``, after :func:`limit_rank` of all layers.
        before: its :func:`settings_of` before that.
        model: the model with the adapter.
        adapter: name of the adapter.
    """
    if settings_of(config) == before or not (before["rank_pattern"] or before["alpha_pattern"]):
        return
    ranks = {name: layer.r[adapter] for name, layer in lora_layers(model) if adapter in layer.r}
    _set(config, with_ranks(settings_of(config), ranks))


def _set(config: Any, settings: dict[str, Any]) -> None:
    for name in PATTERNS:
        setattr(config, name, settings[name])


def unwrap_aliases(model: nn.Module) -> None:
    """Put the adapted module itself in every place where a model still holds its LoRA layer.

    PEFT unloads a layer under the first of its names only.

    Args:
        model: the model that PEFT has unloaded.
    """
    from peft.tuners.lora.layer import LoraLayer

    for module in list(model.modules()):
        for attribute, child in module._modules.items():
            if isinstance(child, LoraLayer):
                module._modules[attribute] = child.get_base_layer()
