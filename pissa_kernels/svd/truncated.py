"""The public function: the arguments are checked, and the weight goes to the driver of whole or of sharded weights."""

from __future__ import annotations

from torch import Tensor

from ..checks import check_accuracy, check_rank, check_weight
from ..runtime.shards import is_sharded, on_mesh, sharded_stack
from .driver import DEFAULT_TOL, solve_batch
from .result import TruncatedSVD
from .sharded_driver import solve_stack


def truncated_svd(
    weight: Tensor, rank: int, *, tol: float = DEFAULT_TOL, niter: int | None = None, seed: int = 0
) -> TruncatedSVD:
    """The leading singular triplets of a weight, to a tolerance on the energy deficit.

    The method is block Krylov [1]_ [2]_ or Chebyshev-filtered subspace iteration [3]_ where these are faster than a
    dense factorization. The weight is read in its own dtype and layout; only a full SVD copies it to float32.

    The energy deficit is 1 − ‖W·V‖_F²/Σ_{i≤r}σᵢ². It is estimated from the residuals of the triplets [4]_.

    Args:
        weight: (m, n), float32, float16 or bfloat16, any strides, finite. For a ``DTensor`` every process of its mesh
            calls this, and gets the same bits; no process holds the whole weight, unless the rank is near n or an
            iteration fails.
        rank: r, 1 ≤ r ≤ min(m, n).
        tol: tolerance on the energy deficit. If the estimate does not come below it, ``certificate.converged`` is
            False.
        niter: None to iterate to ``tol``. Otherwise ``tol`` is not used, and the result is at least as accurate as
            ``torch.svd_lowrank(W, rank, niter=niter)``, which is ``niter`` rounds of subspace iteration with a block of
            ``rank`` columns.
        seed: seed of the sketch. Equal seeds give equal bits on one machine; torch's global random state is neither
            used nor changed.

    Returns:
        U (m, r), S (r,), Vh (r, n) and the certificate; of a ``DTensor`` whole, as plain tensors.

    Raises:
        TypeError: a dtype other than float32, float16 and bfloat16, or a quantized tensor.
        ValueError: not 2-D, empty, a rank out of range, NaN or Inf, ``tol`` or ``niter`` out of range, or singular
            values beyond float32's range.

    Examples:
        A matrix with known singular values, and its three leading triplets:

        >>> import torch
        >>> import pissa_kernels as pk
        >>> def matrix(singular_values, m=300, n=200):
        ...     generator = torch.Generator().manual_seed(0)
        ...     U, _ = torch.linalg.qr(torch.randn(m, len(singular_values), generator=generator))
        ...     V, _ = torch.linalg.qr(torch.randn(n, len(singular_values), generator=generator))
        ...     return (U * singular_values) @ V.T
        >>> s = torch.tensor([5.0, 4.0, 3.0, 2.0, 1.0])
        >>> U, S, Vh, certificate = pk.truncated_svd(matrix(s), rank=3)
        >>> bool(torch.allclose(S, s[:3], rtol=1e-5))
        True
        >>> bool(torch.allclose(U * S, matrix(s) @ Vh.T, atol=1e-4))
        True
        >>> certificate.converged
        True
        >>> round(certificate.energy, 4)  # (25 + 16 + 9)/(25 + 16 + 9 + 4 + 1)
        0.9091

        A cluster of singular values across index r. The second vector may be any direction in the cluster, so single
        vectors are not a measure of accuracy; the captured energy is nearly the same for all of them:

        >>> s = torch.tensor([5.0, 2.001, 2.0, 2.0, 1.999, 1.0])
        >>> W = matrix(s)
        >>> U, S, Vh, certificate = pk.truncated_svd(W, rank=2)
        >>> deficit = 1 - (W @ Vh.T).square().sum() / s[:2].square().sum()
        >>> bool(deficit < 1e-5)
        True
        >>> bool(torch.allclose(S, s[:2], rtol=1e-3))
        True

    References:
        .. [1] C. Musco, C. Musco: Randomized block Krylov methods for stronger and faster approximate singular value
           decomposition. NeurIPS 2015, arXiv 1504.05477.
        .. [2] J. A. Tropp, R. J. Webber: Randomized algorithms for low-rank matrix approximation. 2023, arXiv
           2306.12418.
        .. [3] Y. Zhou, Y. Saad, M. L. Tiago, J. R. Chelikowsky: Self-consistent-field calculations using
           Chebyshev-filtered subspace iteration. Journal of Computational Physics 219, 2006.
        .. [4] B. N. Parlett: The Symmetric Eigenvalue Problem. SIAM 1998, §11.7.
    """
    check_weight(weight)
    check_rank(rank, weight.shape)
    check_accuracy(tol, niter)
    if is_sharded(weight):
        return solve_stack(sharded_stack(weight, on_mesh(weight)), rank, tol=tol, niter=niter, seed=seed)[0]
    return solve_batch([weight], rank, tol=tol, niter=niter, seed=seed)[0]
