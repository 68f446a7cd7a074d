"""Check of a layer against the original model and the residual checkpoint: W_res + s·B₀·A₀ is W to one rounding."""

from __future__ import annotations

import os

from torch import Tensor

from ..files.folder import Checkpoint
from ..files.header import TensorInfo, read_tensor
from ..files.system import open_to_read
from ..numerics import UNIT_ROUNDOFF, reconstruction
from .adapter import Layer
from .lowrank import FactorPair


def check_base(base: Checkpoint, residual: Checkpoint, name: str, layer: Layer, factors: FactorPair) -> float:
    """Compare the two models that a conversion has to make equal, in one layer.

    The trained layer is W_res + s·B·A, the plain LoRA on the base model is W + s·(B·A − B₀·A₀). They differ by
    W − (W_res + s·B₀·A₀), whatever training did.

    Args:
        base: the original model.
        residual: the residual checkpoint around the initial adapter.
        name: name of the layer in the base model.
        layer: places of its factors.
        factors: the factors.

    Returns:
        :func:`pissa_kernels.numerics.reconstruction` of the layer: the largest difference relative to its rounding
        bound, ≤ 1.

    Raises:
        ValueError: the difference is above its bound, or a checkpoint has no such weight, or one of another shape or
            with a quantized dtype.
    """
    W, W_res = _weight(base, name, layer), _weight(residual, name, layer)
    worst = reconstruction(W, W_res, factors.A0, factors.B0, layer.scaling)
    if worst > 1:
        raise ValueError(
            f"W_res + s·B₀·A₀ of {residual.folder} differs from W of {base.folder} by {worst:.3g} times the rounding "
            "bound; give the base model that the initial adapter was made from"
        )
    return worst


def _weight(checkpoint: Checkpoint, name: str, layer: Layer) -> Tensor:
    """The weight of a layer, (out, in), in its own dtype."""
    shard, info = _find(checkpoint, f"{name}.weight")
    shape = layer.shape
    if sorted(info.shape) != sorted(shape):
        raise ValueError(f"{checkpoint.folder}: {info.name!r} has shape {info.shape}; accepted is {shape}")
    if info.torch_dtype not in UNIT_ROUNDOFF:
        raise ValueError(f"{checkpoint.folder}: {info.name!r} has dtype {info.dtype}; accepted are F32, F16 and BF16")
    descriptor = open_to_read(checkpoint.folder / shard)
    try:
        weight = read_tensor(descriptor, info)
    finally:
        os.close(descriptor)
    # fan_in_fan_out is one setting for all layers, which a model with both kinds contradicts: the shape comes first
    transposed = layer.transposed if shape[0] == shape[1] else info.shape != shape
    return weight.mT if transposed else weight


def _find(checkpoint: Checkpoint, key: str) -> tuple[str, TensorInfo]:
    """Shard and place of a tensor. Its key may have a prefix that the module's name lacks, or lack one that it has."""
    tensors = checkpoint.tensors()
    if key in tensors:
        return tensors[key]
    found = [other for other in tensors if other.endswith(f".{key}") or key.endswith(f".{other}")]
    if len(found) != 1:
        raise ValueError(
            f"{checkpoint.folder} has {len(found)} tensors that could be {key!r}"
            + (f" ({', '.join(found[:3])})" if found else "")
            + "; accepted is one"
        )
    return tensors[found[0]]
