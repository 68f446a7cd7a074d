"""What diffusers does with the adapters and the stored weights of its models by itself, besides PEFT."""

from __future__ import annotations

from typing import Any

from ..weights import forward, state
from ..weights.state import adapted_layers
from .replaced_method import Reopen, unguard
from .unloading import check_kept


def unload_lora(model: Any, reopen: Reopen) -> None:
    """``unload_lora`` of diffusers, which takes PEFT's layers out by itself and leaves what they store: W here."""
    layers = [layer for _, layer in adapted_layers(model) if not layer.merged]
    for layer in layers:
        check_kept(layer, False, None)
    for layer in layers:
        forward.restore_(layer)
    type(model).unload_lora(model)
    unguard(model)


def fuse_lora(model: Any, reopen: Reopen, lora_scale: float = 1.0, *args: Any, **kwargs: Any) -> Any:
    """``fuse_lora`` of diffusers, which scales one layer after another before it merges it."""
    layer = next((layer for _, layer in adapted_layers(model)), None)
    if layer is not None and lora_scale != 1.0:
        raise ValueError(
            f"{state.label(layer)}: fuse_lora(lora_scale={lora_scale:g}) would take s·B·A in another scaling than the "
            "residual lacks. Fuse it with lora_scale=1, or convert the adapter to a plain LoRA (convert_adapter)"
        )
    return type(model).fuse_lora(model, lora_scale, *args, **kwargs)


def fuse_qkv_projections(model: Any, reopen: Reopen, *args: Any, **kwargs: Any) -> Any:
    """``fuse_qkv_projections`` of diffusers, which copies the stored weights: only where they are no residuals."""
    for _, layer in adapted_layers(model):
        if not layer.merged:
            raise ValueError(
                f"{state.label(layer)}: fuse_qkv_projections copies stored weights without their adapters, and this "
                "one is a residual of PiSSA. Call fuse_lora() and unload_lora() first"
            )
    return type(model).fuse_qkv_projections(model, *args, **kwargs)
