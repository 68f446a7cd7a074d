"""Exact float32 arithmetic, unit roundoff, and the reconstruction bound."""

from __future__ import annotations

import contextlib
import math
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

# Elements that are held in float64 at a time.
BLOCK_ELEMENTS = 1 << 18
# Unit roundoff u of each storage dtype: rounding is off by at most u, relative.
UNIT_ROUNDOFF = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
# Half the smallest subnormal number of each: rounding is off by at most that where the result is subnormal.
HALF_SUBNORMAL = {dtype: torch.finfo(dtype).smallest_normal * u for dtype, u in UNIT_ROUNDOFF.items()}
# Values of torch's ``fp32_precision`` with which float32 products are float32; "none" is the default.
FULL_PRECISION = ("ieee", "none")


def _leave_unchanged() -> None:
    """Restore nothing: the setting was full precision already."""


_lock = threading.Lock()
_users = 0
_restore: Callable[[], None] = _leave_unchanged


class _Entered(threading.local):
    """Types of devices for which this thread is in the context."""

    types: tuple[str, ...] = ()


_entered = _Entered()


@contextlib.contextmanager
def exact_arithmetic(device: torch.device) -> Iterator[None]:
    """Context in which float32 products are float32: no TF32 or bf16 instead, no autocast, no autograd graph.

    The precision of float32 products is a setting of the process. It is changed by the first thread that enters and
    restored by the last that leaves.

    Args:
        device: where the arithmetic is done, for autocast.

    Examples:
        >>> import torch
        >>> from pissa_kernels.numerics import exact_arithmetic
        >>> torch.set_float32_matmul_precision("high")
        >>> with exact_arithmetic(torch.device("cpu")):
        ...     torch.get_float32_matmul_precision()
        'highest'
        >>> torch.get_float32_matmul_precision()
        'high'
        >>> torch.set_float32_matmul_precision("highest")
    """
    global _users, _restore
    if device.type in _entered.types:  # a layer enters several times
        yield
        return
    before = _entered.types
    with torch.inference_mode(False), torch.no_grad(), torch.autocast(device.type, enabled=False):
        with _lock:
            if _users == 0:
                _restore = _full_precision_products()
            _users += 1
        _entered.types = (*before, device.type)
        try:
            yield
        finally:
            _entered.types = before
            with _lock:
                _users -= 1
                if _users == 0:
                    _restore()


def _full_precision_products() -> Callable[[], None]:
    """Set float32 products to full precision; return a function that restores the setting.

    torch has two interfaces to it, ``set_float32_matmul_precision`` and ``fp32_precision`` of each backend. Where the
    second was used (transformers' ``TrainingArguments(tf32=True)`` does), reading the first raises a RuntimeError.
    Writing the first overwrites the second for both backends, so each backend's setting is restored as well.
    """
    backends: Any = torch.backends
    parents = ((backends.cuda.matmul, backends.cudnn), (backends.mkldnn.matmul, backends.mkldnn))
    found = [(products, _own_precision(products, parent)) for products, parent in parents]
    try:
        precision = torch.get_float32_matmul_precision()
    except RuntimeError:
        precision = "highest"  # set by backend
    if precision == "highest" and all(products.fp32_precision in FULL_PRECISION for products, _ in found):
        return _leave_unchanged
    if precision != "highest":
        torch.set_float32_matmul_precision("highest")
    for products, _ in found:
        if products.fp32_precision not in FULL_PRECISION:
            products.fp32_precision = "ieee"

    def restore() -> None:
        if precision != "highest":
            torch.set_float32_matmul_precision(precision)
        for products, own in found:
            products.fp32_precision = own

    return restore


def _own_precision(products: Any, parent: Any) -> str:
    """The ``fp32_precision`` of a backend's products; "none", which inherits, where it reads like the parent's."""
    precision: str = products.fp32_precision
    return "none" if precision == parent.fp32_precision else precision


def reconstruction(weight: Tensor, residual: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float) -> float:
    """Largest |W − (W_res + s·B·A)| of any element relative to its rounding bound; ≤ 1 holds, Inf if not finite.

    The bound is the rounding of the residual to its dtype, u·|W_res|, plus that of the float32 product before it,
    (r + 2)·2⁻²⁴ times (|W| + s·|B|·|A|) (Higham 2002, §3.1): r for the sum, one each for s and for the product with it.
    Results that are subnormal numbers add an absolute term each. Computed in float64, a block of rows at a time.

    Args:
        weight, residual: (out, in), of one dtype.
        lora_A, lora_B: (r, in) and (out, r).
        scaling: s.
    """
    u = UNIT_ROUNDOFF[residual.dtype]
    # the residual, the r products in float32, and s times their sum
    smallest = HALF_SUBNORMAL[residual.dtype] + (len(lora_A) * scaling + 1) * HALF_SUBNORMAL[torch.float32]
    A, B = lora_A.double(), lora_B.double()
    sizes = A.abs()
    worst = 0.0
    for start in range(0, len(weight), rows := max(1, BLOCK_ELEMENTS // weight.shape[1])):
        W, R = weight[start : start + rows].double(), residual[start : start + rows].double()
        left = scaling * B[start : start + rows]
        error = (W - R).addmm_(left, A, alpha=-1).abs_()
        bound = W.abs_().addmm_(left.abs_(), sizes).mul_((len(A) + 2) * 2.0**-24)
        bound.add_(R.abs_(), alpha=u * (1 + u)).add_(smallest)
        block = float(error.div_(bound).max())
        worst = max(worst, block if math.isfinite(block) else math.inf)
    return worst
