"""Modules that compute with a part of their weight: transformers' tensor parallelism.

Under FSDP2 a module has its whole weight during a pass, so that nothing here concerns it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ...runtime.shards import is_sharded

# Plans for which PEFT divides the adapter like the weight. Those of the others would be added to another output.
SUPPORTED = ("colwise", "rowwise", "embedding_rowwise")


def plan_of(layer: Any) -> str | None:
    """The plan by which tensor parallelism divides the weight of a layer; None where a pass has the whole weight.

    PEFT writes it to the module that it wraps.
    """
    plan: str | None = getattr(layer.get_base_layer(), "_hf_tp_plan", None)
    return plan


def check_plan(layer: Any, weight: Any) -> None:
    """Refuse a weight of which a pass has a part, and PEFT no adapter for it.

    Args:
        layer: the LoRA layer.
        weight: its weight, a ``DTensor``.

    Raises:
        ValueError: with what to do.
    """
    names = weight.device_mesh.mesh_dim_names or ()
    divided = any(
        name == "tp" and not placement.is_replicate() for name, placement in zip(names, weight.placements, strict=False)
    )
    plan = plan_of(layer)
    if plan not in (None, *SUPPORTED) or (plan is None and divided):
        found = f"as {plan!r}" if plan else "without a plan of transformers"
        raise ValueError(
            f"tensor parallelism divides the weight {found}, for which PEFT has no adapter (it has them for "
            f"{', '.join(map(repr, SUPPORTED))}). Leave the layer out of target_modules"
        )


def make_whole(layer: Any, adapter: str, in_features: int, out_features: int) -> None:
    """Give A and B of a linear layer the shapes of the whole weight, before PEFT divides them.

    PEFT 0.21 makes them as large as the part of one process, unless the mesh is FSDP2's and has no names but "fsdp".
    transformers, which divides the inputs of a module by its ``in_features``, and a pass under FSDP2 take whole ones.

    Args:
        layer: the LoRA layer.
        adapter: name of the adapter.
        in_features, out_features: of the weight.
    """
    layer.in_features, layer.out_features = in_features, out_features
    lora_A, lora_B = layer.lora_A[adapter], layer.lora_B[adapter]
    lora_A.in_features, lora_B.out_features = in_features, out_features
    for parameter, shape in (
        (lora_A.weight, (lora_A.out_features, in_features)),
        (lora_B.weight, (out_features, lora_B.in_features)),
    ):
        if not is_sharded(parameter) and parameter.shape != shape:
            parameter.data = parameter.data.new_zeros(shape)


def divided_product(layer: Any, x: Tensor, A: Tensor, B: Tensor, width: int) -> Tensor:
    """B·(A·x) as tensor parallelism divides it, with the gradients summed over the processes.

    Args:
        layer: the LoRA layer.
        x: (…, in), or the columns of it that this process has.
        A: (r, in).
        B: (out, r).
        width: columns of the output that this process has.
    """
    from torch.distributed.tensor import DTensor, Replicate, Shard

    mesh = layer.get_base_layer()._hf_device_mesh

    def whole(values: Tensor, placement: Any, length: int) -> Any:
        shape = torch.Size((*values.shape[:-1], length))
        stride = torch.empty(shape, device="meta").stride()
        return DTensor.from_local(values, mesh, [placement], run_check=False, shape=shape, stride=stride)

    if x.shape[-1] != A.shape[1]:
        divided: Any = functional.linear(whole(x, Shard(-1), A.shape[1]), _cut(A, mesh, Shard(1)))
        inner: Tensor = divided.redistribute(placements=[Replicate()]).to_local()
    else:
        inner = functional.linear(x, A)
    if width == B.shape[0]:
        return functional.linear(inner, B)
    outer: Any = functional.linear(whole(inner, Replicate(), A.shape[0]), _cut(B, mesh, Shard(0)))
    local: Tensor = outer.to_local()
    return local


def _cut(factor: Tensor, mesh: Any, placement: Any) -> Any:
    """A factor that every process has, divided. Nothing is transferred."""
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(factor, mesh, [placement], src_data_rank=None)
