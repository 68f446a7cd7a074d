"""Around PEFT's wrapping of one module, and of all modules of an injection."""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from ...adapter.attention import is_projection
from ...adapter.layers import lora_layers
from ...adapter.layouts import layout_of
from ...adapter.patterns import rank_of, with_rank, with_ranks
from ...checks import layer_context
from ...runtime.shards import is_sharded
from ..notices import Notices
from ..scope import Injection, unwrap_attention
from ..weights.quantized import is_quantized, matrix_shape
from ..weights.record import of_adapter, records
from .additions import check_active_variant
from .targets import base_of, check_options, check_target, weight_of

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
    limit_rank(config, name, target, injection.notices, parameter)
    place = name if parameter is None else name.removesuffix(f".{parameter}")
    before = model.get_submodule(place)
    holders = list(injection.ties.holders(target)) or [_holder(model, place)]
    try:
        yield
    except BaseException:
        unwrap_attention(target)
        raise
    layer = model.get_submodule(place)
    if layer is before:
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


def _holder(model: nn.Module, place: str) -> tuple[nn.Module, str]:
    """The module that holds the one of a name, and the attribute."""
    parent, _, attribute = place.rpartition(".")
    return model.get_submodule(parent), attribute


def limit_rank(config: Any, name: str, target: nn.Module, notices: Notices, parameter: str | None = None) -> None:
    """Give a layer whose weight is smaller than the rank all the rank that it has, with the same scaling.

    The config says so from then on, so that the adapter can be saved, loaded and converted by PEFT as well.

    Args:
        config: the ``LoraConfig``; its ``rank_pattern`` and ``alpha_pattern`` get an entry for the layer.
        name: name of the layer in the model.
        target: the module, or the LoRA layer that gets another adapter.
        notices: collects the warning.
        parameter: name of a parameter of the module (``target_parameters``); None for the module.
    """
    base: Any = base_of(target)
    weight: Tensor = weight_of(base, parameter)
    shape = tuple(getattr(weight, "ds_shape", matrix_shape(base) if is_quantized(base) else weight.shape))
    settings = settings_of(config)
    rank, most = rank_of(settings, name), _most(base, shape, parameter)
    readable = weight.is_floating_point() or is_quantized(base)
    if not readable or not 0 < most < rank:
        return
    _set(config, with_rank(settings, name, most))
    notices.limited.append(f"layer {name!r}, weight {shape}: rank {most} instead of {rank}")


def _most(base: Any, shape: tuple[int, ...], parameter: str | None) -> int:
    """The highest rank that PEFT can give to a weight: of each matrix of a stack, of all groups of a convolution."""
    if parameter is None and isinstance(base, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        return int(base.groups) * min(shape[0] // base.groups, math.prod(shape[1:]))
    return min(shape[-2:]) if len(shape) >= 2 else 0


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
    layers = ((name, layer) for name, layer in lora_layers(model) if _has_own_rank(layer))
    ranks = {name: layer.r[adapter] for name, layer in layers if adapter in layer.r}
    _set(config, with_ranks(settings_of(config), ranks))


def _has_own_rank(layer: Any) -> bool:
    """Whether PEFT looks up the rank of a layer by its name: that of an attention's ``out_proj`` is the attention's."""
    return not is_projection(layer)


def _set(config: Any, settings: dict[str, Any]) -> None:
    for name in PATTERNS:
        setattr(config, name, settings[name])


def warn_of_plain_layers(injection: Injection, model: nn.Module, adapter: str) -> None:
    """Warn of layers that have the adapter and no initial factors: once for all of them.

    Args:
        injection: the call that has added the adapter.
        model: the model.
        adapter: name of the adapter.
    """
    for name, layer in lora_layers(model):
        layout = layout_of(layer)
        if adapter not in layout.adapters or of_adapter(layer, adapter) is not None:
            continue
        B = layout.factors(adapter)[1].detach()
        B = B.to_local() if is_sharded(B) else B
        if not B.is_meta and B.numel() and not B.count_nonzero():
            injection.notices.plain.append(f"layer {name!r} ({type(layer).__name__})")
    injection.notices.warn()


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
