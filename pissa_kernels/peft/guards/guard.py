"""A model that was made under the hook guards itself, also after the patch has ended.

:mod:`pissa_kernels.peft.weights.state` says what a layer stores and computes; here is what PEFT's operations do to it.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

from ...adapter.layers import lora_layers
from ...adapter.layouts import adapters_of
from ...runtime.shards import reshard
from ..injection.additions import check_init
from ..injection.wrapping import unwrap_aliases
from ..layers.replicated import check_separate
from ..saving.pieces import check_gathered
from ..weights import forward, known
from ..weights.state import adapted_layers
from . import merging, of_diffusers
from .replaced_method import UNLOAD, Guard, Reopen, guard, unguard
from .unloading import check_kept, check_one_residual, keeping_residuals, unload

# Models that were pickled by version 0.1.0 look for Guard and unload here.
__all__ = ["Guard", "protect", "protect_layer", "protect_peft_model", "unload"]


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
        guard(tuner, _OF_TUNER | more, reopen)
        guard(model, _OF_MODEL, reopen)


def protect_layer(layer: Any, reopen: Reopen) -> None:
    """Guard one layer that has initial factors."""
    if not forward.is_attached(layer):  # unpickled from a version without the hook
        forward.attach(layer)
    guard(layer, _OF_LAYER)
    guard(layer, {"update_layer": update_layer}, reopen)


# Attribute of a LoraModel.
_OUTER = "pissa_outer"


class Outer:
    """The ``PeftModel`` of a ``LoraModel``, not kept alive; copied and pickled with it."""

    def __init__(self, peft_model: Any) -> None:
        self._model: Callable[[], Any] = weakref.ref(peft_model)

    def __call__(self) -> Any:
        return self._model()

    def __getstate__(self) -> Any:
        return (self._model(),)

    def __setstate__(self, content: Any) -> None:
        (peft_model,) = content
        self._model = (lambda: None) if peft_model is None else weakref.ref(peft_model)


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


# A LoraModel


def inject_adapter(tuner: Any, reopen: Reopen, *args: Any, **kwargs: Any) -> None:
    """``LoraModel.inject_adapter``, with this package's initializer."""
    with reopen():
        type(tuner).inject_adapter(tuner, *args, **kwargs)


def merge_adapter(tuner: Any, reopen: Reopen, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
    """``LoraModel.merge_adapter``, after the checks of all layers."""
    _check_merges(tuner, adapter_names, safe_merge)
    type(tuner).merge_adapter(tuner, adapter_names=adapter_names, safe_merge=safe_merge)


def unmerge_adapter(tuner: Any, reopen: Reopen) -> None:
    """``LoraModel.unmerge_adapter``, on the parameters that FSDP2 keeps."""
    _reshard(tuner)
    type(tuner).unmerge_adapter(tuner)


def _reshard(tuner: Any) -> None:
    """Change the parameters that FSDP2 keeps, of a root that may be the ``PeftModel``."""
    outer = tuner.__dict__.get(_OUTER)
    found = None if outer is None else outer()
    reshard(tuner.model if found is None else found)


def _check_merges(tuner: Any, adapter_names: list[str] | None, safe_merge: bool) -> None:
    _reshard(tuner)
    check_separate(tuner.model)
    for _, layer in adapted_layers(tuner):
        merging.check_safe(layer, safe_merge)
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
        _check_merges(tuner, adapter_names, safe_merge)
    _reshard(tuner)
    check_separate(tuner.model)
    kept = frozenset(
        name for name, config in tuner.peft_config.items() if getattr(config, "init_lora_weights", None) is True
    )
    with keeping_residuals(kept):
        for _, layer in adapted_layers(tuner):
            check_gathered(layer, "take the adapter from the weight")
            known.check_known(layer)
            if not merge:
                check_one_residual(layer)
            check_kept(layer, merge, adapter_names)
        model = type(tuner)._unload_and_optionally_merge(
            tuner, merge=merge, progressbar=progressbar, safe_merge=safe_merge, adapter_names=adapter_names
        )
    unwrap_aliases(model)
    unguard(model)
    return model


# The base model, in which transformers and diffusers make adapters of their own


def add_adapter(model: Any, reopen: Reopen, *args: Any, **kwargs: Any) -> Any:
    """``add_adapter`` of transformers and diffusers, with this package's initializer."""
    with reopen():
        return type(model).add_adapter(model, *args, **kwargs)


def load_adapter(model: Any, reopen: Reopen, *args: Any, **kwargs: Any) -> Any:
    """``load_adapter`` of PEFT, transformers and diffusers, with this package's loader."""
    with reopen():
        return type(model).load_adapter(model, *args, **kwargs)


_OF_LAYER: dict[str, Callable[..., Any]] = {
    "merge": merging.merge,
    "unmerge": merging.unmerge,
    "delete_adapter": delete_adapter,
    UNLOAD: unload,
}
_OF_TUNER: dict[str, Callable[..., Any]] = {
    "unmerge_adapter": unmerge_adapter,
    "inject_adapter": inject_adapter,
    "merge_adapter": merge_adapter,
    "_unload_and_optionally_merge": unload_and_optionally_merge,
}
_OF_MODEL: dict[str, Callable[..., Any]] = {
    "add_adapter": add_adapter,
    "load_adapter": load_adapter,
    "unload_lora": of_diffusers.unload_lora,
    "fuse_lora": of_diffusers.fuse_lora,
    "fuse_qkv_projections": of_diffusers.fuse_qkv_projections,
}


def protect_peft_model(peft_model: Any, reopen: Reopen) -> None:
    """Guard the methods of a ``PeftModel`` that load an adapter, and let its ``LoraModel`` know it."""
    guard(peft_model, {"load_adapter": load_adapter}, reopen)
    peft_model.base_model.__dict__[_OUTER] = Outer(peft_model)
