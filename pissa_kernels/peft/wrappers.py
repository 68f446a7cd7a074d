"""The modules that PEFT has put its own around, and the names that the base model's tensors had before."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

from torch import nn


def alive(reference: weakref.ref[Any]) -> Any:
    """The object that has a method which an attribute replaces.

    Raises:
        ReferenceError: it is gone, as with ``method = make_model().merge_adapter``.
    """
    owner = reference()
    if owner is None:
        raise ReferenceError("the model of this method is gone: keep it in a variable during the call")
    return owner


def base_of(model: Any) -> Any:
    """The base model of a ``PeftModel``; transformers' models with adapters of their own are returned as they are."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def wrapped_in(module: nn.Module) -> nn.Module | None:
    """The module that PEFT has wrapped in this one; None if this one is no wrapper."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    if isinstance(module, AuxiliaryTrainingWrapper):
        return module.original_module  # type: ignore[no-any-return]
    return module.base_layer if isinstance(module, BaseTunerLayer) else None


def own_names(base: nn.Module) -> Callable[[str], str | None]:
    """The function from a key of the state dict to the base model's own name; None for what PEFT has added.

    A wrapper at ``head`` may keep its module at ``head.original_module``, ``head.token_adapter.base_layer`` or
    elsewhere, and may wrap another wrapper. So the modules are asked, not the names.
    """
    inner = {}
    for name, module in base.named_modules(remove_duplicate=False):
        wrapped = wrapped_in(module)
        if wrapped is not None:
            inside = module.named_modules(remove_duplicate=False)
            inner[name] = next(path for path, other in inside if other is wrapped)

    def named(key: str) -> str | None:
        at, own, rest = "", "", key
        while True:
            while at in inner:
                path = f"{inner[at]}."
                if not rest.startswith(path):
                    return None
                at, rest = f"{at}.{path}"[:-1].removeprefix("."), rest[len(path) :]
            head, dot, rest = rest.partition(".")
            own = f"{own}.{head}".removeprefix(".")
            if not dot:
                return own
            at = f"{at}.{head}".removeprefix(".")

    return named
