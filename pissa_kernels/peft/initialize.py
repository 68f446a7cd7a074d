"""``pissa_init``: parse → check → decompose → write back, all or nothing for each layer."""

from __future__ import annotations

import warnings
from typing import Any

from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from .. import ops
from ..checks import check_rank, check_scaling, check_weight, parse_init
from .layer import LayerJob
from .record import InitRecord
from .ties import Ties


def pissa_init(self: Any, adapter_name: str, init_lora_weights: str) -> None:
    """Start a LoRA adapter from the principal singular triplets of the weight that it adapts.

    The signature and the contract of PEFT's ``LoraLayer.pissa_init``. Afterwards ``lora_A`` and ``lora_B`` hold
    √(S/s)·Vᵀ (r, in) and U·√(S/s) (out, r) in float32 on the weight's device, rounded to the weight's dtype because
    PEFT stores them in it; the weight holds W − s·B·A in its own storage, layout and dtype. An adapter on the meta
    device will be filled from a checkpoint: everything is left as it is.

    Args:
        self: a LoRA layer with ``get_base_layer()``, ``r``, ``scaling``, ``lora_A``, ``lora_B``, ``fan_in_fan_out``.
        adapter_name: key of the adapter in those.
        init_lora_weights: "pissa" or "pissa_niter_N", as :func:`pissa_kernels.pissa` takes them.

    Raises:
        TypeError: a quantised weight or a dtype other than float32, float16 and bfloat16.
        ValueError: an unknown ``init_lora_weights``; a rank, scaling or shape out of range; NaN, Inf or an empty
            weight. Nothing has been written then.
    """
    task = prepare(self, adapter_name, init_lora_weights)
    if task is not None:
        task.run()


def prepare(
    layer: Any,
    adapter_name: str,
    init: str,
    *,
    seed: int = 0,
    name: str | None = None,
    ties: Ties | None = None,
    given: InitRecord | None = None,
) -> LayerJob | None:
    """Check everything that needs no arithmetic; None where the layer is to be left alone.

    Args:
        layer, adapter_name, init: as :func:`pissa_init` takes them.
        seed: of the sketch.
        name: the layer's name in its model, for messages and the report.
        ties: of the layer's model; where given, a weight that the model reads in a second place is refused.
        given: the initial factors that a trained adapter brought along.

    Raises:
        TypeError, ValueError: as :func:`pissa_init`.
    """
    if given is not None:
        init, seed = given.report.init, given.report.seed
    task = LayerJob(layer, adapter_name, init, seed, name, given)
    base, where = layer.get_base_layer(), task.where
    parse_init(init)
    weight = base.weight
    if weight.is_meta:
        return None
    if layer.lora_A[adapter_name].weight.is_meta and given is None:
        _warn_left_alone(where)
        return None
    check_weight(weight, f"the weight of {where}")
    if is_parametrized(base, "weight"):
        raise ValueError(f"{where}: its weight is computed by a parametrization and cannot hold a residual")
    if ops.has_overlap(weight):
        raise ValueError(f"{where}: elements of its weight share memory (strides {weight.stride()}); clone it first")
    _check_unshared(base, where, ties)
    check_rank(task.rank, weight.shape, f"the weight of {where}")
    check_scaling(task.scaling, f"the weight of {where}")
    _check_adapter(task)
    return task


def _warn_left_alone(where: str) -> None:
    warnings.warn(
        f"{where}: its adapter is on the meta device (low_cpu_mem_usage=True), so PiSSA leaves its weight alone. "
        "Unless the loaded weight already is the residual, load the adapter without low_cpu_mem_usage.",
        stacklevel=4,
    )


def _check_adapter(task: LayerJob) -> None:
    (out_features, in_features), rank = task.view.shape, task.rank
    lora_A, lora_B = task.layer.lora_A[task.adapter].weight, task.layer.lora_B[task.adapter].weight
    found, wanted = (tuple(lora_A.shape), tuple(lora_B.shape)), ((rank, in_features), (out_features, rank))
    if lora_A.numel() and lora_B.numel() and found != wanted:
        raise ValueError(
            f"{task.where}: its weight {tuple(task.weight.shape)} with fan_in_fan_out={task.transposed} takes A "
            f"{wanted[0]} and B {wanted[1]}, but the adapter has A {found[0]} and B {found[1]}"
        )


def _check_unshared(base: nn.Module, where: str, ties: Ties | None) -> None:
    """Refuse a weight that the model reads in a second place, which would see the residual without the adapter."""
    other = ties.of(base) if ties is not None else None
    if other is not None:
        weight: Tensor = base.weight  # type: ignore[assignment]
        raise ValueError(
            f"the weight of {where} {tuple(weight.shape)} is tied to {other}, which would be changed with "
            "it. Untie them first (config.tie_word_embeddings = False, then module.weight = "
            "nn.Parameter(module.weight.detach().clone())), or leave the layer out of target_modules."
        )
