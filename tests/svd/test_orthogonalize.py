"""Orthonormalization of panels of every kind."""

from __future__ import annotations

import pytest
import torch

import pissa_kernels as pk
from pissa_kernels.ops import dispatch, reference
from pissa_kernels.svd.orthogonalize import orthonormalize

from ..support.reference import EPS, with_spectrum


@pytest.fixture(params=["torch", "csrc"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    name: str = request.param
    reasons = pk.ops.unsupported_reasons("orthonormalize", torch.ones(2, 2))[name]
    if reasons:
        pytest.skip(f"{name}: {'; '.join(reasons)}")
    monkeypatch.setenv(dispatch.VARIABLE, name)
    return name


@pytest.mark.parametrize("near_only", [False, True])
def test_a_basis_stays_orthonormal_when_panels_are_round_off(near_only: bool) -> None:
    """On steep spectra only round-off is left after a few blocks; the error must not grow from panel to panel."""
    W = with_spectrum(600, 420, 0.5 ** torch.arange(420, dtype=torch.float64), seed=7).float()
    panel, _ = orthonormalize(W.mT @ torch.randn(600, 12, generator=torch.Generator().manual_seed(0)))
    basis = panel.mT.contiguous()
    while len(basis) < 200:
        near = max(0, len(basis) - 24) if near_only else 0
        panel, _ = orthonormalize(W.mT @ (W @ panel), basis, near)
        assert (basis.double() @ panel.double()).abs().max() <= 20 * EPS
        basis = torch.cat([basis, panel.mT])


KINDS = ("generic", "dependent", "zero", "inside the basis", "tiny", "ill-conditioned")


def panel_of(kind: str, n: int, b: int, size: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    Z = torch.randn(n, b, generator=generator)
    if kind == "dependent":
        Z[:, 3] = Z[:, 1]
        Z[:, 7] = 0
    elif kind == "zero":
        Z.zero_()
    elif kind == "inside the basis":
        Z[size:] = 0
    elif kind == "tiny":
        Z *= 1e-18
    elif kind == "ill-conditioned":
        Z = Z @ torch.linalg.qr(torch.randn(b, b, generator=generator))[0] * torch.logspace(0, -6, b)
        Z = Z @ torch.linalg.qr(torch.randn(b, b, generator=generator))[0]
    return Z


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [0, 40])
@pytest.mark.parametrize("b", [8, 12])
def test_orthonormalize_any_panel(kind: str, size: int, b: int, backend: str) -> None:
    n = 120
    # the leading unit vectors, which are also what Householder QR returns for a zero panel
    basis = torch.eye(n)[:size]
    Z = panel_of(kind, n, b, size)
    panel, arbitrary = orthonormalize(Z, basis)
    assert (panel.double().mT @ panel.double() - torch.eye(b)).abs().max() <= 10 * EPS
    assert size == 0 or (basis.double() @ panel.double()).abs().max() <= 10 * EPS
    assert arbitrary == (kind in ("dependent", "zero", "ill-conditioned", "inside the basis"))
    if kind in ("generic", "tiny"):
        rest = Z.double() - basis.double().mT @ (basis.double() @ Z.double())
        assert (rest - panel.double() @ (panel.double().mT @ rest)).norm() <= 1e-5 * rest.norm(), "spans what Z adds"


@pytest.mark.parametrize("columns", [1, 3, 8, 12, 40])
@pytest.mark.parametrize(("n", "size"), [(50, 5), (257, 40), (1000, 0), (5000, 200)])
@pytest.mark.parametrize("transposed", [False, True])
def test_orthonormal_panels_against_float64(columns: int, n: int, size: int, transposed: bool, backend: str) -> None:
    generator = torch.Generator().manual_seed(0)
    Z = torch.randn(n, columns, generator=generator) * torch.logspace(-1, 1, columns)
    Z = Z.mT.contiguous().mT if transposed else Z
    whole = torch.linalg.qr(torch.randn(n, size, generator=generator))[0].mT.contiguous()
    kept = Z.clone()
    panel, figures = pk.ops.orthonormalize(Z, whole if size else None)
    rest = Z.double() - whole.double().mT @ (whole.double() @ Z.double())
    # the panel is Z times an upper triangular matrix with positive diagonal, so it is the Q of QR with such an R
    Q, R = torch.linalg.qr(rest)
    exact = Q * R.diagonal().sign()
    theirs = reference.orthonormalize(Z, whole)[0]
    assert torch.equal(Z, kept)
    assert panel.shape == Z.shape
    error = torch.linalg.matrix_norm(panel - exact)
    assert error <= 1.5 * torch.linalg.matrix_norm(theirs - exact) + 4 * EPS
    assert (panel.double().mT @ panel.double() - torch.eye(columns)).abs().max() <= 10 * EPS
    lengths = torch.linalg.vector_norm(rest, dim=0)
    first, last, left = figures.double()
    torch.testing.assert_close(first, (R.diagonal().abs() / lengths).amin(), rtol=1e-4, atol=0)
    if size:  # in the second round the columns are orthonormal already
        torch.testing.assert_close(last, torch.ones_like(last), rtol=1e-4, atol=0)
        longest = torch.linalg.vector_norm(Z.double(), dim=0).amax()
        torch.testing.assert_close(left, lengths.amin() / longest, rtol=1e-5, atol=0)
    else:
        assert left == 1


def test_the_first_projection_uses_the_rows_that_are_near(backend: str) -> None:
    """The part along the other rows is removed by the second, which leaves a shorter column of round-off."""
    basis = torch.linalg.qr(torch.randn(80, 30, generator=torch.Generator().manual_seed(0)))[0].mT.contiguous()
    Z = torch.randn(80, 4, generator=torch.Generator().manual_seed(1))
    for near in (0, 10, 30):
        panel, (_, _, kept) = pk.ops.orthonormalize(Z, basis, near)
        rows = basis[near:].double()
        lengths = (Z.double() - rows.mT @ (rows @ Z.double())).norm(dim=0)
        torch.testing.assert_close(kept.double(), lengths.amin() / Z.double().norm(dim=0).amax(), rtol=1e-5, atol=0)
        assert (basis.double() @ panel.double()).abs().max() <= 10 * EPS


@pytest.mark.parametrize("columns", [6, 12])
def test_a_rank_deficient_panel_has_a_tiny_pivot(columns: int, backend: str) -> None:
    panels = torch.randn(4, 60, columns, generator=torch.Generator().manual_seed(0))
    panels[1, :, 2] = 0
    panels[2, :, 5] = panels[2, :, 1]
    panels[3, 7, 3] = float("nan")
    basis = torch.zeros(1, 60)
    figures = [pk.ops.orthonormalize(panel, basis)[1] for panel in panels]
    assert figures[0][:2].amin() > 0.1
    for pivots in (found[:2] for found in figures[1:]):
        assert not (pivots > 1e-3).all(), "0, NaN, or round-off"
    assert figures[1][2] == 0
    assert figures[3][2].isnan()


@pytest.mark.parametrize(
    ("panel", "basis", "error", "words"),
    [
        (torch.ones(9, 2).half(), None, TypeError, "the panel must be float32 or float64"),
        (torch.ones(1, 9, 2), None, ValueError, r"must be \(n, b\)"),
        (torch.ones(9, 0), None, ValueError, "b ≥ 1"),
        (torch.ones(9, 2), torch.ones(3, 8), ValueError, r"takes a basis \(k, 9\), got \(3, 8\)"),
        (torch.ones(9, 2), torch.ones(3, 9).double(), ValueError, "the basis torch.float64"),
    ],
)
def test_orthonormalize_refuses_other_dtypes_and_shapes(
    panel: torch.Tensor, basis: torch.Tensor | None, error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        pk.ops.orthonormalize(panel, basis)


def test_near_is_a_row_of_the_basis() -> None:
    for near in (-1, 4):
        with pytest.raises(ValueError, match="near must be a row of the basis, 0 to 3"):
            pk.ops.orthonormalize(torch.ones(9, 2), torch.ones(3, 9), near)


@pytest.mark.parametrize("basis", [None, 5])
@pytest.mark.parametrize("kind", ["zeros first", "repeated first", "one row", "two rows"])
def test_a_rank_deficient_panel_keeps_its_span(kind: str, basis: int | None) -> None:
    """QR without pivoting gives a zero pivot an arbitrary column, which may lie along the columns that follow."""
    n, b = 60, 8
    Z = torch.randn(n, b, generator=torch.Generator().manual_seed(0))
    if kind == "zeros first":
        Z[:, :6] = 0
        Z[:50, 6:] = 0
    elif kind == "repeated first":
        Z[:, 1:5] = Z[:, :1]
    elif kind == "one row":
        Z[[row for row in range(n) if row != 7], :] = 0
        Z[7, :7] = 0
    else:
        Z[2:] = 0
    rows = None if basis is None else torch.eye(n)[-basis:]
    panel, arbitrary = orthonormalize(Z, rows)
    P = panel.double()
    wanted = Z.double()
    if basis is not None:
        wanted[-basis:] = 0
    assert arbitrary is True
    assert (P.mT @ P - torch.eye(b)).abs().max() <= 10 * EPS
    assert (wanted - P @ (P.mT @ wanted)).norm() <= 20 * EPS * wanted.norm()
