"""The model as it was before PiSSA."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..adapter.layers import lora_layers
from .record import InitRecord, records


@contextlib.contextmanager
def original_model(peft_model: Any) -> Iterator[Any]:
    """Context in which a PiSSA model computes what its base model did before the initialization.

    ``disable_adapter()`` leaves the residual W − s·B₀·A₀, which is another model. This context adds the initial term
    instead of the trained one: each adapted layer computes W_res·x + s·B₀·(A₀·x), which is W·x to the rounding of its
    dtype. So a reference policy for DPO or GRPO needs no second model::

        with pk.original_model(model), torch.no_grad():
            reference = model(**batch).logits

    No parameter is changed, so a graph that waits for its backward pass stays valid. While the context is open, the
    initial factors are in float32 on the devices on which the layers compute.

    Args:
        peft_model: made by PEFT under :func:`pissa_kernels.patch_peft`, or copied or unpickled from such a model.

    Yields:
        The same model.

    Raises:
        ValueError: no layer of the model was initialized by this package, or an adapter is merged into the weights.

    Examples:
        >>> import copy, peft, torch
        >>> import pissa_kernels as pk
        >>> base = torch.nn.Sequential(torch.nn.Linear(48, 64), torch.nn.ReLU(), torch.nn.Linear(64, 8))
        >>> config = peft.LoraConfig(r=4, target_modules=["0"], init_lora_weights="pissa")
        >>> with pk.patch_peft():
        ...     model = peft.get_peft_model(copy.deepcopy(base), config)
        >>> x = torch.ones(1, 48)
        >>> with torch.no_grad(), model.disable_adapter():
        ...     bool(torch.allclose(model(x), base(x), atol=1e-5))
        False
        >>> with torch.no_grad(), pk.original_model(model):
        ...     bool(torch.allclose(model(x), base(x), atol=1e-5))
        True
    """
    layers = [
        (name, layer, [record for record in records(layer) if not record.shared])
        for name, layer in lora_layers(peft_model)
    ]
    if not any(subtracted for _, _, subtracted in layers):
        raise ValueError(
            "no layer of this model was initialized by pissa_kernels, so its original weights are not known; make or "
            "load it under patch_peft()"
        )
    merged = [name for name, layer, _ in layers if layer.merged]
    if merged:
        raise ValueError(f"an adapter is merged into layer {merged[0]!r} and {len(merged) - 1} more; unmerge it first")
    with contextlib.ExitStack() as stack:
        stack.enter_context(peft_model.disable_adapter())
        for _, layer, subtracted in layers:
            if subtracted:
                stack.callback(layer.register_forward_hook(_adding(subtracted)).remove)
        yield peft_model


def _adding(subtracted: list[InitRecord]) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
    """Forward hook that adds s·B₀·A₀·x of every record to the output of a layer."""
    moved: dict[torch.device, list[tuple[Tensor, Tensor]]] = {}

    def hook(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        x = inputs[0]
        if x.device not in moved:
            moved[x.device] = [
                (record.lora_A.to(x.device).float(), record.report.scaling * record.lora_B.to(x.device).float())
                for record in subtracted
            ]
        with torch.autocast(x.device.type, enabled=False):
            total = output.float()
            for A, B in moved[x.device]:
                total = total + nn.functional.linear(nn.functional.linear(x.float(), A), B)
        return total.to(output.dtype)

    return hook
