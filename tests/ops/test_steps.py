"""The verbs of the iterations' steps against float64, with the reference's own error for comparison."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pissa_kernels.ops import csrc, dispatch, reference
from pissa_kernels.ops.panels import recurrence

pytestmark = pytest.mark.usefixtures("csrc_backend", "poison")

# A weight, its transpose, and a panel with fewer columns than the kernels have in a tile.
CASES = [((300, 257), 40), ((257, 300), 16), ((129, 60), 3)]
DTYPES = [torch.float32, torch.bfloat16]


def weight_of(shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """A tall weight of norm 1; a wide one is a transposed view."""
    W = torch.randn(*shape, generator=torch.Generator().manual_seed(0))
    W = (W / torch.linalg.matrix_norm(W, ord=2)).to(dtype)
    return W if shape[0] >= shape[1] else W.mT


def panel_of(n: int, columns: int, strided: bool = False, seed: int = 1) -> Tensor:
    """An orthonormal panel; with ``strided`` a slice of a wider one."""
    panel = torch.linalg.qr(torch.randn(n, columns, generator=torch.Generator().manual_seed(seed)))[0]
    if strided:
        return torch.cat([panel.new_zeros(n, 5), panel], dim=1)[:, 5:]
    return panel.contiguous()


def rounded(panel: Tensor, pieces: int) -> Tensor:
    """The sum of the first bfloat16 pieces of a panel."""
    kept = torch.zeros_like(panel)
    for _ in range(pieces):
        kept += (panel - kept).bfloat16().float()
    return kept


def assert_as_exact(got: Tensor, theirs: Tensor, exact: Tensor) -> None:
    """The error is hardly larger than that of the reference, and not more than a rounding larger."""
    assert (got - exact).norm() <= 1.2 * (theirs - exact).norm() + exact.norm() * 2.0**-23


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "columns"), CASES)
@pytest.mark.parametrize("degree", [1, 2, 5])
@pytest.mark.parametrize("gram", [False, True])
@pytest.mark.parametrize("strided", [False, True])
def test_filters_are_as_exact_as_the_reference(
    shape: tuple[int, int], columns: int, dtype: torch.dtype, degree: int, gram: bool, strided: bool
) -> None:
    W = weight_of(shape, dtype)
    H = W.double().mT @ W.double()
    operand = H.float() if gram else W
    H = operand.double() if gram else H
    X = panel_of(len(H), columns, strided)
    HX, edge = (H @ X.double()).float(), 0.4
    arguments = operand, X, HX, edge, degree, 3, gram
    got, theirs = dispatch.bind("chebyshev_filter", operand)(*arguments), reference.chebyshev_filter(*arguments)
    values, vectors = torch.linalg.eigh(H)
    x = 2 * values / edge - 1
    polynomial = torch.where(x.abs() <= 1, (degree * x.clamp(-1, 1).acos()).cos(), (degree * x.clamp(1).acosh()).cosh())
    exact = vectors @ (polynomial[:, None] * (vectors.mT @ X.double()))
    assert got.shape == X.shape
    if not gram and dtype == torch.bfloat16 and degree > 2:  # products before the last may take two bfloat16 pieces
        A = W.float()
        theirs = recurrence(lambda P, p: A.mT @ rounded(A @ rounded(P, p), p), X, HX, edge, degree, 3)
    assert_as_exact(got, theirs, exact)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "columns"), CASES)
@pytest.mark.parametrize("gram", [False, True])
@pytest.mark.parametrize("strided", [False, True])
def test_ritz_pairs_are_as_exact_as_the_reference(
    shape: tuple[int, int], columns: int, dtype: torch.dtype, gram: bool, strided: bool
) -> None:
    W = weight_of(shape, dtype)
    operand = (W.double().mT @ W.double()).float() if gram else W
    H = operand.double() if gram else W.double().mT @ W.double()
    Q = panel_of(len(H), columns, strided)
    rank = columns - 1
    basis = torch.linalg.qr(Q.double())[0]
    exact = torch.linalg.eigvalsh(basis.mT @ H @ basis)
    errors = []
    for body in (dispatch.bind("ritz", operand), reference.ritz):
        X, HX, values, residuals = body(operand, Q, rank, gram)
        image, wanted = H @ X.double(), X[:, -rank:].double()
        lengths = (image[:, -rank:] - wanted * values[-rank:].double()).norm(dim=0)
        outside = X - Q.double() @ (Q.double().mT @ X.double())
        orthogonality = X.double().mT @ X.double() - torch.eye(columns)
        errors.append([(values - exact), HX - image, residuals - lengths, outside, orthogonality])
    for ours, theirs in zip(*errors, strict=True):
        assert ours.norm() <= 1.5 * theirs.norm() + 2.0**-22  # ‖H‖ = 1


def test_a_failed_eigensolver_gives_NaN(monkeypatch: pytest.MonkeyPatch) -> None:
    W = torch.ones(20, 10)
    Q = torch.ones(10, 3)
    Q[2, 1] = torch.nan
    for body in (csrc.ritz, reference.ritz):
        X, HX, values, residuals = body(W, Q, 2)
        assert X.shape == HX.shape == Q.shape
        assert values.shape == (3,)
        assert residuals.shape == (2,)
        assert values.isnan().all()
        assert residuals.isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "columns"), CASES)
def test_triplets_are_as_exact_as_the_reference(shape: tuple[int, int], columns: int, dtype: torch.dtype) -> None:
    W = weight_of(shape, dtype)
    V = panel_of(W.shape[1], columns)
    Y = reference.matmul(W, V)
    Q, _ = torch.linalg.qr(Y)
    A, errors = W.double(), []
    sizes = torch.linalg.svdvals(Q.double().mT @ Y.double())
    for body in (dispatch.bind("triplets", W), reference.triplets):
        U, S, right, residuals = body(W, Q, Y, V)
        left = (A @ right.double() - U * S.double()).norm(dim=0)
        lengths = torch.maximum(left, (A.mT @ U.double() - right * S.double()).norm(dim=0))
        orthogonality = [P.double().mT @ P.double() - torch.eye(columns) for P in (U, right)]
        outside = [P - P_0.double() @ (P_0.double().mT @ P.double()) for P, P_0 in ((U, Q), (right, V))]
        errors.append([S - sizes, left, residuals - lengths, *orthogonality, *outside])
    for ours, theirs in zip(*errors, strict=True):
        assert ours.norm() <= 1.5 * theirs.norm() + 2.0**-22  # ‖W‖ = 1


def test_triplets_report_a_wrong_vector() -> None:
    """Each of the two residuals on its own."""
    W = torch.diag(torch.tensor([3.0, 2.0, 1.0]))
    V = torch.eye(3)[:, :2].contiguous()
    other = torch.eye(3)[:, 1:].contiguous()
    Y = W @ V
    body = dispatch.bind("triplets", W)
    _, S, _, residuals = body(W, V, Y, V)
    assert S.tolist() == [3.0, 2.0]
    assert residuals.tolist() == [0.0, 0.0]
    assert (body(W, V, Y, other)[3] >= 1).all(), "the right vectors are not those of Y"
    assert body(W, other, Y, V)[3].tolist() == pytest.approx([0.0, 3.0], abs=1e-6), "Y has a part outside Q"


def test_a_failed_svd_gives_NaN() -> None:
    W, panel = torch.ones(20, 10), torch.full((10, 3), torch.nan)
    for body in (csrc.triplets, reference.triplets):
        U, S, V, residuals = body(W, W[:, :3].contiguous(), torch.full((20, 3), torch.nan), panel)
        assert U.shape == (20, 3)
        assert V.shape == (10, 3)
        assert S.isnan().all()
        assert residuals.isnan().all()


def test_the_last_product_of_a_recurrence_takes_the_most_pieces() -> None:
    H = torch.diag(torch.tensor([3.0, 1.0]))
    for pieces, expected in ((1, [1, 1, 1]), (2, [1, 1, 2]), (3, [2, 2, 3])):
        taken: list[int] = []

        def multiply(panel: Tensor, split: int, taken: list[int] = taken) -> Tensor:
            taken.append(split)
            return H @ panel

        recurrence(multiply, torch.ones(2, 1), H @ torch.ones(2, 1), 1.0, 4, pieces)
        assert taken == expected


@pytest.mark.parametrize(
    ("panel", "basis", "near", "words"),
    [
        (torch.ones(20, 0), torch.ones(2, 20), 0, r"a float32 panel \(n, b\)"),
        (torch.ones(1, 20, 3), torch.ones(2, 20), 0, r"a float32 panel \(n, b\)"),
        (torch.ones(20, 3).half(), torch.ones(2, 20), 0, r"a float32 panel \(n, b\)"),
        (torch.ones(20, 3), torch.ones(2, 19), 0, "contiguous rows of 20 elements"),
        (torch.ones(20, 3), torch.ones(2, 20).half(), 0, "contiguous rows of 20 elements"),
        (torch.ones(20, 3), torch.ones(1, 2, 20), 0, "contiguous rows of 20 elements"),
        (torch.ones(20, 3), torch.ones(20, 2).mT, 0, "contiguous rows of 20 elements"),
        (torch.ones(20, 3), torch.ones(2, 20), 3, "near must be a row of the basis, got 3"),
    ],
)
def test_orthonormalize_refuses_what_it_would_read_out_of_bounds(
    panel: torch.Tensor, basis: torch.Tensor, near: int, words: str
) -> None:
    with pytest.raises(RuntimeError, match=words):
        torch.ops.pissa_kernels.orthonormalize(panel, basis, near)


@pytest.mark.parametrize(
    ("verb", "arguments", "words"),
    [
        ("chebyshev_filter", (torch.ones(4, 3), torch.ones(3, 2), torch.ones(4, 2), 1.0, 2), "a float32 matrix of 3"),
        ("chebyshev_filter", (torch.ones(4, 3), torch.ones(4, 2), torch.ones(3, 2), 1.0, 2), "a float32 matrix of 3"),
        ("chebyshev_filter", (torch.ones(4, 3), torch.ones(3), torch.ones(3, 2), 1.0, 2), "a weight"),
        ("chebyshev_filter", (torch.ones(4, 3), *[torch.ones(3, 2)] * 2, 1.0, 2, 3, True), "a square float32 matrix"),
        ("ritz", (torch.ones(4, 3), torch.ones(4, 2), 1), "a float32 matrix of 3 rows"),
        ("ritz", (torch.ones(4, 3), torch.ones(3, 2), 3), "rank must be"),
        ("ritz", (torch.ones(3, 3).half(), torch.ones(3, 2), 1, True), "a square float32 matrix"),
        ("triplets", (torch.ones(4, 3), torch.ones(4, 2), torch.ones(4, 1), torch.ones(3, 2)), "got 4 by 1"),
        ("triplets", (torch.ones(4, 3), torch.ones(4, 2), torch.ones(4, 2), torch.ones(4, 2)), "matrix of 3 rows"),
    ],
)
def test_steps_refuse_what_they_would_read_out_of_bounds(verb: str, arguments: tuple[object, ...], words: str) -> None:
    with pytest.raises(RuntimeError, match=words):
        getattr(torch.ops.pissa_kernels, verb)(*arguments)
