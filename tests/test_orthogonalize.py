"""Panels of every kind, alone and in a stack."""

from __future__ import annotations

import pytest
import torch

from pissa_kernels.orthogonalize import orthonormalize

from .reference import EPS, with_spectrum


@pytest.mark.parametrize("neighbours_only", [False, True])
def test_a_basis_stays_orthonormal_when_nothing_is_left_to_add(neighbours_only: bool) -> None:
    """Steep spectra leave only rounding noise after a few blocks; the error must not grow from panel to panel."""
    W = with_spectrum(600, 420, 0.5 ** torch.arange(420, dtype=torch.float64), seed=7).float()
    panel, _ = orthonormalize((W.mT @ torch.randn(600, 12, generator=torch.Generator().manual_seed(0)))[None])
    basis = panel.mT.contiguous()
    while basis.shape[1] < 200:
        near = basis[:, -24:] if neighbours_only else None
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
    # unit vectors first: the very ones that Householder returns for a zero panel
    basis = torch.eye(n)[:size]
    stack = torch.stack([panel_of(kind, n, b, size) for kind in kinds])
    panels, deficient = orthonormalize(stack, basis.expand(len(kinds), -1, -1))
    for kind, Z, panel, arbitrary in zip(kinds, stack, panels, deficient, strict=True):
        assert (panel.double().mT @ panel.double() - torch.eye(b)).abs().max() <= 10 * EPS
        assert size == 0 or (basis.double() @ panel.double()).abs().max() <= 10 * EPS
        assert arbitrary == (kind in ("dependent", "zero", "ill-conditioned", "inside the basis"))
        if kind in ("generic", "tiny"):
            rest = Z.double() - basis.double().mT @ (basis.double() @ Z.double())
            assert (rest - panel.double() @ (panel.double().mT @ rest)).norm() <= 1e-5 * rest.norm(), (
                "spans what Z adds"
            )
