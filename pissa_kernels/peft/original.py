"""The model as it was before PiSSA took anything out of its weights."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..adapter.layers import lora_layers
from .record import InitRecord, records


@contextlib.contextmanager
def original_model(peft_model: Any) -> Iterator[Any]:
    """Context in which a PiSSA model computes what its base model did before.

    ``disable_adapter()`` leaves the residual W − s·B₀·A₀, which is nobody's model. Here the initial term is put back:
    each adapted layer computes W_res·x + s·B₀·(A₀·x), the trained adapter left out, which is W·x to the rounding of its
    dtype. A reference policy for DPO or GRPO needs no second model then::

        with pk.original_model(model), torch.no_grad():
            reference = model(**batch).logits

    No parameter is touched, so a graph that is waiting for its backward pass is not disturbed. The initial factors are
    moved to where the layer computes, in float32, for as long as the context is open.

    Args:
        peft_model: made by PEFT under :func:`pissa_kernels.patch_peft`, or copied or unpickled from one.

    Yields:
        The same model.

    Raises:
        ValueError: no layer of it was initialised here, or an adapter is merged into the weights.
    """
    layers = [
        (name, layer, [initial for initial in records(layer) if not initial.shared])
        for name, layer in lora_layers(peft_model)
    ]
    if not any(taken for _, _, taken in layers):
        raise ValueError(
            "no layer of this model was initialised by pissa_kernels, so it is not known what was taken out of it; "
            "make or load it under patch_peft()"
        )
    merged = [name for name, layer, _ in layers if layer.merged]
    if merged:
        raise ValueError(f"an adapter is merged into layer {merged[0]!r} and {len(merged) - 1} more; unmerge it first")
    with contextlib.ExitStack() as stack:
        stack.enter_context(peft_model.disable_adapter())
        for _, layer, taken in layers:
            if taken:
                stack.callback(layer.register_forward_hook(_putting_back(taken)).remove)
        yield peft_model


def _putting_back(taken: list[InitRecord]) -> Any:
    moved: dict[torch.device, list[tuple[Tensor, Tensor]]] = {}

    def hook(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        x = inputs[0]
        if x.device not in moved:
            moved[x.device] = [
                (initial.lora_A.to(x.device).float(), initial.report.scaling * initial.lora_B.to(x.device).float())
                for initial in taken
            ]
        with torch.autocast(x.device.type, enabled=False):
            total = output.float()
            for A, B in moved[x.device]:
                total = total + nn.functional.linear(nn.functional.linear(x.float(), A), B)
        return total.to(output.dtype)

    return hook
