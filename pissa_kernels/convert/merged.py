"""W_res + s·B·A against W + s·B'·A', weight by weight in float64: the same model, if nothing was mixed up."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import Tensor

from ..files.folder import Checkpoint, open_checkpoint
from ..files.header import TensorInfo, read_tensor
from ..numerics import UNIT_ROUNDOFF
from .adapter import Layer
from .lowrank import FactorPair, whole

# Elements of a weight that are float64 at a time.
BLOCK = 1 << 22


class Merged:
    """The original and the residual checkpoint.

    Raises:
        FileNotFoundError, NotADirectoryError, ValueError: one of them is none.
    """

    def __init__(self, base: Path, residual: Path) -> None:
        self._base, self._residual = open_checkpoint(base), open_checkpoint(residual)

    def check(self, name: str, layer: Layer, factors: FactorPair) -> float:
        """:meth:`worst` of a layer, which has to be ≤ 1.

        Raises:
            ValueError: it is not.
        """
        worst = self.worst(name, layer, factors)
        if worst > 1:
            raise ValueError(
                f"layer {name!r}: the residual weight with the trained adapter and the base weight with the plain LoRA "
                f"differ by {worst:.3g} times what rounding allows; is this the model that the initial adapter is of?"
            )
        return worst

    def worst(self, name: str, layer: Layer, factors: FactorPair) -> float:
        """Worst difference of any element of one layer, over what rounding allows it (≤ 1: they are the same).

        Allowed are the one rounding of W_res to its dtype and the float32 product before it, as in
        :func:`pissa_kernels.examples.demo.worst_reconstruction`: with s·(B'·A') = s·(B·A − B₀·A₀) what is compared is
        W_res + s·B₀·A₀ and W, whatever training did.

        Raises:
            ValueError: a checkpoint has no such weight, or one of another shape or a quantised dtype.
        """
        W, residual = (_weight(checkpoint, name, layer) for checkpoint in (self._base, self._residual))
        u = UNIT_ROUNDOFF[residual.dtype]
        smallest = torch.finfo(residual.dtype).smallest_normal * u  # subnormal residuals
        A, B, A0, B0 = (factor.double() for factor in (factors.A, factors.B, factors.A0, factors.B0))
        product = whole(factors)
        new_A, new_B = product.A.double(), product.B.double()
        s, worst = layer.scaling, 0.0
        step = max(1, BLOCK // W.shape[1])
        for start in range(0, W.shape[0], step):
            rows = slice(start, start + step)
            before, after = W[rows].double(), residual[rows].double()
            error = ((after + s * B[rows] @ A) - (before + s * new_B[rows] @ new_A)).abs()
            rounding = (layer.rank + 2) * 2.0**-24 * (before.abs() + abs(s) * B0[rows].abs() @ A0.abs())
            excess = error / (u * (1 + u) * after.abs() + rounding + smallest)
            worst = max(worst, float(excess.max().nan_to_num(float("inf"))))
        return worst


def _weight(checkpoint: Checkpoint, name: str, layer: Layer) -> Tensor:
    """The weight of a layer, (out, in), in its own dtype."""
    shard, entry = _find(checkpoint, f"{name}.weight")
    shape = layer.shape
    if sorted(entry.shape) != sorted(shape):
        raise ValueError(f"{checkpoint.folder}: {entry.name!r} has shape {entry.shape}; accepted is {shape}")
    if entry.torch_dtype not in UNIT_ROUNDOFF:
        raise ValueError(f"{checkpoint.folder}: {entry.name!r} is {entry.dtype}; accepted are F32, F16 and BF16")
    descriptor = os.open(checkpoint.folder / shard, os.O_RDONLY)
    try:
        weight = read_tensor(descriptor, entry)
    finally:
        os.close(descriptor)
    # the shape says which way round it lies; of a square one the config does
    transposed = layer.transposed if shape[0] == shape[1] else entry.shape != shape
    return weight.mT if transposed else weight


def _find(checkpoint: Checkpoint, key: str) -> tuple[str, TensorInfo]:
    """Shard and place of a tensor, whose name may have a prefix more or less than the module."""
    tensors = checkpoint.tensors()
    if key in tensors:
        return tensors[key]
    found = [name for name in tensors if name.endswith(f".{key}") or key.endswith(f".{name}")]
    if len(found) != 1:
        raise ValueError(
            f"{checkpoint.folder} has {len(found)} tensors that could be {key!r}"
            + (f" ({', '.join(found[:3])})" if found else "")
            + "; accepted is one"
        )
    return tensors[found[0]]
