"""What is refused, with its message. Each check runs once, where a caller's values come in, before any write.

The messages speak of "the weight"; :func:`layer_context` adds the name of the layer where it is known.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator

import torch
from torch import Tensor

from .ops import WEIGHT_DTYPES
from .runtime.shards import is_sharded

# PEFT raises a TypeError that starts with this sentence, and callers match it.
DTYPE_SENTENCE = "Please initialize PiSSA under float32, float16, or bfloat16."
# With a smaller scaling A and B exceed float32's range, and with a larger one B·A falls below it.
_SMALLEST_SCALING, _LARGEST_SCALING = 1e-30, 1e30


@contextlib.contextmanager
def layer_context(layer: str) -> Iterator[None]:
    """Context that adds the name of a layer to the errors that leave it. Nested contexts add the innermost name only.

    Args:
        layer: as in "layer 'model.layers.0.self_attn.q_proj', weight (4096, 4096)".

    Examples:
        >>> from pissa_kernels.checks import check_rank, layer_context
        >>> with layer_context("layer 'lm_head'"):
        ...     check_rank(8, (3, 4))
        Traceback (most recent call last):
            ...
        ValueError: layer 'lm_head': the weight has shape (3, 4), so PiSSA takes a rank r with 1 ≤ r ≤ 3, got r=8
    """
    try:
        yield
    except (TypeError, ValueError, RuntimeError, MemoryError) as error:
        if not hasattr(error, "layer"):
            text = str(error)
            if text.startswith(DTYPE_SENTENCE):
                error.args = (f"{DTYPE_SENTENCE} {layer}: {text.removeprefix(DTYPE_SENTENCE).strip()}",)
            else:
                error.args = (f"{layer}: {text}",)
            error.layer = layer  # type: ignore[union-attr]
        raise


def asks_for_pissa(init: object) -> bool:
    """Whether PEFT takes a value of ``init_lora_weights`` for PiSSA, valid or not: it looks at the first letters."""
    return isinstance(init, str) and init.startswith("pissa")


def parse_init(init: str) -> int | None:
    """Parse PEFT's ``init_lora_weights``.

    Args:
        init: "pissa" or "pissa_niter_N".

    Returns:
        None for "pissa", the number of rounds N for "pissa_niter_N".

    Raises:
        ValueError: any other string, or an N that is not an integer ≥ 0.

    Examples:
        >>> from pissa_kernels.checks import parse_init
        >>> parse_init("pissa") is None
        True
        >>> parse_init("pissa_niter_4")
        4
    """
    if init == "pissa":
        return None
    head, found, rounds = str(init).partition("_niter_")
    if head != "pissa" or not found:
        raise ValueError(f"init_lora_weights should be 'pissa' or 'pissa_niter_[number of iters]', got {init} instead.")
    if not (rounds.isascii() and rounds.isdigit()):
        raise ValueError(
            f"init_lora_weights='pissa_niter_N' takes an integer N ≥ 0, as in 'pissa_niter_4', got {init!r}"
        )
    return int(rounds)


def check_weight(weight: Tensor, *, matrix: bool = True) -> None:
    """Refuse a tensor that cannot be decomposed.

    Args:
        weight: the tensor.
        matrix: whether it has to be one matrix; otherwise it may be a stack of matrices, or a convolution's weight.

    Raises:
        TypeError: quantized storage, a tensor subclass, or a dtype other than float32, float16 and bfloat16.
        ValueError: fake, empty, on the meta device, or not 2-D where it has to be.
    """
    if type(weight.data).__name__ == "FakeTensor":
        raise ValueError("the weight is a FakeTensor and has no values. Initialize PiSSA outside of FakeTensorMode")
    if scheme := quantization_of(weight):
        raise TypeError(
            f"{DTYPE_SENTENCE} the weight is quantized ({scheme}) and its storage is packed, so it cannot be "
            "decomposed in place. Load the model without quantization, initialize it, and quantize the residual model."
        )
    if weight.dtype not in WEIGHT_DTYPES:
        raise TypeError(
            f"{DTYPE_SENTENCE} the weight is {weight.dtype} with shape {tuple(weight.shape)}. "
            "A quantized model is initialized before it is quantized."
        )
    if weight.numel() == 0:
        raise ValueError(
            f"the weight is empty (shape {tuple(weight.shape)}): under DeepSpeed ZeRO-3 it has to be gathered while it "
            "is initialized (deepspeed.zero.GatheredParameters(list(model.parameters()), modifier_rank=0) in all "
            "processes; with another modifier_rank DeepSpeed drops the residual)"
        )
    if weight.ndim < 2 or (matrix and weight.ndim != 2):
        flat = ", as FSDP leaves it: initialize PiSSA before the model is wrapped" if weight.ndim == 1 else ""
        raise ValueError(f"the weight must be 2-D, got shape {tuple(weight.shape)}{flat}")
    if weight.is_meta:
        raise ValueError("the weight is on the meta device and has no values to decompose")


def check_rank(rank: int, shape: tuple[int, ...]) -> None:
    """Refuse a rank that a matrix of this shape does not have.

    Raises:
        ValueError: rank < 1 or rank > min(shape).
    """
    if not 1 <= rank <= min(shape):
        raise ValueError(
            f"the weight has shape {tuple(shape)}, so PiSSA takes a rank r with 1 ≤ r ≤ {min(shape)}, got r={rank}"
        )


def check_scaling(scaling: float) -> None:
    """Refuse a scaling that the singular values cannot be divided by.

    Raises:
        ValueError: not a finite number above zero, or one with which s·B·A leaves the range of float32.
    """
    if not (math.isfinite(scaling) and scaling > 0):
        raise ValueError(f"PiSSA divides by the scaling (lora_alpha/r), which must be above 0, got {scaling}")
    if not _SMALLEST_SCALING <= scaling <= _LARGEST_SCALING:
        raise ValueError(
            f"the scaling (lora_alpha/r) is {scaling:.3g}, and the factors of the weight would leave the range of "
            f"float32; accepted is {_SMALLEST_SCALING:g} to {_LARGEST_SCALING:g}"
        )


def check_accuracy(tol: float, niter: int | None) -> None:
    """Refuse a tolerance or a number of rounds out of range.

    Raises:
        ValueError: without ``niter``, a ``tol`` not between 0 and 1; a negative ``niter``.
    """
    if niter is None and not 0 < tol < 1:
        raise ValueError(f"tol must lie between 0 and 1, got {tol}")
    if niter is not None and niter < 0:
        raise ValueError(f"niter must be 0 or more, got {niter}")


def quantization_of(weight: Tensor) -> str | None:
    """What packs the values of a weight behind its dtype; None for a plain tensor.

    Recognized by what the packages put on the parameter: bitsandbytes' ``Params4bit`` and ``Int8Params`` (whose storage
    dtype may be a float one), and tensor subclasses that only claim a float dtype (torchao).
    """
    kind = type(weight).__name__
    if kind in ("Params4bit", "Int8Params") or getattr(weight, "quant_state", None) is not None:
        return f"bitsandbytes {kind}"
    data = type(weight.data)
    if data not in (Tensor, torch.nn.Parameter) and not is_sharded(weight):
        return f"tensor subclass {data.__module__}.{data.__qualname__}"
    return None
