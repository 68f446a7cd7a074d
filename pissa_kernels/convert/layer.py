"""The layers of an adapter's file: the factors of each, which weight they are for, and its rank and scaling."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ..adapter.attention import projection_gain
from ..adapter.packing import Packing, packing_of
from ..adapter.patterns import rank_of, scaling_of
from ..adapter.wrapped import Known, Parameter, Stored, name_inside, parameters_of
from ..checks import layer_context
from ..files.header import DTYPES, TensorInfo
from ..report import LayerReport

FACTOR_DTYPES = ("F64", "F32", "F16", "BF16")
# Where PEFT has the output projection of an ``nn.MultiheadAttention`` that it adapts.
_OUT_PROJ = ".base_layer.out_proj"
_EMBEDDING = ".lora_embedding_A"


@dataclass(frozen=True)
class Layer:
    """The factors of one layer.

    Attributes:
        A, B: places of the factors in the file, as PEFT packs them.
        rank: r of the adapter's config: that of each expert, and of all groups of a convolution together.
        scaling: s.
        transposed: whether the weight is stored (in, out): embeddings, and every layer if the config sets
            ``fan_in_fan_out``. Of experts, the file does not tell.
        packing: the matrices in A and B.
        path: PEFT's path of the layer in the base model.
        settings: the name that PEFT looks up in ``rank_pattern`` and ``alpha_pattern``.
        weight: name of the weight in the base model; "" where the file does not tell it.
        wrapped: whether PEFT adapts the parameter itself, as that of fused experts, and not the module that owns it.
        gain: how often PEFT adds s·B·A to the weight: g of :mod:`pissa_kernels.adapter.layouts`.
    """

    A: TensorInfo
    B: TensorInfo
    rank: int
    scaling: float
    transposed: bool
    packing: Packing
    path: str
    settings: str
    weight: str
    wrapped: bool = False
    gain: int = 1

    @property
    def factor(self) -> float:
        """g·s: PEFT's layer computes with W + g·s·B·A."""
        return self.gain * self.scaling

    @property
    def embedding(self) -> bool:
        """Whether the layer is an embedding. Under plain LoRA, it starts from A = 0."""
        return self.A.name.endswith(_EMBEDDING)

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of each matrix; of a convolution, in times the size of the kernel for in."""
        return self.B.shape[0] // self.packing.groups, math.prod(self.A.shape[1:])

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """Shape of the weight, if it is no stack and not stored (in, out)."""
        packing = self.packing
        if not packing.kernel:
            return self.shape
        return self.B.shape[0], self.A.shape[1] // packing.groups, *packing.kernel

    @property
    def dtype(self) -> torch.dtype:
        """The smallest dtype that represents both factors exactly."""
        return torch.promote_types(DTYPES[self.A.dtype], DTYPES[self.B.dtype])


def read_layers(
    factors: Mapping[str, Mapping[str, TensorInfo]], config: Mapping[str, Any], known: Known | None, file: object
) -> dict[str, Layer]:
    """The layers of an adapter that PEFT saved, by name.

    A layer has the name of its module in PEFT's model, and the adapter of a parameter that of the parameter. Where the
    file does not tell which of several it is, it has PEFT's path.

    Args:
        factors: "A" and "B" of each layer, by its path.
        config: the adapter's config.
        known: what other files say of parameters.
        file: the file, for messages.

    Raises:
        ValueError: factors are missing, or do not match the config; the message names the layer.
    """
    stored = {}
    for path, pair in factors.items():
        with layer_context(f"layer {path!r} in {file}"):
            if len(pair) != 2:
                raise ValueError(f"lora_{'B' if 'A' in pair else 'A'} is missing; save the adapter again")
            A, B = check_dtypes(pair["A"], pair["B"])
            if len(A.shape) == len(B.shape) == 2:
                stored[path] = Stored(A.shape[0], (B.shape[0], A.shape[1]))
    try:
        parameters = parameters_of(stored, config, known)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None
    layers = {}
    for path, pair in factors.items():
        name = name_inside(path, parameters)
        with layer_context(f"layer {name!r} in {file}"):
            layer = _layer(path, name, pair["A"], pair["B"], config, parameters.get(path), factors)
        layers[layer.weight if layer.wrapped and layer.weight else name] = layer
    return layers


def _layer(
    path: str,
    name: str,
    A: TensorInfo,
    B: TensorInfo,
    config: Mapping[str, Any],
    parameter: Parameter | None,
    paths: Mapping[str, object],
) -> Layer:
    attention, gain = name.removesuffix(_OUT_PROJ), 1
    if parameter is not None:
        settings, weight = parameter.name, parameter.name if parameter.decided else ""
    elif attention != name and path.removesuffix(_OUT_PROJ) in paths:
        settings, weight, gain = attention, f"{attention}.out_proj.weight", projection_gain()
    else:
        settings, weight = name, f"{name}.in_proj_weight" if path + _OUT_PROJ in paths else f"{name}.weight"
    rank = rank_of(config, settings)
    experts = 1 if parameter is None else parameter.experts
    _check_shapes(A, B, rank, experts)
    return Layer(
        A,
        B,
        rank,
        scaling_of(config, settings),
        transposed=A.name.endswith(_EMBEDDING) or bool(config.get("fan_in_fan_out")),
        packing=packing_of(A.shape, B.shape, experts),
        path=path,
        settings=settings,
        weight=weight,
        wrapped=parameter is not None,
        gain=gain,
    )


def recorded_layer(report: LayerReport, A: TensorInfo, B: TensorInfo) -> Layer:
    """A layer of a ``pissa_initial.safetensors``, which has no config.

    Args:
        report: the layer in the file's report.
        A, B: places of its factors.

    Raises:
        ValueError: the factors are not those of the report.
    """
    check_dtypes(A, B)
    parts = max(1, len(report.parts))
    packing = packing_of(A.shape, B.shape, parts if len(A.shape) == 2 else 1)
    if A.shape[0] != report.rank * parts or packing.parts != parts:
        raise ValueError(f"lora_A has shape {A.shape}; accepted are {parts} matrices of rank {report.rank}")
    return Layer(
        A,
        B,
        rank=report.rank * packing.groups,
        scaling=report.scaling,
        transposed=False,
        packing=packing,
        path="",
        settings=report.name,
        weight="",
    )


def check_dtypes(A: TensorInfo, B: TensorInfo) -> tuple[TensorInfo, TensorInfo]:
    """Both factors, if they have numbers."""
    for factor, info in (("A", A), ("B", B)):
        if info.dtype not in FACTOR_DTYPES:
            raise ValueError(f"lora_{factor} has dtype {info.dtype}; accepted are {', '.join(FACTOR_DTYPES)}")
    return A, B


def _check_shapes(A: TensorInfo, B: TensorInfo, rank: int, experts: int) -> None:
    """Refuse factors of another rank. Of a convolution, B has r/groups columns."""
    if len(A.shape) > 2 and len(A.shape) == len(B.shape) and not A.name.endswith(_EMBEDDING):
        if A.shape[0] != rank:
            raise ValueError(f"lora_A has shape {A.shape}; accepted is ({rank}, in, *kernel)")
        return
    total = rank * experts
    for factor, info, axis in (("A", A, 0), ("B", B, 1)):
        if len(info.shape) != 2 or info.shape[axis] != total:
            accepted = f"({total}, in)" if factor == "A" else f"(out, {total})"
            raise ValueError(f"lora_{factor} has shape {info.shape}; accepted is {accepted}")
