"""A model that was made under the hook guards itself, also after the patch has ended.

PEFT calls its own methods through the object, ``layer.merge(…)`` or ``self.inject_adapter(…)``. So an attribute of one
object replaces a method for that object alone. It is copied and pickled with the object.

:mod:`pissa_kernels.peft.state` says what a layer stores and computes; here is what PEFT's operations do to it.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import replace
from typing import Any

import torch

from ..adapter.layers import lora_layers
from ..adapter.layouts import adapters_of, layout_of
from . import forward, merging, state
from .additions import check_init
from .quantized import is_quantized
from .record import GONE, InitRecord, records, set_records
from .replicated import check_separate
from .state import adapted_layers
from .swap import guard_hotswap
from .wrappers import alive
from .wrapping import unwrap_aliases

# Context in which a patch applies to the thread.
Reopen = Callable[[], contextlib.AbstractContextManager[Any]]

# Adapters of PEFT's recipe, whose residual stays in the weight when a model is unloaded.
_keeping: ContextVar[frozenset[str]] = ContextVar("pissa_kernels_keeping", default=frozenset())


class Guard:
    """A method of one object, replaced for this object alone.

    Args:
        owner: the object; it is not kept alive.
        function: a function of a module, called with the object, ``bound`` and the arguments of the method.
        bound: what else the function takes.
    """

    def __init__(self, owner: Any, function: Callable[..., Any], *bound: Any) -> None:
        self.__setstate__((owner, function, bound))

    def __getstate__(self) -> Any:
        return self._owner(), self._function, self._bound

    def __setstate__(self, content: Any) -> None:
        owner, self._function, self._bound = content
        self._owner = weakref.ref(owner)
        guard_hotswap()  # for a model that was unpickled too

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._function(alive(self._owner), *self._bound, *args, **kwargs)


def _guard(owner: Any, functions: dict[str, Callable[..., Any]], *bound: Any) -> None:
    for name, function in functions.items():
        if hasattr(type(owner), name) or name == _UNLOAD:
            owner.__dict__[name] = Guard(owner, function, *bound)


def _unguard(owner: Any) -> None:
    for name, value in list(owner.__dict__.items()):
        if isinstance(value, Guard):
            del owner.__dict__[name]


def protect(tuner: Any, model: Any, reopen: Reopen, **more: Callable[..., Any]) -> None:
    """Guard the layers of a model that have initial factors, the model itself, and its ``LoraModel``.

    A model with plain LoRA layers only is guarded too: a later PiSSA adapter would change their base weight.

    Args:
        tuner: the ``LoraModel``.
        model: the base model, with its adapted layers.
        reopen: context in which a patch applies to the thread; picklable.
        more: further methods of the ``LoraModel`` to replace.
    """
    for _, layer in adapted_layers(model):
        protect_layer(layer, reopen)
    if any(True for _ in lora_layers(model)):
        _guard(tuner, _OF_TUNER | more, reopen)
        _guard(model, _OF_MODEL, reopen)


def protect_layer(layer: Any, reopen: Reopen) -> None:
    """Guard one layer that has initial factors."""
    if not forward.is_attached(layer):  # unpickled from a version without the hook
        forward.attach(layer)
    _guard(layer, _OF_LAYER)
    _guard(layer, {"update_layer": update_layer}, reopen)


# A layer


def update_layer(layer: Any, reopen: Reopen, adapter_name: str, *args: Any, **kwargs: Any) -> Any:
    """``LoraLayer.update_layer``: add an adapter, with this package's initializer."""
    check_init(layer, adapter_name, kwargs.get("config"))
    with reopen():
        return type(layer).update_layer(layer, adapter_name, *args, **kwargs)


def delete_adapter(layer: Any, adapter_name: str) -> None:
    """``LoraLayer.delete_adapter``: a later adapter of the same name is a new one."""
    type(layer).delete_adapter(layer, adapter_name)
    forward.forget(layer, adapter_name)


def unload(
    layer: Any, merge: bool = True, safe_merge: bool = False, adapter_names: list[str] | None = None
) -> torch.nn.Module:
    """The bare module for ``unload`` and ``merge_and_unload``: W, or W and the merged changes.

    PEFT's recipe wants the residual of the adapter that it names. The module keeps a record then, for a new start.
    """
    base: torch.nn.Module = layer.get_base_layer()
    if merge:
        for each in _wrapping(layer):
            each.merge(safe_merge=safe_merge, adapter_names=adapter_names)
    for each in (*_wrapping(layer), *merging.inside(base)):
        if not each.merged and records(each):
            _unload_weight(each, [] if merge else _of_recipe(each))
    if merging.inside(base):
        return type(layer).unload_and_optionally_merge_module(layer, False, safe_merge, None)  # type: ignore[no-any-return]
    return base


def _wrapping(layer: Any) -> Iterator[Any]:
    """A layer, and the layers of further parameters of its module that it wraps."""
    while hasattr(layer, "base_layer"):
        yield layer
        layer = layer.base_layer


def _unload_weight(layer: Any, wanted: list[InitRecord]) -> None:
    """Leave the residual of a record in the weight, or W."""
    if wanted:
        layout, found = layout_of(layer), state.terms(layer)
        subtracted = [0.0] * len(found.factors)
        subtracted[found.groups[wanted[0].adapter]] = wanted[0].report.scaling
        state.rebase_(layer, subtracted)
        set_records(layout.module, [replace(wanted[0], adapter=GONE, shared=False)], layout.parameter)
    else:
        forward.restore_(layer)


def _of_recipe(layer: Any) -> list[InitRecord]:
    """Records of the adapters of PEFT's recipe."""
    return [record for record in records(layer) if record.adapter in _keeping.get()]


