"""``python -m bench.model``: a whole ``get_peft_model`` on a Llama-shaped model, gate → time → memory → row.

Every weight has the spectrum of a real projection (:mod:`bench.spectra`). The model is never run: what is timed is the
injection of an adapter into all its linear layers, as a user calls it. The layers are judged one by one.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import peft
import torch

import pissa_kernels as pk
from pissa_kernels.adapter.layers import lora_layers

from . import environment, gate, memory, resident
from .llama import SPECTRA, Base, ModelCase, add_case_arguments, case_of, targets
from .providers import Subject
from .rows import Row, read_rows, write_row
from .run import RESULTS
from .table import table
from .timing import Times, interleaved, timed

OURS = "ours pissa"


@dataclass(frozen=True)
class Way:
    """How a provider injects an adapter.

    Attributes:
        init: what ``init_lora_weights`` says; None for no adapter, but a copy of all weights to the GPU and back.
        settings: of ``patch_peft``; None for stock PEFT.
        on_cpu: the model is on the CPU, whichever device is measured.
    """

    init: str | bool | None
    settings: dict[str, Any] | None = None
    on_cpu: bool = False


PROVIDERS = {
    OURS: Way("pissa", {}),
    "ours pissa, one by one": Way("pissa", {"batch": False}),
    "ours pissa, through the GPU": Way("pissa", {"device": "cuda"}, on_cpu=True),
    "copy to the GPU and back": Way(None, on_cpu=True),
    "peft pissa_niter_4": Way("pissa_niter_4"),
    "peft pissa": Way("pissa"),
    "peft plain LoRA": Way(True),
}
STANDARD = {
    "cpu": (OURS, "ours pissa, one by one", "peft pissa_niter_4", "peft plain LoRA"),
    "cuda": (OURS, "ours pissa, through the GPU", "copy to the GPU and back", "peft pissa_niter_4", "peft plain LoRA"),
}


class Injection:
    """One provider's ``get_peft_model``: a subject of :mod:`bench.timing`.

    Args:
        base: the model.
        provider: a key of :data:`PROVIDERS`.
        device: that is measured.
    """

    def __init__(self, base: Base, provider: str, device: str = "cpu") -> None:
        self.base = base
        self.way = PROVIDERS[provider]
        self.device = device

    def restore(self) -> None:
        self.base.restore("cpu" if self.way.on_cpu else self.device)

    def run(self) -> None:
        if self.way.init is None:
            for _, module in targets(self.base.model):
                module.weight.data.copy_(module.weight.data.to(self.device))
            return
        rank, settings = self.base.case.rank, self.way.settings
        config = peft.LoraConfig(
            r=rank, lora_alpha=rank, init_lora_weights=self.way.init, target_modules=sorted(SPECTRA)
        )
        with contextlib.nullcontext() if settings is None else pk.patch_peft(**settings):
            self.base.adapted = peft.get_peft_model(self.base.model, config)

    def outcome(self) -> Any:
        return None  # the layers are judged by :func:`worst_deficit`, one at a time


def worst_deficit(base: Base, device: str) -> tuple[float, float]:
    """Over all layers, the largest energy deficit of the rows of A as stored, and error in units of its rounding.

    The second is max |W − W_res − s·B·A| over what the one rounding of the residual and the float32 product explain.
    """
    figures = []
    for name, layer in lora_layers(base.adapted):
        truth = gate.reference(base.pristine[name].to(device))
        A, B = (factor["default"].weight.detach().to(device) for factor in (layer.lora_A, layer.lora_B))
        residual = layer.get_base_layer().weight.detach().to(device)
        deficit = gate.subspace_deficit(truth.weight, A, truth.optimum(len(A)))
        figures.append((deficit, gate.rounding_error(truth.weight, residual, B, A, layer.scaling["default"])))
    largest_deficit, largest_error = np.max(figures, axis=0)  # a NaN stays one, Python's max may drop it
    return float(largest_deficit), float(largest_error)


def run_case(case: ModelCase, providers: Sequence[str], *, device: str, repeats: int, with_memory: bool) -> list[Row]:
    """Gate all providers, time the green ones, measure their memory; one row each."""
    base = Base(case)
    subjects = {name: Injection(base, name, device) for name in providers}
    first = {name: timed(subject, device) for name, subject in subjects.items()}
    figures, reasons = {}, {}
    for name, subject in subjects.items():
        timed(subject, device)  # again: the last one ran on the same model
        if isinstance(subject.way.init, str):
            figures[name] = worst_deficit(base, device)
        reasons[name] = refusal(name, *figures.get(name, (0.0, 0.0)))
    green: dict[str, Subject] = {name: subject for name, subject in subjects.items() if reasons[name] is None}
    times = interleaved(green, first, repeats, device)
    peaks = measure_memory(base, list(green)) if with_memory else {}
    return [
        make_row(case, device, name, reasons[name], figures.get(name), times.get(name), peaks.get(name))
        for name in subjects
    ]


def refusal(provider: str, deficit: float, error: float) -> str | None:
    """Why a provider may not be timed, or None."""
    ours = provider.startswith("ours")
    limit = gate.PISSA_LIMIT if ours else gate.BASELINE_LIMIT
    if not deficit <= limit:
        return f"energy deficit {deficit:.1e} is above {limit:.1e}"
    if ours and not error <= 1:
        return f"reconstruction error, in units of the allowed rounding, {error:.1e} is above 1"
    return None


def measure_memory(base: Base, providers: Sequence[str]) -> dict[str, float]:
    """MiB that ``get_peft_model`` adds to the process at its peak, the adapter included, in a process of its own."""
    peaks = {}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "weights.pt"
        torch.save(base.pristine, path)
        for name in providers:
            command = [sys.executable, "-m", "bench.model", "--child", name, str(path)]
            command += [f"--{key}={value}" for key, value in dataclasses.asdict(base.case).items()]
            environ = dict(os.environ) | memory.MALLOC
            done = subprocess.run(
                command, cwd=environment.ROOT, env=environ, capture_output=True, text=True, check=True
            )
            peaks[name] = json.loads(done.stdout.splitlines()[-1])
    return peaks


def child(case: ModelCase, provider: str, path: str) -> float | None:
    """The part of that process: warm up on a small model, then the measurement."""
    small = Base(ModelCase(layers=1, width=512, inner=1536, rank=min(case.rank, 16), dtype=case.dtype))
    Injection(small, provider).run()
    base = Base.__new__(Base)
    base.case, base.model, base.adapted = case, case.build(), None
    for name, module in targets(base.model):
        module.weight.data.copy_(torch.load(path, mmap=True, weights_only=True)[name])
    return resident.peak_of(Injection(base, provider).run)


def make_row(
    case: ModelCase,
    device: str,
    provider: str,
    reason: str | None,
    figures: tuple[float, float] | None,
    times: Times | None,
    peak: float | None,
) -> Row:
    """One line of the results."""
    row: Row = {"case": case.name, **dataclasses.asdict(case), "device": device, "provider": provider}
    row |= {"ok": reason is None, "reason": reason}
    no_times = dict.fromkeys((field.name for field in dataclasses.fields(Times)), None) | {"repeats": 0}
    row |= dataclasses.asdict(times) if times else no_times
    adapter = sum(
        case.rank * sum(module.weight.shape) * 4 for _, module in targets(ModelCase(**dataclasses.asdict(case)).build())
    )
    deficit, error = figures or (None, None)
    return row | {
        "peak_extra_mib": peak,
        "adapter_mib": adapter / 2**20,
        "energy_deficit": deficit,
        "rounding": error,
    }


def cases(arguments: argparse.Namespace) -> list[ModelCase]:
    """The model asked for; with ``--sweep`` also fewer layers, and the same layers at smaller widths."""
    whole: ModelCase = arguments.case
    if not arguments.sweep:
        return [whole]
    fewer = [dataclasses.replace(whole, layers=layers) for layers in (1, 2, 4, 8) if layers < whole.layers]
    narrower = [
        dataclasses.replace(whole, layers=4, width=whole.width // part, inner=whole.inner // part)
        for part in (4, 2)
        if whole.width % (64 * whole.groups * part) == 0
    ]
    return [*narrower, *fewer, whole]


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse(argv)
    if arguments.child:
        [case] = cases(arguments)
        print(json.dumps(child(case, *arguments.child)))
        return 0
    about: Row = {
        "machine": environment.machine(arguments.device),
        "versions": environment.versions(),
        "commit": environment.commit(),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%MZ"),
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    green = True
    with arguments.out.open("a" if arguments.append else "w", encoding="utf-8") as file:
        for case in cases(arguments):
            print(case.name, file=sys.stderr, flush=True)
            for row in run_case(
                case,
                arguments.providers or STANDARD[arguments.device],
                device=arguments.device,
                repeats=arguments.repeats,
                with_memory=not arguments.no_memory and arguments.device == "cpu",
            ):
                write_row(file, row | about)
                green &= row["ok"]
    print(table(read_rows(arguments.out), "simple"))
    return 0 if green else 1


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.model", description=__doc__)
    add_case_arguments(parser)
    parser.add_argument("--sweep", action="store_true", help="also fewer layers and smaller widths")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where the model is")
    parser.add_argument("--providers", nargs="+", choices=PROVIDERS)
    parser.add_argument("--repeats", type=int, default=3, metavar="N", help="timed runs of each provider (3)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="default: bench/results/model-DEVICE.jsonl")
    parser.add_argument("--append", action="store_true", help="keep the rows that the file has")
    parser.add_argument("--no-memory", action="store_true", help="skip the memory processes")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.repeats < 1:
        parser.error("numbers are 1 or more")
    arguments.case = case_of(parser, arguments)
    gpu = arguments.device == "cuda" or any("GPU" in name for name in arguments.providers or ())
    if gpu and not torch.cuda.is_available():
        parser.error("this torch sees no CUDA device")
    arguments.out = arguments.out or RESULTS / f"model-{arguments.device}.jsonl"
    return arguments


if __name__ == "__main__":
    sys.exit(main())
