"""Whether what a module computes with its weight is what PEFT's adapter of its kind assumes.

PEFT computes the adapter of a convolution or an embedding beside the module, from the module's settings. Where it
leaves some of them out, a plain LoRA still starts from the model's own function, because B is zero. PiSSA does not.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ...adapter.layouts import Layout

_CONVOLVE: dict[type[Any], Any] = {
    nn.Conv1d: functional.conv1d,
    nn.Conv2d: functional.conv2d,
    nn.Conv3d: functional.conv3d,
}
# Units in the last place of the dtype within which a module agrees with torch's function.
_UNITS = 8


def check_form(layout: Layout) -> None:
    """Refuse a layer whose adapter PEFT computes in another way than the module computes with its weight.

    Raises:
        ValueError: with what was found; :func:`pissa_kernels.checks.layer_context` adds the layer.
    """
    base = layout.module
    if not layout.by_output:
        if layout.transposed and layout.parts == 1:
            raise ValueError(
                f"the stack {tuple(layout.weight.shape)} has one matrix, stored (in, out), to which PEFT adds the "
                "product B·A without transposing it. Leave the parameter out of target_parameters"
            )
    elif isinstance(base, nn.Embedding):
        _check_embedding(base, layout)
    elif (kind := next((kind for kind in _CONVOLVE if isinstance(base, kind)), None)) is not None:
        _check_convolution(base, kind)


def _check_convolution(base: Any, kind: type[Any]) -> None:
    left_out = {"dilation": set(base.dilation) - {1}, "padding_mode": {base.padding_mode} - {"zeros"}}
    for setting, other in left_out.items():
        if other:
            raise ValueError(
                f"the convolution has {setting}={getattr(base, setting)!r}, which PEFT does not give to its adapter, "
                "so that it would compute with other elements of the input. Leave the layer out of target_modules"
            )
    if type(base).forward is kind.forward and type(base)._conv_forward is kind._conv_forward:
        return
    weight = base.weight.detach()
    shape = (1, base.in_channels, *(2 * size for size in base.kernel_size))
    x = torch.linspace(-1.0, 1.0, torch.Size(shape).numel(), dtype=torch.float64, device=weight.device)
    x = x.reshape(shape).to(weight.dtype)
    expected = _CONVOLVE[kind](x, weight, base.bias, stride=base.stride, padding=base.padding, groups=base.groups)
    _check_computes(base, x, expected, "a convolution of its input with its weight")


def _check_embedding(base: Any, layout: Layout) -> None:
    if base.max_norm is not None:
        raise ValueError(
            f"the embedding has max_norm={base.max_norm}, and rescales the rows of its weight, which would be those of "
            "the residual. Leave the layer out of target_modules"
        )
    if type(base).forward is nn.Embedding.forward:
        return
    weight = base.weight.detach()
    index = torch.tensor([[len(weight) - 1, 0]], device=weight.device)
    # the identity as B: rows of W, scaled as PEFT scales its adapter
    expected = layout.product(index, weight.mT, torch.eye(weight.shape[1], dtype=weight.dtype, device=weight.device))
    _check_computes(base, index, expected, "the rows of its weight that its input names")


def _check_computes(base: Any, x: Tensor, expected: Tensor, what: str) -> None:
    try:
        with torch.no_grad():
            found = type(base).forward(base, x)
        close = _UNITS * torch.finfo(expected.dtype).eps * expected.abs().max()
        same = found.shape == expected.shape and bool(((found - expected).abs() <= close).all())
    except Exception:  # whatever a class of other code raises for this input
        same = False
    if not same:
        raise ValueError(
            f"{type(base).__name__} has a forward pass of its own, which is not {what}, and PEFT computes the adapter "
            "as if it were. Leave the layer out of target_modules"
        )