# A LoraModel


def inject_adapter(tuner: Any, reopen: Reopen, *args: Any, **kwargs: Any) -> None:
    """``LoraModel.inject_adapter``, with this package's initializer."""
    with reopen():
        type(tuner).inject_adapter(tuner, *args, **kwargs)


def merge_adapter(tuner: Any, reopen: Reopen, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
    """``LoraModel.merge_adapter``, after the checks of all layers."""
    _check_merges(tuner, adapter_names)
    type(tuner).merge_adapter(tuner, adapter_names=adapter_names, safe_merge=safe_merge)


def _check_merges(tuner: Any, adapter_names: list[str] | None) -> None:
    check_separate(tuner.model)
    for _, layer in adapted_layers(tuner):
        names = layer.active_adapters if adapter_names is None else adapter_names
        if not isinstance(names, str):
            new = [name for name in names if name in adapters_of(layer) and name not in layer.merged_adapters]
            merging.check_merge(layer, new)


def unload_and_optionally_merge(
    tuner: Any,
    reopen: Reopen,
    merge: bool = True,
    progressbar: bool = False,
    safe_merge: bool = False,
    adapter_names: list[str] | None = None,
) -> Any:
    """``LoraModel._unload_and_optionally_merge``, after the checks of all layers."""
    if merge:
        _check_merges(tuner, adapter_names)
    check_separate(tuner.model)
    kept = frozenset(
        name for name, config in tuner.peft_config.items() if getattr(config, "init_lora_weights", None) is True
    )
    token = _keeping.set(kept)
    try:
        for _, layer in adapted_layers(tuner):
            state.check_known(layer)
            if not merge:
                _check_one_residual(layer)
            _check_kept(layer, merge, adapter_names)
        model = type(tuner)._unload_and_optionally_merge(
            tuner, merge=merge, progressbar=progressbar, safe_merge=safe_merge, adapter_names=adapter_names
        )
    finally:
        _keeping.reset(token)
    unwrap_aliases(model)
    _unguard(model)
    return model


def _check_one_residual(layer: Any) -> None:
    wanted = _of_recipe(layer)
    if any(record.lora_A is not wanted[0].lora_A for record in wanted):
        names = " and ".join(sorted({repr(record.adapter) for record in wanted}))
        raise ValueError(
            f"{state.label(layer)}: the adapters {names} have init_lora_weights=True, so that unload() keeps the "
            "residual of each, but these differ. Set it for one of them, or delete the others first"
        )


def _check_kept(layer: Any, merge: bool, adapter_names: list[str] | None) -> None:
    """Refuse to unload a quantized weight that is neither merged nor the residual that ``unload`` keeps."""
    names = layer.active_adapters if adapter_names is None else adapter_names
    merges = layer.merged or (merge and any(name in adapters_of(layer) for name in names))
    if is_quantized(layer.get_base_layer()) and not merges:
        wanted = [] if merge else _of_recipe(layer)
        state.check_own(layer, wanted[0] if wanted else None)


# The base model, in which transformers and diffusers make adapters of their own


def add_adapter(model: Any, reopen: Reopen, *args: Any, **kwargs: Any) -> Any:
    """``add_adapter`` of transformers and diffusers, with this package's initializer."""
    with reopen():
        return type(model).add_adapter(model, *args, **kwargs)


def load_adapter(model: Any, reopen: Reopen, *args: Any, **kwargs: Any) -> Any:
    """``load_adapter`` of PEFT, transformers and diffusers, with this package's loader."""
    with reopen():
        return type(model).load_adapter(model, *args, **kwargs)


def unload_lora(model: Any, reopen: Reopen) -> None:
    """``unload_lora`` of diffusers, which takes PEFT's layers out by itself and leaves what they store: W here."""
    layers = [layer for _, layer in adapted_layers(model) if not layer.merged]
    for layer in layers:
        _check_kept(layer, False, None)
    for layer in layers:
        forward.restore_(layer)
    type(model).unload_lora(model)
    _unguard(model)


def fuse_qkv_projections(model: Any, reopen: Reopen, *args: Any, **kwargs: Any) -> Any:
    """``fuse_qkv_projections`` of diffusers, which copies the stored weights: only where they are no residuals."""
    for _, layer in adapted_layers(model):
        if not layer.merged:
            raise ValueError(
                f"{state.label(layer)}: fuse_qkv_projections copies stored weights without their adapters, and this "
                "one is a residual of PiSSA. Call fuse_lora() and unload_lora() first"
            )
    return type(model).fuse_qkv_projections(model, *args, **kwargs)


_UNLOAD = "unload_and_optionally_merge_module"  # PEFT looks for it on each layer
_OF_LAYER: dict[str, Callable[..., Any]] = {
    "merge": merging.merge,
    "unmerge": merging.unmerge,
    "delete_adapter": delete_adapter,
    _UNLOAD: unload,
}
_OF_TUNER: dict[str, Callable[..., Any]] = {
    "inject_adapter": inject_adapter,
    "merge_adapter": merge_adapter,
    "_unload_and_optionally_merge": unload_and_optionally_merge,
}
_OF_MODEL: dict[str, Callable[..., Any]] = {
    "add_adapter": add_adapter,
    "load_adapter": load_adapter,
    "unload_lora": unload_lora,
    "fuse_qkv_projections": fuse_qkv_projections,
}


def protect_peft_model(peft_model: Any, reopen: Reopen) -> None:
    """Guard the methods of a ``PeftModel`` that load an adapter."""
    _guard(peft_model, {"load_adapter": load_adapter}, reopen)
