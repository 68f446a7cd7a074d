"""Where an adapter that is being loaded comes from, and what it brings along."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable
from typing import Any

from . import sidecar
from .initial import Initial


class Source:
    """The folder or repository of an adapter.

    Attributes:
        missing: layers that the adapter has no initial factors for, in the order of the questions.
    """

    def __init__(self, location: str | os.PathLike[str], options: dict[str, Any]) -> None:
        self.location = location
        self.options = options
        self.missing: list[str | None] = []
        self._initials: dict[str, Initial] | None = None

    @classmethod
    def of_call(cls, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Source:
        """Of a call of ``PeftModel.from_pretrained`` or ``load_adapter``."""
        arguments = inspect.signature(function).bind(*args, **kwargs).arguments
        return cls(arguments["model_id"], arguments.get("kwargs", {}))

    def initial(self, name: str | None, adapter: str) -> Initial | None:
        """The initial factors of one layer, or None where there are none.

        Raises:
            ValueError: the file with them is damaged.
        """
        if self._initials is None:
            path = sidecar.find(self.location, self.options)
            self._initials = {} if path is None else sidecar.read(path, adapter)
        found = self._initials.get(name) if name is not None else None
        if found is None:
            self.missing.append(name)
        return found
