"""The block Jacobi kernels against float64: residual, orthogonality, eigenvalues."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ..support.backends import DEVICE, randn
from ..support.block_jacobi import UNIT_ROUNDOFF
from ..support.block_jacobi import block_jacobi as transcribed
from ..support.marks import slow_but

pytest.importorskip("triton")

from pissa_kernels.ops.triton.jacobi import SMALL, SWEEPS, block_jacobi, eigh
from pissa_kernels.ops.triton.pieces import INTERPRETED

pytestmark = pytest.mark.skipif(DEVICE == "cpu" and not INTERPRETED, reason="needs Triton's interpreter or a GPU")

KINDS = [
    "zero",
    "identity",
    "diagonal",
    "repeated",
    "clustered",
    "conditioned",
    "indefinite",
    "gram",
    "singular",
    "nearly diagonal",
]


def symmetric(kind: str, size: int, seed: int = 1) -> Tensor:
    """A symmetric matrix of a norm near 1."""
    X = randn(size, size, seed=seed)
    if kind == "zero":
        return torch.zeros_like(X)
    if kind == "identity":
        return torch.eye(size, device=DEVICE)
    if kind == "diagonal":
        return torch.diag(X.diagonal())
    if kind == "indefinite":
        return (X + X.mT) / (8 * size) ** 0.5
    if kind in ("gram", "singular"):
        Z = randn(2 * size if kind == "gram" else size // 2, size, seed=seed)
        return Z.mT @ Z / (4 * size)
    if kind == "nearly diagonal":
        scale = torch.logspace(0, -3, size, device=DEVICE)
        noise = 1e-3 * (X + X.mT) * (scale[:, None] * scale).sqrt()
        return torch.diag(scale) + noise
    values = {
        "repeated": torch.arange(size) // 3 + 1.0,
        "clustered": 1 + (torch.arange(size) < size // 2) + 1e-6 * torch.arange(size),
        "conditioned": torch.logspace(0, -12, size, dtype=torch.float64),
    }[kind].to(DEVICE, torch.float64)
    Q = torch.linalg.qr(X.double())[0]
    A = ((Q * values / values.max()) @ Q.mT).float()
    return (A + A.mT) / 2


def check(matrix: Tensor, values: Tensor, vectors: Tensor) -> None:
    """Residual, orthogonality and order, to ten round-offs for each row."""
    A, V, size = matrix.double(), vectors.double(), len(matrix)
    bound = 10 * UNIT_ROUNDOFF * size
    norm = torch.linalg.matrix_norm(A, 2)
    assert torch.linalg.vector_norm(A @ V - V * values, dim=0).max() <= bound * norm
    assert (V.mT @ V - torch.eye(size, device=DEVICE)).abs().max() <= bound
    assert (values.diff() <= 0).all()
    assert (values - torch.linalg.eigvalsh(A).flip(-1)).abs().max() <= bound * norm


@pytest.mark.parametrize("kind", KINDS)
def test_one_subproblem(kind: str, poison: None) -> None:
    matrix = symmetric(kind, 13)
    values, vectors = block_jacobi(matrix[None], 16)
    check(matrix, values[0], vectors[0])


@pytest.mark.parametrize("size", [1, 2, 32])
def test_sizes(size: int) -> None:
    matrix = symmetric("nearly diagonal", size)
    values, vectors = eigh(matrix[None])
    check(matrix, values[0], vectors[0])


@pytest.mark.parametrize("kind", slow_but(["gram", "indefinite", "repeated"], "indefinite"))
def test_pairs_of_blocks_and_the_transcription(kind: str, poison: None) -> None:
    matrix = symmetric(kind, 13)
    values, vectors = block_jacobi(matrix[None], 8)
    check(matrix, values[0], vectors[0])
    expected, basis, _ = transcribed(matrix.cpu(), 8, SWEEPS)
    torch.testing.assert_close(values[0].cpu(), expected, rtol=0.0, atol=1e-5)
    if kind != "repeated":  # signs, too
        torch.testing.assert_close(vectors[0].cpu(), basis, rtol=0.0, atol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["gram", "clustered", "nearly diagonal"])
@pytest.mark.parametrize("size", [40, 65])
def test_many_blocks(kind: str, size: int) -> None:
    matrix = symmetric(kind, size)
    values, vectors = eigh(matrix[None])
    check(matrix, values[0], vectors[0])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "size"),
    [
        *itertools.product(["gram", "indefinite", "conditioned", "clustered", "nearly diagonal"], [128, 256]),
        ("clustered", 448),
    ],
)
def test_sweeps_of_real_sizes(kind: str, size: int) -> None:
    matrix = symmetric(kind, size).cpu()
    values, vectors, sweeps = transcribed(matrix, SMALL, SWEEPS)
    check(matrix.to(DEVICE), values.to(DEVICE), vectors.to(DEVICE))
    assert sweeps <= {"gram": 10, "indefinite": 10, "nearly diagonal": 4}.get(kind, SWEEPS)


def test_the_same_bits_alone_and_in_a_batch() -> None:
    matrices = torch.stack([symmetric(kind, 10) for kind in ("diagonal", "nearly diagonal")])
    together = block_jacobi(matrices, 8)
    for index, matrix in enumerate(matrices):
        for whole, alone in zip(together, block_jacobi(matrix[None], 8), strict=True):
            assert torch.equal(whole[index], alone[0])


@pytest.mark.parametrize("exponent", [-100, 100])
def test_powers_of_two_scale_the_eigenvalues_alone(exponent: int) -> None:
    matrix = symmetric("gram", 7)[None]
    values, vectors = block_jacobi(matrix, 8)
    scaled_values, scaled_vectors = block_jacobi(torch.ldexp(matrix, torch.tensor(exponent)), 8)
    assert torch.equal(scaled_values, torch.ldexp(values, torch.tensor(exponent)))
    assert torch.equal(scaled_vectors, vectors)


def test_a_matrix_that_is_not_finite_spoils_itself_only() -> None:
    matrices = torch.stack([symmetric("gram", 6), symmetric("gram", 6), symmetric("indefinite", 6)])
    matrices[0, 2, 3] = matrices[0, 3, 2] = torch.inf
    matrices[2, 1, 1] = torch.nan
    values, vectors = block_jacobi(matrices, 8)
    assert values[[0, 2]].isnan().all()
    assert vectors[[0, 2]].isnan().all()
    check(matrices[1], values[1], vectors[1])


def test_graded_matrices_keep_the_relative_accuracy_of_small_eigenvalues() -> None:
    size = 12
    scale = torch.logspace(0, -6, size, device=DEVICE)
    core = torch.eye(size, device=DEVICE) + 0.5 * symmetric("indefinite", size)
    matrix = scale[:, None] * core * scale
    exact = torch.linalg.eigvalsh(matrix.double()).flip(-1)
    ours = ((block_jacobi(matrix[None], 16)[0][0] - exact) / exact).abs().max()
    lapack = ((torch.linalg.eigvalsh(matrix).flip(-1) - exact) / exact).abs().max()
    assert ours <= 100 * UNIT_ROUNDOFF
    assert ours < lapack


def test_an_empty_batch() -> None:
    values, vectors = eigh(randn(0, 5, 5))
    assert values.shape == (0, 5)
    assert vectors.shape == (0, 5, 5)


@settings(max_examples=10, deadline=None)
@given(entries=st.lists(st.integers(-3, 3), min_size=21, max_size=21), size=st.integers(1, 6))
def test_small_integers(entries: list[int], size: int) -> None:
    matrix = torch.zeros(6, 6)
    row, col = torch.tril_indices(6, 6)
    matrix[row, col] = torch.tensor(entries, dtype=torch.float32)
    matrix = (matrix + matrix.tril(-1).mT)[:size, :size].to(DEVICE).contiguous()
    values, vectors = block_jacobi(matrix[None], 8)
    check(matrix, values[0], vectors[0])
    torch.testing.assert_close(values[0].sum(), matrix.trace(), rtol=0.0, atol=1e-4)
