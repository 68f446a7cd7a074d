"""A check at the first forward pass: whether DeepSpeed ZeRO-3 has kept the residual.

``GatheredParameters(…, modifier_rank=None)``, its default, drops what was written to a gathered weight. The layer would
compute with the original weight and the adapter then, which is wrong, and loads as if it were right.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ...adapter.layouts import layout_of
from ...runtime.gathering import is_partitioned
from . import known, state


class FirstPass:
    """Forward hook of the module that a LoRA layer wraps. It removes itself after the first pass that it could check.

    DeepSpeed's hooks are registered after this one, so that the weight is gathered here. It is copied and pickled with
    the layer, and does not keep it alive.

    Args:
        layer: the LoRA layer.
    """

    def __init__(self, layer: Any) -> None:
        self._layer: Callable[[], Any] = weakref.ref(layer)

    def __getstate__(self) -> Any:
        return (self._layer(),)

    def __setstate__(self, content: Any) -> None:
        (layer,) = content
        self._layer = (lambda: None) if layer is None else weakref.ref(layer)

    def __call__(self, module: nn.Module, *_: Any) -> None:
        if torch.compiler.is_compiling():
            return
        layer: Any = self._layer()
        if layer is not None:
            if layer.merged or is_partitioned(layout_of(layer).weight):
                return
            if not known.is_known(layer):
                raise ValueError(
                    f"{state.label(layer)}: the stored weight is not the residual that PiSSA left here. If the layer "
                    "was initialized within deepspeed.zero.GatheredParameters, DeepSpeed keeps what is written only "
                    "with modifier_rank=0; make the model again with it"
                )
        _remove(module)


def watch(layer: Any) -> None:
    """Check a layer at its first pass, if its weight is one of DeepSpeed ZeRO-3.

    Not one whose module computes with another weight while it is called, which has its residual then in no place.
    """
    layout = layout_of(layer)
    if hasattr(layout.weight, "ds_id") and layout.by_output:
        _remove(layout.module)
        layout.module.register_forward_hook(FirstPass(layer))


def _remove(module: nn.Module) -> None:
    for key in [key for key, hook in module._forward_hooks.items() if isinstance(hook, FirstPass)]:
        del module._forward_hooks[key]
