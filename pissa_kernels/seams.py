"""Where this package takes hold of PEFT, which has no hook for an initializer: the attributes that are replaced.

``LoraLayer.pissa_init`` is the one that matters. The others note what it does not know:
``LoraModel._create_and_replace`` the layer's name, ``BaseTuner.inject_adapter`` where a model begins and ends,
``PeftModel.from_pretrained`` and ``load_adapter`` where an adapter comes from, ``PeftModel.__init__`` and
``add_adapter`` the model that will be saved. All wrappers keep what they found.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import nn

from .adapter.layers import in_scope
from .loading import Source
from .saving import SavePretrained
from .task import Task
from .ties import Ties

if TYPE_CHECKING:
    from .peft import PatchedPeft

Wrapper = Callable[[Callable[..., Any]], Callable[..., Any]]


@dataclass
class Injection:
    """One run of ``inject_adapter``: what it has come by so far."""

    ties: Ties
    tasks: list[Task] = field(default_factory=list)


# Of this thread: name and target module of the layer that PEFT is creating; the injection that it belongs to; where the
# adapter that is being loaded comes from.
creating: ContextVar[tuple[str, nn.Module] | None] = ContextVar("pissa_kernels_creating", default=None)
injecting: ContextVar[Injection | None] = ContextVar("pissa_kernels_injecting", default=None)
loading: ContextVar[Source | None] = ContextVar("pissa_kernels_loading", default=None)


def can_wait(layer: Any, adapter_name: str) -> bool:
    """Whether nothing reads this layer's weight, A or B before its model has been gone through.

    Not so where a variant takes more from them (DoRA its magnitudes), where the weight is there only now (a gathered
    ZeRO-3 partition), and where the adapter is a view of another one (tied embeddings).
    """
    if adapter_name in layer.lora_variant or hasattr(layer.get_base_layer().weight, "ds_id"):
        return False
    return not any(factor[adapter_name].weight._is_view() for factor in (layer.lora_A, layer.lora_B))


def seams(patch: PatchedPeft) -> list[tuple[type, str, Wrapper]]:
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
            if injection.tasks:
                patch.carry_out(injection.tasks)

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


def put_in_place(patch: PatchedPeft, owner: type, attribute: str, wrapper: Wrapper) -> None:
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
