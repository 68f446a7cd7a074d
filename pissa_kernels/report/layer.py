"""Report of one layer: as an object, as a row of a table, and as a JSON object."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..checks import parse_init
from ..ops import WEIGHT_DTYPES
from ..svd.result import Certificate
from . import strict
from .quantization import Quantization, quantization_from_dict

_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in WEIGHT_DTYPES}
_FLOAT32_MAX = torch.finfo(torch.float32).max

# Heads of the cells of layer_row, and the indices of the columns of text; all others are numbers.
HEADS = ("layer", "shape", "dtype", "r", "energy, %", "σ₁", "σ_r", "residual/σ₁", "passes", "method", "converged", "ms")
# Heads of the cells that a quantized layer has besides: ‖E‖_F, and the share of ‖W − Q(W)‖_F that PiSSA saves.
QUANTIZED_HEADS = ("error", "saved, %", "iterations")
TEXT_COLUMNS = [HEADS.index(head) for head in ("layer", "dtype", "method", "converged")]


@dataclass(frozen=True, eq=False)
class LayerReport:
    """Report of the initialization of one layer.

    Attributes:
        name: name of the module in the model, or its class if the model is not known; with the name of the parameter
            where the adapter is of a parameter, as in "model.layers.0.mlp.experts.gate_up_proj".
        shape: (out, in) of the weight in the adapter's orientation; of each matrix, where there are several.
        rank: r.
        certificate: certificate of the SVD.
        seconds: wall time of checking, decomposing and writing back, in seconds; for a layer in a batch, its share of
            the batch's time.
        singular_values: (r,) float32 on the CPU, descending, before the scaling; root mean squares over the parts.
        dtype: dtype of the weight.
        scaling: the adapter's scaling s.
        init: "pissa" or "pissa_niter_N".
        seed: seed of the sketch.
        quantization: what quantizing the residual has lost; None for a residual in ``dtype``.
        parts: reports of the single matrices, where the layer has several: the experts of a stack, the groups of a
            convolution. The layer's certificate sums them up: the energy is that of all together, and the residual and
            the passes are the largest.

    Examples:
        >>> import torch
        >>> from pissa_kernels import Certificate, LayerReport
        >>> layer = LayerReport(
        ...     name="lm_head",
        ...     shape=(64, 48),
        ...     rank=2,
        ...     certificate=Certificate(passes=5, energy=0.5, residual=2e-6, converged=True, method="krylov"),
        ...     seconds=0.25,
        ...     singular_values=torch.tensor([4.0, 2.0]),
        ...     dtype=torch.bfloat16,
        ...     scaling=1.0,
        ...     init="pissa",
        ...     seed=0,
        ... )
        >>> layer.singular_values.square().sum() / layer.certificate.energy  # ‖W‖_F²
        tensor(40.)
    """

    name: str
    shape: tuple[int, int]
    rank: int
    certificate: Certificate
    seconds: float
    singular_values: Tensor
    dtype: torch.dtype
    scaling: float
    init: str
    seed: int
    quantization: Quantization | None = None
    parts: tuple[LayerReport, ...] = ()


def of_parts(name: str, parts: Sequence[LayerReport], seconds: float) -> LayerReport:
    """Report of a layer from those of its matrices, which have one shape, rank and recipe.

    Args:
        name: name of the layer; its matrices are "name[0]", "name[1]", and so on.
        parts: at least one.
        seconds: wall time of the layer, in seconds.
    """
    squares = torch.stack([part.singular_values.double().square() for part in parts])
    whole = sum(_whole(part) for part in parts)
    methods = dict.fromkeys(part.certificate.method for part in parts)
    certificate = Certificate(
        passes=max(part.certificate.passes for part in parts),
        energy=min(1.0, float(squares.sum()) / whole) if whole > 0 else 1.0,
        residual=max(part.certificate.residual for part in parts),
        converged=all(part.certificate.converged for part in parts),
        method="+".join(methods),
    )
    return dataclasses.replace(
        parts[0],
        name=name,
        certificate=certificate,
        seconds=seconds,
        singular_values=squares.mean(0).sqrt().float(),
        parts=tuple(dataclasses.replace(part, name=f"{name}[{index}]") for index, part in enumerate(parts)),
    )


def _whole(layer: LayerReport) -> float:
    captured = float(layer.singular_values.double().square().sum())
    energy = layer.certificate.energy
    return captured / energy if energy > 0 else captured  # e may underflow to 0


def frobenius_squared(layer: LayerReport) -> float:
    """‖W‖_F² = Σσ̂²/e, of all matrices together; 0 for a zero matrix."""
    return max(1, len(layer.parts)) * _whole(layer)


def rank_range(layers: Sequence[LayerReport]) -> str:
    """The layers' rank, as in "rank 16", or the lowest and the highest, as in "rank 4 to 16"."""
    ranks = [layer.rank for layer in layers]
    return "rank " + " to ".join(map(str, sorted({min(ranks), max(ranks)})))


def shape_text(layer: LayerReport) -> str:
    """The layer's shape, as in "64×48"; "8×64×48" for a stack of eight matrices."""
    return "×".join(map(str, (len(layer.parts), *layer.shape) if layer.parts else layer.shape))


def layer_table(layers: Sequence[LayerReport]) -> tuple[tuple[str, ...], list[list[str]]]:
    """Heads of a table, and a row for each layer. Only where a layer is quantized are there columns for its error."""
    rows = [layer_row(layer) for layer in layers]
    if all(layer.quantization is None for layer in layers):
        return HEADS, rows
    return HEADS + QUANTIZED_HEADS, [row + _quantized_cells(layer) for row, layer in zip(rows, layers, strict=True)]


