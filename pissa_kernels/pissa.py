"""One weight → A, B, residual, certificate (PiSSA, Meng et al. 2024, arXiv 2404.02948, §3)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from . import ops
from .checks import check_rank, check_scaling, check_weight, parse_init
from .numerics import exact_arithmetic
from .ops import reference
from .svd.driver import DEFAULT_TOL, truncated_svd
from .svd.result import Certificate, TruncatedSVD


@dataclass(frozen=True, eq=False)
class Factors:
    """The principal adapter of one weight, before anything is written.

    Attributes:
        lora_A: (r, in) float32, contiguous: √(S/s)·Vᵀ.
        lora_B: (out, r) float32, contiguous: U·√(S/s).
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
    """What energy deficit "pissa" works to for an adapter that ``dtype`` stores: 1e-6, or 2.5e-6 for bfloat16.

    To round A elementwise costs about u²/6 of its energy, u the dtype's unit roundoff: an element in [2ᵉ, 2ᵉ⁺¹) is off
    by up to u·2ᵉ, evenly spread. An SVD that lacks as much again at most doubles that, and may be there a step
    sooner; below 1e-6 the rounding no longer counts.
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
    """Split a weight into its principal LoRA adapter and the residual that is frozen.

    The residual is taken against A and B as they will be stored: both are rounded to ``adapter_dtype`` first, so that
    residual + s·B·A differs from W by the one rounding of the residual to the weight's dtype:
    |W − residual − s·B·A| ≤ u·|residual| elementwise, u the dtype's unit roundoff (2⁻⁸ bfloat16, 2⁻¹¹ float16,
    2⁻²⁴ float32), plus the float32 rounding of the product.

    Args:
        weight: (out, in), or (in, out) with ``fan_in_fan_out``; float32, float16 or bfloat16; any strides.
        rank: 1 ≤ r ≤ min(out, in).
        scaling: the adapter's scaling s > 0 (lora_alpha/r, or lora_alpha/√r with rsLoRA).
        init: "pissa", to an energy deficit of :func:`tolerance` before A is rounded, or "pissa_niter_N", at least as
            accurate as N rounds of ``torch.svd_lowrank``.
        fan_in_fan_out: the weight is stored (in, out), as transformers' ``Conv1D`` stores it.
        seed: of the sketch; torch's global random state is neither used nor changed.
        inplace: write the residual over ``weight``; all checks come first.
        adapter_dtype: what A and B will be stored in; the weight's dtype by default, as PEFT does it. They are returned
            as float32 that this dtype holds exactly.

    Returns:
        A, B, residual, singular values and certificate.

    Raises:
        TypeError: a quantised weight or a dtype other than float32, float16 and bfloat16.
        ValueError: rank, scaling, shape or ``init`` out of range; NaN or Inf in the weight; a residual that overflows
            the weight's dtype; ``inplace`` on a weight whose elements share memory.
    """
    if inplace and weight.ndim == 2 and ops.has_overlap(weight):
        raise ValueError(
            f"inplace=True takes a weight of its own memory, got strides {weight.stride()}; clone it first"
        )
    factors = principal_factors(
        weight,
        rank,
        scaling=scaling,
        init=init,
        fan_in_fan_out=fan_in_fan_out,
        seed=seed,
        adapter_dtype=adapter_dtype,
    )
    with exact_arithmetic(weight.device):
        residual = weight.detach() if inplace else weight.detach().clone(memory_format=torch.preserve_format)
        ops.subtract_lowrank_(residual, factors.lora_B, factors.lora_A, scaling, fan_in_fan_out)
    return Decomposition(**vars(factors), residual=residual)


def principal_factors(
    weight: Tensor,
    rank: int,
    *,
    scaling: float,
    init: str,
    fan_in_fan_out: bool,
    seed: int,
    adapter_dtype: torch.dtype | None = None,
    where: str = "the weight",
) -> Factors:
    """The read-only part of :func:`decompose`; everything that can be refused is refused here, naming ``where``."""
    niter = parse_init(init)
    check_weight(weight, where)
    check_rank(rank, weight.shape, where)
    check_scaling(scaling, where)
    view = weight.detach().mT if fan_in_fan_out else weight.detach()
    dtype = adapter_dtype or weight.dtype
    try:
        svd = truncated_svd(view, rank, tol=tolerance(dtype), niter=niter, seed=seed)
    except ValueError as error:  # non-finite values are found by the engine, which does not know the layer
        raise ValueError(f"{where} {tuple(weight.shape)}: {error}") from None
    return rounded_factors(view, svd, scaling, dtype, where)


def rounded_factors(weight: Tensor, svd: TruncatedSVD, scaling: float, dtype: torch.dtype, where: str) -> Factors:
    """A and B of a weight (out, in) from its triplets, rounded to the dtype that will store them.

    Raises:
        ValueError: A or B exceed the range of ``dtype``, or the residual that of the weight's.
    """
    with exact_arithmetic(weight.device):
        root = (svd.S / scaling).sqrt()
        lora_A = (root[:, None] * svd.Vh).to(dtype).float()
        lora_B = (svd.U * root).to(dtype).float()
        if not (torch.isfinite(lora_A).all() and torch.isfinite(lora_B).all()):
            raise ValueError(f"{where} {tuple(weight.shape)}: its factors exceed the range of {dtype}")
        factors = Factors(lora_A, lora_B, svd.S, svd.certificate)
        _check_residual_range(weight, factors, scaling, where)
    return factors


def _check_residual_range(weight: Tensor, factors: Factors, scaling: float, where: str) -> None:
    """Refuse a residual that its dtype cannot hold (a weight at the end of its range), before it is written."""
    limit = torch.finfo(weight.dtype).max
    # |R_ij| ≤ |W_ij| + |s·B·A|_ij ≤ max|W| + σ₁, and max|W| ≤ σ₁: nearly every weight is settled here
    if 2.1 * float(factors.singular_values[0]) < limit:
        return
    left = factors.lora_B
    for start, stop, block in reference.row_blocks(weight, torch.float64):
        residual = block - scaling * (left[start:stop].double() @ factors.lora_A.double())
        if float(residual.abs().amax()) > limit:
            raise ValueError(
                f"{where} {tuple(weight.shape)}: its residual exceeds the range of {weight.dtype} (±{limit:g}); "
                "initialise it in a wider dtype"
            )
