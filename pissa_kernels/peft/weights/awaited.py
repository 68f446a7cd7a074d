"""Adapters whose initial factors are not known in this process, because the weight was on the meta device."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from ...adapter.layouts import layout_of

# Attribute of a layer: by the name of such an adapter, the layer in messages.
_ATTRIBUTE = "pissa_awaited"


def awaited(layer: Any) -> Collection[str]:
    """Names of these adapters."""
    found: dict[str, str] = layer.__dict__.get(_ATTRIBUTE, {})
    return found


def mark(layer: Any, adapter: str, shown: str) -> None:
    """Count an adapter among them.

    Args:
        layer: the layer.
        adapter: name of the adapter.
        shown: the layer in messages.
    """
    layer.__dict__.setdefault(_ATTRIBUTE, {})[adapter] = shown


def settle(layer: Any, adapter: str) -> None:
    """The factors are known now."""
    layer.__dict__.get(_ATTRIBUTE, {}).pop(adapter, None)


def check_awaited(layer: Any, active: Sequence[str]) -> None:
    """Refuse a pass that needs initial factors which are not known in this process.

    Args:
        layer: the layer.
        active: the adapters that the pass adds.
    """
    found: dict[str, str] = layer.__dict__.get(_ATTRIBUTE, {})
    for adapter, shown in found.items():
        if adapter in layout_of(layer).adapters and adapter not in active:
            raise RuntimeError(
                f"{shown}: the weight or the adapter was on the meta device when the adapter {adapter!r} was "
                "made, so its initial factors are not known in this process, and a pass without it may be of the "
                "residual. Where another process has them, call pissa_kernels.share_initial(model) in all processes"
            )
