"""``python -m bench.checkpoints.child PROVIDER MODEL OUT RANK DEVICE``: initialize one checkpoint on disk.

The last line of output is JSON: seconds of the imports, seconds and CPU seconds of the work after them, MiB resident
after the imports, and MiB by which the resident set grew at its peak.

Both providers import torch, transformers and PEFT before the work starts. This module imports nothing else that takes
time.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path

from ..harness.resident import peak_of, status_mib

Job = Callable[[Path, Path, int, str], None]


def ours(*options: str) -> Job:
    """Import what ``pissa-kernels init`` needs; returns the function that runs it.

    Args:
        options: more of its options.
    """
    import peft  # noqa: F401
    from transformers import AutoModelForCausalLM, LlamaForCausalLM  # noqa: F401

    from pissa_kernels.cli import main as cli

    def job(model: Path, out: Path, rank: int, device: str) -> None:
        if cli.command(["init", str(model), str(out), "--rank", str(rank), "--device", device, *options]):
            raise RuntimeError("pissa-kernels init failed")

    return job


def quantized() -> Job:
    """The same for a quantized residual; bitsandbytes is imported as well."""
    import bitsandbytes  # noqa: F401

    return ours("--quantize", "nf4", "--double-quant")


def stock() -> Job:
    """Import transformers and PEFT; returns the function that follows PEFT's recipe for PiSSA.

    Reload the result with ``PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(OUT), OUT/pissa_init)``.
    """
    import peft
    import torch
    from transformers import AutoModelForCausalLM, LlamaForCausalLM  # noqa: F401

    def job(model: Path, out: Path, rank: int, device: str) -> None:
        config = peft.LoraConfig(
            r=rank,
            lora_alpha=rank,
            init_lora_weights="pissa_niter_4",
            target_modules="all-linear",
            task_type="CAUSAL_LM",
        )
        torch.manual_seed(0)
        base = AutoModelForCausalLM.from_pretrained(model, dtype="auto").to(device)
        adapted = peft.get_peft_model(base, config)
        adapted.peft_config["default"].init_lora_weights = True
        adapted.save_pretrained(out / "pissa_init")
        adapted.unload().save_pretrained(out)

    return job


QUANTIZED = "ours pissa nf4"
PROVIDERS = {"ours pissa": ours, "peft pissa_niter_4": stock, QUANTIZED: quantized}
# Those that run where none are named.
DEFAULT = ("ours pissa", "peft pissa_niter_4")


def main() -> None:
    provider, model, out, rank, device = sys.argv[1:]
    began = time.perf_counter()
    job = PROVIDERS[provider]()
    imported, cpu = time.perf_counter(), _cpu_seconds()
    resident = status_mib("VmRSS")
    peak = peak_of(lambda: job(Path(model), Path(out), int(rank), device))
    figures = {
        "imports_s": imported - began,
        "work_s": time.perf_counter() - imported,
        "work_cpu_s": _cpu_seconds() - cpu,
        "imported_mib": resident,
        "peak_mib": peak,
    }
    print(json.dumps(figures))


def _cpu_seconds() -> float:
    """User and system time of this process, in seconds."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


if __name__ == "__main__":
    main()
