"""The quantized weight of a layer of bitsandbytes: read without changing it, replaced whole."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from ...quantize.bnb import EightBit, FourBit, PackedEightBit, PackedFourBit, standard_state

BnbScheme: TypeAlias = FourBit | EightBit
BnbPacked: TypeAlias = PackedFourBit | PackedEightBit


def is_quantized(base: nn.Module) -> bool:
    """Whether a module computes with a weight that bitsandbytes has packed."""
    return scheme_of(base) is not None


def scheme_of(base: Any) -> BnbScheme | None:
    """The format of a module's weight with its settings; None where the weight is not quantized by bitsandbytes."""
    # by attributes: a pickled Params4bit is a plain parameter that has them
    weight: Any = getattr(base, "weight", None)
    if weight is None:
        return None
    if getattr(state := _state(base), "quant_type", None) in ("nf4", "fp4"):
        double = bool(getattr(weight, "compress_statistics", state.nested))
        return FourBit(state.quant_type, state.blocksize, double, weight.dtype)
    return EightBit() if weight.dtype == torch.int8 and hasattr(weight, "SCB") else None


def packed_of(base: Any) -> BnbPacked:
    """The weight (out, in) as it is stored. Its tensors are those of the module, which must not be written to."""
    weight, state = base.weight, _state(base)
    if state is not None:
        return standard_state(weight.data, state)
    # the scales move to the module's state at the first forward pass
    scales = weight.SCB if weight.SCB is not None else base.state.SCB
    return PackedEightBit(weight.data, scales)


def put(base: Any, packed: Any) -> None:
    """Make a packed weight that of a module. The parameter stays the same object."""
    weight = base.weight
    if isinstance(packed, PackedFourBit):
        weight.data = packed.codes
        weight.quant_state = base.quant_state = packed.state
        return
    moved = weight.SCB is None
    weight.data = packed.codes
    if moved:
        base.state.CB, base.state.SCB = packed.codes, packed.scales
    else:
        weight.CB, weight.SCB = packed.codes, packed.scales


def kept(base: nn.Module) -> Callable[[], None]:
    """A function that makes the weight what it is now."""
    packed = copied(base)
    return lambda: put(base, packed)


def copied(base: nn.Module) -> BnbPacked:
    """The weight as it is stored, safe from what a forward pass writes to its state."""
    packed = packed_of(base)
    return PackedFourBit(packed.codes, copy.copy(packed.state)) if isinstance(packed, PackedFourBit) else packed


def values_of(base: Any) -> Tensor:
    """The weight that a module computes with: its parameter, or the dequantized values in memory of their own."""
    if is_quantized(base):
        return packed_of(base).dequantize()
    weight: Tensor = base.weight.detach()
    return weight


def matrix_shape(base: Any) -> tuple[int, ...]:
    """Shape of the weight as a matrix, as it is stored before it is packed."""
    return shape_of(base) if is_quantized(base) else tuple(base.weight.shape)


def moved(packed: BnbPacked, device: torch.device) -> BnbPacked:
    """A packed weight on a device."""
    if isinstance(packed, PackedEightBit):
        return PackedEightBit(packed.codes.to(device), packed.scales.to(device))
    packed.state.to(device)
    return PackedFourBit(packed.codes.to(device), packed.state)


def shape_of(base: Any) -> tuple[int, int]:
    """(out, in) of a linear module whose weight may be packed."""
    return base.out_features, base.in_features


def in_standard_order(model: nn.Module) -> None:
    """Undo what bitsandbytes does to 4-bit weights in evaluation mode on CPUs with AVX512-BF16.

    It packs the codes in another order, and unpacks them for a state dict: in version 0.50 with the scales still
    transposed where they are not quantized, so that saving a model would change what it computes. Afterwards there is
    nothing left to unpack.
    """
    for module in model.modules():
        if "weight" in module._parameters:  # not the LoRA layer, whose ``weight`` is that of its base layer
            _unpack(module)


def saved_in_standard_order(base: nn.Module) -> None:
    """Let a module always be in the standard order when it is asked for its state dict."""
    if not any(hook is _unpack for hook in base._state_dict_pre_hooks.values()):
        base.register_state_dict_pre_hook(_unpack)  # type: ignore[no-untyped-call]


def _unpack(module: nn.Module, *_: Any) -> None:
    if getattr(_state(module), "packing_format_for_cpu", False):
        put(module, packed_of(module))


def _state(base: Any) -> Any:
    state = getattr(getattr(base, "weight", None), "quant_state", None)
    return state if state is not None else getattr(base, "quant_state", None)
