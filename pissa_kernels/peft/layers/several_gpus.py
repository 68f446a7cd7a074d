"""Several GPUs: their names, and the layers of each.

Weights that are on GPUs stay there. Those on the CPU are divided by their estimated times, the longest first, each to
the GPU that is expected to be free first. GPUs are taken to be equally fast.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence

import torch

from ...svd import cost
from .batches import needed_bytes
from .layer import LayerJob

# Bytes per second of weights on their way to a GPU and back, there and back counted: on an H200, 3.2 GB take 0.17 s
# (the rows of ``copies through pinned memory`` in bench/results/gpu-h200).
COPIED_BYTES = 3.7e10
Named = torch.device | str | Sequence[torch.device | str] | None


def devices_of(named: Named) -> tuple[torch.device, ...]:
    """The devices that a caller has named, with their indices.

    Raises:
        RuntimeError: there is no such device.
        ValueError: an empty sequence, a device named twice, or the CPU beside GPUs.
    """
    if named is None:
        return ()
    if isinstance(named, str) or not isinstance(named, Sequence):
        return (_existing(named),)
    shown = f"device={[str(each) for each in named]}"
    if not named:
        raise ValueError(f"{shown} names no device; name one or more GPUs, or pass None for no streaming")
    devices = tuple(map(_existing, named))
    if len({device.type for device in devices}) > 1:
        raise ValueError(f"{shown} mixes kinds of devices; name GPUs of one kind, or 'cpu' alone")
    for index, device in enumerate(devices):
        if device in devices[:index]:
            raise ValueError(f"{shown} names {device} twice; name each device once")
    return devices


def _existing(device: torch.device | str) -> torch.device:
    """The device with its index, as tensors report it."""
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:  # torch without CUDA raises an AssertionError
        reason = str(error).partition("\n")[0]  # CUDA adds hints for debugging
        raise RuntimeError(f"device={str(device)!r} cannot be used: {reason}") from None


def divide(
    jobs: Sequence[LayerJob], devices: Sequence[torch.device], budget: Callable[[torch.device], int]
) -> dict[torch.device, list[LayerJob]]:
    """The layers of each device, in the given order: all where their weights are, except those that are streamed.

    Args:
        jobs: the layers.
        devices: where weights that are on the CPU are decomposed; none for the CPU itself.
        budget: bytes that may be used on a device. A layer goes to a device whose budget it fits, if there is one, and
            otherwise to the one with the largest, for which it is refused.
    """
    places = {job: job.weight.device for job in jobs}
    streamed = [job for job in jobs if places[job].type == "cpu"] if devices else []
    if len(devices) == 1:
        places |= dict.fromkeys(streamed, devices[0])
    elif streamed:
        places |= _by_time(jobs, streamed, {device: budget(device) for device in devices})
    shares: dict[torch.device, list[LayerJob]] = defaultdict(list)
    for job in jobs:
        shares[places[job]].append(job)
    return dict(shares)


def _by_time(
    jobs: Sequence[LayerJob], streamed: Sequence[LayerJob], budgets: dict[torch.device, int]
) -> dict[LayerJob, torch.device]:
    """A device for each streamed layer."""
    busy = {device: sum(seconds(job, device) for job in jobs if job.weight.device == device) for device in budgets}
    largest = max(budgets, key=lambda device: budgets[device])
    found = {}
    for job in sorted(streamed, key=lambda job: -seconds(job, largest)):
        fitting = [device for device in budgets if needed_bytes(job, device) <= budgets[device]]
        device = min(fitting or [largest], key=lambda device: busy[device])
        busy[device] += seconds(job, device)
        found[job] = device
    return found


def seconds(job: LayerJob, device: torch.device) -> float:
    """Estimated time of a layer on a GPU, with the copies of a weight that is elsewhere."""
    weight = job.weight
    copies = 0.0 if weight.device == device else 2 * weight.nbytes / COPIED_BYTES
    recipe = job.recipe
    return copies + job.parts * cost.seconds(*job.shape, recipe.rank, recipe.niter, machine=device.type)
