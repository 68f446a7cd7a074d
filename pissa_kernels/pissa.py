"""One weight → A, B, residual, certificate (PiSSA, Meng et al. 2024, arXiv 2404.02948, §3)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from . import ops
from .checks import check_rank, check_scaling, check_weight, layer_context, parse_init
from .numerics import exact_arithmetic
from .ops import reference
from .runtime.shards import EVERYTHING, Index, ShardedStack
from .svd.driver import DEFAULT_TOL, solve_batch, solve_stack
from .svd.result import Certificate, TruncatedSVD


@dataclass(frozen=True)
class Recipe:
    """What is asked of one layer.

    Attributes:
        rank: r.
        scaling: the adapter's scaling s (lora_alpha/r, or lora_alpha/√r with rsLoRA).
        init: "pissa" or "pissa_niter_N".
        seed: seed of the sketch.
        niter: N of "pissa_niter_N", None for "pissa"; parsed from ``init``.

    Raises:
        ValueError: another ``init``.
    """

    rank: int
    scaling: float = 1.0
    init: str = "pissa"
    seed: int = 0
    niter: int | None = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "niter", parse_init(self.init))


@dataclass(frozen=True, eq=False)
class Factors:
    """The initial adapter of one weight.

    Attributes:
        lora_A: (r, in) float32, contiguous: √(S/s)·Vᵀ, rounded to the adapter's dtype.
        lora_B: (out, r) float32, contiguous: U·√(S/s), rounded to the adapter's dtype.
        singular_values: (r,) float32, descending; the scaling is not applied.
        certificate: of the SVD, before A and B were rounded.
    """

    lora_A: Tensor
    lora_B: Tensor
    singular_values: Tensor
    certificate: Certificate


@dataclass(frozen=True, eq=False)
class Decomposition(Factors):
    """W = residual + s·B·A.

    Attributes:
        residual: W − s·B·A in the shape, dtype and layout of the weight (its own storage with ``inplace=True``).
    """

    residual: Tensor


def tolerance(dtype: torch.dtype) -> float:
    """Energy deficit that "pissa" iterates to, for an adapter stored in ``dtype``: 1e-6, or 2.5e-6 for bfloat16.

    Rounding A elementwise costs about u²/6 of its energy, u the unit roundoff of the dtype: an element in [2ᵉ, 2ᵉ⁺¹)
    is off by up to u·2ᵉ, uniformly distributed. An SVD with the same deficit at most doubles it and may finish a step
    earlier; below 1e-6 the rounding is negligible.
    """
    roundoff = torch.finfo(dtype).eps / 2
    return max(DEFAULT_TOL, roundoff**2 / 6)


def decompose(
    weight: Tensor,
    rank: int,
    *,
    scaling: float = 1.0,
    init: str = "pissa",
    fan_in_fan_out: bool = False,
    seed: int = 0,
    inplace: bool = False,
    adapter_dtype: torch.dtype | None = None,
) -> Decomposition:
    """Split a weight into its principal LoRA adapter and the residual that stays frozen.

    A and B are rounded to ``adapter_dtype`` before the residual is taken, so that residual + s·B·A differs from W by
    one rounding of the residual to the weight's dtype: |W − residual − s·B·A| ≤ u·|residual| elementwise, u the unit
    roundoff of the dtype (2⁻⁸ bfloat16, 2⁻¹¹ float16, 2⁻²⁴ float32), plus the float32 round-off of the product.

    Args:
        weight: (out, in), or (in, out) with ``fan_in_fan_out``; float32, float16 or bfloat16; any strides.
        rank: r, 1 ≤ r ≤ min(out, in).
        scaling: the adapter's scaling s > 0 (lora_alpha/r, or lora_alpha/√r with rsLoRA).
        init: "pissa", to the energy deficit of :func:`tolerance` before A is rounded, or "pissa_niter_N", at least as
            accurate as N rounds of ``torch.svd_lowrank``.
        fan_in_fan_out: the weight is stored (in, out), as in transformers' ``Conv1D``.
        seed: seed of the sketch; torch's global random state is neither used nor changed.
        inplace: overwrite ``weight`` with the residual, after all checks.
        adapter_dtype: dtype that will store A and B; by default the weight's, as in PEFT. They are returned as float32
            tensors whose values this dtype represents exactly.

    Returns:
        A, B, residual, singular values and certificate.

    Raises:
        TypeError: a quantized weight, or a dtype other than float32, float16 and bfloat16.
        ValueError: rank, scaling, shape or ``init`` out of range; NaN or Inf in the weight; a residual that overflows
            the weight's dtype; ``inplace`` on a weight whose elements share memory.

    Examples:
        >>> import torch
        >>> import pissa_kernels as pk
        >>> W = torch.randn(64, 48, generator=torch.Generator().manual_seed(0))
        >>> d = pk.decompose(W, rank=8, scaling=2.0)
        >>> d.lora_A.shape, d.lora_B.shape
        (torch.Size([8, 48]), torch.Size([64, 8]))
        >>> bool(torch.allclose(d.residual + 2.0 * d.lora_B @ d.lora_A, W, atol=1e-5))
        True
        >>> d.certificate.converged
        True
    """
    recipe = Recipe(rank, scaling, init, seed)
    check_weight(weight)
    check_rank(rank, weight.shape)
    check_scaling(scaling)
    if inplace and ops.has_overlap(weight):
        raise ValueError(
            f"inplace=True takes a weight of its own memory, got strides {weight.stride()}; clone it first"
        )
    view = weight.detach().mT if fan_in_fan_out else weight.detach()
    factors = principal_factors(view, recipe, adapter_dtype)
    with exact_arithmetic(weight.device):
        residual = weight.detach() if inplace else weight.detach().clone(memory_format=torch.preserve_format)
        ops.subtract_lowrank_(residual, factors.lora_B, factors.lora_A, scaling, fan_in_fan_out)
    return Decomposition(**vars(factors), residual=residual)


def principal_factors(weight: Tensor, recipe: Recipe, adapter_dtype: torch.dtype | None = None) -> Factors:
    """A and B of a weight that has passed the checks of :mod:`pissa_kernels.checks`. The weight is only read.

    Args:
        weight: (out, in), any strides.
        recipe: rank, scaling, accuracy and seed.
        adapter_dtype: dtype that will store A and B; by default the weight's.

    Raises:
        ValueError: NaN or Inf in the weight; A, B or the residual overflow their dtype.
    """
    return principal_factors_of_batch([weight], [recipe], adapter_dtype)[0]


def principal_factors_of_batch(
    weights: Sequence[Tensor], recipes: Sequence[Recipe], adapter_dtype: torch.dtype | None = None
) -> list[Factors]:
    """:func:`principal_factors` of each weight of a batch, with the same results.

    Args:
        weights: (out, in) each, of one shape, dtype and layout, on one device.
        recipes: one for each weight, equal but for the scaling.
        adapter_dtype: as for one weight.

    Raises:
        ValueError: as for one weight.
    """
    first, dtype = recipes[0], adapter_dtype or weights[0].dtype
    svds = solve_batch(weights, first.rank, tol=tolerance(dtype), niter=first.niter, seed=first.seed)
    return rounded_factors(weights, svds, [recipe.scaling for recipe in recipes], dtype)


def principal_factors_of_stack(
    stack: ShardedStack,
    recipe: Recipe,
    adapter_dtype: torch.dtype,
    label: Callable[[int], str],
) -> list[Factors]:
    """A and B of each matrix of a stack that several processes hold, in all of them, with the same bits.

    Args:
        stack: what this process holds, (out, in) in its blocks. The values are only read.
        recipe: rank, scaling, accuracy and seed.
        adapter_dtype: dtype that will store A and B.
        label: of a matrix in messages, by its index.

    Raises:
        ValueError, RuntimeError: as for one weight, of any of the processes, in all of them.
    """
    svds = solve_stack(
        stack,
        recipe.rank,
        tol=tolerance(adapter_dtype),
        niter=recipe.niter,
        seed=recipe.seed,
        context=lambda part: layer_context(label(part)),
    )
    found: dict[int, Factors] = {}
    failure: Exception | None = None
    try:
        for part, matrix, svd in zip(stack.parts, stack.matrices, svds, strict=True):
            with layer_context(label(part)):
                (found[part],) = _rounded([svd], [recipe.scaling], adapter_dtype)
                _check_residual_range(
                    matrix.block, found[part], recipe.scaling, float(svd.S[0]), matrix.rows, matrix.columns
                )
    except ValueError as error:
        failure = error
    stack.everywhere.agree(failure)
    return _of_all_parts(stack, found, recipe.rank)


def _of_all_parts(stack: ShardedStack, found: dict[int, Factors], rank: int) -> list[Factors]:
    """The factors of every matrix, from the processes that have a part of it."""
    if not stack.over_parts:
        return [found[part] for part in range(stack.total)]
    certificates: dict[int, Certificate] = {}
    for others in stack.over_parts.gather({part: factors.certificate for part, factors in found.items()}):
        certificates |= others
    m, n = stack.shape
    device = stack.device
    A, B, S = (torch.zeros(stack.total, *shape, device=device) for shape in ((rank, n), (m, rank), (rank,)))
    for part, factors in found.items():
        A[part], B[part], S[part] = factors.lora_A, factors.lora_B, factors.singular_values
    for each in (A, B, S):
        stack.over_parts.sum_(each)
    return [Factors(A[part], B[part], S[part], certificates[part]) for part in range(stack.total)]


def rounded_factors(
    weights: Sequence[Tensor], svds: Sequence[TruncatedSVD], scalings: Sequence[float], dtype: torch.dtype
) -> list[Factors]:
    """A and B of each weight (out, in) from its triplets, rounded to the dtype that will store them.

    Raises:
        ValueError: A or B overflow or underflow ``dtype``, or the residual overflows the weight's dtype.
    """
    found = _rounded(svds, scalings, dtype)
    with exact_arithmetic(weights[0].device):
        largest = _stacked([svd.S[:1] for svd in svds]).flatten().tolist()
        for weight, factors, scaling, first in zip(weights, found, scalings, largest, strict=True):
            _check_residual_range(weight, factors, scaling, first)
    return found


def _rounded(svds: Sequence[TruncatedSVD], scalings: Sequence[float], dtype: torch.dtype) -> list[Factors]:
    """A and B from triplets, rounded to the dtype that will store them.

    Raises:
        ValueError: A or B overflow or underflow ``dtype``.
    """
    with exact_arithmetic(svds[0].S.device):
        S = _stacked([svd.S for svd in svds])
        root = _stacked([svd.S / scaling for svd, scaling in zip(svds, scalings, strict=True)]).sqrt()
        exact_A = root[:, :, None] * _stacked([svd.Vh for svd in svds])
        lora_A = exact_A.to(dtype).float()
        lora_B = (_stacked([svd.U for svd in svds]) * root[:, None, :]).to(dtype).float()
        largest_A = _largest(lora_A)
        in_range = torch.isfinite(largest_A) & torch.isfinite(_largest(lora_B))
        if torch.finfo(dtype).tiny > torch.finfo(torch.float32).tiny:
            in_range &= largest_A >= _largest(exact_A) / 2  # otherwise A is rounded to 0, and training would not move B
        if not all(in_range.tolist()):
            raise ValueError(f"the factors of the weight leave the range of {dtype}; choose another lora_alpha")
        return [Factors(lora_A[index], lora_B[index], S[index], svd.certificate) for index, svd in enumerate(svds)]


def _stacked(tensors: list[Tensor]) -> Tensor:
    """A batch of the tensors; a view of a single one."""
    return torch.stack(tensors) if len(tensors) > 1 else tensors[0].unsqueeze(0)


def _largest(batch: Tensor) -> Tensor:
    """The largest |element| of each matrix of a batch; NaN where there is one."""
    return batch.abs().amax((-2, -1))


def _check_residual_range(
    weight: Tensor,
    factors: Factors,
    scaling: float,
    largest: float,
    rows: Index = EVERYTHING,
    columns: Index = EVERYTHING,
) -> None:
    """Refuse a residual that overflows the weight's dtype, before it is written.

    Args:
        weight: (out, in), or a block of it.
        factors: A and B of the whole.
        scaling: s.
        largest: σ₁.
        rows, columns: places of the block.
    """
    limit = torch.finfo(weight.dtype).max
    # |R_ij| ≤ |W_ij| + |s·B·A|_ij ≤ max|W| + σ₁ and max|W| ≤ σ₁, which settles nearly every weight
    if 2.1 * largest < limit or not weight.numel():
        return
    left, right = factors.lora_B[rows].double(), factors.lora_A[:, columns].double()
    for start, stop, block in reference.row_blocks(weight, torch.float64):
        residual = block - scaling * (left[start:stop] @ right)
        if float(residual.abs().amax()) > limit:
            raise ValueError(
                f"the residual exceeds the range of {weight.dtype} (±{limit:g}); initialize it in a wider dtype"
            )
