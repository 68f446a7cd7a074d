"""One residual against the original weight, in float64: reconstruction, norms of A and B, energy, residual norms.

What is stored is compared with what the certificate says of U, S and V, before A = √(S/s)·Vᵀ and B = U·√(S/s) were
computed in float32 and rounded. Nothing is assumed of the weight. With u₃₂ = 2⁻²⁴, u the unit roundoff of the dtype
that stores A and B, ω half its smallest subnormal number and ω₃₂ that of float32, the bounds are:

- **A and B.** τ = √(σ/s) comes from s, a quotient and a root in float32, 2u₃₂ relative, or ω₃₂/τ where the quotient is
  subnormal. The product with the vector takes u₃₂, and its storage u. With float32's second-order terms, a row of A of
  length n is within δₙ = τ·(u + 4u₃₂) + ω₃₂/τ + √n·(ω + ω₃₂) of τ·v (Higham 2002, §2.2 and (2.8)).
- **Norms.** ‖u‖ and ‖v‖ are 1 to ε. Orthonormalization by Gram matrices divides by the root of a float32 sum of
  squares, off by γₙ/2 ≈ n·u₃₂/2 for n elements (Higham 2002, §3.1). LAPACK promises p(m, n)·2u₃₂, p a "modestly growing
  function" (Users' Guide, §4.9); its vectors of weights with many equal or zero singular values are off by up to
  n·u₃₂/4, so n·u₃₂/2 covers both. The fixed schedule measures the products of its vectors, and accepts MAX_SKEW.
- **Residuals.** With v̂ = A/τ and û = B/τ, W·v̂ − σ·û is W·v − σ·u, whose norm the certificate bounds, plus W·δv − σ·δu,
  at most ‖W‖₂·δₙ/τ + σ·δₘ/τ. ‖W‖₂ ≤ 2σ₁: the iterations find σ₁ to far less than that from any start.
- **Energy.** ‖W‖_F² is summed in float32 along rows of n elements, in at least eight lanes, and in float64 across rows.
- **Reconstruction.** :func:`pissa_kernels.numerics.reconstruction`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..numerics import BLOCK_ELEMENTS, HALF_SUBNORMAL, UNIT_ROUNDOFF, reconstruction
from ..report import LayerReport
from ..svd.steps import MAX_SKEW

U32, OMEGA32 = UNIT_ROUNDOFF[torch.float32], HALF_SUBNORMAL[torch.float32]
# Round-offs that do not grow with the size, in units of u₃₂: of small dense problems, and of the last sums.
SMALL_ROUNDING = 16
# Lanes of the float32 sums of squares along rows: eight in plain torch, more in the other backends.
ENERGY_LANES = 8
OTHER_NORMS = "s·‖A‖² and s·‖B‖² are not the singular values in the report"


@dataclass(frozen=True)
class LayerCheck:
    """What was found of one residual.

    Attributes:
        name: name of the layer.
        reconstruction: largest |W − (W_res + s·B·A)| relative to its rounding bound; ≤ 1 holds.
        energy: Σσᵢ²/‖W‖_F² of the singular values in the report, at most 1.
        residual: max of ‖W·vᵢ − σᵢ·uᵢ‖ and ‖Wᵀ·uᵢ − σᵢ·vᵢ‖ over σ₁, with vᵢ and uᵢ from the factors as stored.
        problem: what does not hold, "" if everything does.
        parts: checks of the single matrices, where the layer has several: the largest errors of them are the layer's,
            and the energy is that of all together.
    """

    name: str
    reconstruction: float
    energy: float
    residual: float
    problem: str
    parts: tuple[LayerCheck, ...] = ()


class Errors(NamedTuple):
    """What was found, relative to its bound; ≤ 1 holds, and NaN does not.

    Attributes:
        reconstruction: of W.
        norms: of the rows of A and the columns of B.
        energy: of the certificate's energy.
        residual: of the norms of W·v − σ·u and Wᵀ·u − σ·v.
        certificate: of the bound on these norms that the certificate gives, to ‖W‖_F + σ₁, which none exceeds.
    """

    reconstruction: float
    norms: float
    energy: float
    residual: float
    certificate: float


def check_layer(weight: Tensor, residual: Tensor, A: Tensor, B: Tensor, report: LayerReport) -> LayerCheck:
    """Check the stored factors of a layer against the original weight and the certificate.

    Args:
        weight, residual: (out, in), of one dtype.
        A, B: (r, in) and (out, r), as stored.
        report: the layer's entry in the report of the run.
    """
    if problem := _other_weight(weight, residual, A, B, report):
        return LayerCheck(report.name, torch.inf, 0.0, torch.inf, problem)
    errors, energy, apart = measure(weight, residual, A, B, report)
    problem = "; ".join(problems_of(errors, energy, apart, report))
    return LayerCheck(report.name, errors.reconstruction, energy, apart, problem)


def problems_of(errors: Errors, energy: float, apart: float, report: LayerReport) -> list[str]:
    """What does not hold of what :func:`measure` found."""
    problems = []
    if not errors.reconstruction <= 1:
        problems.append(f"W_res + s·B·A differs from W by {errors.reconstruction:.3g} times the rounding bound")
    if not errors.norms <= 1:
        problems.append(OTHER_NORMS)
    if not errors.energy <= 1:
        problems.append(f"the energy is {energy:.6f}, not the certificate's {report.certificate.energy:.6f}")
    if not errors.residual <= 1:
        problems.append(f"the triplets have a residual of {apart:.1e}, above the certificate's")
    if not errors.certificate <= 1:
        problems.append(f"the certificate's residual of {report.certificate.residual:.1e} is larger than any")
    return problems


def measure(weight: Tensor, residual: Tensor, A: Tensor, B: Tensor, report: LayerReport) -> tuple[Errors, float, float]:
    """The errors relative to their bounds, Σσᵢ²/‖W‖_F², and the largest residual norm relative to σ₁."""
    errors, energy, apart = measure_factors(weight, A, B, report)
    return errors._replace(reconstruction=reconstruction(weight, residual, A, B, report.scaling)), energy, apart


def measure_norms(A: Tensor, B: Tensor, report: LayerReport) -> float:
    """How far the norms of the rows of A and the columns of B are from those of the singular values, over the bound."""
    tau = (report.singular_values.double() / report.scaling).sqrt()
    skew = (max(report.shape) / 2 + SMALL_ROUNDING) * U32
    skew += MAX_SKEW / 2 if report.certificate.method == "fixed" else 0.0
    return max(
        _ratio((factor.norm(dim=0) - tau).abs(), skew * tau + _storage_error(tau, len(factor), stored.dtype))
        for stored, factor in ((A, A.double().mT), (B, B.double()))
    )


def measure_factors(weight: Tensor, A: Tensor, B: Tensor, report: LayerReport) -> tuple[Errors, float, float]:
    """:func:`measure` without a residual: the reconstruction is 0."""
    certificate, sigma = report.certificate, report.singular_values.double()
    tau = (sigma / report.scaling).sqrt()
    # (length, r) each; a column of zeros where σ is zero
    vectors = [A.double().mT, B.double()]
    stored = [_storage_error(tau, len(A.mT), A.dtype), _storage_error(tau, len(B), B.dtype)]
    V, U = (torch.where(tau > 0, factor / tau, factor) for factor in vectors)
    WV, WU, squares = _products(weight, V, U)
    off = torch.stack([(WV - U * sigma).norm(dim=0), (WU - V * sigma).norm(dim=0)])
    right, left = (torch.where(tau > 0, error / tau, 0.0) for error in stored)
    norm = 2 * sigma[0]
    rounding = torch.stack([norm * right + sigma * left, norm * left + sigma * right])
    allowed = certificate.residual * sigma[0]
    residuals = _ratio(off, allowed + rounding)
    # the certificate adds round-off, at most 1 % of σ₁ and half a subnormal number
    largest_norm = squares**0.5 + 1.01 * sigma[0] + OMEGA32
    captured = float(sigma.square().sum())
    energy = min(captured / squares, 1.0) if squares else 1.0
    # σ itself is rounded where it is subnormal, after the energy was taken
    subnormal = 2 * OMEGA32 * float(sigma.sum()) / captured if captured else 0.0
    relative = (max(weight.shape) / ENERGY_LANES + SMALL_ROUNDING) * U32 + subnormal
    energies = abs(energy - certificate.energy) / (relative * energy) if energy else torch.inf
    largest = float(sigma[0])
    apart = float(off.max()) / largest if largest else float(off.max())
    norms = measure_norms(A, B, report)
    return Errors(0.0, norms, energies, residuals, _ratio(allowed, largest_norm)), energy, apart


def _other_weight(weight: Tensor, residual: Tensor, A: Tensor, B: Tensor, report: LayerReport) -> str:
    """Why the tensors cannot be those that the report describes, "" if they can."""
    found = [(tuple(tensor.shape), tensor.dtype) for tensor in (weight, residual)]
    if found != [(report.shape, report.dtype)] * 2:
        return "the report describes another weight than " + " and ".join(f"{shape} {kind}" for shape, kind in found)
    return other_factors(A, B, report)


def other_factors(A: Tensor, B: Tensor, report: LayerReport) -> str:
    """Why A and B cannot be those that the report describes, "" if they can."""
    (out, columns), r = report.shape, report.rank
    for name, factor, shape in (("A", A, (r, columns)), ("B", B, (out, r))):
        if (tuple(factor.shape), factor.dtype) != (shape, report.dtype):
            return f"{name} is {tuple(factor.shape)} {factor.dtype}, not the {shape} {report.dtype} of the report"
    return ""


def _storage_error(tau: Tensor, length: int, dtype: torch.dtype) -> Tensor:
    """δ of the module's docstring: how far a stored vector of this length is from τ times the unit vector."""
    storage = UNIT_ROUNDOFF[dtype] if dtype != torch.float32 else 0.0  # float32 values are stored as they are
    subnormal = tau.square() < torch.finfo(torch.float32).smallest_normal
    quotient = torch.where(subnormal & (tau > 0), OMEGA32 / tau, 0.0)
    floor = length**0.5 * (HALF_SUBNORMAL[dtype] + OMEGA32)
    return torch.where(tau > 0, tau * (storage + 4 * U32) + quotient + floor, 0.0)


def _products(weight: Tensor, V: Tensor, U: Tensor) -> tuple[Tensor, Tensor, float]:
    """W·V, Wᵀ·U and ‖W‖_F², in float64, from one reading of W."""
    WV, WU, squares = V.new_empty(len(U), V.shape[1]), V.new_zeros(len(V), V.shape[1]), 0.0
    for start in range(0, len(weight), rows := max(1, BLOCK_ELEMENTS // weight.shape[1])):
        block = weight[start : start + rows].double()
        torch.mm(block, V, out=WV[start : start + rows])
        WU.addmm_(block.mT, U[start : start + rows])
        squares += float(block.square().sum())
    return WV, WU, squares


def _ratio(found: Tensor, bound: Tensor) -> float:
    """Largest found/bound; 0 where both are zero, NaN if anything is."""
    return float(torch.where((found == 0) & (bound == 0), 0.0, found / bound).max())
