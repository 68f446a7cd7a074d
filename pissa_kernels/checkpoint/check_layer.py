"""One residual against the original weight, in float64: reconstruction, singular values, energy, residual norms."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .. import ops
from ..numerics import UNIT_ROUNDOFF, reconstruction
from ..report import LayerReport

# Relative round-off of a float32 sum of up to 10⁹ squares, added in blocks.
ENERGY_ROUNDING = 1e-4
# Round-off of residual norms that are measured again in float32.
RESIDUAL_ROUNDING = 1e-5


@dataclass(frozen=True)
class LayerCheck:
    """What was found of one residual.

    Attributes:
        name: name of the layer.
        reconstruction: largest |W − (W_res + s·B·A)| relative to its rounding bound; ≤ 1 holds.
        energy: s²·Σ‖Bᵢ‖²‖Aᵢ‖² / ‖W‖_F², from the factors as stored.
        residual: max of ‖W·vᵢ − σᵢ·uᵢ‖ and ‖Wᵀ·uᵢ − σᵢ·vᵢ‖ over σ₁, from the factors as stored.
        problem: what does not hold, "" if everything does.
    """

    name: str
    reconstruction: float
    energy: float
    residual: float
    problem: str


def check_layer(weight: Tensor, residual: Tensor, A: Tensor, B: Tensor, report: LayerReport) -> LayerCheck:
    """Check the stored factors of a layer against the original weight and the certificate.

    Args:
        weight, residual: (out, in), of one dtype.
        A, B: (r, in) and (out, r), as stored.
        report: the layer's entry in the report of the run.
    """
    problems = []
    if (tuple(weight.shape), len(A), weight.dtype) != (report.shape, report.rank, report.dtype):
        found = f"{tuple(weight.shape)} {weight.dtype} of rank {len(A)}"
        return LayerCheck(report.name, torch.inf, 0.0, torch.inf, f"the report describes another weight than {found}")
    worst = reconstruction(weight, residual, A, B, report.scaling)
    if not worst <= 1:
        problems.append(f"W_res + s·B·A differs from W by {worst:.3g} times the rounding bound")
    u = UNIT_ROUNDOFF[weight.dtype]
    rows, columns = A.double().norm(dim=1), B.double().norm(dim=0)
    sigma = report.scaling * rows * columns
    expected = report.singular_values.double()
    # an element is off by u relative to itself, or, where it is subnormal, by u times the smallest normal number
    tiny = torch.finfo(weight.dtype).smallest_normal * u * max(weight.shape) ** 0.5 * report.scaling
    if not bool(((sigma - expected).abs() <= (2.1 * u + 1e-6) * expected + tiny * (rows + columns)).all()):
        problems.append("s·‖B‖·‖A‖ are not the singular values in the report")
    norm = float(sum(weight[row : row + 256].double().square().sum() for row in range(0, len(weight), 256)))
    energy = float(expected.square().sum()) / norm if norm else 1.0
    if not abs(energy - report.certificate.energy) <= ENERGY_ROUNDING * report.certificate.energy:
        problems.append(f"the energy is {energy:.6f}, not the certificate's {report.certificate.energy:.6f}")
    V = (A.double() / rows.clamp_min(1e-300)[:, None]).float().mT.contiguous()
    U = (B.double() / columns.clamp_min(1e-300)).float()
    apart = torch.stack(
        [
            (ops.matmul(weight, V) - U * expected.float()).norm(dim=0),
            (ops.rmatmul(weight, U) - V * expected.float()).norm(dim=0),
        ]
    )
    largest = float(expected[0])
    moved = float(apart.max()) / largest if largest else 0.0
    # rounding changes a unit vector by at most u, and therefore either norm by at most 2u·σ₁
    if not moved <= report.certificate.residual + 4 * u + RESIDUAL_ROUNDING:
        problems.append(f"the triplets have a residual of {moved:.1e}, above the certificate's")
    return LayerCheck(report.name, worst, energy, moved, "; ".join(problems))
