"""A method of one object, replaced for this object alone.

PEFT calls its own methods through the object, ``layer.merge(…)`` or ``self.inject_adapter(…)``. So an attribute of one
object replaces a method for that object. It is copied and pickled with the object.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable
from typing import Any

from ..weights.wrappers import alive
from .swap import guard_hotswap

# Context in which a patch applies to the thread.
Reopen = Callable[[], contextlib.AbstractContextManager[Any]]

UNLOAD = "unload_and_optionally_merge_module"  # PEFT looks for it on each layer


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


def guard(owner: Any, functions: dict[str, Callable[..., Any]], *bound: Any) -> None:
    """Replace the methods of an object that it has, by name."""
    for name, function in functions.items():
        if hasattr(type(owner), name) or name == UNLOAD:
            owner.__dict__[name] = Guard(owner, function, *bound)


def unguard(owner: Any) -> None:
    """Give an object its class's methods back."""
    for name, value in list(owner.__dict__.items()):
        if isinstance(value, Guard):
            del owner.__dict__[name]
