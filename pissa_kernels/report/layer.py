"""What an initialisation did to one layer: as an object, as a row of a table, and as a JSON object."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..checks import parse_init
from ..ops import WEIGHT_DTYPES
from ..svd.result import Certificate
from . import strict

_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in WEIGHT_DTYPES}
_FLOAT32_MAX = torch.finfo(torch.float32).max

# Heads of :func:`layer_row`'s cells, and the indices of those that are text.
HEADS = ("layer", "shape", "dtype", "r", "energy, %", "σ₁", "σ_r", "residual/σ₁", "passes", "method", "converged", "ms")
TEXT_COLUMNS = [HEADS.index(head) for head in ("layer", "dtype", "method", "converged")]


@dataclass(frozen=True, eq=False)
class LayerReport:
    """What was done to one layer.

    Attributes:
        name: the module's name in the model, or its class where the model is not known.
        shape: (out, in) of the weight as the adapter sees it.
        rank: r.
        certificate: of the SVD.
        seconds: wall time of checking, decomposing and writing back; of a layer in a wave, its share of the wave.
        singular_values: (r,) float32 on the CPU, descending; the scaling is not applied.
        dtype: of the weight.
        scaling: s, the adapter's.
        init: "pissa" or "pissa_niter_N".
        seed: of the sketch.
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


def layer_row(layer: LayerReport) -> list[str]:
    """Cells under :data:`HEADS`."""
    certificate = layer.certificate
    return [
        layer.name,
        "×".join(map(str, layer.shape)),
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
    """The layer in what JSON has; a float32 is the same number as a float."""
    return {
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


def layer_from_dict(record: object, where: str) -> LayerReport:
    """The layer that :func:`layer_to_dict` describes.

    Args:
        record: one parsed JSON value.
        where: of the record in its file, for the message.

    Raises:
        ValueError: it describes none; the message says what was found and what is accepted.
    """
    values = strict.fields(record, where, _LAYER_RULES)
    sigma, rank, shape = values["singular_values"], values["rank"], values["shape"]
    if not (len(sigma) == rank <= min(shape)):
        raise ValueError(
            f"{where} has {len(sigma)} singular values, rank {rank} and shape {shape}; accepted are as many values as "
            "the rank, and a rank that the shape has"
        )
    certificate = strict.fields(values["certificate"], f"{where}.certificate", _CERTIFICATE_RULES)
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
    "name": strict.TEXT,
    "shape": strict.Rule("[out, in], two integers ≥ 1", _is_shape),
    "dtype": strict.one_of(*_DTYPES),
    "rank": strict.Rule("an integer ≥ 1", lambda value: strict.is_integer(value, 1)),
    "scaling": strict.Rule("a finite number > 0", lambda value: strict.is_number(value) and value > 0),
    "init": strict.Rule("'pissa' or 'pissa_niter_N'", _is_init),
    "seed": strict.INTEGER,
    "seconds": strict.NUMBER,
    "singular_values": strict.Rule("an array of finite float32 numbers ≥ 0", _is_spectrum),
    "certificate": strict.Rule("an object", lambda value: isinstance(value, dict)),
}
_CERTIFICATE_RULES = {
    "passes": strict.COUNT,
    "energy": strict.NUMBER,
    "residual": strict.NUMBER,
    "converged": strict.TRUTH,
    "method": strict.TEXT,
}
