"""Cases whose operand is a batch of weights: products, sums of squares, subtractions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pissa_kernels.ops import batched_reference, dispatch
from pissa_kernels.ops.batched import Panel, Update, Weights
from pissa_kernels.ops.batched_reference import split

from ..harness.dtypes import DTYPES
from ..harness.gate import rounding_error
from .case import BatchedCase, Errors, Limit, largest

SCALINGS = (1.0, 0.5, 2.0)
# A quarter of float32's unit roundoff: that an error of torch's is below it is luck.
QUARTER = 2.0**-26


@dataclass(frozen=True)
class Product(BatchedCase):
    """A product of weights with panels, or of float32 matrices.

    Attributes:
        columns: k.
        precision: 1, 2 or 3.
        transposed: whether the left side is Wᵀ.
        update: whether α·W·X + β·current + γ·previous is stored.
        shared: whether all weights have the same panel, as a sketch.
        kind: "product" of weights W (m, n) with panels; "gram" for ZᵀZ (k, k) of panels Z (n, k), where m = k; "change"
            for Z·C of panels Z (m, n) with C (n, k).
    """

    columns: int = 24
    precision: int = 3
    transposed: bool = False
    update: bool = False
    shared: bool = False
    kind: str = "product"

    @property
    def function(self) -> str:
        return self.kind

    @property
    def name(self) -> str:
        options = "".join(f"-{word}" for word in ("update", "shared") if getattr(self, word))
        options = ("-T" if self.transposed else "") + options
        return f"{super().name}-k{self.columns}-p{self.precision}{options}"

    @property
    def limits(self) -> Mapping[str, Limit]:
        # a bf16 piece rounds at 2⁻⁹ and TF32 at 2⁻¹¹, or 2⁻¹⁰ where the hardware truncates
        pieces = {1: Limit(2, 0, 2.0**-8), 2: Limit(2, 0, 2.0**-15), 3: Limit(2, QUARTER, 1e-5)}
        tf32 = Limit(2, 2.0**-10, 2.0**-10)
        in_pieces = self.dtype == "bf16" or self.kind != "product"
        wide = pieces[self.precision] if in_pieces else tf32 if self.precision == 1 else pieces[3]
        return {"values": wide, "pieces": Limit(1, 2.0**-16, 2.0**-16)}

    def inputs(self, device: str) -> Any:
        generator = torch.Generator(device).manual_seed(self.columns)
        rows, inner = (self.n, self.m) if self.transposed else (self.m, self.n)

        def randn(*shape: int) -> Tensor:
            return torch.randn(self.batch, *shape, generator=generator, device=device)

        if self.kind == "gram":
            Z = randn(inner, self.columns)
            return Z.mT, Panel(Z, None), None
        if self.kind == "change":
            return randn(rows, inner), Panel(randn(inner, self.columns), None), None
        weights, values = self.weights(device), randn(inner, self.columns)
        if self.shared:
            values = values[:1].expand(self.batch, -1, -1)
        pieces = split(values[:1], 3).expand(-1, self.batch, -1, -1) if self.shared else split(values, 3)
        update = Update(
            alpha=1 + randn(1).abs().flatten(),
            beta=-0.5,
            current=randn(rows, self.columns),
            gamma=0.25,
            previous=randn(rows, self.columns),
        )
        return weights, Panel(values, pieces), update if self.update else None

    def call(self, body: Any, inputs: Any, count: int) -> tuple[Tensor, ...]:
        left, panel, update = _first(inputs, count)
        if self.kind == "product":
            left = Weights.of(left)
            left = left.mT if self.transposed else left
            if self.dtype == "bf16":
                panel = Panel(None, panel.pieces)  # only the pieces may be read
        found = body.product(left, panel, precision=self.precision, update=update, pieces=2)
        return found.values, found.pieces

    def errors(self, inputs: Any, results: tuple[Tensor, ...]) -> Errors:
        values, pieces = results
        left, panel, update = _first(inputs, len(values))
        worst, whole = [], []
        for index, matrix in enumerate(left):
            D = matrix.double().mT if self.transposed else matrix.double()
            assert panel.values is not None
            exact = D @ panel.values[index].double()
            if update is not None:
                assert update.current is not None
                assert update.previous is not None
                exact = update.alpha[index].double() * exact + update.beta * update.current[index].double()
                exact += update.gamma * update.previous[index].double()
            worst.append(_relative(values[index], exact))
            whole.append(_relative(pieces[:, index].double().sum(0), values[index]))
        return {"values": largest(worst), "pieces": largest(whole)}

    @property
    def pieces(self) -> int:
        """Number of bf16 products; 1 for other dtypes."""
        return self.precision if self.dtype == "bf16" else 1

    @property
    def flops(self) -> int:
        """Operations of one product, 2·m·n·k for each matrix."""
        return 2 * self.batch * self.m * self.n * self.columns


@dataclass(frozen=True)
class Split(BatchedCase):
    """The three bfloat16 pieces of m×n panels, bit by bit."""

    @property
    def function(self) -> str:
        return "split"

    @property
    def limits(self) -> Mapping[str, Limit]:
        return {"other_bits": Limit(0, 0.5, 0.5)}  # of a number of elements

    def inputs(self, device: str) -> Tensor:
        return torch.stack(self.weights(device))

    def call(self, body: Any, inputs: Any, count: int) -> tuple[Tensor, ...]:
        return (body.split(inputs[:count], 3),)

    def errors(self, inputs: Any, results: tuple[Tensor, ...]) -> Errors:
        exact = split(inputs[: results[0].shape[1]], 3)
        return {"other_bits": float((results[0] != exact).sum())}


@dataclass(frozen=True)
class TransposeCast(BatchedCase):
    """Wᵀ in another dtype, one weight after another.

    Attributes:
        target: dtype of the results.
    """

    target: str = "fp32"

    @property
    def function(self) -> str:
        return "transpose_cast"

    @property
    def limits(self) -> Mapping[str, Limit]:
        return {"other_bits": Limit(0, 0.5, 0.5)}  # of a number of elements

    def inputs(self, device: str) -> Any:
        return self.weights(device)

    def call(self, body: Any, inputs: Any, count: int) -> tuple[Tensor, ...]:
        backend = dispatch.load("torch" if body is batched_reference else "triton")
        return tuple(backend.transpose_cast(weight, DTYPES[self.target]) for weight in inputs[:count])

    def errors(self, inputs: Any, results: tuple[Tensor, ...]) -> Errors:
        pairs = zip(results, inputs[: len(results)], strict=True)
        return {"other_bits": float(sum((found != weight.mT.to(found.dtype)).sum() for found, weight in pairs))}


@dataclass(frozen=True)
class SumOfSquares(BatchedCase):
    """‖W‖_F²."""

    @property
    def function(self) -> str:
        return "sum_of_squares"

    @property
    def limits(self) -> Mapping[str, Limit]:
        return {"values": Limit(2, 2.0**-21, 2.0**-18)}

    def inputs(self, device: str) -> Any:
        return self.weights(device)

    def call(self, body: Any, inputs: Any, count: int) -> tuple[Tensor, ...]:
        return (body.sum_of_squares(Weights.of(inputs[:count])),)

    def errors(self, inputs: Any, results: tuple[Tensor, ...]) -> Errors:
        exact = torch.stack([weight.double().square().sum() for weight in inputs[: len(results[0])]])
        return {"values": float((results[0] / exact - 1).abs().amax())}


@dataclass(frozen=True)
class Subtraction(BatchedCase):
    """W − s·B·A, with B and A rounded to the weight's dtype.

    Attributes:
        rank: r.
        transposed: whether the weights are stored (in, out).
        factors: dtype of B and A; the weights', as the engine passes them, where it is empty.
    """

    rank: int = 16
    transposed: bool = False
    factors: str = ""

    @property
    def function(self) -> str:
        return "subtract_lowrank_"

    @property
    def name(self) -> str:
        return f"{super().name}-r{self.rank}{'-T' if self.transposed else ''}"

    @property
    def limits(self) -> Mapping[str, Limit]:
        return {"rounding": Limit(0, 1, 1)}

    def inputs(self, device: str) -> Any:
        generator = torch.Generator(device).manual_seed(self.rank)
        rows, cols = (self.n, self.m) if self.transposed else (self.m, self.n)
        B = torch.randn(self.batch, rows, self.rank, generator=generator, device=device)
        A = torch.randn(self.batch, self.rank, cols, generator=generator, device=device)
        B, A = (factor.to(DTYPES[self.factors or self.dtype]) for factor in (B, A))
        return self.weights(device), B, A, torch.tensor(SCALINGS, dtype=torch.float64).repeat(self.batch)[: self.batch]

    def call(self, body: Any, inputs: Any, count: int) -> tuple[Tensor, ...]:
        weights, B, A, scalings = inputs
        results = [weight.clone() for weight in weights[:count]]
        batch = Weights.of(results)
        body.subtract_lowrank_(batch.mT if self.transposed else batch, B[:count], A[:count], scalings[:count])
        return tuple(results)

    def errors(self, inputs: Any, results: tuple[Tensor, ...]) -> Errors:
        weights, B, A, scalings = inputs
        worst = []
        for index, result in enumerate(results):
            views = (weights[index].mT, result.mT) if self.transposed else (weights[index], result)
            worst.append(rounding_error(views[0].double(), views[1], B[index], A[index], float(scalings[index])))
        return {"rounding": largest(worst)}


def _first(inputs: Any, count: int) -> tuple[Any, Panel, Update | None]:
    """The first ``count`` matrices of a product's inputs."""
    left, panel, update = inputs
    pieces = None if panel.pieces is None else panel.pieces[:, :count]
    if pieces is not None and pieces.stride(1):  # not shared
        pieces = pieces.contiguous()
    if update is not None:
        alpha, current, previous = (part[:count] for part in (update.alpha, update.current, update.previous))
        update = Update(alpha, update.beta, current, update.gamma, previous)
    return left[:count], Panel(panel.values[:count], pieces), update


def _relative(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact).norm() / exact.double().norm())
