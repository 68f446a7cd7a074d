"""Where an adapter that is being loaded comes from, and what it brings along."""

from __future__ import annotations

import inspect
import os
import warnings
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from typing import Any

from torch import Tensor

from ..adapter.layers import lora_layers
from ..numerics import UNIT_ROUNDOFF
from ..report import REPORT_NAME, LayerReport, Report
from . import sidecar
from .record import InitRecord, matches

# Where the adapter that PEFT loads in this thread comes from.
loading: ContextVar[Source | None] = ContextVar("pissa_kernels_loading", default=None)


class Source:
    """The folder or repository of an adapter.

    Attributes:
        missing: layers that the adapter has no initial factors for, in the order of the questions.
    """

    def __init__(self, location: str | os.PathLike[str], options: dict[str, Any]) -> None:
        self.location = location
        self.options = options
        self.missing: list[str | None] = []
        self._initials: dict[str, InitRecord] | None = None

    @classmethod
    def of_call(cls, function: Callable[..., Any], *args: Any, **kwargs: Any) -> tuple[Source, str]:
        """Of a call of ``PeftModel.from_pretrained`` or ``load_adapter``, and the adapter's name in it."""
        call = inspect.signature(function).bind(*args, **kwargs)
        call.apply_defaults()
        return cls(call.arguments["model_id"], call.arguments["kwargs"]), call.arguments["adapter_name"]

    def initial(self, name: str | None, adapter: str) -> InitRecord | None:
        """The initial factors of one layer, or None where there are none.

        Raises:
            ValueError: the file with them is damaged.
        """
        found = self._all(adapter).get(name) if name is not None else None
        if found is None:
            self.missing.append(name)
        return found

    def check_residual(self, peft_model: Any, adapter: str) -> None:
        """Refuse a model whose weights are not the residuals that this adapter was trained on.

        For an adapter that is loaded into one that is there already, as a trainer resumes from a checkpoint: no
        residual is taken then, and one of another seed or of an unseeded sketch would pass unnoticed.

        Raises:
            ValueError: with the layer's name; nothing has been loaded.
        """
        for name, layer in lora_layers(peft_model):
            given, weight = self._all(adapter).get(name), layer.get_base_layer().weight
            # a partitioned or sharded weight cannot be looked at here
            if given is None or weight.is_meta or weight.ndim != 2 or type(weight.data) is not Tensor:
                continue
            if not matches(given.after, given.report.dtype, weight):
                raise ValueError(
                    f"the weight of layer {name!r} {tuple(weight.shape)} is not the residual that the adapter in "
                    f"{self.location} was trained on. Make the model with PeftModel.from_pretrained on the original "
                    "base model, or with get_peft_model under patch_peft() as for the training."
                )

    def _all(self, adapter: str) -> dict[str, InitRecord]:
        if self._initials is None:
            path = sidecar.find(self.location, self.options)
            self._initials = {} if path is None else sidecar.read(path, adapter)
        return self._initials

    def compare(self, layers: Sequence[LayerReport]) -> None:
        """Warn where a residual was taken anew and may differ from the one that the adapter was trained on.

        Args:
            layers: what was done while the adapter was loaded.
        """
        anew = [layer for layer in layers if layer.name in self.missing]
        if not anew:
            return
        path = sidecar.find(self.location, self.options, REPORT_NAME)
        before = {layer.name: layer for layer in Report.read(path).layers} if path is not None else {}
        differ = [layer.name for layer in anew if layer.name in before and not _agree(layer, before[layer.name])]
        unseeded = [layer.name for layer in anew if layer.name not in before and layer.init != "pissa"]
        if differ:
            warnings.warn(
                f"{self.location} has no {sidecar.INITIAL_NAME}, so its residual was taken anew, and the singular "
                f"values of {len(differ)} layers (the first is {differ[0]!r}) are not those of its {REPORT_NAME}. "
                "Load the base model that it was trained on, neither its residual nor another.",
                stacklevel=4,
            )
        if unseeded:
            warnings.warn(
                f"{self.location} has neither {sidecar.INITIAL_NAME} nor {REPORT_NAME}, and says "
                f"init_lora_weights={anew[0].init!r}. If it was trained without pissa_kernels, its sketch was not "
                "seeded, and the residual that was taken now is not the one that it was trained on.",
                stacklevel=4,
            )


def _agree(now: LayerReport, before: LayerReport) -> bool:
    """Whether two decompositions can be of one weight, as stored in one dtype or in two."""
    if (now.shape, now.rank) != (before.shape, before.rank):
        return False
    apart = float((now.singular_values - before.singular_values).abs().max())
    # Weyl: rounding moves σ by no more than the rounding's own norm, some u·σ₁ for a weight of full rank
    rounding = 2 * max(UNIT_ROUNDOFF[now.dtype], UNIT_ROUNDOFF[before.dtype]) if now.dtype != before.dtype else 1e-3
    return apart <= rounding * float(before.singular_values[0])
