"""The verbs of the iterations' steps against float64, with the reference's own error for comparison."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pissa_kernels.ops import csrc, dispatch, reference
from pissa_kernels.ops.panels import MIN_PIVOT, recurrence

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
    Z = panel_of(len(H), columns, strided) * torch.linspace(0.5, 2, columns)
    Z = Z + 0.1 * Z.flip(1)  # not orthonormal
    rank = columns - 1
    Q = torch.linalg.qr(Z.double())[0]
    exact = torch.linalg.eigvalsh(Q.mT @ H @ Q)
    errors = []
    for body in (dispatch.bind("ritz", operand), reference.ritz):
        X, HX, figures = body(operand, Z, rank, gram)
        values, residuals, pivots = figures.split([columns, rank, 2])
        assert (pivots > 0.1).all()
        image, wanted = H @ X.double(), X[:, -rank:].double()
        lengths = (image[:, -rank:] - wanted * values[-rank:].double()).norm(dim=0)
        outside = X - Q @ (Q.mT @ X.double())
        orthogonality = X.double().mT @ X.double() - torch.eye(columns)
        errors.append([(values - exact), HX - image, residuals - lengths, outside, orthogonality])
    for ours, theirs in zip(*errors, strict=True):
        assert ours.norm() <= 1.5 * theirs.norm() + 2.0**-22  # ‖H‖ = 1


def test_a_panel_that_is_not_resolved_gives_NaN_and_its_pivots() -> None:
    W = torch.ones(20, 10)
    panels = {"NaN": torch.ones(10, 3), "equal columns": torch.ones(10, 3)}
    panels["NaN"][2, 1] = torch.nan
    for panel in panels.values():
        for body in (csrc.ritz, reference.ritz):
            X, HX, figures = body(W, panel, 2)
            assert X.shape == HX.shape == panel.shape
            assert figures.shape == (3 + 2 + 2,)
            assert figures[:5].isnan().all()
            assert not (figures[5:] > MIN_PIVOT).all()
        for body in (csrc.triplets, reference.triplets):
            U, V, figures = body(W, panel, 2)
            assert U.shape == (20, 2)
            assert V.shape == (10, 2)
            assert figures.shape == (3 + 2 + 2,)
            assert figures[:5].isnan().all()
            assert not (figures[5:] > MIN_PIVOT).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "columns"), CASES)
@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize("steep", [False, True])
def test_triplets_are_as_exact_as_the_reference(
    shape: tuple[int, int], columns: int, dtype: torch.dtype, known: bool, steep: bool
) -> None:
    """``steep``: with singular values down to 1e-4, which the eigenproblem of RᵀR does not resolve."""
    W = weight_of(shape, dtype)
    if steep:
        W = (W.float() * torch.logspace(0, -4, W.shape[1])).to(dtype)
    V = panel_of(W.shape[1], columns, strided=True)
    V = torch.eye(W.shape[1])[:, torch.arange(columns) * (W.shape[1] - 1) // (columns - 1)] if steep else V
    rank = columns - 1
    image = reference.matmul(W, V) if known else None
    A, errors = W.double(), []
    sizes = torch.linalg.svdvals(A @ V.double())
    Q = torch.linalg.qr(A @ V.double())[0]
    for body in (dispatch.bind("triplets", W), reference.triplets):
        U, right, figures = body(W, V, rank, image)
        S, residuals, pivots = figures.split([columns, rank, 2])
        assert (pivots > MIN_PIVOT).all()
        left = (A @ right.double() - U * S[:rank].double()).norm(dim=0)
        lengths = torch.maximum(left, (A.mT @ U.double() - right * S[:rank].double()).norm(dim=0))
        orthogonality = [P.double().mT @ P.double() - torch.eye(rank) for P in (U, right)]
        outside = [P - P_0.double() @ (P_0.double().mT @ P.double()) for P, P_0 in ((U, Q), (right, V))]
        errors.append([S - sizes, left, residuals - lengths, *orthogonality, *outside])
    for ours, theirs in zip(*errors, strict=True):
        assert ours.norm() <= 1.5 * theirs.norm() + 2.0**-22  # ‖W‖ = 1


def test_triplets_report_a_wrong_vector() -> None:
    """With an image that is not that of the panel, the left residuals are small and the right ones are not."""
    W = torch.diag(torch.tensor([3.0, 2.0, 1.0]))
    V = torch.eye(3)[:, :2].contiguous()
    body = dispatch.bind("triplets", W)
    _, _, figures = body(W, V, 2, W @ V)
    assert figures[:4].tolist() == [3.0, 2.0, 0.0, 0.0]
    _, _, figures = body(W, torch.eye(3)[:, 1:].contiguous(), 2, W @ V)
    assert figures[:2].tolist() == [3.0, 2.0]
    assert (figures[2:4] >= 1).all()


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


def lanczos_arguments(count: int = 2, **others: torch.Tensor) -> tuple[object, ...]:
    """Arguments for a weight (9, 7), a panel of two columns and a basis of two out of six, but for ``others``."""
    sizes = {"panel": (7, 2), "coupling": (2, 2), "rows": (6, 7), "image": (6, 9), "T": (6, 6)}
    tensors = {name: torch.ones(size) for name, size in sizes.items()} | others
    return torch.ones(9, 7), *(tensors[name] for name in sizes), 2, count


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
        ("triplets", (torch.ones(4, 3), torch.ones(3, 2), 1, torch.ones(4, 1)), "got 4 by 1"),
        ("triplets", (torch.ones(4, 3), torch.ones(4, 2), 1), "matrix of 3 rows"),
        ("triplets", (torch.ones(4, 3), torch.ones(3, 2), 3), "rank must be"),
        ("chebyshev", (torch.ones(14, 13), None, torch.ones(13, 9), 1, 1e-6, 9), "a float32 matrix of 14 rows"),
        (
            "chebyshev",
            (torch.ones(14, 13), torch.ones(12, 12), torch.ones(13, 9), 1, 1e-6, 9),
            "a float32 matrix of 13",
        ),
        ("chebyshev", (torch.ones(14, 13), None, torch.ones(14, 9), 2, 1e-6, 9), "8 columns more than the rank"),
        ("chebyshev", (torch.ones(14, 13), None, torch.ones(14, 9), 1, 0.0, 9), "tol must be positive"),
        ("lanczos", lanczos_arguments(panel=torch.ones(8, 2)), "a float32 matrix of 7"),
        ("lanczos", lanczos_arguments(coupling=torch.ones(2, 3)), "got 2 by 3"),
        ("lanczos", lanczos_arguments(coupling=torch.ones(3, 2)), "no room"),
        ("lanczos", lanczos_arguments(rows=torch.ones(6, 8)), "got 6 by 8"),
        ("lanczos", lanczos_arguments(rows=torch.ones(6, 14)[:, ::2]), "contiguous float32 matrices"),
        ("lanczos", lanczos_arguments(image=torch.ones(5, 9)), "a float32 matrix of 6"),
        ("lanczos", lanczos_arguments(T=torch.ones(6, 6).double()), "must be float32"),
        ("lanczos", lanczos_arguments(count=3), "no room for 3 steps"),
    ],
)
def test_steps_refuse_what_they_would_read_out_of_bounds(verb: str, arguments: tuple[object, ...], words: str) -> None:
    with pytest.raises(RuntimeError, match=words):
        getattr(torch.ops.pissa_kernels, verb)(*arguments)
