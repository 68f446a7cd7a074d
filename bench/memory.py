"""Peak extra memory of one run, measured in a process that does nothing else.

On the CPU it is the peak of the resident set during the run minus the resident set before it (VmHWM, reset through
/proc/self/clear_refs, and VmRSS). Two things would hide or inflate it:

- memory that glibc keeps after a free is resident already, and a later allocation from it does not show. The child runs
  with MALLOC_MMAP_THRESHOLD_ fixed, so that every block of 128 KiB or more, in whichever arena, is mapped on its own
  and unmapped when it is freed; malloc_trim returns the small ones before the measurement;
- first use loads code and starts thread pools. A run on a small weight comes first; the run that is measured is the
  first big one.

On a GPU it is what torch's allocator reports, max_memory_allocated minus memory_allocated.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from .environment import ROOT
from .providers import PROVIDERS, Provider
from .resident import peak_of

MALLOC = {"MALLOC_MMAP_THRESHOLD_": str(128 << 10), "MALLOC_TRIM_THRESHOLD_": str(128 << 10)}
# Large enough that our engine takes the same way as on a large weight.
WARM_UP = 768


def peak_extra_mib(provider: Provider, weight: Tensor, rank: int, fan_in_fan_out: bool) -> float | None:
    """MiB that one run needs beyond the layer itself, or None where the system does not tell.

    Args:
        provider: what is run.
        weight: as its layer stores it, on the device that is measured.
        rank: r.
        fan_in_fan_out: the layer is a ``Conv1D``.

    Raises:
        subprocess.CalledProcessError: the provider failed in its own process; ``stderr`` says how.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "weight.pt"
        torch.save(weight.cpu(), path)
        command = [sys.executable, "-m", "bench.memory", provider.name, str(path), str(rank), weight.device.type]
        if fan_in_fan_out:
            command.append("--fan-in-fan-out")
        done = subprocess.run(command, cwd=ROOT, env=os.environ | MALLOC, capture_output=True, text=True, check=True)
    peak: float | None = json.loads(done.stdout.splitlines()[-1])
    return peak


def measure(provider: Provider, weight: Tensor, rank: int, fan_in_fan_out: bool) -> float | None:
    """The child's part: warm up, run once, MiB."""
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


def main() -> None:
    parser = argparse.ArgumentParser(description="peak extra memory of one run, MiB, as the last line of the output")
    parser.add_argument("provider", choices=PROVIDERS)
    parser.add_argument("weight", help="file written by torch.save")
    parser.add_argument("rank", type=int)
    parser.add_argument("device", choices=("cpu", "cuda"))
    parser.add_argument("--fan-in-fan-out", action="store_true")
    arguments = parser.parse_args()
    weight = torch.load(arguments.weight, weights_only=True).to(arguments.device)
    print(json.dumps(measure(PROVIDERS[arguments.provider], weight, arguments.rank, arguments.fan_in_fan_out)))


if __name__ == "__main__":
    main()
