"""Truncated SVD with a certificate: the engine's public face and the one place that chooses a method.

The methods work on a tall operator, so a wide weight is seen through its transpose (a view). Whatever found the
subspace, :func:`_rayleigh_ritz` turns it into triplets and :func:`_certify` measures them against the weight itself.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from . import ops
from .checks import check_rank, check_weight
from .krylov import basis_size, block_krylov, block_size, missing_energy, steps_for_niter
from .ops import reference
from .orthogonalize import orthonormalize

MAX_PRODUCTS = 120
# A spectrum too flat for Krylov is handed to the dense method up to this width, where that takes 0.2 s.
CHEAP_GRAM = 1024
# What a float32 Gram matrix leaves on a well-conditioned weight is below this; where it leaves more, singular values
# below √ε·σ₁ are wanted, and only a float64 one knows them.
GRAM_RESIDUAL = 1e-5
FLOAT32_EPS = torch.finfo(torch.float32).eps


@dataclass(frozen=True)
class Certificate:
    """What is known of a truncated SVD without a reference.

    Attributes:
        passes: products with W or Wᵀ, the measurement of the residual included.
        energy: Σσ̂²/‖W‖_F², the share of W's energy that the triplets capture; 1 for a zero matrix.
        residual: max ρ/σ₁ with ρᵢ = max(‖W·vᵢ − σᵢ·uᵢ‖, ‖Wᵀ·uᵢ − σᵢ·vᵢ‖): the triplets are the exact ones of a matrix
            within √2·max ρ of W. Measured in float32, with that measurement's own rounding added.
        converged: the energy deficit, estimated from the residuals, is below the tolerance, or a dense method answered.
            Where singular values cluster across index r the estimate may be short by a factor of five.
        method: "krylov", or "gram" and "svd" for the two dense ones.
    """

    passes: int
    energy: float
    residual: float
    converged: bool
    method: str


class TruncatedSVD(NamedTuple):
    """W ≈ U·diag(S)·Vh: U (m, r), S (r,) descending, Vh (r, n), float32, contiguous, on W's device."""

    U: Tensor
    S: Tensor
    Vh: Tensor
    certificate: Certificate


def truncated_svd(
    weight: Tensor, rank: int, *, tol: float = 1e-6, niter: int | None = None, seed: int = 0
) -> TruncatedSVD:
    """The leading ``rank`` singular triplets of a weight, to a tolerance on the captured energy.

    Block Krylov (:mod:`pissa_kernels.krylov`) where it is the cheaper way, a dense factorisation elsewhere. The
    weight is read as it is stored; torch's global random state is neither used nor changed.

    Args:
        weight: (m, n), float32, float16 or bfloat16, any strides, finite.
        rank: 1 ≤ rank ≤ min(m, n).
        tol: on the energy deficit 1 − ‖W·V‖_F²/Σ_{i≤r}σᵢ². Iterates until the estimate of what is left is below it, or
            reports ``converged=False``.
        niter: instead of ``tol``, promise at least the accuracy of that many rounds of subspace iteration with a block
            of ``rank`` columns, as ``torch.svd_lowrank(W, rank, niter=niter)`` does them.
        seed: of the sketch; equal seeds give equal bits on one machine.

    Returns:
        U, S, Vh and the certificate.

    Raises:
        TypeError: a dtype that is not float32, float16 or bfloat16, or a quantised tensor.
        ValueError: not 2-D, empty, a rank out of range, NaN or Inf, ``tol`` or ``niter`` out of range.
    """
    check_weight(weight)
    check_rank(rank, weight.shape)
    if niter is None and not 0 < tol < 1:
        raise ValueError(f"tol must lie between 0 and 1, got {tol}")
    if niter is not None and niter < 0:
        raise ValueError(f"niter must be 0 or more, got {niter}")
    with exact_arithmetic(weight.device):
        operator = TallOperator(weight.detach())
        method = choose_method(*operator.shape, rank, niter)
        if method == "krylov":
            try:
                result = _krylov(operator, rank, tol, niter, seed)
            except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
                method = "gram"
            else:
                if result.certificate.converged or niter is not None or operator.shape[1] > CHEAP_GRAM:
                    return result
                method = "gram"
        if method == "svd":
            return _certify(operator, *_svd(operator, rank), method=method)[0]
        result, _ = _certify(operator, *_gram(operator, rank, torch.float32), method=method)
        if result.certificate.residual > GRAM_RESIDUAL:
            result, _ = _certify(operator, *_gram(operator, rank, torch.float64), method=method)
        return result


class TallOperator:
    """A weight seen as A (m, n), m ≥ n, times a power of two that keeps its squares inside float32's range.

    The power is applied to the panels, where it is exact, so the weight is never copied. ``products`` counts.
    """

    def __init__(self, weight: Tensor) -> None:
        self.wide = weight.shape[0] < weight.shape[1]
        self.weight = weight.mT if self.wide else weight
        self.shape: tuple[int, int] = (self.weight.shape[0], self.weight.shape[1])
        self.device = weight.device
        self.products = 0
        self.scale = 1.0
        self.energy = reference.sum_of_squares(weight)
        if math.isnan(self.energy):
            raise ValueError("the weight holds NaN")
        # Krylov squares the operator: fourth powers of its norm have to stay inside float32
        if not 1e-8 < self.energy < 1e8:
            largest = float(weight.abs().amax())
            if math.isinf(largest):
                raise ValueError("the weight holds Inf")
            if largest > 0:
                exponent = -math.frexp(largest)[1] - math.frexp(math.sqrt(weight.numel()))[1]
                self.scale = 2.0 ** max(-126, min(126, exponent))
                self.energy = reference.sum_of_squares(weight, self.scale)

    def apply(self, X: Tensor) -> Tensor:
        self.products += 1
        return ops.matmul(self.weight, X if self.scale == 1.0 else X * self.scale)

    def adjoint(self, Y: Tensor) -> Tensor:
        self.products += 1
        return ops.rmatmul(self.weight, Y if self.scale == 1.0 else Y * self.scale)


