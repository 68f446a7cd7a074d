"""``pissa_init``: parse → check → decompose → write back, all or nothing for each layer."""

from __future__ import annotations

import time
import warnings
from typing import Any

from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from . import ops
from .checks import check_rank, check_weight, parse_init
from .decompose import Factors, principal_factors
from .report import LayerReport
from .svd import exact_arithmetic


def pissa_init(self: Any, adapter_name: str, init_lora_weights: str) -> None:
    """Start a LoRA adapter from the principal singular triplets of the weight that it adapts.

    The signature and the contract of PEFT's ``LoraLayer.pissa_init``. Afterwards ``lora_A`` and ``lora_B`` hold
    √(S/s)·Vᵀ (r, in) and U·√(S/s) (out, r) in float32 on the weight's device, rounded to the weight's dtype because
    PEFT stores them in it; the weight holds W − s·B·A in its own storage, layout and dtype. An adapter on the meta
    device will be filled from a checkpoint: everything is left as it is.

    Args:
        self: a LoRA layer with ``get_base_layer()``, ``r``, ``scaling``, ``lora_A``, ``lora_B``, ``fan_in_fan_out``.
        adapter_name: key of the adapter in those.
        init_lora_weights: "pissa" or "pissa_niter_N".

    Raises:
        TypeError: a quantised weight or a dtype other than float32, float16 and bfloat16.
        ValueError: an unknown ``init_lora_weights``; a rank, scaling or shape out of range; NaN, Inf or an empty
            weight. Nothing has been written then.
    """
    initialize(self, adapter_name, init_lora_weights)


def initialize(
    layer: Any, adapter_name: str, init: str, *, name: str | None = None, seed: int = 0, model: nn.Module | None = None
) -> LayerReport | None:
    """:func:`pissa_init` with what only the caller knows, and a report; None where the layer was left alone.

    Args:
        layer, adapter_name, init: as :func:`pissa_init` takes them.
        name: the layer's name in its model, for messages and the report.
        seed: of the sketch.
        model: where given, a weight that shares memory with another of the model's parameters is refused.
    """
    began = time.perf_counter()
    base = layer.get_base_layer()
    where = f"layer {name!r}" if name else f"a {type(base).__name__} layer"
    parse_init(init)
    weight = base.weight
    if weight.is_meta or layer.lora_A[adapter_name].weight.is_meta:
        _warn_left_alone(weight, where)
        return None
    check_weight(weight, f"the weight of {where}")
    if is_parametrized(base, "weight"):
        raise ValueError(f"{where}: its weight is computed by a parametrization and cannot hold a residual")
    if ops.has_overlap(weight):
        raise ValueError(f"{where}: elements of its weight share memory (strides {weight.stride()}); clone it first")
    if model is not None:
        _check_unshared(base, where, model)
    rank, scaling, transposed = layer.r[adapter_name], layer.scaling[adapter_name], layer.fan_in_fan_out
    out_features, in_features = weight.mT.shape if transposed else weight.shape
    lora_A, lora_B = layer.lora_A[adapter_name].weight, layer.lora_B[adapter_name].weight
    check_rank(rank, weight.shape, f"the weight of {where}")
    _check_adapter(lora_A, lora_B, (rank, in_features), (out_features, rank), weight, transposed, where)
    factors = principal_factors(
        weight, rank, scaling=scaling, init=init, fan_in_fan_out=transposed, seed=seed, where=f"the weight of {where}"
    )
    _write(weight, lora_A, lora_B, factors, scaling, transposed)
    return LayerReport(
        name=name or f"{type(base).__name__}({in_features}, {out_features})",
        shape=(out_features, in_features),
        rank=rank,
        certificate=factors.certificate,
        seconds=time.perf_counter() - began,
        singular_values=factors.singular_values.cpu(),
        dtype=weight.dtype,
        scaling=scaling,
        init=init,
        seed=seed,
    )


def _warn_left_alone(weight: Tensor, where: str) -> None:
    if not weight.is_meta:
        warnings.warn(
            f"{where}: its adapter is on the meta device (low_cpu_mem_usage=True), so PiSSA leaves its weight alone. "
            "Unless the loaded weight already is the residual, load the adapter without low_cpu_mem_usage.",
            stacklevel=4,
        )


def _write(weight: Tensor, lora_A: Tensor, lora_B: Tensor, factors: Factors, scaling: float, transposed: bool) -> None:
    """The three writes; a failure leaves all three as they were."""
    before = lora_A.data, lora_B.data
    lora_A.data, lora_B.data = factors.lora_A, factors.lora_B
    try:
        with exact_arithmetic(weight.device):
            ops.subtract_lowrank_(weight.data, factors.lora_B, factors.lora_A, scaling, transposed)
    except BaseException:
        lora_A.data, lora_B.data = before
        raise


def _check_adapter(
    lora_A: Tensor,
    lora_B: Tensor,
    shape_A: tuple[int, int],
    shape_B: tuple[int, int],
    weight: Tensor,
    transposed: bool,
    where: str,
) -> None:
    found = tuple(lora_A.shape), tuple(lora_B.shape)
    if lora_A.numel() and lora_B.numel() and found != (shape_A, shape_B):
        raise ValueError(
            f"{where}: its weight {tuple(weight.shape)} with fan_in_fan_out={transposed} takes A {shape_A} and "
            f"B {shape_B}, but the adapter has A {found[0]} and B {found[1]}"
        )


def _check_unshared(base: nn.Module, where: str, model: nn.Module) -> None:
    """Refuse a weight that the model reads in a second place, which would see the residual without the adapter."""
    weight: Tensor = base.weight  # type: ignore[assignment]
    start, stop = _extent(weight)
    own = 0
    for name, module in model.named_modules(remove_duplicate=False):
        for key, other in module._parameters.items():
            if other is None or other.is_meta or other.numel() == 0 or other.device != weight.device:
                continue
            if module is base and key == "weight":
                own += 1
                if own == 1:
                    continue
            other_start, other_stop = _extent(other)
            if other_start < stop and start < other_stop:
                raise ValueError(
                    f"the weight of {where} {tuple(weight.shape)} is tied to {name}.{key}, which would be changed with "
                    "it. Untie them first (config.tie_word_embeddings = False, then module.weight = "
                    "nn.Parameter(module.weight.detach().clone())), or leave the layer out of target_modules."
                )


def _extent(tensor: Tensor) -> tuple[int, int]:
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    start = tensor.data_ptr()
    return start, start + (last + 1) * tensor.element_size()
