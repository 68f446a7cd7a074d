"""This package's initializer and PEFT's on copies of one model: time, and captured energy."""

from __future__ import annotations

import copy
import gc
import time
from dataclasses import dataclass
from typing import Any

import torch

from ..peft.patch import patch_peft
from .layers import Choice
from .measure import captured_energies

# A shorter initialization is timed three times, and the fastest counts.
REPEAT_BELOW_SECONDS = 10.0


@dataclass
class Run:
    """One way to initialize the model.

    Attributes:
        name: package and initializer, such as "PEFT pissa_niter_4".
        seconds: wall time of ``get_peft_model``, which also injects the layers of the adapter; fastest run.
        energy_lost: energy deficit of the worst layer, 1 − ‖W·V̂‖_F² relative to that of PEFT's full SVD; None if it
            was not measured.
        failed: why PEFT's initializer failed; None if it did not.
    """

    name: str
    seconds: float
    energy_lost: float | None = None
    failed: str | None = None


def inject(model: Any, rank: int, init: str | bool, choice: Choice) -> tuple[Any, float]:
    """A copy of the model with a LoRA adapter, and the wall time of ``get_peft_model`` in seconds."""
    import peft
    from transformers.pytorch_utils import Conv1D

    config = peft.LoraConfig(
        r=rank,
        lora_alpha=rank,
        init_lora_weights=init,
        target_modules=choice.target_modules,
        exclude_modules=choice.exclude_modules,
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.modules()),
    )
    model = copy.deepcopy(model)
    gc.collect()
    began = time.perf_counter()
    adapted = peft.get_peft_model(model, config)
    return adapted.eval(), time.perf_counter() - began


def compare_initializers(original: Any, adapted: Any, rank: int, init: str, choice: Choice, first: float) -> list[Run]:
    """Interleaved times of this package and of PEFT, and energy deficits relative to PEFT's full SVD."""
    energies = {"ours": captured_energies(original, adapted)}
    ours, exact, rough = Run(f"pissa_kernels {init}", first), Run("PEFT pissa", 0.0), Run("PEFT pissa_niter_4", 0.0)
    for round_number in range(3):
        if round_number:
            with patch_peft():
                ours.seconds = min(ours.seconds, inject(original, rank, init, choice)[1])
        for run in (exact, rough):
            if run.failed is not None:
                continue
            try:
                model, seconds = inject(original, rank, run.name.removeprefix("PEFT "), choice)
                run.seconds = min(run.seconds or seconds, seconds)
                if not round_number:
                    energies[run.name] = captured_energies(original, model)
                del model
            except Exception as error:  # PEFT's own, which says nothing of this package
                run.failed = f"{type(error).__name__}: {' '.join(str(error).split())}"
        if max(ours.seconds, exact.seconds, rough.seconds) > REPEAT_BELOW_SECONDS:
            break
    if exact.name in energies:
        ours.energy_lost = _energy_lost(energies["ours"], energies[exact.name])
        if rough.name in energies:
            rough.energy_lost = _energy_lost(energies[rough.name], energies[exact.name])
    return [ours, exact, rough]


def _energy_lost(found: torch.Tensor, exact: torch.Tensor) -> float:
    """Energy deficit of the worst layer. A weight of zeros has none."""
    return float((1 - found / exact).nan_to_num(nan=0.0).max())
