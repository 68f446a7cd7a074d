"""Peak memory of one initialization beyond the layer itself, measured in a fresh process.

On a GPU it is max_memory_allocated minus memory_allocated of torch's allocator; on the CPU, see
:mod:`bench.harness.fresh`.
"""

from __future__ import annotations

import gc
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from ..harness import fresh
from ..harness.resident import peak_of
from .providers import PROVIDERS, Provider

# Size of the warm-up weight: large enough that the engine chooses the same method as on a large weight.
WARM_UP = 768


def peak_extra_mib(provider: Provider, weight: Tensor, rank: int, fan_in_fan_out: bool) -> float | None:
    """MiB that one run needs beyond the layer itself; None where the system cannot measure it.

    Args:
        provider: provider to run.
        weight: weight as its layer stores it, on the device to measure.
        rank: r.
        fan_in_fan_out: whether the layer is a ``Conv1D``.

    Raises:
        subprocess.CalledProcessError: the fresh process failed; ``stderr`` contains its traceback.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "weight.pt"
        torch.save(weight.cpu(), path)
        return fresh.call(measure_file, provider.name, str(path), rank, weight.device.type, fan_in_fan_out)


def measure_file(provider: str, path: str, rank: int, device: str, fan_in_fan_out: bool) -> float | None:
    """The part of :func:`peak_extra_mib` in the fresh process."""
    weight = torch.load(path, weights_only=True).to(device)
    return measure(PROVIDERS[provider], weight, rank, fan_in_fan_out)


def measure(provider: Provider, weight: Tensor, rank: int, fan_in_fan_out: bool) -> float | None:
    """Warm up on a small weight, then run once; MiB at the peak of that run."""
    small = torch.randn(WARM_UP, WARM_UP, generator=torch.Generator().manual_seed(0)).to(weight)
    provider.prepare(small, min(rank, 16), fan_in_fan_out).run()
    subject = provider.prepare(weight, rank, fan_in_fan_out)
    gc.collect()
    if weight.is_cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        subject.run()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    return peak_of(subject.run)
