"""Layers that share one weight (``layer_replication``): the residual is taken once, and each layer has its adapter.

Layers of equal settings get equal initial factors, so W_res + s·B₀·A₀ is W for each of them. PEFT does not merge such
a model.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace

import torch
from torch import nn

from ...adapter.layers import lora_layers
from ...adapter.layouts import layout_of
from ...checks import layer_context
from ...report import LayerReport
from ..weights.forward import remember
from ..weights.record import InitRecord, of_adapter, records
from ..weights.ties import Ties
from .layer import LayerJob


def split(jobs: list[LayerJob], ties: Ties) -> tuple[list[LayerJob], list[tuple[LayerJob, LayerJob]]]:
    """The layers to initialize, and those that follow one of them because they have its weight.

    Args:
        jobs: the layers of an injection.
        ties: parameters of the model that share memory.

    Raises:
        ValueError: a weight is shared with a module that has no adapter, or the settings of its layers differ. Nothing
            has been written.
    """
    if not ties.replicated:
        return jobs, []
    sharing: dict[int, list[LayerJob]] = defaultdict(list)
    for job in jobs:
        sharing[id(job.layout.weight)].append(job)
    adapted = {(id(job.layout.module), job.layout.parameter) for job in jobs}
    for first, *others in sharing.values():
        for other, key, name in ties.others(first.layout.module, first.layout.parameter):
            if (id(other), key) not in adapted:
                with layer_context(first.label):
                    raise ValueError(
                        f"the weight is tied to {name}, which would change with it. Adapt every copy of a replicated "
                        "layer, or leave this layer out of target_modules"
                    )
        for job in others:
            if not _agree(first, job):
                with layer_context(job.label):
                    raise ValueError(
                        f"the layer shares its weight with {first.name!r} (layer_replication) but not its rank, alpha "
                        "or initial factors, and one weight holds one residual. Give the copies equal settings"
                    )
    return [jobs[0] for jobs in sharing.values()], [
        (job, first) for first, *others in sharing.values() for job in others
    ]


def check_separate(model: nn.Module) -> None:
    """Refuse to merge or unload the adapters of a model in which layers with initial factors share a weight.

    Each of the layers would change the weight of the others. PEFT does not merge them either.

    Raises:
        ValueError: with the name of a layer.
    """
    owners: dict[int, tuple[str, nn.Module]] = {}
    for name, layer in lora_layers(model):
        layout = layout_of(layer)
        if not records(layer):
            continue
        first, owner = owners.setdefault(id(layout.weight), (name, layout.module))
        if owner is not layout.module:
            with layer_context(f"layer {name!r}"):
                raise ValueError(
                    f"it shares its weight with {first!r} (layer_replication, or tied embeddings), and each has an "
                    "adapter of its own, so that the weight can neither take their changes nor be restored. Keep the "
                    "adapters"
                )


def _agree(one: LayerJob, other: LayerJob) -> bool:
    if one.recipe != other.recipe or one.transposed != other.transposed:
        return False
    if one.given is None or other.given is None:
        return one.given is other.given
    return all(torch.equal(getattr(one.given, factor), getattr(other.given, factor)) for factor in ("lora_A", "lora_B"))


def follow(job: LayerJob, first: LayerJob) -> LayerReport:
    """Give a layer the initial factors of the layer that has its weight, once that is initialized."""
    found = of_adapter(first.layer, first.adapter)
    assert found is not None
    report = replace(found.report, name=job.name or found.report.name, seconds=0.0)
    job.set_adapter(found.lora_A, found.lora_B)
    same = next((record for record in records(job.layer) if _equal(record, found)), None)
    kept = same or found
    tensors = {name: getattr(kept, name) for name in ("lora_A", "lora_B", "before", "after")}
    if same is None:  # tensors that share memory cannot be saved together
        tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    latest = of_adapter(job.layer, job.adapter)
    if latest is None or latest.lora_A is not tensors["lora_A"]:
        remember(job.layer, replace(found, report=report, **tensors))
    return report


def _equal(one: InitRecord, other: InitRecord) -> bool:
    return torch.equal(one.lora_A, other.lora_A) and torch.equal(one.lora_B, other.lora_B)
