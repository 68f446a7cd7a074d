"""One weight → A, B, residual, certificate (PiSSA, Meng et al. 2024, arXiv 2404.02948, §3)."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from . import ops
from .checks import check_rank, check_scaling, check_weight, layer_context
from .factors import Factors, Recipe, check_residual_range, rounded, rounded_factors, tolerance
from .numerics import exact_arithmetic
from .runtime.shards import ShardedStack, is_sharded, on_mesh, sharded_stack
from .svd.driver import solve_batch
from .svd.result import Certificate
from .svd.sharded_driver import solve_stack


@dataclass(frozen=True, eq=False)
class Decomposition(Factors):
    """W = residual + s·B·A.

    Attributes:
        residual: W − s·B·A in the shape, dtype and layout of the weight (its own storage with ``inplace=True``).
    """

    residual: Tensor


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
        weight: (out, in), or (in, out) with ``fan_in_fan_out``; float32, float16 or bfloat16; any strides. For a
            ``DTensor`` every process of its mesh calls this; A and B are whole, and the residual is sharded like it.
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
    if inplace and not is_sharded(weight) and ops.has_overlap(weight):
        raise ValueError(
            f"inplace=True takes a weight of its own memory, got strides {weight.stride()}; clone it first"
        )
    if is_sharded(weight):
        return _decompose_sharded(weight.detach(), recipe, fan_in_fan_out, inplace, adapter_dtype or weight.dtype)
    view = weight.detach().mT if fan_in_fan_out else weight.detach()
    factors = principal_factors(view, recipe, adapter_dtype)
    with exact_arithmetic(weight.device):
        residual = weight.detach() if inplace else weight.detach().clone(memory_format=torch.preserve_format)
        ops.subtract_lowrank_(residual, factors.lora_B, factors.lora_A, scaling, fan_in_fan_out)
    return Decomposition(**vars(factors), residual=residual)


def _decompose_sharded(
    weight: Any, recipe: Recipe, fan_in_fan_out: bool, inplace: bool, adapter_dtype: torch.dtype
) -> Decomposition:
    stack = sharded_stack(weight, on_mesh(weight))
    factors = principal_factors_of_stack(stack.mT if fan_in_fan_out else stack, recipe, adapter_dtype)[0]
    residual = weight if inplace else weight.clone()
    held = sharded_stack(residual, residual.to_local())
    subtract_from_blocks_(held, [factors.lora_A], [factors.lora_B], recipe.scaling, fan_in_fan_out)
    return Decomposition(**vars(factors), residual=residual)


def subtract_from_blocks_(
    held: ShardedStack, A: Sequence[Tensor] | Tensor, B: Sequence[Tensor] | Tensor, scaling: float, transposed: bool
) -> None:
    """W −= s·B·A in place, in the blocks that this process holds. After an exception they are as before, to rounding.

    Args:
        held: what it holds of a stack of P matrices, as they are stored.
        A, B: (r, in) and (out, r) of each of the P matrices.
        scaling: s.
        transposed: whether the matrices are stored (in, out).
    """
    done: list[Callable[[], object]] = []
    with exact_arithmetic(held.device):
        try:
            for part, matrix in zip(held.parts, held.matrices, strict=True):
                if matrix.block.numel():
                    lora_A, lora_B = matrix.factors(A[part], B[part], transposed)
                    change = partial(ops.subtract_lowrank_, matrix.block, lora_B, lora_A, fan_in_fan_out=transposed)
                    change(scaling=scaling)
                    done.append(partial(change, scaling=-scaling))
        except BaseException:
            for restore in done:
                restore()
            raise


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
    label: Callable[[int], str] | None = None,
) -> list[Factors]:
    """A and B of each matrix of a stack that several processes hold, in all of them, with the same bits.

    Args:
        stack: what this process holds, (out, in) in its blocks. The values are only read.
        recipe: rank, scaling, accuracy and seed.
        adapter_dtype: dtype that will store A and B.
        label: of a matrix in messages, by its index; None for no label.

    Raises:
        ValueError, RuntimeError: as for one weight, of any of the processes, in all of them.
    """

    def context(part: int) -> contextlib.AbstractContextManager[object]:
        return contextlib.nullcontext() if label is None else layer_context(label(part))

    svds = solve_stack(
        stack,
        recipe.rank,
        tol=tolerance(adapter_dtype),
        niter=recipe.niter,
        seed=recipe.seed,
        context=context,
    )
    found: dict[int, Factors] = {}
    failure: Exception | None = None
    try:
        for part, matrix, svd in zip(stack.parts, stack.matrices, svds, strict=True):
            with context(part):
                (found[part],) = rounded([svd], [recipe.scaling], adapter_dtype)
                check_residual_range(
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
    shapes = ((rank, n), (m, rank), (rank,))
    A, B, S = (torch.zeros(stack.total, *shape, dtype=torch.float32, device=device) for shape in shapes)
    for part, factors in found.items():
        A[part], B[part], S[part] = factors.lora_A, factors.lora_B, factors.singular_values
    for each in (A, B, S):
        stack.over_parts.sum_(each)
    return [Factors(A[part], B[part], S[part], certificates[part]) for part in range(stack.total)]
