"""The Cholesky kernel against float64 and the error of LAPACK's float32 factorization."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pissa_kernels.ops import batched_reference

from ..support.backends import DEVICE, randn
from ..support.marks import slow_but

pytest.importorskip("triton")

from pissa_kernels.ops.triton.cholesky import inverse_cholesky
from pissa_kernels.ops.triton.pieces import INTERPRETED

pytestmark = pytest.mark.skipif(DEVICE == "cpu" and not INTERPRETED, reason="needs Triton's interpreter or a GPU")

UNIT_ROUNDOFF = 2.0**-24


def gram_of(batch: int, size: int, smallest: float = 0.1, seed: int = 1) -> Tensor:
    """ZᵀZ for Z of two rows more than columns, whose norms fall to ``smallest``."""
    Z = randn(batch, size + 2, size, seed=seed) * torch.logspace(0, torch.tensor(smallest).log10(), size, device=DEVICE)
    return Z.mT @ Z


def exact(gram: Tensor, shift: float) -> tuple[Tensor, Tensor]:
    """The reference in float64."""
    G = gram.double()
    norms = G.diagonal(dim1=-2, dim2=-1).sqrt()
    scaled = G / norms.unsqueeze(-1) / norms.unsqueeze(-2)
    scaled.diagonal(dim1=-2, dim2=-1).fill_(1.0 + shift)
    L = torch.linalg.cholesky(scaled)
    C = torch.linalg.solve_triangular(L, torch.diag_embed(1 / norms), upper=False).mT
    return C, L.diagonal(dim1=-2, dim2=-1) * norms


@pytest.mark.parametrize("size", slow_but([1, 8, 31, 33, 64, 129, 160], 8, 33, 160))
def test_errors_are_those_of_lapack(size: int, poison: None) -> None:
    gram = gram_of(12 if size < 100 else 4, size)  # the error of a single one depends on the CPU's LAPACK
    shift = 1e-6
    found, reference = inverse_cholesky(gram, shift), batched_reference.inverse_cholesky(gram, shift)
    for ours, theirs, true in zip(found, reference, exact(gram, shift), strict=True):
        error = (theirs - true).norm() + UNIT_ROUNDOFF * true.norm()
        assert (ours - true).norm() <= 2 * error
    assert torch.equal(found[0], found[0].triu())


def test_columns_are_orthonormal_afterwards() -> None:
    Z = randn(1, 200, 70) * torch.logspace(0, -6, 70, device=DEVICE)
    Q = (Z @ inverse_cholesky(Z.mT @ Z, 0.0)[0]).double()
    assert (Q.mT @ Q - torch.eye(70, device=DEVICE)).abs().max() < 70 * 8 * UNIT_ROUNDOFF


def test_the_same_bits_alone_and_in_a_batch() -> None:
    gram = gram_of(3, 45)
    together = inverse_cholesky(gram, 1e-6)
    for index in range(3):
        for whole, alone in zip(together, inverse_cholesky(gram[index : index + 1], 1e-6), strict=True):
            assert torch.equal(whole[index], alone[0])


def test_a_shift_of_scaled_columns_makes_a_singular_matrix_definite() -> None:
    Z = randn(1, 60, 20)
    gram = torch.cat([Z, Z], dim=-1).mT @ torch.cat([Z, Z], dim=-1)
    change, diagonal = inverse_cholesky(gram, 1e-4)
    assert change.isfinite().all()
    # a repeated column has the pivot (1 + s)² − 1 over (1 + s), about 2·s, and others have at least that
    assert (diagonal[:, 20:] / gram.diagonal(dim1=-2, dim2=-1)[:, 20:].sqrt()).amin() >= 1e-2


def test_a_failed_factorization_spoils_its_matrix_only() -> None:
    gram = gram_of(4, 40)
    good = {index: inverse_cholesky(gram[index : index + 1], 0.0) for index in (0, 3)}
    gram[1, 35, 3] = gram[1, 3, 35] = 1e3  # indefinite, which the second block shows
    gram[2, 5, 30] = gram[2, 30, 5] = torch.nan
    change, diagonal = inverse_cholesky(gram, 0.0)
    for index in (1, 2):
        assert change[index].isnan().all()
        assert diagonal[index].isnan().all()
    for index in (0, 3):
        assert torch.equal(change[index], good[index][0][0])
        assert torch.equal(diagonal[index], good[index][1][0])


@pytest.mark.parametrize("scale", [1e-36, 1e30])
def test_tiny_and_huge_columns(scale: float) -> None:
    gram = gram_of(1, 12)
    change, diagonal = inverse_cholesky(gram, 1e-6)
    scaled_change, scaled_diagonal = inverse_cholesky(gram * scale, 1e-6)
    torch.testing.assert_close(scaled_change * scale**0.5, change, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(scaled_diagonal / scale**0.5, diagonal, rtol=1e-5, atol=0.0)


def test_an_empty_batch() -> None:
    change, diagonal = inverse_cholesky(randn(0, 8, 8), 0.0)
    assert change.shape == (0, 8, 8)
    assert diagonal.shape == (0, 8)


@settings(max_examples=12, deadline=None)
@given(size=st.integers(1, 40), zeros=st.sets(st.integers(0, 39)), seed=st.integers(0, 2**16))
def test_columns_of_zeros_stay_zero(size: int, zeros: set[int], seed: int) -> None:
    Z = randn(1, size + 5, size, seed=seed)
    empty = sorted(column for column in zeros if column < size)
    Z[..., empty] = 0.0
    change, diagonal = inverse_cholesky(Z.mT @ Z, 1e-6)
    reference, norms = batched_reference.inverse_cholesky(Z.mT @ Z, 1e-6)
    assert change.isfinite().all()
    assert not change[..., empty].any()
    assert not change[..., empty, :].any()
    assert not diagonal[..., empty].any()
    torch.testing.assert_close(diagonal, norms, rtol=2e-3, atol=1e-6)
    full = [column for column in range(size) if column not in empty]
    Q = (Z @ change)[..., full].double()
    bound = 1e-6 + 64 * size * UNIT_ROUNDOFF * float(reference.norm() * Z.norm())
    assert ((Q.mT @ Q - torch.eye(len(full), device=DEVICE)).abs() <= bound).all()
