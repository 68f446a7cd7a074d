"""Check of a layer against the original model and the residual checkpoint: W_res + s·B₀·A₀ is W to one rounding.

Where the residual is quantized, the difference is the error of the quantization, which the report of the run has.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
from torch import Tensor

from ..checkpoint.manifest import MANIFEST, Manifest
from ..files.folder import Checkpoint
from ..files.header import TensorInfo, read_tensor
from ..files.system import open_to_read
from ..numerics import BLOCK_ELEMENTS, UNIT_ROUNDOFF, reconstruction
from ..quantize.stored import StoredWeight, quantized_weights
from .check_experts import fused, worst_of_stack
from .layer import Layer
from .lowrank import FactorPair
from .pieces import pieces_of

# Of the norm of W − s·B₀·A₀. In 4 bits, E is about a tenth of it; with the weight of an unrelated model, more than all.
_LARGEST_LOSS = 0.5
# The report's errors are norms of float32 numbers, summed in float32.
_RECORDED_DIGITS = 1e-3


@dataclass(frozen=True)
class BaseCheck:
    """What was found of one layer.

    Attributes:
        reconstruction: :func:`pissa_kernels.numerics.reconstruction`, ≤ 1; None if the residual is quantized.
        error: ‖W − W_q − s·B₀·A₀‖_F of a quantized residual, else 0.
        weight: ‖W‖_F of the original weight; 0 if the residual is not quantized.
    """

    reconstruction: float | None
    error: float = 0.0
    weight: float = 0.0


class Models:
    """The original model and the residual checkpoint, which a conversion has to make equal.

    The trained layer is W_res + s·B·A, the plain LoRA on the base model is W + s·(B·A − B₀·A₀). They differ by
    W − (W_res + s·B₀·A₀), whatever training did.

    Args:
        base: the original model.
        residual: the residual checkpoint around the initial adapter.

    Attributes:
        left_out: why layers were not compared, by the layer's name.
    """

    def __init__(self, base: Checkpoint, residual: Checkpoint) -> None:
        self.base, self.residual = base, residual
        self.left_out: dict[str, str] = {}
        self._stored = quantized_weights(residual.tensors())
        manifest = Manifest.read(residual.folder) if (residual.folder / MANIFEST).is_file() else None
        self._pieces = pieces_of({} if manifest is None else manifest.targets)

    def check(self, name: str, layer: Layer, factors: FactorPair, recorded: float | None) -> BaseCheck | None:
        """Compare the models in one layer.

        Args:
            name: name of the layer in the base model.
            layer: places of its factors.
            factors: the factors.
            recorded: ‖E‖_F of the report, if the residual is quantized and there is one.

        Returns:
            What was found; None where the tensors of a stack are not known, and ``left_out`` has the reason.

        Raises:
            ValueError: the difference is above its bound, or a checkpoint has no such weight, or one of another shape
                or dtype.
        """
        if layer.wrapped:
            return self._check_stack(name, layer, factors)
        W = _weight(self.base, layer)
        _, info = _find(self.residual, layer.weight)
        if info.name in self._stored:
            (matrix,) = factors.matrices()
            return self._check_quantized(W, self._stored[info.name], layer, matrix, recorded)
        R, groups = _weight(self.residual, layer), layer.packing.groups
        pairs = zip(W.chunk(groups), R.chunk(groups), factors.matrices(), strict=True)
        return self._checked(
            max(_worst_of_group(w, r, factors, layer, group) for group, (w, r, factors) in enumerate(pairs))
        )

    def remarks(self) -> list[str]:
        """A sentence for each reason why layers were not compared."""
        reasons = dict.fromkeys(self.left_out.values())
        names = {why: [name for name, found in self.left_out.items() if found == why] for why in reasons}
        return [
            f"{found[0]!r} ({len(found)} such) is not compared with the base model, because its experts are {why}"
            for why, found in names.items()
        ]

    def _checked(self, worst: float) -> BaseCheck:
        if worst > 1:
            raise ValueError(
                f"W_res + s·B₀·A₀ of {self.residual.folder} differs from W of {self.base.folder} by {worst:.3g} times "
                "the rounding bound; give the base model that the initial adapter was made from"
            )
        return BaseCheck(worst)

    def _check_stack(self, name: str, layer: Layer, factors: FactorPair) -> BaseCheck | None:
        """Compare fused experts, or another parameter that PEFT adapts by itself."""
        models, ways = (self.base, self.residual), []
        if name in self._pieces:
            ways = [self._pieces[name]]
        elif layer.weight and all(_candidates(checkpoint, layer.weight) for checkpoint in models):
            # a square matrix may be stored either way, of which one is right
            ways = [[piece] for piece in fused(self.residual, _find(self.residual, layer.weight)[1], layer)]
        if not ways or any(piece.key in self._stored for way in ways for piece in way):
            self.left_out[name] = "quantized" if ways else "in tensors that no manifest names"
            return None

        def read(checkpoint: Checkpoint, info: TensorInfo) -> Tensor:
            return _read(checkpoint, *checkpoint.tensors()[info.name])

        def find(checkpoint: Checkpoint, key: str) -> TensorInfo:
            return _find(checkpoint, key)[1]

        return self._checked(min(worst_of_stack(models, way, layer, factors, find, read) for way in ways))

    def _check_quantized(
        self, W: Tensor, stored: StoredWeight, layer: Layer, factors: FactorPair, recorded: float | None
    ) -> BaseCheck:
        W_q = stored.read(lambda key: _read(self.residual, *self.residual.tensors()[key])).dequantize()
        if W_q.shape != layer.shape:
            raise ValueError(
                f"{self.residual.folder}: the quantized weight of {stored.module!r} has shape {tuple(W_q.shape)}; "
                f"accepted is {layer.shape}"
            )
        # a config that was trained on quantized weights does not say how the base model stores a square one
        candidates = [W, W.mT] if W.shape[0] == W.shape[1] else [W]
        error, left, weight = min(_norms(candidate, W_q, factors, layer.factor) for candidate in candidates)
        rounding = (len(factors.A0) + 4) * UNIT_ROUNDOFF[torch.float32] * (weight + left)
        bound = _LARGEST_LOSS * left if recorded is None else recorded * (1 + _RECORDED_DIGITS) + rounding
        if not error <= bound:
            known = "" if recorded is None else f", and its report says {recorded:.3g}"
            raise ValueError(
                f"W_q + s·B₀·A₀ of {self.residual.folder} differs from W of {self.base.folder} by {error:.3g} in the "
                f"Frobenius norm, of {left:.3g} of the residual{known}; give the base model that the initial adapter "
                "was made from"
            )
        return BaseCheck(None, error, weight)


def _norms(W: Tensor, W_q: Tensor, factors: FactorPair, scaling: float) -> tuple[float, float, float]:
    """‖W − s·B₀·A₀ − W_q‖_F, ‖W − s·B₀·A₀‖_F and ‖W‖_F in float64, a block of rows at a time."""
    A, B = factors.A0.double(), scaling * factors.B0.double()
    squares = torch.zeros(3, dtype=torch.float64)
    for start in range(0, len(W), rows := max(1, BLOCK_ELEMENTS // W.shape[1])):
        block = W[start : start + rows].double()
        left = torch.addmm(block, B[start : start + rows], A, alpha=-1)
        error = left - W_q[start : start + rows]
        squares += torch.stack([values.square().sum() for values in (error, left, block)])
    error_norm, left_norm, weight_norm = squares.sqrt().tolist()
    return error_norm, left_norm, weight_norm


def _weight(checkpoint: Checkpoint, layer: Layer) -> Tensor:
    """The weight of a layer, (out, in), in its own dtype; of a convolution (out, in/g·k) of all groups."""
    shard, info = _find(checkpoint, layer.weight)
    shape, accepted = layer.shape, layer.weight_shape
    convolution = len(accepted) > 2
    if info.shape != accepted and (convolution or sorted(info.shape) != sorted(accepted)):
        raise ValueError(f"{checkpoint.folder}: {info.name!r} has shape {info.shape}; accepted is {accepted}")
    if info.torch_dtype not in UNIT_ROUNDOFF:
        raise ValueError(f"{checkpoint.folder}: {info.name!r} has dtype {info.dtype}; accepted are F32, F16 and BF16")
    weight = _read(checkpoint, shard, info)
    if convolution:
        return weight.flatten(1)
    # fan_in_fan_out is one setting for all layers, which a model with both kinds contradicts: the shape comes first
    transposed = layer.transposed if shape[0] == shape[1] else info.shape != shape
    return weight.mT if transposed else weight


def _worst_of_group(W: Tensor, R: Tensor, factors: FactorPair, layer: Layer, group: int) -> float:
    """:func:`pissa_kernels.numerics.reconstruction` of one group of a convolution, or of a weight without groups.

    PEFT's A sees the inputs of all groups. A product with those of others is no part of W, and has to be nothing: at
    most what rounding leaves of zeros.

    Args:
        W, R: (out/g, in/g·k).
        factors: of the group.
        layer: places of all factors.
        group: index of the group.
    """
    width = W.shape[1]
    own = slice(group * width, (group + 1) * width)
    worst = reconstruction(W, R, factors.A0[:, own], factors.B0, layer.factor)
    foreign = factors.A0.double()
    foreign[:, own] = 0
    if not foreign.any():
        return worst
    product = float((layer.factor * factors.B0.double() @ foreign).abs().max())
    return max(worst, product / max(UNIT_ROUNDOFF[torch.float32] * float(W.abs().max()), 1e-300))


def _read(checkpoint: Checkpoint, shard: str, info: TensorInfo) -> Tensor:
    descriptor = open_to_read(checkpoint.folder / shard)
    try:
        return read_tensor(descriptor, info)
    finally:
        os.close(descriptor)


def _find(checkpoint: Checkpoint, key: str) -> tuple[str, TensorInfo]:
    """Shard and place of a tensor. Its key may have a prefix that the module's name lacks, or lack one that it has."""
    found = _candidates(checkpoint, key)
    if len(found) != 1:
        raise ValueError(
            f"{checkpoint.folder} has {len(found)} tensors that could be {key!r}"
            + (f" ({', '.join(found[:3])})" if found else "")
            + "; accepted is one"
        )
    return checkpoint.tensors()[found[0]]


def _candidates(checkpoint: Checkpoint, key: str) -> list[str]:
    """Keys of the tensors that may have this one."""
    tensors = checkpoint.tensors()
    if key in tensors:
        return [key]
    return [other for other in tensors if other.endswith(f".{key}") or key.endswith(f".{other}")]
