"""The modules that PEFT and others have put their own around, and the names that the model's tensors had before."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

from ...adapter.names import AROUND, own_name


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


def innermost(module: nn.Module) -> nn.Module:
    """The module that FSDP1, activation checkpointing or ``torch.compile`` has wrapped; a bare module itself."""
    while True:
        inside = next((module._modules[name] for name in AROUND if name in module._modules), None)
        if inside is None:
            return module
        module = inside


@contextlib.contextmanager
def unwrapped(model: nn.Module) -> Iterator[None]:
    """Context in which a model holds its own modules where others have wrapped them, under the names of its files.

    PEFT 0.21 looks for the names of modules in a state dict, which has no wrappers in its names, and finds nothing. The
    parameters stay as they are: those of FSDP1 are whole within ``summon_full_params`` only. No forward pass may run.
    """
    around = [
        (holder, attribute, child)
        for holder in model.modules()
        for attribute, child in holder._modules.items()
        if child is not None and innermost(child) is not child
    ]
    for holder, attribute, child in around:
        holder._modules[attribute] = innermost(child)
    try:
        yield
    finally:
        for holder, attribute, child in around:
            holder._modules[attribute] = child


def own_names(base: nn.Module) -> Callable[[str], str | None]:
    """The function from a key of the state dict to the base model's own name; None for what PEFT has added.

    A wrapper at ``head`` may keep its module at ``head.original_module``, ``head.token_adapter.base_layer`` or
    elsewhere, and may wrap another wrapper. So the modules are asked, not the names. What others than PEFT have added
    to a name is left out of it.
    """
    inner = {}
    for name, module in base.named_modules(remove_duplicate=False):
        wrapped = wrapped_in(module)
        if wrapped is not None:
            inside = module.named_modules(remove_duplicate=False)
            inner[own_name(name)] = own_name(next(path for path, other in inside if other is wrapped))

    def named(key: str) -> str | None:
        at, own, rest = "", "", own_name(key)
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


def repeated_names(base: nn.Module) -> dict[str, str]:
    """By the own name of a parameter that a model has under an earlier name too, such as a tied one, that name."""
    named, names, repeated = own_names(base), dict[int, str](), dict[str, str]()
    for key, parameter in base.named_parameters(remove_duplicate=False):
        if (own := named(key)) is not None and names.setdefault(id(parameter), own) != own:
            repeated[own] = names[id(parameter)]
    return repeated


def all_names(model: nn.Module) -> set[str]:
    """Own names of the modules and parameters of a base model, with or without adapters."""
    named = own_names(model)
    modules = (name for name, _ in model.named_modules(remove_duplicate=False))
    parameters = (name for name, _ in model.named_parameters(remove_duplicate=False))
    return {own for name in (*modules, *parameters) if (own := named(name)) is not None}
