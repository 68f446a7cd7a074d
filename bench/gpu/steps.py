"""The steps of a run, in order of worth."""

from __future__ import annotations

import importlib
import traceback
from collections.abc import Callable
from dataclasses import dataclass

from .record import Recorder, Settings


@dataclass(frozen=True)
class Step:
    """One part of a run.

    Attributes:
        name: name in the rows; ``--steps`` selects it.
        function: "module:function" in this package; takes a :class:`Recorder`.
        limit: seconds after which it is stopped.
        summary: what it shows.
    """

    name: str
    function: str
    limit: int
    summary: str

    def load(self) -> Callable[[Recorder], None]:
        module, _, name = self.function.partition(":")
        function: Callable[[Recorder], None] = getattr(importlib.import_module(f"{__package__}.{module}"), name)
        return function


STEPS = {
    step.name: step
    for step in (
        Step("compile", "compile:compile_all", 110, "nvcc on csrc, and Triton on the kernels of smoke, in parallel"),
        Step("smoke", "smoke:smoke", 120, "every operation on every backend against float64"),
        Step("resident", "resident:resident", 150, "a model of Llama-2-7B's shape on the GPU, beside PEFT"),
        Step("profile", "profiled:profile_injection", 60, "time by kernel, launches, host synchronizations"),
        Step("kernels", "kernels:kernels", 100, "kernels beside the copy rate, cuBLAS and torch.linalg"),
        Step("streamed", "streamed:streamed", 90, "the model in CPU memory through the GPU, beside its copies"),
        Step("engine", "others:engine", 90, "initializers over a few shapes, ranks and spectra"),
        Step("tests", "others:tests", 120, "the tests that need a GPU"),
        Step("search", "others:search", 240, "launch parameters of the Triton kernels"),
    )
}


def run_step(name: str, settings: Settings) -> bool:
    """Run one step in this process; whether all its rows are ok. An exception becomes a red row."""
    recorder = Recorder(name, settings)
    try:
        STEPS[name].load()(recorder)
    except Exception as error:
        traceback.print_exc()
        recorder.row(name, "step", reason=f"raised {type(error).__name__}: {str(error)[:300]}")
    return recorder.ok
