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
        name: name of the module in the model, or its class if the model is not known.
        shape: (out, in) of the weight in the adapter's orientation.
        rank: r.
        certificate: certificate of the SVD.
        seconds: wall time of checking, decomposing and writing back, in seconds; for a layer in a batch, its share of
            the batch's time.
        singular_values: (r,) float32 on the CPU, descending, before the scaling.
        dtype: dtype of the weight.
        scaling: the adapter's scaling s.
        init: "pissa" or "pissa_niter_N".
        seed: seed of the sketch.
        quantization: what quantizing the residual has lost; None for a residual in ``dtype``.

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


def rank_range(layers: Sequence[LayerReport]) -> str:
    """The layers' rank, as in "rank 16", or the lowest and the highest, as in "rank 4 to 16"."""
    ranks = [layer.rank for layer in layers]
    return "rank " + " to ".join(map(str, sorted({min(ranks), max(ranks)})))


def shape_text(layer: LayerReport) -> str:
    """The layer's shape, as in "64×48"."""
    return "×".join(map(str, layer.shape))


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
    return record if layer.quantization is None else {**record, "quantization": layer.quantization.to_dict()}


def layer_from_dict(record: object, path: str) -> LayerReport:
    """Read the JSON object that :func:`layer_to_dict` made.

    Args:
        record: a parsed JSON value.
        path: place of the record in its file, such as "layers[2]", for the message.

    Raises:
        ValueError: the record is not such an object; the message names what was found and what is accepted.
    """
    quantized = isinstance(record, dict) and "quantization" in record
    values = strict.fields(record, path, _LAYER_RULES | _QUANTIZED_RULE if quantized else _LAYER_RULES)
    sigma, rank, shape = values["singular_values"], values["rank"], values["shape"]
    if not (len(sigma) == rank <= min(shape)):
        raise ValueError(
            f"{path} has {len(sigma)} singular values, rank {rank} and shape {shape}; accepted are as many values as "
            "the rank, and a rank up to the smaller side of the shape"
        )
    certificate = strict.fields(values["certificate"], f"{path}.certificate", _CERTIFICATE_RULES)
    floats = {key: float(certificate[key]) for key in ("energy", "residual")}
    return LayerReport(
        name=values["name"],
        shape=(shape[0], shape[1]),
        rank=rank,
        certificate=Certificate(**{**certificate, **floats}),
        seconds=float(values["seconds"]),
        singular_values=torch.tensor(sigma, dtype=torch.float32),
        dtype=_DTYPES[values["dtype"]],
        scaling=float(values["scaling"]),
        init=values["init"],
        seed=values["seed"],
        quantization=quantization_from_dict(values["quantization"], f"{path}.quantization") if quantized else None,
    )


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
_QUANTIZED_RULE = {"quantization": strict.OBJECT}
_CERTIFICATE_RULES = {
    "passes": strict.COUNT,
    "energy": strict.NUMBER,
    "residual": strict.NUMBER,
    "converged": strict.BOOLEAN,
    "method": strict.STRING,
}