def _quantized_cells(layer: LayerReport) -> list[str]:
    found = layer.quantization
    if found is None:
        return [""] * len(QUANTIZED_HEADS)
    return [f"{found.error:.3g}", f"{100 * found.saved:.1f}", str(found.iterations)]


def layer_row(layer: LayerReport) -> list[str]:
    """Cells of a table under :data:`HEADS`."""
    certificate = layer.certificate
    return [
        layer.name,
        shape_text(layer),
        str(layer.dtype).removeprefix("torch."),
        str(layer.rank),
        f"{100 * certificate.energy:.2f}",
        f"{float(layer.singular_values[0]):.3g}",
        f"{float(layer.singular_values[-1]):.3g}",
        f"{certificate.residual:.0e}",
        str(certificate.passes),
        certificate.method,
        "yes" if certificate.converged else "NO",
        f"{1e3 * layer.seconds:.1f}",
    ]


def layer_to_dict(layer: LayerReport) -> dict[str, Any]:
    """A JSON object that :func:`layer_from_dict` reads; each float32 is written exactly."""
    record = {
        "name": layer.name,
        "shape": list(layer.shape),
        "dtype": str(layer.dtype).removeprefix("torch."),
        "rank": layer.rank,
        "scaling": layer.scaling,
        "init": layer.init,
        "seed": layer.seed,
        "seconds": layer.seconds,
        "singular_values": layer.singular_values.tolist(),
        "certificate": dataclasses.asdict(layer.certificate),
    }
    # absent elsewhere, so that other versions read the report
    if layer.quantization is not None:
        record["quantization"] = layer.quantization.to_dict()
    if layer.parts:
        record["parts"] = [
            {
                "seconds": part.seconds,
                "singular_values": part.singular_values.tolist(),
                "certificate": dataclasses.asdict(part.certificate),
            }
            for part in layer.parts
        ]
    return record


def layer_from_dict(record: object, path: str) -> LayerReport:
    """Read the JSON object that :func:`layer_to_dict` made.

    Args:
        record: a parsed JSON value.
        path: place of the record in its file, such as "layers[2]", for the message.

    Raises:
        ValueError: the record is not such an object; the message names what was found and what is accepted.
    """
    optional = {key: rule for key, rule in _OPTIONAL_RULES.items() if isinstance(record, dict) and key in record}
    values = strict.fields(record, path, _LAYER_RULES | optional)
    rank, shape = values["rank"], values["shape"]
    layer = LayerReport(
        name=values["name"],
        shape=(shape[0], shape[1]),
        rank=rank,
        certificate=_certificate(values, path),
        seconds=float(values["seconds"]),
        singular_values=_spectrum(values, rank, shape, path),
        dtype=_DTYPES[values["dtype"]],
        scaling=float(values["scaling"]),
        init=values["init"],
        seed=values["seed"],
        quantization=(
            quantization_from_dict(values["quantization"], f"{path}.quantization") if "quantization" in values else None
        ),
    )
    parts = []
    for index, part in enumerate(values.get("parts", ())):
        place = f"{path}.parts[{index}]"
        found = strict.fields(part, place, _PART_RULES)
        parts.append(
            dataclasses.replace(
                layer,
                name=f"{layer.name}[{index}]",
                certificate=_certificate(found, place),
                seconds=float(found["seconds"]),
                singular_values=_spectrum(found, rank, shape, place),
            )
        )
    return dataclasses.replace(layer, parts=tuple(parts))


def _certificate(values: dict[str, Any], path: str) -> Certificate:
    found = strict.fields(values["certificate"], f"{path}.certificate", _CERTIFICATE_RULES)
    return Certificate(**{**found, **{key: float(found[key]) for key in ("energy", "residual")}})


def _spectrum(values: dict[str, Any], rank: int, shape: Sequence[int], path: str) -> Tensor:
    sigma = values["singular_values"]
    if not (len(sigma) == rank <= min(shape)):
        raise ValueError(
            f"{path} has {len(sigma)} singular values, rank {rank} and shape {list(shape)}; accepted are as many "
            "values as the rank, and a rank up to the smaller side of the shape"
        )
    return torch.tensor(sigma, dtype=torch.float32)


def _is_init(value: object) -> bool:
    try:
        parse_init(str(value))
    except ValueError:
        return False
    return isinstance(value, str)


def _is_shape(value: object) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(strict.is_integer(size, 1) for size in value)


def _is_spectrum(value: object) -> bool:
    return isinstance(value, list) and all(strict.is_number(sigma) and sigma <= _FLOAT32_MAX for sigma in value)


_LAYER_RULES = {
    "name": strict.STRING,
    "shape": strict.Rule("[out, in], two integers ≥ 1", _is_shape),
    "dtype": strict.one_of(*_DTYPES),
    "rank": strict.Rule("an integer ≥ 1", lambda value: strict.is_integer(value, 1)),
    "scaling": strict.Rule("a finite number > 0", lambda value: strict.is_number(value) and value > 0),
    "init": strict.Rule("'pissa' or 'pissa_niter_N'", _is_init),
    "seed": strict.INTEGER,
    "seconds": strict.NUMBER,
    "singular_values": strict.Rule("an array of finite float32 numbers ≥ 0", _is_spectrum),
    "certificate": strict.OBJECT,
}
_OPTIONAL_RULES = {"quantization": strict.OBJECT, "parts": strict.ARRAY}
_PART_RULES = {key: _LAYER_RULES[key] for key in ("seconds", "singular_values", "certificate")}
_CERTIFICATE_RULES = {
    "passes": strict.COUNT,
    "energy": strict.NUMBER,
    "residual": strict.NUMBER,
    "converged": strict.BOOLEAN,
    "method": strict.STRING,
}
