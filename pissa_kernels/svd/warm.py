"""Triplets of a weight that differs little from one whose triplets are known: one product each way.

Let X be the right vectors of the other weight, Y = A·X and Z = AᵀY. The singular triplets of the projection of A onto
span(Y) are those of the pencil (ZᵀZ, YᵀY): with ZᵀZ·t = σ²·YᵀY·t, u = Y·t and σ·v = Z·t. So the two products, which
one reading of the weight gives, are all that a Rayleigh–Ritz projection takes, and Aᵀu = σ·v holds to round-off. The
columns of Y are nearly orthogonal, so that YᵀY, scaled to a diagonal of ones, is well conditioned.

A subspace sees nothing of a direction that is orthogonal to it, so the two weights must have most of their leading
right vectors in common: they do if they differ by much less than σ_r in the 2-norm. Where they do not, a direction with
a singular value of up to about 2·σ_r can be missed, and the certificate does not tell. W − W_q = s·B·A + E of
:mod:`pissa_kernels.quantize.iteration` has no such direction: A is in the subspace, and ‖E‖₂ a fraction of σ_r.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..numerics import exact_arithmetic
from .driver import solve_batch
from .rayleigh_ritz import Triplets, certified
from .result import Certificate, TruncatedSVD
from .sketches import gaussian
from .stopping import estimated_deficit
from .weight_operator import WeightOperator

# Columns beyond the rank: their Ritz values are the gap that the deficit is estimated with, and they carry directions
# near index r that a change of the weight may exchange.
GUARD_COLUMNS = 16
# Pieces of bfloat16 that a float32 panel is split into on bfloat16 weights. One leaves an energy deficit near that of
# rounding A and B to bfloat16, which the next weight's products remove; two leave none that counts.
ROUGH_PIECES, PIECES = 1, 2
# Rounds after which the triplets are computed from a random start.
MAX_ROUNDS = 6
# Smallest pivot of the scaled YᵀY with which its Cholesky factor is used.
MIN_PIVOT = 1e-2


class WarmStart:
    """A subspace near the leading right singular vectors of a weight (the left ones if it is wide).

    Args:
        svd: triplets of a weight (m, n).
        seed: seed of the columns beyond them.
    """

    def __init__(self, svd: TruncatedSVD, seed: int) -> None:
        m, n = len(svd.U), svd.Vh.shape[1]
        self.rank, self.seed = len(svd.S), seed
        start = svd.Vh.mT if m >= n else svd.U
        guards = min(GUARD_COLUMNS, min(m, n) - self.rank)
        length = len(start)
        beyond = gaussian(length, guards, seed, start.device) / length**0.5
        # A·beyond must not be dominated by the leading triplets, which may be a thousand times as large as the rest
        self.block = torch.cat([start, beyond - start @ (start.mT @ beyond)], dim=1)

    def solve(self, weight: Tensor, tol: float, *, certify: bool = True) -> TruncatedSVD:
        """Triplets of another weight of the same shape; the subspace follows it.

        Args:
            weight: (m, n) float32, float16 or bfloat16.
            tol: tolerance on the energy deficit.
            certify: whether to measure the residuals, and to iterate to ``tol``. Without, one product each way is made,
                the certificate says nothing of the accuracy (``converged`` is False, the residual 0), and the result
                is a start for the next weight.

        Raises:
            ValueError: NaN or Inf in the weight.
        """
        with exact_arithmetic(weight.device):
            operator = WeightOperator(weight.detach())
            for _ in range(MAX_ROUNDS):
                found = _projected(operator, self.block, PIECES if certify else ROUGH_PIECES)
                if found is None:
                    break
                U, S, self.block = found
                following = S[self.rank :]
                U, S, V = U[:, : self.rank], S[: self.rank], self.block[:, : self.rank]
                if not certify:
                    return _uncertified(operator, Triplets(U, S, V, torch.zeros_like(S), following))
                residuals = (operator.apply(V.contiguous()) - U * S).norm(dim=0)
                triplets = Triplets(U, S, V, residuals, following)
                if _deficit(triplets) <= tol:
                    return certified(operator, triplets, True, "warm")
        svd = solve_batch([weight], self.rank, tol=tol, niter=None, seed=self.seed)[0]
        self.block = WarmStart(svd, self.seed).block
        return svd

    def certificate(self, weight: Tensor, svd: TruncatedSVD, tol: float) -> Certificate:
        """Certificate of triplets that :meth:`solve` has found without one.

        Args:
            weight: (m, n) the weight that they are of.
            svd: the triplets.
            tol: tolerance on the energy deficit.
        """
        with exact_arithmetic(weight.device):
            operator = WeightOperator(weight.detach())
            U, V = (svd.Vh.mT, svd.U) if operator.wide else (svd.U, svd.Vh.mT)
            U, S, V = U.contiguous(), svd.S * operator.scale, V.contiguous()
            found = _projected(operator, self.block, PIECES)
            following = S[-1:] if found is None else found[1][self.rank :]
            triplets = Triplets(U, S, V, operator.residuals(U, S, V, operator.apply(V)), following)
            return certified(operator, triplets, _deficit(triplets) <= tol, "warm").certificate


def _projected(operator: WeightOperator, X: Tensor, pieces: int) -> tuple[Tensor, Tensor, Tensor] | None:
    """Triplets of A projected onto span(A·X): U (m, b), S (b,) descending, V (n, b). None where X is degenerate."""
    Y, Z = operator.both(X, pieces)
    lengths = Y.norm(dim=0)
    if not bool(lengths.amin() > 0):
        return None
    inverse = (1.0 / lengths.double())[:, None]
    left, right = ((inverse * (panel.mT @ panel).double() * inverse.mT) for panel in (Y, Z))
    factor, info = torch.linalg.cholesky_ex(left)
    if int(info) or not bool(factor.diagonal().amin() > MIN_PIVOT):  # NaN too
        return None
    root = torch.linalg.solve_triangular(
        factor.mT, torch.eye(len(left), dtype=left.dtype, device=left.device), upper=True
    )
    squares, turn = torch.linalg.eigh(root.mT @ right @ root)  # rootᵀ·left·root = I
    S = squares.flip(0).clamp(min=0).sqrt()
    if not bool(S[-1] > 0):
        return None
    change = inverse * (root @ turn.flip(1))
    return Y @ change.float(), S.float(), Z @ (change / S).float()


def _deficit(triplets: Triplets) -> float:
    """Estimated energy deficit: the Ritz pairs of A·Aᵀ are (σ², u), and their residuals σ·‖A·v − σ·u‖."""
    values = triplets.S.double().square().tolist()
    residuals = (triplets.S * triplets.residuals).tolist()
    following = triplets.following.tolist()
    return estimated_deficit(values, residuals, following[len(following) // 2] ** 2 if following else 0.0)


def _uncertified(operator: WeightOperator, triplets: Triplets) -> TruncatedSVD:
    svd = certified(operator, triplets, False, "warm")
    passes, energy = svd.certificate.passes, svd.certificate.energy
    return svd._replace(certificate=Certificate(passes, energy, 0.0, False, "warm"))
