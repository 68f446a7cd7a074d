"""Processes of which only the first has the weights, until the model is sharded: the others get its initial factors.

accelerate's ``fsdp_cpu_ram_efficient_loading`` loads the weights in process 0. The other processes have a model on the
meta device, or with arbitrary values, and ``Accelerator.prepare`` sends them W_res, A and B. Records are no parameters,
so they are sent when the adapter is made, or by :func:`share_initial`.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from ...adapter.layers import lora_layers
from ...report import LayerReport
from ...runtime.connected import Connected, connected
from ...runtime.shards import is_sharded
from ..layers.layer import LayerJob
from ..scope import Injection
from ..weights import forward
from ..weights.record import InitRecord, of_adapter, records

_SETTINGS = ("ACCELERATE_USE_FSDP", "FSDP_CPU_RAM_EFFICIENT_LOADING")
_TRUE = ("1", "true", "yes", "on", "y", "t")


def filled_from_first(model: nn.Module) -> Connected | None:
    """The processes, if accelerate is about to fill the model in all of them from that of the first; None otherwise."""
    if not all(os.environ.get(name, "").lower() in _TRUE for name in _SETTINGS):
        return None
    group = connected()
    sharded_already = any(is_sharded(parameter) for parameter in model.parameters())
    return group if group is not None and group.world > 1 and not sharded_already else None


def share_initial(peft_model: Any) -> None:
    """Give every process the initial factors that process 0 has of a PiSSA model.

    For models whose weights only process 0 has loaded, while the others have them on the meta device, before or after
    they are sharded from process 0. With accelerate's ``fsdp_cpu_ram_efficient_loading`` ``get_peft_model`` does it.
    Every process of ``torch.distributed``'s default group calls this; the layers are sent one by one, and no parameter
    is changed. Without the factors, a process cannot disable the adapter, and refuses to. Over nccl, each process has
    chosen its GPU before (``torch.cuda.set_device``).

    Args:
        peft_model: a model that has the same adapters in every process.

    Raises:
        RuntimeError: ``torch.distributed`` is not initialized.
        ValueError: no layer in process 0 has initial factors, or the layers of a process have other names. Nothing has
            been changed then, in any process.

    Examples:
        >>> import pissa_kernels as pk
        >>> def load(rank, base, config):  # base is on the meta device unless rank is 0
        ...     with pk.patch_peft():
        ...         model = peft.get_peft_model(base, config)
        ...     pk.share_initial(model)
        ...     return model
    """
    group = connected()
    if group is None:
        raise RuntimeError("share_initial needs torch.distributed's default process group (init_process_group)")
    layers = dict(lora_layers(peft_model))
    with group.together():
        names = group.share([name for name, layer in layers.items() if records(layer)])
        if not names:
            raise ValueError(
                "no layer of this model was initialized by pissa_kernels in process 0; make it under patch_peft() there"
            )
        if unknown := [name for name in names if name not in layers]:
            raise ValueError(f"process 0 has initial factors of layer {unknown[0]!r}, which this model does not have")
    for name in names:
        found = group.share(records(layers[name]))
        if not group.first:
            forward.replace_records(layers[name], found)


def leave_to_first(
    injection: Injection, layer: Any, adapter: str, job: LayerJob | None, given: InitRecord | None
) -> list[LayerReport]:
    """Leave a layer to process 0, whose weights this process will get.

    Args:
        injection: the call that adds the adapter.
        layer: the layer.
        adapter: name of the adapter.
        job: of the layer; None where it is on the meta device.
        given: the initial factors, from a file that each process has.

    Returns:
        The report, where the factors are known.
    """
    later = None if job is None else job.defer()
    if given is not None:
        if job is None:
            injection.notices.left_alone.pop()
        _take(layer, given, later)
        return [given.report]
    if later is not None:
        injection.jobs.append(later)
        forward.await_record(layer, adapter, later.label)
    return []


def follow_first(group: Connected, model: nn.Module, adapter: str, jobs: Sequence[LayerJob]) -> list[LayerReport]:
    """Take the initial factors of process 0, in a process whose weights will be replaced by those of process 0.

    Where the weights are those of process 0 already, the residual is taken. Where they are on the meta device or
    arbitrary, A, B and W_res come with the weights.

    Args:
        group: all processes.
        model: the model with the adapter.
        adapter: name of the adapter.
        jobs: its layers that are not on the meta device; none in process 0.

    Returns:
        The reports of the layers, in processes other than 0.
    """
    layers = dict(lora_layers(model))
    by_layer = {id(job.layer): job for job in jobs}
    names = group.share([name for name, layer in layers.items() if of_adapter(layer, adapter) is not None])
    found = {name: group.share(of_adapter(layers[name], adapter) if group.first else None) for name in names}
    reports = []
    with group.together():
        for name, record in found.items() if not group.first else ():
            assert record is not None
            _take(layers[name], record, by_layer.get(id(layers[name])))
            reports.append(record.report)
    return reports


def _take(layer: Any, record: InitRecord, job: LayerJob | None) -> None:
    """Take initial factors in a process whose weights will be replaced by those of process 0.

    Args:
        layer: the layer.
        record: of the factors.
        job: of the layer; None where it is on the meta device.
    """
    if job is not None and job.is_of(record):
        replace(job, given=record).run()
        return
    if job is not None:
        job.set_adapter(record.lora_A, record.lora_B)
    forward.remember(layer, record)
