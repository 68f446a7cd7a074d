"""Stacks of matrices, such as fused experts: the parameters that PEFT wraps, found among a checkpoint's tensors.

A file has the experts of a layer in one tensor, as the model has them, or each expert in tensors of its own, which
transformers stacks on loading: it concatenates the rows of an expert's gate and up projections, for example.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ..adapter.tensors import Conversion, Source
from ..factors import Recipe
from ..files.header import TensorInfo
from ..ops import WEIGHT_DTYPES
from .weights import Piece, Stack


def is_wrapper(layer: Any) -> bool:
    """Whether a LoRA layer of PEFT adapts a parameter (``target_parameters``) and not a module."""
    from peft.tuners.lora.layer import ParamWrapper

    return isinstance(layer, ParamWrapper)


def stacks_in(model: nn.Module) -> list[str]:
    """Names of a model's parameters that are stacks of several matrices, but for those of torch's own modules."""
    return [
        f"{name}.{parameter}" if name else parameter
        for name, module in model.named_modules()
        if not type(module).__module__.startswith("torch.nn.")
        for parameter, value in module.named_parameters(recurse=False)
        if value.ndim == 3 and min(value.shape) > 1  # a table of positions is (1, length, width)
    ]


def matrices_of(name: str, layer: Any) -> tuple[int, int, int]:
    """Number of matrices of the parameter that a wrapper adapts, and (out, in) of each.

    Raises:
        ValueError: it is no stack of matrices, or PEFT adds the change to it in the wrong orientation.
    """
    parameter = layer.get_param()
    shape = tuple(parameter.shape)
    if len(shape) != 3:
        raise ValueError(
            f"layer {name!r} has shape {shape}; target_parameters takes stacks of matrices, with three dimensions, and "
            "target_modules takes linear layers"
        )
    experts, m, n = shape
    transposed = _is_transposed(layer)
    if experts == 1 and transposed:
        raise ValueError(
            f"layer {name!r} has shape {shape}, a single matrix stored (in, out), to which PEFT adds the change "
            "untransposed; leave it out of target_parameters"
        )
    return (experts, n, m) if transposed else (experts, m, n)


def find_stack(
    name: str,
    module: str,
    layer: Any,
    recipe: Recipe,
    tensors: Mapping[str, tuple[str, TensorInfo]],
    plain: Sequence[str],
    conversion: Conversion | None,
) -> Stack:
    """A stack with the places of its matrices.

    Args:
        name, module: name of the parameter and of the wrapper.
        layer: the wrapper.
        recipe: rank, scaling, initializer and seed.
        tensors: shard and place of every tensor of the checkpoint, by name.
        plain: keys of the tensors that transformers loads unchanged into the parameter.
        conversion: how transformers makes the parameter of others; None if it does not.

    Raises:
        TypeError: a tensor is quantized, or its dtype is not float32, float16 or bfloat16.
        ValueError: the tensors are not those of all experts; or transformers computes the parameter in a way that
            cannot be undone here. The message names the layer, and the tensor or the operation.
    """
    experts, out, columns = matrices_of(name, layer)
    transposed = _is_transposed(layer)
    stored = (columns, out) if transposed else (out, columns)
    number = len(plain) + (0 if conversion is None else sum(map(len, conversion.sources.values())))
    if conversion is None or plain:
        if len(plain) != 1 or conversion is not None:
            raise ValueError(
                f"layer {name!r}: transformers loads it from {number} tensors, some of which are the same experts; "
                "accepted is one tensor, or those of each expert"
                if number
                else f"layer {name!r}: no tensor of the checkpoint is loaded into it"
            )
        return _fused(name, module, recipe, tensors[plain[0]], (experts, *stored), transposed)
    kinds = [type(operation).__name__ for operation in conversion.operations]
    dims = [getattr(operation, "dim", None) for operation in conversion.operations]
    if kinds == ["Transpose"] and number == 1 and _of_matrices(conversion.operations[0]):
        ((source,),) = filter(None, conversion.sources.values())
        found = tensors[source.key]
        if not (conversion.operations[0].check_dims and found[1].shape == (experts, *stored)):
            stored, transposed = stored[::-1], not transposed
        return _fused(name, module, recipe, found, (experts, *stored), transposed)
    stacked = kinds == ["MergeModulelist"] and dims == [0] and len(conversion.sources) == 1
    joined = kinds == ["MergeModulelist", "Concatenate"] and dims == [0, 1] and not transposed
    if not (stacked or joined):
        operations = ", ".join(map(repr, conversion.operations))
        raise ValueError(
            f"layer {name!r}: transformers makes it of {number} tensors by {operations}; init undoes a stack of the "
            "experts (MergeModulelist), with the rows of their projections joined (Concatenate), and a Transpose; "
            "leave it out of target_parameters"
        )
    rows = 0
    pieces: list[tuple[Piece, ...]] = [()] * experts
    for pattern, sources in conversion.sources.items():
        found_pieces = _one_by_one(name, pattern, sources, tensors, experts, rows, stored if stacked else None)
        pieces = [(*before, piece) for before, piece in zip(pieces, found_pieces, strict=True)]
        rows = found_pieces[0].rows[1]
    if (joined and rows != out) or any(piece.info.shape[-1] != stored[1] for piece in pieces[0]):
        shapes = " and ".join(str(piece.info.shape) for piece in pieces[0])
        raise ValueError(f"layer {name!r}: each expert has tensors of shape {shapes}, and the model has {stored}")
    if stacked:
        pieces = [(Piece(piece.shard, piece.info, (0, out)),) for (piece,) in pieces]
    infos = [piece.info for expert in pieces for piece in expert]
    return Stack(name, module, (out, columns), _dtype(name, infos), transposed, False, tuple(pieces), recipe)


def _is_transposed(layer: Any) -> bool:
    """Whether a module has its matrices (in, out), by the attribute that PEFT asks for."""
    return bool(getattr(layer.get_base_layer(), "is_transposed", False))


def _of_matrices(transpose: Any) -> bool:
    """Whether an operation transposes the matrices of a stack."""
    return {transpose.dim0 % 3, transpose.dim1 % 3} == {1, 2}


def _fused(
    name: str,
    module: str,
    recipe: Recipe,
    tensor: tuple[str, TensorInfo],
    shape: tuple[int, int, int],
    transposed: bool,
) -> Stack:
    """The stack that one tensor is, which has to have this shape."""
    shard, info = tensor
    if info.shape != shape:
        raise ValueError(f"layer {name!r}: tensor {info.name!r} has shape {info.shape}, and the model has {shape}")
    dtype = _dtype(name, [info])
    experts, m, n = shape
    out, columns = (n, m) if transposed else (m, n)
    pieces = tuple((Piece(shard, info.matrix(index), (0, out)),) for index in range(experts))
    return Stack(name, module, (out, columns), dtype, transposed, True, pieces, recipe)


def _one_by_one(
    name: str,
    pattern: str,
    sources: Sequence[Source],
    tensors: Mapping[str, tuple[str, TensorInfo]],
    experts: int,
    first: int,
    shape: tuple[int, int] | None,
) -> list[Piece]:
    """The tensors that a pattern matches, one for each expert, in the order of their numbers.

    Args:
        name: name of the layer.
        pattern: what transformers finds them by.
        sources: the tensors, in the order in which transformers stacks them.
        tensors: shard and place of every tensor.
        experts: E.
        first: their first row in the matrices.
        shape: what they have to have; None for any shape (rows, in).
    """
    numbers = [source.index for source in sources]
    if numbers != list(range(experts)):
        missing = sorted(set(range(experts)) - set(numbers))
        what = f"there is none of expert {missing[0]}" if missing else "some experts have several, or are no numbers"
        raise ValueError(
            f"layer {name!r}: {len(sources)} tensors match {pattern!r}, where the model has {experts} experts: {what}"
        )
    found = [tensors[source.key] for source in sources]
    expected = shape or found[0][1].shape
    for _, info in found:
        if info.shape != expected or len(expected) != 2:
            raise ValueError(f"layer {name!r}: tensor {info.name!r} has shape {info.shape}, others have {expected}")
    return [Piece(shard, info, (first, first + expected[0])) for shard, info in found]


def _dtype(name: str, infos: Sequence[TensorInfo]) -> torch.dtype:
    """The dtype of all tensors of a stack, whose A and B it will be."""
    dtypes = {info.dtype: info for info in infos}
    if len(dtypes) > 1:
        which = " and ".join(f"{info.name!r} is {dtype}" for dtype, info in list(dtypes.items())[:2])
        raise TypeError(f"layer {name!r}: {which}; the adapter of its experts has one dtype, so cast them to one")
    (info,) = dtypes.values()
    dtype = info.torch_dtype
    if dtype not in WEIGHT_DTYPES or dtype is None:
        raise TypeError(
            f"layer {name!r}: tensor {info.name!r} is {info.dtype}; PiSSA takes F32, F16 and BF16. Quantize the "
            "residual checkpoint, not the original one."
        )
    return dtype
