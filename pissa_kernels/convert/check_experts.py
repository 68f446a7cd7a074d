"""Check of a stack of matrices, such as fused experts, against the original model and the residual checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from ..files.folder import Checkpoint
from ..files.header import TensorInfo
from ..numerics import UNIT_ROUNDOFF, reconstruction
from .layer import Layer
from .lowrank import FactorPair
from .pieces import Piece, check_complete

# Reads the tensor of a checkpoint by a key, which may have a prefix that the file lacks, or lack one that it has.
Find = Callable[[Checkpoint, str], TensorInfo]
Read = Callable[[Checkpoint, TensorInfo], Tensor]


def worst_of_stack(
    models: tuple[Checkpoint, Checkpoint],
    pieces: Sequence[Piece],
    layer: Layer,
    factors: FactorPair,
    find: Find,
    read: Read,
) -> float:
    """:func:`pissa_kernels.numerics.reconstruction` of the worst matrix of a stack. One tensor of each model is read.

    Args:
        models: the original model and the residual checkpoint.
        pieces: where both have the matrices.
        layer: places of the factors.
        factors: the factors.
        find, read: how a tensor is found and read.

    Raises:
        ValueError: tensors are missing, or have another shape or dtype.
    """
    check_complete(pieces, layer)
    matrices = list(factors.matrices())
    worst = 0.0
    for piece in pieces:
        infos = [find(checkpoint, piece.key) for checkpoint in models]
        for checkpoint, info in zip(models, infos, strict=True):
            _check_tensor(checkpoint, info, piece, layer)
        W, R = (read(checkpoint, info) for checkpoint, info in zip(models, infos, strict=True))
        for (index, original), (_, residual) in zip(piece.matrices(W), piece.matrices(R), strict=True):
            A0, B0 = matrices[index].A0, piece.rows_of(matrices[index].B0)
            worst = max(worst, reconstruction(original, residual, A0, B0, layer.scaling))
    return worst


def fused(checkpoint: Checkpoint, info: TensorInfo, layer: Layer) -> list[Piece]:
    """The ways in which a tensor that has the name of a layer's parameter may hold its matrices.

    Raises:
        ValueError: it cannot.
    """
    if len(info.shape) == 2 and layer.packing.experts == 1:
        ways = [Piece(layer.weight, transposed=False, expert=0)]
    else:
        ways = [Piece(layer.weight, transposed) for transposed in (False, True)]
    fitting = [way for way in ways if way.shape(layer) == info.shape]
    if not fitting:
        _check_tensor(checkpoint, info, ways[0], layer)
    return fitting


def _check_tensor(checkpoint: Checkpoint, info: TensorInfo, piece: Piece, layer: Layer) -> None:
    if info.shape != piece.shape(layer):
        raise ValueError(f"{checkpoint.folder}: {info.name!r} has shape {info.shape}; accepted is {piece.shape(layer)}")
    if info.torch_dtype not in UNIT_ROUNDOFF:
        raise ValueError(f"{checkpoint.folder}: {info.name!r} has dtype {info.dtype}; accepted are F32, F16 and BF16")
