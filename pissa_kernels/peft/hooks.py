"""Where this package takes hold of PEFT, which has no hook for an initializer: the attributes that are replaced.

``LoraLayer.pissa_init`` is the one that matters. The others note what it does not know:
``LoraModel._create_and_replace`` the layer's name, ``BaseTuner.inject_adapter`` where a model begins and ends,
``PeftModel.from_pretrained`` and ``load_adapter`` where an adapter comes from, ``PeftModel.__init__`` and
``add_adapter`` the model that will be saved. All wrappers keep what they found.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import nn

from ..adapter.layers import in_scope
from .load import Source, loading
from .save import SavePretrained
from .scope import Injection, Session, creating, injecting
from .ties import Ties

Wrapper = Callable[[Callable[..., Any]], Callable[..., Any]]


def replacements(patch: Session) -> list[tuple[type, str, Wrapper]]:
    """The attributes, and for each what makes ``patch``'s wrapper of the function that is found there."""
    from peft import PeftModel
    from peft.tuners.lora.layer import LoraLayer
    from peft.tuners.lora.model import LoraModel
    from peft.tuners.tuners_utils import BaseTuner

    def pissa_init(previous: Callable[..., None]) -> Callable[..., None]:
        def wrapper(layer: Any, adapter_name: str, init_lora_weights: str) -> None:
            created = creating.get()
            if patch.applies() and in_scope(layer, None if created is None else created[1]):
                patch.initialize(layer, adapter_name, init_lora_weights)
            else:
                previous(layer, adapter_name, init_lora_weights)

        return wrapper

    def create(previous: Callable[..., None]) -> Callable[..., None]:
        def wrapper(
            self: Any,
            lora_config: Any,
            adapter_name: str,
            target: nn.Module,
            target_name: str,
            parent: Any,
            current_key: str,
            *args: Any,
            **kwargs: Any,
        ) -> None:
            token = creating.set((current_key, target))
            try:
                previous(self, lora_config, adapter_name, target, target_name, parent, current_key, *args, **kwargs)
            finally:
                creating.reset(token)

        return wrapper

    def inject(previous: Callable[..., None]) -> Callable[..., None]:
        def wrapper(self: Any, model: nn.Module, *args: Any, **kwargs: Any) -> None:
            # an injection that another patch collects for is that patch's
            if not patch.applies() or injecting.get() is not None:
                return previous(self, model, *args, **kwargs)
            injection = Injection(Ties(model))
            token = injecting.set(injection)
            try:
                previous(self, model, *args, **kwargs)
            finally:
                injecting.reset(token)
            if injection.jobs:
                patch.carry_out(injection.jobs)

        return wrapper

    def load(previous: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
            if not patch.applies() or loading.get() is not None:
                return previous(self, *args, **kwargs)
            source, adapter_name = Source.of_call(previous, self, *args, **kwargs)
            if isinstance(self, PeftModel) and adapter_name in self.peft_config:
                source.check_residual(self, adapter_name)
            token, seen = loading.set(source), len(patch.layers)
            try:
                result = previous(self, *args, **kwargs)
            finally:
                loading.reset(token)
            source.compare(patch.layers[seen:])
            return result

        return wrapper

    def build(previous: Callable[..., None]) -> Callable[..., None]:
        def wrapper(self: Any, *args: Any, **kwargs: Any) -> None:
            previous(self, *args, **kwargs)
            if patch.applies():
                # the model's own: it will be saved when this patch is long over
                self.save_pretrained = SavePretrained(self)

        return wrapper

    return [
        (LoraLayer, "pissa_init", pissa_init),
        (LoraModel, "_create_and_replace", create),
        (BaseTuner, "inject_adapter", inject),
        (PeftModel, "from_pretrained", load),
        (PeftModel, "load_adapter", load),
        (PeftModel, "__init__", build),
        (PeftModel, "add_adapter", build),
    ]


def put_in_place(patch: Session, owner: type, attribute: str, wrapper: Wrapper) -> None:
    """Replace an attribute by a wrapper that knows its patch and what it has replaced."""
    found = vars(owner)[attribute]
    function: Any = found.__func__ if isinstance(found, classmethod) else found
    replacement = functools.wraps(function)(wrapper(function))
    replacement.__dict__.update(_pissa_kernels_patch=patch, _pissa_kernels_found=found)
    setattr(owner, attribute, classmethod(replacement) if isinstance(found, classmethod) else replacement)


def remove_closed(owner: type, attribute: str) -> None:
    """Take wrappers whose patch has ended off the top."""
    while True:
        found = vars(owner)[attribute]
        function: Any = found.__func__ if isinstance(found, classmethod) else found
        patch = getattr(function, "_pissa_kernels_patch", None)
        if patch is None or patch.open:
            return
        setattr(owner, attribute, function._pissa_kernels_found)
