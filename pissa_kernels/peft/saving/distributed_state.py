"""Initial factors in a checkpoint of ``torch.distributed.checkpoint``, beside the state of the model."""

from __future__ import annotations

import json
from typing import Any

import torch
from torch import Tensor

from ...adapter.layers import lora_layers
from ...adapter.layouts import layout_of
from ...report import Report
from ...runtime.gathering import shape_of
from ..weights import forward, state
from ..weights.awaited import awaited
from ..weights.record import GONE, InitRecord, places_of, records, sharing

_REPORTS, _TENSORS = "reports", ("lora_A", "lora_B", "before", "after")


class PissaState:
    """The initial factors of a PiSSA model, as a part of a checkpoint that ``torch.distributed.checkpoint`` writes.

    A model's state dict has W_res, A and B. What its layers started from is no parameter, and without it nothing can be
    computed with W, nor converted. Every process has the same factors, and the checkpoint has them once. They may be
    loaded by another number of processes, into a model with the same adapters: one that
    :func:`pissa_kernels.patch_peft` has initialized, or whose layers were on the meta device.

    Args:
        peft_model: the model, before or after it is sharded.
        loading: whether the state is for ``dcp.load``. Only then may there be layers whose initial factors this process
            does not know, because their weights were on the meta device.

    Examples:
        >>> import peft, tempfile, torch, torch.distributed.checkpoint as dcp
        >>> import pissa_kernels as pk
        >>> from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
        >>> def build():
        ...     base = torch.nn.Sequential(torch.nn.Linear(48, 64, bias=False))
        ...     config = peft.LoraConfig(r=4, target_modules=["0"], init_lora_weights="pissa")
        ...     with pk.patch_peft():
        ...         return peft.get_peft_model(base, config)
        >>> model, folder = build(), tempfile.mkdtemp()
        >>> saved = {"model": get_model_state_dict(model), "pissa": pk.PissaState(model)}
        >>> _ = dcp.save(saved, checkpoint_id=folder)
        >>> other = build()
        >>> state = {"model": get_model_state_dict(other), "pissa": pk.PissaState(other, loading=True)}
        >>> dcp.load(state, checkpoint_id=folder)
        >>> _ = set_model_state_dict(other, state["model"])
        >>> x = torch.ones(1, 48)
        >>> with torch.no_grad(), pk.original_model(model), pk.original_model(other):
        ...     bool(torch.equal(model(x), other(x)))
        True
    """

    def __init__(self, peft_model: Any, *, loading: bool = False) -> None:
        self._model = getattr(peft_model, "_orig_mod", peft_model)
        self._loading = loading

    def state_dict(self) -> dict[str, Any]:
        """Tensors by "layer|adapter|field", and the reports of the layers as JSON.

        Raises:
            ValueError: the model has no initial factors, or an adapter that had some is gone, so that no state dict has
                its A and B, or without ``loading`` this process does not know those of a layer.
        """
        tensors: dict[str, Tensor] = {}
        reports: list[dict[str, Any]] = []
        for name, layer in lora_layers(self._model):
            for record in records(layer):
                if record.adapter == GONE:
                    raise ValueError(
                        f"{state.label(layer)}: the weight is the residual of an adapter that was deleted. Unload the "
                        "model, or keep the adapter, before it is saved in this format"
                    )
                # in memory of their own: adapters may share factors, and a load writes to these
                tensors |= {_key(name, record.adapter, field): getattr(record, field).clone() for field in _TENSORS}
                report = Report(layers=[record.report]).to_dict()
                reports.append({"layer": name, "adapter": record.adapter, "shared": record.shared, "report": report})
            for adapter in awaited(layer):
                if not self._loading:
                    raise ValueError(
                        f"{state.label_of(layer, name)}: this process does not know the initial factors of the adapter "
                        f"{adapter!r}. To save them, call pissa_kernels.share_initial(model) in all processes first; "
                        "to load them, use PissaState(model, loading=True)"
                    )
                tensors |= {_key(name, adapter, field): each for field, each in _empty(layer, adapter).items()}
        if not tensors:
            raise ValueError(
                f"{type(self._model).__name__} has no layer with initial factors, so there is nothing to save or load "
                "with PissaState; make the model with get_peft_model inside of pk.patch_peft()"
            )
        return {**tensors, _REPORTS: json.dumps(reports)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Give the layers the initial factors of a checkpoint.

        Raises:
            ValueError: it has not the factors of exactly those layers and adapters that the model has, in their shapes.
                Nothing has been changed then.
        """
        if _REPORTS not in state_dict:
            raise ValueError(
                f"the checkpoint has no initial factors: no key {_REPORTS!r} beside {sorted(state_dict)[:3]}; pass "
                "what PissaState.state_dict() returned"
            )
        reports: list[dict[str, Any]] = json.loads(state_dict[_REPORTS])
        layers = dict(lora_layers(self._model))
        given = {(stored["layer"], stored["adapter"]) for stored in reports}
        for name, layer in layers.items():
            for adapter in [record.adapter for record in records(layer)] + list(awaited(layer)):
                if (name, adapter) not in given:
                    raise ValueError(
                        f"{state.label_of(layer, name)}: the checkpoint has no initial factors of the adapter "
                        f"{adapter!r}; load one that was saved with this adapter"
                    )
        found: dict[str, list[InitRecord]] = {}
        for stored in reports:
            name, adapter = stored["layer"], stored["adapter"]
            if name not in layers or adapter not in layout_of(layers[name]).adapters:
                raise ValueError(
                    f"the checkpoint has initial factors of the adapter {adapter!r} of layer {name!r}, which the model "
                    "does not have; make it with the configuration that was saved"
                )
            tensors = _tensors(state_dict, name, adapter, _empty(layers[name], adapter))
            (report,) = Report.from_dict(stored["report"]).layers
            kept = found.setdefault(name, [])
            kept.append(sharing(InitRecord(adapter, report=report, shared=stored["shared"], **tensors), kept))
        for name, kept in found.items():
            forward.replace_records(layers[name], kept)


def _tensors(state_dict: dict[str, Any], name: str, adapter: str, expected: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a record, which have the shapes that the model's layer needs."""
    found = {field: state_dict.get(_key(name, adapter, field)) for field in _TENSORS}
    for field, tensor in found.items():
        shape = None if tensor is None else tuple(tensor.shape)
        if shape != tuple(expected[field].shape):
            raise ValueError(
                f"layer {name!r}: {field} of the adapter {adapter!r} in the checkpoint "
                f"{'is missing' if shape is None else f'is {shape}'}, and the model's layer needs "
                f"{tuple(expected[field].shape)}; make the model with the configuration that was saved"
            )
    return {field: tensor for field, tensor in found.items() if tensor is not None}


def _key(name: str, adapter: str, field: str) -> str:
    return f"{name}|{adapter}|{field}"


def _empty(layer: Any, adapter: str) -> dict[str, Tensor]:
    """Tensors of the shapes and dtypes that the record of a layer will have."""
    layout = layout_of(layer)
    stored = layout.weight.dtype
    found = {
        # the codes of a quantized weight have no dtype of factors
        field: torch.empty(shape_of(factor), dtype=stored if stored.is_floating_point else factor.dtype, device="cpu")
        for field, factor in zip(("lora_A", "lora_B"), layout.factors(adapter), strict=True)
    }
    length = len(places_of(shape_of(layout.weight)))
    return found | {field: torch.empty(length, dtype=torch.float32, device="cpu") for field in ("before", "after")}
