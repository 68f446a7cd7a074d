"""The providers of whole models: ``get_peft_model`` with and without ``patch_peft``."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any

import peft
import torch

import pissa_kernels as pk

from .llama import SPECTRA, Base, targets

OURS = "ours pissa"


@dataclass(frozen=True)
class Method:
    """How a provider injects an adapter.

    Attributes:
        init: value of ``init_lora_weights``; None to inject nothing, but copy all weights to the GPU and back.
        settings: arguments of ``patch_peft``; None for PEFT without the patch.
        on_cpu: whether the model is on the CPU when a GPU is measured.
        every_gpu: whether its weights are streamed through all GPUs of the machine.
    """

    init: str | bool | None
    settings: dict[str, Any] | None = None
    on_cpu: bool = False
    every_gpu: bool = False


PROVIDERS = {
    OURS: Method("pissa", {}),
    "ours pissa, one by one": Method("pissa", {"batch": False}),
    "ours pissa, through the GPU": Method("pissa", {"device": "cuda"}, on_cpu=True),
    "ours pissa, through every GPU": Method("pissa", {}, on_cpu=True, every_gpu=True),
    "copy to the GPU and back": Method(None, on_cpu=True),
    "peft pissa_niter_4": Method("pissa_niter_4"),
    "peft pissa": Method("pissa"),
    "peft plain LoRA": Method(True),
}
STANDARD = {
    "cpu": (OURS, "ours pissa, one by one", "peft pissa_niter_4", "peft plain LoRA"),
    "cuda": (OURS, "ours pissa, through the GPU", "copy to the GPU and back", "peft pissa_niter_4", "peft plain LoRA"),
}


class Injection:
    """One provider's ``get_peft_model`` on a base model.

    Args:
        base: base model.
        provider: key of :data:`PROVIDERS`.
        device: device to measure.

    Attributes:
        method: how it injects the adapter.
        report: report of the last run; None without ``patch_peft``.
    """

    def __init__(self, base: Base, provider: str, device: str = "cpu") -> None:
        self.base = base
        self.method = PROVIDERS[provider]
        self.device = device
        self.report: pk.Report | None = None

    def restore(self) -> None:
        self.base.restore("cpu" if self.method.on_cpu else self.device)

    def run(self) -> None:
        if self.method.init is None:
            for _, module in targets(self.base.model):
                module.weight.data.copy_(module.weight.data.to(self.device))
            return
        rank, settings = self.base.case.rank, self.method.settings
        if self.method.every_gpu:
            settings = {"device": [f"cuda:{index}" for index in range(torch.cuda.device_count())]}
        config = peft.LoraConfig(
            r=rank, lora_alpha=rank, init_lora_weights=self.method.init, target_modules=sorted(SPECTRA)
        )
        with contextlib.nullcontext() if settings is None else pk.patch_peft(**settings) as self.report:
            self.base.adapted = peft.get_peft_model(self.base.model, config)
