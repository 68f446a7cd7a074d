"""Refusals: each names what was found and what would be accepted, and comes before anything is touched."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .ops import WEIGHT_DTYPES

# PEFT raises with this sentence; callers match on it.
DTYPE_SENTENCE = "Please initialize PiSSA under float32, float16, or bfloat16."


def parse_init(init: str) -> int | None:
    """Rounds that an ``init_lora_weights`` string asks for: None for "pissa", N for "pissa_niter_N".

    Raises:
        ValueError: any other string, or an N that is not an integer ≥ 0.
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


def check_weight(weight: Tensor, where: str = "the weight") -> None:
    """Refuse what cannot be decomposed: ``where`` names the layer in the message.

    Raises:
        TypeError: quantised storage, a tensor subclass, or a dtype other than float32, float16 and bfloat16.
        ValueError: empty, on the meta device, or not 2-D.
    """
    if quantisation := quantised_by(weight):
        raise TypeError(
            f"{DTYPE_SENTENCE} {where} is quantised ({quantisation}): its storage is packed, so its values cannot be "
            "decomposed in place. Load the model without quantisation, initialise, and quantise the residual model."
        )
    if weight.dtype not in WEIGHT_DTYPES:
        raise TypeError(
            f"{DTYPE_SENTENCE} {where} is {weight.dtype} with shape {tuple(weight.shape)}. "
            "A quantised model is initialised before it is quantised."
        )
    if weight.numel() == 0:
        raise ValueError(
            f"{where} is empty (shape {tuple(weight.shape)}): under DeepSpeed ZeRO-3 the weight has to be gathered "
            "(deepspeed.zero.GatheredParameters) while it is initialised"
        )
    if weight.ndim != 2:
        raise ValueError(f"{where} must be 2-D, got shape {tuple(weight.shape)}")
    if weight.is_meta:
        raise ValueError(f"{where} is on the meta device and has no values to decompose")


def check_rank(rank: int, shape: tuple[int, ...], where: str = "the weight") -> None:
    """Refuse a rank that the shape does not have.

    Raises:
        ValueError: rank < 1 or rank > min(shape).
    """
    if not 1 <= rank <= min(shape):
        raise ValueError(
            f"{where} has shape {tuple(shape)}, so PiSSA takes a rank r with 1 ≤ r ≤ {min(shape)}, got r={rank}"
        )


def check_scaling(scaling: float, where: str = "the weight") -> None:
    """Refuse a scaling that the singular values cannot be divided by.

    Raises:
        ValueError: not a finite number above zero.
    """
    if not (math.isfinite(scaling) and scaling > 0):
        raise ValueError(f"{where}: PiSSA divides by the scaling (lora_alpha/r), which must be above 0, got {scaling}")


def quantised_by(weight: Tensor) -> str | None:
    """What packs the values of ``weight`` behind its dtype, or None for a plain tensor.

    Recognised by what the packages put on the parameter: bitsandbytes' ``Params4bit`` and ``Int8Params`` (whose storage
    dtype may well be a float one), and tensor subclasses that only claim a float dtype (torchao).
    """
    kind = type(weight).__name__
    if kind in ("Params4bit", "Int8Params") or getattr(weight, "quant_state", None) is not None:
        return f"bitsandbytes {kind}"
    data = type(weight.data)
    if data not in (Tensor, torch.nn.Parameter):
        return f"tensor subclass {data.__module__}.{data.__qualname__}"
    return None
