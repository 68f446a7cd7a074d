"""The bodies of csrc/, where they were built: C++ for CPUs, CUDA C++ for GPUs.

The libraries hold operators of ``torch.ops.pissa_kernels`` and link against torch's stable ABI alone, so that one
binary serves every torch from 2.10 on. They are loaded at the first question, not at import.

Products compute eight columns where there are fewer. A single column is left to BLAS, whose product of a matrix and a
vector is a loop of its own: faster, and with shorter sums.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from . import reference

VERBS: dict[str, tuple[str, ...]] = {"cuda": ("transpose_cast", "subtract_lowrank_")}
VERBS["cpu"] = ("matmul", "rmatmul", "normal", "sum_of_squares", "gram_schmidt", *VERBS["cuda"])
# The first holds the schemas too, so it is loaded on every device.
LIBRARIES = {"cpu": "_csrc_cpu.so", "cuda": "_csrc_cuda.so"}
FOLDER = Path(__file__).parent
OLDEST_TORCH = (2, 10)
# Columns of the widest panel whose Gram–Schmidt has a body here: a wider one has fewer and larger calls.
WIDEST = 8
# By device, why its library cannot be loaded, None where it was.
_FAILURES: dict[str, str | None] = {}


def verbs(device: str) -> tuple[str, ...]:
    """Those that have a body for tensors on ``device``, a type."""
    return VERBS.get(device, ())


def unsupported_reasons(verb: str, weight: Tensor) -> list[str]:
    """Reasons why ``verb`` cannot run on ``weight``; none when it can."""
    device = weight.device.type
    if device not in LIBRARIES:
        return [f"it has no body for {device} tensors"]
    reasons = [_failure("cpu"), _failure(device) if device != "cpu" else None]
    if 1 not in weight.stride()[-2:] and weight.numel() > 1:
        reasons.append(f"neither dimension of the weight is contiguous (strides {weight.stride()})")
    return [reason for reason in reasons if reason]


def _failure(device: str) -> str | None:
    if device not in _FAILURES:
        if torch.compiler.is_compiling():  # loading cannot be traced
            return "its library was not loaded before this graph was traced"
        _FAILURES[device] = _load(device)
    return _FAILURES[device]


def _load(device: str) -> str | None:
    """Load the library for ``device``; why it cannot be, or None."""
    library = FOLDER / LIBRARIES[device]
    if not library.exists():
        return f"csrc was not built for {device} (PISSA_KERNELS_BUILD={device} at installation does that)"
    version = tuple(int(part) for part in torch.__version__.split(".")[:2])
    if version < OLDEST_TORCH:
        return f"its library needs torch {'.'.join(map(str, OLDEST_TORCH))} or newer, this is {torch.__version__}"
    try:
        torch.ops.load_library(library)  # type: ignore[no-untyped-call]
    except OSError as error:
        return f"its library does not load: {error}"
    if device == "cpu":
        _register_fakes()
    return None


def _register_fakes() -> None:
    """What the operators return for tensors without data, as torch.compile traces them."""

    def transpose_cast(weight: Tensor, dtype: torch.dtype) -> Tensor:
        m, n = weight.shape
        return weight.new_empty(n, m, dtype=dtype)

    def subtract_lowrank_(
        weight: Tensor, lora_B: Tensor, lora_A: Tensor, scaling: float, fan_in_fan_out: bool = False
    ) -> None:
        return None

    def matmul(weight: Tensor, X: Tensor) -> Tensor:
        return X.new_empty(*weight.shape[:-1], X.shape[-1])

    def rmatmul(weight: Tensor, Y: Tensor) -> Tensor:
        return matmul(weight.mT, Y)

    def normal(weight: Tensor, X: Tensor) -> tuple[Tensor, Tensor]:
        return matmul(weight, X), rmatmul(weight, X)

    def gram_schmidt(panel: Tensor, basis: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        batch = panel.shape[0]
        return panel.new_empty(panel.shape), panel.new_empty(batch), panel.new_empty(batch)

    def sum_of_squares(weights: Tensor) -> Tensor:
        return weights.new_empty(weights.shape[0], dtype=torch.float64)

    for fake in (matmul, rmatmul, normal, sum_of_squares, gram_schmidt, transpose_cast, subtract_lowrank_):
        torch.library.register_fake(f"pissa_kernels::{fake.__name__}", fake)


def matmul(weight: Tensor, X: Tensor, pieces: int = 3) -> Tensor:
    """W·X in float32, whatever ``pieces``; see :func:`pissa_kernels.ops.matmul`."""
    if X.shape[-1] == 1:
        return reference.matmul(weight, X)
    result: Tensor = torch.ops.pissa_kernels.matmul(weight, X)
    return result


def rmatmul(weight: Tensor, Y: Tensor, pieces: int = 3) -> Tensor:
    """Wᵀ·Y in float32, whatever ``pieces``; see :func:`pissa_kernels.ops.rmatmul`."""
    if Y.shape[-1] == 1:
        return reference.rmatmul(weight, Y)
    result: Tensor = torch.ops.pissa_kernels.rmatmul(weight, Y)
    return result


def normal(weight: Tensor, X: Tensor, pieces: int = 3) -> tuple[Tensor, Tensor]:
    """Y = W·X and Wᵀ·Y in float32, whatever ``pieces``; see :func:`pissa_kernels.ops.normal`."""
    if X.shape[-1] == 1:
        return reference.normal(weight, X)
    result: tuple[Tensor, Tensor] = torch.ops.pissa_kernels.normal(weight, X)
    return result


def grouped(verb: str, weights: Sequence[Tensor], panels: Sequence[Tensor], pieces: int = 3) -> list[Tensor]:
    """``matmul`` or ``rmatmul`` of each weight with its panel, one after the other."""
    product = {"matmul": matmul, "rmatmul": rmatmul}[verb]
    return [product(weight, panel) for weight, panel in zip(weights, panels, strict=True)]


def sum_of_squares(weights: Tensor) -> Tensor:
    """‖W‖_F² of each of a stack; see :func:`pissa_kernels.ops.sum_of_squares`."""
    result: Tensor = torch.ops.pissa_kernels.sum_of_squares(weights)
    return result


def gram_schmidt(panel: Tensor, basis: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """One round of block Gram–Schmidt and CholeskyQR; see :func:`pissa_kernels.ops.gram_schmidt`."""
    batch, n, columns = panel.shape
    basis = panel.new_empty(batch, 0, n) if basis is None else basis
    if columns > WIDEST or basis.stride(-1) != 1:
        return reference.gram_schmidt(panel, basis)
    result: tuple[Tensor, Tensor, Tensor] = torch.ops.pissa_kernels.gram_schmidt(panel, basis)
    return result


def transpose_cast(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Wᵀ in ``dtype``; see :func:`pissa_kernels.ops.transpose_cast`."""
    result: Tensor = torch.ops.pissa_kernels.transpose_cast(weight, dtype)
    return result


def subtract_lowrank_(
    weight: Tensor, lora_B: Tensor, lora_A: Tensor, scaling: float, fan_in_fan_out: bool = False
) -> Tensor:
    """W −= s·B·A in place; see :func:`pissa_kernels.ops.subtract_lowrank_`."""
    torch.ops.pissa_kernels.subtract_lowrank_(weight, lora_B, lora_A, scaling, fan_in_fan_out)
    torch.autograd.graph.increment_version(weight)  # an operator of the stable ABI does not do it
    return weight