def choose_method(m: int, n: int, rank: int, niter: int | None) -> str:
    """The method for a tall (m, n) operator: "krylov", "gram" or "svd", by estimated cost.

    The constants are seconds on two AVX2 cores: products at 100 GFLOP/s with 1 ms for the small work of each step,
    float32 ``eigh`` at 9e-11·n³, Gram matrix at 80 GFLOP/s. Only their ratios matter.
    """
    if 2 * rank > n:
        return "svd"
    block = block_size(rank, niter)
    too_large = basis_size(rank, block, niter) + block > n
    if too_large:
        return "gram"
    steps = (8 if block > rank else 12) if niter is None else steps_for_niter(niter) + 1
    basis = steps * block
    looks = 1 if niter is not None else 2
    krylov = steps * (4 * m * n * block / 1e11 + 1e-3) + 4 * basis**2 * n / 1e11 + looks * 9e-11 * basis**3
    gram = 9e-11 * n**3 + 2 * m * n * n / 8e10
    return "krylov" if krylov < gram else "gram"


def _krylov(operator: TallOperator, rank: int, tol: float, niter: int | None, seed: int) -> TruncatedSVD:
    V, beyond = block_krylov(operator, rank, tol=tol, niter=niter, max_products=MAX_PRODUCTS, seed=seed)
    result, residuals = _certify(operator, *_rayleigh_ritz(operator, V), method="krylov")
    # the residual of an eigenpair of AᵀA is σ times that of the triplet
    values = result.S * operator.scale
    converged = missing_energy(values.square(), residuals * values, beyond) <= tol
    return result._replace(certificate=replace(result.certificate, converged=converged))


def _gram(operator: TallOperator, rank: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Leading eigenvectors of AᵀA, summed and decomposed in ``dtype``."""
    gram = torch.zeros(operator.shape[1], operator.shape[1], dtype=dtype, device=operator.device)
    for _, _, rows in reference.row_blocks(operator.weight, dtype):
        rows = rows if operator.scale == 1.0 else rows * operator.scale
        gram.addmm_(rows.mT, rows)
    operator.products += 2
    _, vectors = torch.linalg.eigh(gram)
    return _rayleigh_ritz(operator, vectors[:, -rank:])


def _svd(operator: TallOperator, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """LAPACK's or cuSOLVER's own, for ranks that leave little to truncate."""
    U, S, Vh = torch.linalg.svd(operator.weight.float() * operator.scale, full_matrices=False)
    operator.products += 2
    return U[:, :rank].contiguous(), S[:rank], Vh[:rank].mT.contiguous()


def _rayleigh_ritz(operator: TallOperator, V: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Triplets of A on the subspace of V: A·V = Q·R, R = X·S·Zᵀ, U = Q·X. Orthonormal even where S is zero."""
    V, _ = orthonormalize(V)
    Y = operator.apply(V)
    Q, _ = orthonormalize(Y)
    X, S, Zh = torch.linalg.svd((Q.mT @ Y).double())
    return (Q @ X.to(Q.dtype)).float(), S.float(), (V @ Zh.mT.to(V.dtype)).float()


def _certify(operator: TallOperator, U: Tensor, S: Tensor, V: Tensor, *, method: str) -> tuple[TruncatedSVD, Tensor]:
    """The result with its measured certificate, and each triplet's residual ρᵢ (r,), times the operator's scale."""
    left = torch.linalg.vector_norm(operator.apply(V) - U * S, dim=0)
    right = torch.linalg.vector_norm(operator.adjoint(U) - V * S, dim=0)
    residuals = torch.maximum(left, right)
    largest = float(S[0])
    # float32 products of unit vectors are off by a few ε·σ₁ themselves
    residual = float(residuals.max()) / largest + 4 * FLOAT32_EPS if largest > 0 else 0.0
    energy = float(S.double().square().sum()) / operator.energy if operator.energy > 0 else 1.0
    S = S / operator.scale
    if not torch.isfinite(S).all():
        raise ValueError("the weight's singular values exceed float32's range")
    certificate = Certificate(operator.products, min(energy, 1.0), residual, True, method)
    if operator.wide:
        U, V = V, U
    return TruncatedSVD(U.contiguous(), S, V.mT.contiguous(), certificate), residuals


@contextlib.contextmanager
def exact_arithmetic(device: torch.device) -> Iterator[None]:
    """float32 means float32: no autograd, no autocast, no TF32 or bf16 behind a float32 product."""
    precision = torch.get_float32_matmul_precision()
    with torch.inference_mode(False), torch.no_grad(), torch.autocast(device.type, enabled=False):
        if precision == "highest":
            yield
            return
        torch.set_float32_matmul_precision("highest")
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(precision)
