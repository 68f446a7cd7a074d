"""Orthonormalization of panels of every kind, alone and in a batch."""

from __future__ import annotations

import pytest
import torch

import pissa_kernels as pk
from pissa_kernels.ops import dispatch, reference
from pissa_kernels.svd.orthogonalize import orthonormalize

from ..support.reference import EPS, with_spectrum


@pytest.mark.parametrize("near_only", [False, True])
def test_a_basis_stays_orthonormal_when_panels_are_round_off(near_only: bool) -> None:
    """On steep spectra only round-off is left after a few blocks; the error must not grow from panel to panel."""
    W = with_spectrum(600, 420, 0.5 ** torch.arange(420, dtype=torch.float64), seed=7).float()
    panel, _ = orthonormalize((W.mT @ torch.randn(600, 12, generator=torch.Generator().manual_seed(0)))[None])
    basis = panel.mT.contiguous()
    while basis.shape[1] < 200:
        near = basis[:, -24:] if near_only else None
        panel, _ = orthonormalize((W.mT @ (W @ panel[0]))[None], basis, near)
        assert (basis.double() @ panel.double()).abs().max() <= 20 * EPS
        basis = torch.cat([basis, panel.mT], dim=1)


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


@pytest.mark.parametrize("kinds", [*((kind,) for kind in KINDS), KINDS], ids="+".join)
@pytest.mark.parametrize("size", [0, 40])
def test_orthonormalize_any_panel(kinds: tuple[str, ...], size: int) -> None:
    n, b = 120, 12
    # the leading unit vectors, which are also what Householder QR returns for a zero panel
    basis = torch.eye(n)[:size]
    batch = torch.stack([panel_of(kind, n, b, size) for kind in kinds])
    panels, deficient = orthonormalize(batch, basis.expand(len(kinds), -1, -1))
    for kind, Z, panel, arbitrary in zip(kinds, batch, panels, deficient, strict=True):
        assert (panel.double().mT @ panel.double() - torch.eye(b)).abs().max() <= 10 * EPS
        assert size == 0 or (basis.double() @ panel.double()).abs().max() <= 10 * EPS
        assert arbitrary == (kind in ("dependent", "zero", "ill-conditioned", "inside the basis"))
        if kind in ("generic", "tiny"):
            rest = Z.double() - basis.double().mT @ (basis.double() @ Z.double())
            assert (rest - panel.double() @ (panel.double().mT @ rest)).norm() <= 1e-5 * rest.norm(), (
                "spans what Z adds"
            )


@pytest.fixture(params=["torch", "csrc"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    name: str = request.param
    reasons = pk.ops.unsupported_reasons("gram_schmidt", torch.ones(2, 2))[name]
    if reasons:
        pytest.skip(f"{name}: {'; '.join(reasons)}")
    monkeypatch.setenv(dispatch.VARIABLE, name)
    return name


@pytest.mark.parametrize("columns", [1, 3, 8, 12])
@pytest.mark.parametrize(("batch", "n", "size"), [(1, 30, 5), (3, 257, 40), (2, 1000, 0), (1, 5000, 200)])
@pytest.mark.parametrize("transposed", [False, True])
def test_one_round_against_float64(columns: int, batch: int, n: int, size: int, transposed: bool, backend: str) -> None:
    generator = torch.Generator().manual_seed(0)
    Z = torch.randn(batch, n, columns, generator=generator) * torch.logspace(-1, 1, columns)
    Z = Z.mT.contiguous().mT if transposed else Z
    whole = torch.linalg.qr(torch.randn(batch, n, size, generator=generator))[0].mT.contiguous()
    kept = Z.clone()
    panel, pivot, shortest = pk.ops.gram_schmidt(Z, whole if size else None)
    rest = Z.double() - whole.double().mT @ (whole.double() @ Z.double())
    # the panel is Z times an upper triangular matrix with positive diagonal, so it is the Q of QR with such an R
    Q, R = torch.linalg.qr(rest)
    exact = Q * R.diagonal(dim1=-2, dim2=-1).sign().unsqueeze(-2)
    theirs = reference.gram_schmidt(Z, whole)[0]
    assert torch.equal(Z, kept)
    assert panel.shape == Z.shape
    error = torch.linalg.matrix_norm(panel - exact).max()
    assert error <= 1.5 * torch.linalg.matrix_norm(theirs - exact).max() + 4 * EPS
    lengths = torch.linalg.vector_norm(rest, dim=1)
    torch.testing.assert_close(shortest.double(), lengths.amin(-1), rtol=1e-5, atol=0)
    pivots = R.diagonal(dim1=-2, dim2=-1).abs() / lengths
    torch.testing.assert_close(pivot.double(), pivots.amin(-1), rtol=1e-4, atol=0)


def test_a_rank_deficient_panel_has_a_tiny_pivot(backend: str) -> None:
    batch = torch.randn(4, 60, 6, generator=torch.Generator().manual_seed(0))
    batch[1, :, 2] = 0
    batch[2, :, 5] = batch[2, :, 1]
    batch[3, 7, 3] = float("nan")
    _, pivot, shortest = pk.ops.gram_schmidt(batch)
    assert pivot[0] > 0.1
    assert not (pivot[1:] > 1e-3).any(), "0, NaN, or round-off"
    assert shortest[1] == 0
    assert shortest[3].isnan()


@pytest.mark.parametrize(
    ("panel", "basis", "error", "words"),
    [
        (torch.ones(1, 9, 2).half(), None, TypeError, "the panel must be float32 or float64"),
        (torch.ones(9, 2), None, ValueError, r"a batch \(batch, n, b\)"),
        (torch.ones(1, 9, 0), None, ValueError, "b ≥ 1"),
        (torch.ones(1, 9, 2), torch.ones(1, 3, 8), ValueError, r"takes a basis \(1, k, 9\), got \(1, 3, 8\)"),
        (torch.ones(1, 9, 2), torch.ones(1, 3, 9).double(), ValueError, "the basis torch.float64"),
    ],
)
def test_gram_schmidt_refuses_other_dtypes_and_shapes(
    panel: torch.Tensor, basis: torch.Tensor | None, error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        pk.ops.gram_schmidt(panel, basis)


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
    rows = None if basis is None else torch.eye(n)[None, -basis:]
    panel, arbitrary = orthonormalize(Z[None], rows)
    P = panel[0].double()
    wanted = Z.double()
    if basis is not None:
        wanted[-basis:] = 0
    assert arbitrary == [True]
    assert (P.mT @ P - torch.eye(b)).abs().max() <= 10 * EPS
    assert (wanted - P @ (P.mT @ wanted)).norm() <= 20 * EPS * wanted.norm()
