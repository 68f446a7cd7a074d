"""What a run is estimated to cost: seconds of a core for each tensor, and bytes for each worker."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..files.header import TensorInfo
from ..quantize.iteration import DEFAULT_ITERATIONS
from ..svd.cost import choose_plan, workspace
from ..svd.machines import machine_of
from .quantization import QuantizationPlan
from .weights import LinearWeight, Stack, Target

# Bytes that are read, hashed and written per second, to weigh a copy against a decomposition.
COPIED_PER_SECOND = 5e8
# Elements that are quantized and dequantized per second, the error measured: on a core of an Intel Xeon, and as is
# estimated for an H100.
QUANTIZED_PER_SECOND = {"cpu": 2e7, "cuda": 1e10}
# An SVD that starts from the triplets of the iteration before, against one from the start.
WARM_SVD = 0.1
# Bytes for each element of a weight, beyond it, at the peak of an iteration, as measured on a CPU: the weight, its
# residual and what bitsandbytes makes of it in float32, codes of four or, in fp4, eight bytes, and dequantized values.
QUANTIZATION_BYTES = {"nf4": 32, "fp4": 48, "int8": 36}


def worker_bytes(targets: Sequence[Target | Stack], plan: QuantizationPlan | None, device: str) -> int:
    """Upper estimate of the bytes that a worker takes: a weight, its SVD and its quantization, A and B.

    Args:
        targets: the layers that have an adapter; of a stack, a worker has one matrix.
        plan: the layers that become quantized, if any do.
        device: "cpu" or "cuda".
    """
    quantized = plan.weights if plan else {}
    extra = QUANTIZATION_BYTES[plan.options.kind] if plan else 0
    svds = [
        _elements(target) * target.dtype.itemsize
        + workspace(*target.shape, target.recipe.rank, target.recipe.niter, machine=_machine(target, device))
        + (extra * _elements(target) if isinstance(target, Target) and target.info.name in quantized else 0)
        for target in targets
    ]
    others = [weight.info.nbytes + extra * _elements(weight) for weight in quantized.values()]
    return max([*svds, *others])


def tensor_seconds(info: TensorInfo, target: Target | None, plan: QuantizationPlan | None, device: str) -> float:
    """Estimated time of one tensor on one core."""
    iterations: int = 1
    seconds = info.nbytes / COPIED_PER_SECOND
    if plan is not None and (weight := plan.weights.get(info.name)) is not None:
        if target is not None:
            iterations = DEFAULT_ITERATIONS if plan.options.iterations == "auto" else plan.options.iterations
        # with an adapter, the weight itself is quantized too, for the report
        quantized = iterations + (target is not None)
        seconds += quantized * _elements(weight) / QUANTIZED_PER_SECOND[device]
    if target is not None:
        seconds += svd_seconds(target, device) * (1 + WARM_SVD * (iterations - 1))
    return seconds


def svd_seconds(target: Target | Stack, device: str) -> float:
    """Estimated time of an SVD of a layer's weight, or of one matrix of a stack."""
    m, n = max(target.shape), min(target.shape)
    machine = _machine(target, device)
    return choose_plan(m, n, target.recipe.rank, target.recipe.niter, machine=machine).seconds


def _elements(weight: LinearWeight | Stack) -> int:
    return weight.shape[0] * weight.shape[1]


def _machine(target: Target | Stack, device: str) -> str:
    return machine_of(torch.empty(1, 1, dtype=target.dtype)) if device == "cpu" else device
