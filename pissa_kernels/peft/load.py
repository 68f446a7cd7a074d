"""The adapter that PEFT is loading: its initial factors, and whether the base model is the one it was trained on."""

from __future__ import annotations

import inspect
import os
import warnings
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from typing import Any

from torch import Tensor

from ..adapter.layers import lora_layers
from ..checks import layer_context
from ..numerics import UNIT_ROUNDOFF
from ..report import REPORT_NAME, LayerReport, Report
from . import sidecar
from .record import InitRecord, matches

# Source of the adapter that PEFT loads in this thread.
loading: ContextVar[Source | None] = ContextVar("pissa_kernels_loading", default=None)


class Source:
    """The folder or repository of an adapter.

    Args:
        location: the ``model_id`` of PEFT's ``from_pretrained``.
        options: its other keyword arguments, as for :func:`pissa_kernels.peft.sidecar.find`.

    Attributes:
        missing: names of the layers without initial factors, in the order in which PEFT creates the layers.
    """

    def __init__(self, location: str | os.PathLike[str], options: dict[str, Any]) -> None:
        self.location = location
        self.options = options
        self.missing: list[str | None] = []
        self._records: dict[str, InitRecord] | None = None

    @classmethod
    def of_call(cls, function: Callable[..., Any], *args: Any, **kwargs: Any) -> tuple[Source, str]:
        """Source and adapter name in the arguments of ``PeftModel.from_pretrained`` or ``load_adapter``."""
        call = inspect.signature(function).bind(*args, **kwargs)
        call.apply_defaults()
        return cls(call.arguments["model_id"], call.arguments["kwargs"]), call.arguments["adapter_name"]

    def initial(self, name: str | None, adapter: str) -> InitRecord | None:
        """The record of one layer, or None.

        Raises:
            ValueError: the file of the initial factors is damaged.
        """
        found = self._all(adapter).get(name) if name is not None else None
        if found is None:
            self.missing.append(name)
        return found

    def check_residuals(self, peft_model: Any, adapter: str) -> None:
        """Refuse a model whose weights are not the residuals that this adapter was trained on.

        For an adapter whose values are loaded into an existing one, as when a trainer resumes from a checkpoint. PEFT
        subtracts nothing then, so a residual of another seed or of an unseeded sketch would give another model.

        Raises:
            ValueError: with the name of the layer. Nothing has been loaded.
        """
        for name, layer in lora_layers(peft_model):
            given, weight = self._all(adapter).get(name), layer.get_base_layer().weight
            # a partitioned or sharded weight cannot be compared
            if given is None or weight.is_meta or weight.ndim != 2 or type(weight.data) is not Tensor:
                continue
            if not matches(given.after, given.report.dtype, weight):
                with layer_context(f"layer {name!r}, weight {tuple(weight.shape)}"):
                    raise ValueError(
                        f"the weight is not the residual that the adapter in {self.location} was trained on. Make the "
                        "model with PeftModel.from_pretrained on the original base model, or with get_peft_model under "
                        "patch_peft() and the settings of the training."
                    )

    def warn_of_other_residuals(self, layers: Sequence[LayerReport]) -> None:
        """Warn if a residual was computed by an SVD and may differ from the residual of the training.

        Args:
            layers: reports of the layers initialized while the adapter was loaded.
        """
        recomputed = [layer for layer in layers if layer.name in self.missing]
        if not recomputed:
            return
        path = sidecar.find(self.location, self.options, REPORT_NAME)
        saved = {layer.name: layer for layer in Report.read(path).layers} if path is not None else {}
        differing = [layer.name for layer in recomputed if layer.name in saved and not _agree(layer, saved[layer.name])]
        unseeded = [layer for layer in recomputed if layer.name not in saved and layer.init != "pissa"]
        if differing:
            warnings.warn(
                f"{self.location} has no {sidecar.INITIAL_NAME}, so its residual was computed again, and the singular "
                f"values of {len(differing)} layers (the first is {differing[0]!r}) differ from those in its "
                f"{REPORT_NAME}. Load the base model that the adapter was trained on, neither its residual nor another "
                "model.",
                stacklevel=4,  # the caller of from_pretrained or load_adapter
            )
        if unseeded:
            warnings.warn(
                f"{self.location} has neither {sidecar.INITIAL_NAME} nor {REPORT_NAME}, and was initialized with "
                f"{unseeded[0].init!r}. If it was trained without pissa_kernels, its sketch was not seeded, and the "
                "residual computed now differs from that of the training.",
                stacklevel=4,
            )

    def _all(self, adapter: str) -> dict[str, InitRecord]:
        if self._records is None:
            path = sidecar.find(self.location, self.options)
            self._records = {} if path is None else sidecar.read(path, adapter)
        return self._records


def _agree(now: LayerReport, saved: LayerReport) -> bool:
    """Whether two decompositions can be of the same weight, stored in the same dtype or in two."""
    if (now.shape, now.rank) != (saved.shape, saved.rank):
        return False
    difference = float((now.singular_values - saved.singular_values).abs().max())
    # Weyl: rounding moves σ by at most the norm of the rounding errors, about u·σ₁ for a weight of full rank
    rounding = 2 * max(UNIT_ROUNDOFF[now.dtype], UNIT_ROUNDOFF[saved.dtype]) if now.dtype != saved.dtype else 1e-3
    return difference <= rounding * float(saved.singular_values[0])
