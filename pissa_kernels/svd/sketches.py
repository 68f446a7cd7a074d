"""Seeded random matrices, the same for every device."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

# Elements of a Gaussian matrix that is kept for the next weight: 512 KiB.
KEPT_ELEMENTS = 1 << 17


def gaussian(rows: int, columns: int, seed: int, device: torch.device) -> Tensor:
    """Gaussian matrix (rows, columns) float32, the same on every device, from a generator of its own. It is shared."""
    draw = _recently_drawn if rows * columns <= KEPT_ELEMENTS else _drawn
    return draw(rows, columns, seed).to(device)


def _drawn(rows: int, columns: int, seed: int) -> Tensor:
    generator = torch.Generator(device="cpu").manual_seed(seed)
    return torch.randn(rows, columns, generator=generator, dtype=torch.float32, device="cpu")


# Layers of one shape start from the same matrix, and drawing it takes a twentieth of the time of a small SVD.
_recently_drawn = functools.lru_cache(maxsize=4)(_drawn)


def random_signs(rows: int, columns: int, seed: int, device: torch.device) -> Tensor:
    """Matrix (rows, columns) float32 of random signs, the same on every device: one bit of a drawn byte each."""
    generator = torch.Generator(device="cpu").manual_seed(seed)
    count = -(-rows * columns // 8)
    drawn = torch.randint(256, (count, 1), generator=generator, dtype=torch.uint8, device="cpu")
    if device.type == "cuda":
        drawn = drawn.pin_memory()
    bits = drawn.to(device, non_blocking=True) >> torch.arange(8, dtype=torch.uint8, device=device) & 1
    return bits.flatten()[: rows * columns].view(rows, columns).float().mul_(2).sub_(1)
