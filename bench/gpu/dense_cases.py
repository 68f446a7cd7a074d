"""Cases of small dense problems: inverse Cholesky factors and eigenproblems."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .case import BatchedCase, Errors, Limit

SHIFT = 2.0**-20


@dataclass(frozen=True)
class InverseCholesky(BatchedCase):
    """Of Gram matrices of m×n panels whose columns differ by a factor of 10⁶ in length; the last is zero."""

    @property
    def function(self) -> str:
        return "inverse_cholesky"

    @property
    def limits(self) -> Mapping[str, Limit]:
        return {"identity": Limit(4, 2.0**-23, 1e-3), "diagonal": Limit(4, 2.0**-23, 1e-4)}

    def inputs(self, device: str) -> Tensor:
        generator = torch.Generator(device).manual_seed(self.n)
        Z = torch.randn(self.batch, self.m, self.n, generator=generator, device=device)
        Z *= torch.logspace(-3, 3, self.n, device=device)
        Z[..., -1] = 0
        return Z.mT @ Z

    def call(self, body: Any, inputs: Any, count: int) -> tuple[Tensor, ...]:
        return tuple(body.inverse_cholesky(inputs[:count], SHIFT))

    def errors(self, inputs: Any, results: tuple[Tensor, ...]) -> Errors:
        changes, diagonals = (result.double() for result in results)
        gram = inputs[: len(changes)].double()
        squares = gram.diagonal(dim1=-2, dim2=-1)
        identity = changes.mT @ (gram + SHIFT * torch.diag_embed(squares)) @ changes
        expected = torch.diag_embed((squares > 0).double())
        norms = squares.sqrt()
        scale = torch.where(norms > 0, 1 / norms, 0.0)
        scaled = gram * scale.unsqueeze(-1) * scale.unsqueeze(-2)
        scaled.diagonal(dim1=-2, dim2=-1).fill_(1 + SHIFT)
        exact = torch.linalg.cholesky(scaled).diagonal(dim1=-2, dim2=-1) * norms
        return {
            "identity": float((identity - expected).abs().amax()),
            "diagonal": float(((diagonals - exact).abs() / exact.clamp(min=1e-30)).amax()),
        }


@dataclass(frozen=True)
class Eigh(BatchedCase):
    """Of n×n matrices whose eigenvalues fall by a factor of 10³."""

    @property
    def function(self) -> str:
        return "eigh"

    @property
    def limits(self) -> Mapping[str, Limit]:
        # torch's body works in float64; Jacobi's method in float32 rotates every element some 10·n times
        roundoff = self.n * 2.0**-24
        return dict.fromkeys(("residual", "orthogonality", "values"), Limit(0, roundoff, roundoff))

    def inputs(self, device: str) -> Tensor:
        generator = torch.Generator(device).manual_seed(self.n)
        basis = torch.linalg.qr(torch.randn(self.batch, self.n, self.n, generator=generator, device=device))[0]
        matrices: Tensor = (basis * torch.logspace(0, -3, self.n, device=device)) @ basis.mT
        return (matrices + matrices.mT) / 2

    def call(self, body: Any, inputs: Any, count: int) -> tuple[Tensor, ...]:
        return tuple(body.eigh(inputs[:count]))

    def errors(self, inputs: Any, results: tuple[Tensor, ...]) -> Errors:
        values, vectors = (result.double() for result in results)
        H = inputs[: len(values)].double()
        exact = torch.linalg.eigvalsh(H).flip(-1)
        residual = torch.linalg.matrix_norm(H @ vectors - vectors * values.unsqueeze(-2))
        identity = torch.eye(self.n, device=H.device, dtype=H.dtype)
        orthogonality = torch.linalg.matrix_norm(vectors.mT @ vectors - identity) / math.sqrt(self.n)
        return {
            "residual": float((residual / torch.linalg.matrix_norm(H)).amax()),
            "orthogonality": float(orthogonality.amax()),
            "values": float((values - exact).abs().amax() / exact.abs().amax()),
        }
