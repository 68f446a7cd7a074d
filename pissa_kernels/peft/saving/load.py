"""The adapter that PEFT is loading: its initial factors, and whether the base model is the one it was trained on."""

from __future__ import annotations

import inspect
import json
import os
import warnings
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from dataclasses import replace
from typing import Any

from torch import nn

from ...adapter.layers import lora_layers
from ...adapter.names import CONFIG_NAME
from ...checks import layer_context
from ...numerics import UNIT_ROUNDOFF
from ...report import REPORT_NAME, LayerReport, Report
from ..weights import forward, known, state
from ..weights.record import InitRecord, fingerprint, matches, of_adapter, records, same_factors
from ..weights.wrappers import all_names, base_of
from . import sidecar

# As ROUNDINGS, for the residual itself: a few merges.
RESIDUAL_ROUNDINGS = 2

# Source of the adapter that PEFT loads in this thread.
loading: ContextVar[Source | None] = ContextVar("pissa_kernels_loading", default=None)


class Source:
    """The folder or repository of an adapter.

    Args:
        location: the ``model_id`` of PEFT's ``from_pretrained``.
        options: its other keyword arguments, as for :func:`pissa_kernels.peft.saving.sidecar.find`.

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

    def check_layers(self, model: nn.Module, adapter: str) -> None:
        """Refuse initial factors of another model, for whose layers new factors would be computed.

        Args:
            model: the base model that gets the adapter.
            adapter: name of the adapter.

        Raises:
            ValueError: none of the layers is in the model.
        """
        found = self._all(adapter)
        if found and found.keys().isdisjoint({*all_names(model), *(name for name, _ in lora_layers(model))}):
            raise ValueError(
                f"{self.location} has the initial factors of {len(found)} layers, such as {next(iter(found))!r}, and "
                f"the model ({type(model).__name__}) has none of these. Load the base model that the adapter was "
                "trained on"
            )

    def has_initial(self, adapter: str) -> bool:
        """Whether the source has initial factors."""
        return bool(self._all(adapter))

    def values_for(self, peft_model: Any, adapter: str) -> list[tuple[Any, InitRecord | None]]:
        """The initial factors that belong to values which are loaded into an adapter that exists.

        A trainer loads like this when it resumes, or at the end the best model. PEFT subtracts nothing then. Values
        that were trained from other factors of the same weight, as on another backend, are used with those factors:
        the forward pass of the layer adds the difference.

        Returns:
            Layers whose record has to change, and the new record; None where the values are of a plain LoRA.

        Raises:
            ValueError: with the name of the layer; an adapter is merged, or the weight is not the one that this adapter
                was trained on; as for :meth:`check_layers`. Nothing has been loaded.
        """
        changed: list[tuple[Any, InitRecord | None]] = []
        self.check_layers(base_of(peft_model), adapter)
        found = self._all(adapter)
        plain = not found and self._is_plain()
        for name, layer in lora_layers(peft_model):
            given, own = found.get(name), of_adapter(layer, adapter)
            if adapter in layer.merged_adapters and (given is not None or own is not None):
                raise ValueError(f"{state.label(layer)}: the adapter {adapter!r} is merged; unmerge it before the load")
            if given is None:
                if plain and own is not None:
                    changed.append((layer, None))
                continue
            if not self._is_of(given, layer):
                with layer_context(state.label_of(layer, name)):
                    raise ValueError(
                        f"the weight is not the residual that the adapter in {self.location} was trained on. Make the "
                        "model with PeftModel.from_pretrained on the original base model, or with get_peft_model under "
                        "patch_peft() and the settings of the training."
                    )
            if records(layer) and (own is None or not same_factors(own, given)):
                changed.append((layer, given))
        return changed

    def _is_of(self, given: InitRecord, layer: Any) -> bool:
        """Whether values that were trained from ``given`` belong on a layer."""
        if not known.can_be_compared(layer):
            return True
        if records(layer):
            return known.is_known(layer) and known.is_original(layer, given)
        weight = state.values(layer)
        dtypes = (given.report.dtype, weight.dtype)
        # without records the residual itself has to be the same one; that of another sketch may be near
        return matches(given.after, fingerprint(weight), dtypes, roundings=RESIDUAL_ROUNDINGS)

    def _is_plain(self) -> bool:
        """Whether the adapter is a plain LoRA: neither its config nor a report says that it starts from a weight."""
        path = sidecar.find(self.location, self.options, CONFIG_NAME)
        if path is None or sidecar.find(self.location, self.options, REPORT_NAME) is not None:
            return False
        init = json.loads(path.read_text()).get("init_lora_weights", True)
        return not isinstance(init, str) or init in ("gaussian", "eva", "orthogonal", "mica")

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


def replace_records(config: Any, adapter: str, values: Sequence[tuple[Any, InitRecord | None]]) -> None:
    """Give the adapter of layers other initial factors, or none. The stored weights stay as they are.

    Args:
        config: the adapter's, which says afterwards what it has become.
        adapter: its name.
        values: result of :meth:`Source.values_for`.
    """
    for layer, record in values:
        forward.forget(layer, adapter)
        if record is not None:
            forward.remember(layer, replace(record, adapter=adapter, shared=True))
    inits = [record.report.init for _, record in values if record is not None]
    if values:
        config.init_lora_weights = inits[0] if inits else True


def _agree(now: LayerReport, saved: LayerReport) -> bool:
    """Whether two decompositions can be of the same weight, stored in the same dtype or in two."""
    if (now.shape, now.rank) != (saved.shape, saved.rank):
        return False
    difference = float((now.singular_values - saved.singular_values).abs().max())
    # Weyl: rounding moves σ by at most the norm of the rounding errors, about u·σ₁ for a weight of full rank
    rounding = 2 * max(UNIT_ROUNDOFF[now.dtype], UNIT_ROUNDOFF[saved.dtype]) if now.dtype != saved.dtype else 1e-3
    return difference <= rounding * float(saved.singular_values[0])
