"""What is asked of a weight, and its A and B as they are stored (Meng et al. 2024, arXiv 2404.02948, §3)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .checks import parse_init
from .numerics import exact_arithmetic
from .ops import reference
from .runtime.shards import EVERYTHING, Index
from .svd.driver import DEFAULT_TOL
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


def tolerance(dtype: torch.dtype) -> float:
    """Energy deficit that "pissa" iterates to, for an adapter stored in ``dtype``: 1e-6, or 2.5e-6 for bfloat16.

    Rounding A elementwise costs about u²/6 of its energy, u the unit roundoff of the dtype: an element in [2ᵉ, 2ᵉ⁺¹)
    is off by up to u·2ᵉ, uniformly distributed. An SVD with the same deficit at most doubles it and may finish a step
    earlier; below 1e-6 the rounding is negligible.
    """
    roundoff = torch.finfo(dtype).eps / 2
    return max(DEFAULT_TOL, roundoff**2 / 6)


def rounded_factors(
    weights: Sequence[Tensor], svds: Sequence[TruncatedSVD], scalings: Sequence[float], dtype: torch.dtype
) -> list[Factors]:
    """A and B of each weight (out, in) from its triplets, rounded to the dtype that will store them.

    Raises:
        ValueError: A or B overflow or underflow ``dtype``, or the residual overflows the weight's dtype.
    """
    found = rounded(svds, scalings, dtype)
    with exact_arithmetic(weights[0].device):
        largest = _stacked([svd.S[:1] for svd in svds]).flatten().tolist()
        for weight, factors, scaling, first in zip(weights, found, scalings, largest, strict=True):
            check_residual_range(weight, factors, scaling, first)
    return found


def rounded(svds: Sequence[TruncatedSVD], scalings: Sequence[float], dtype: torch.dtype) -> list[Factors]:
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


def check_residual_range(
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
