"""The matrices that PEFT's forward pass makes of an adapted layer, in float64, from what goes in and comes out."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any
from unittest import mock

import peft
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from .kinds import KINDS, Matrix, Stack, inputs_of
from .reference import energy_deficit


def stock(name: str, base: Any, config: Any, state: Mapping[str, Tensor], magnitudes: bool = False) -> Any:
    """PEFT's own model in float64, with the base weights and the factors of an adapted one.

    Args:
        name: a key of :data:`~.kinds.KINDS`.
        base: the base model.
        config: the adapter's ``LoraConfig``.
        state: state dict of the adapted model, whose adapter is named "default".
        magnitudes: take |A| and |B|, so that the low-rank term bounds the terms of its sums.
    """
    config = copy.deepcopy(config)
    config.init_lora_weights = False
    model = peft.get_peft_model(copy.deepcopy(base).double(), config)
    factors = {key: value for key, value in state.items() if "lora_" in key}
    assert factors
    values = {key: value.double() for key, value in state.items()}
    if magnitudes:
        values |= {key: value.double().abs() for key, value in factors.items()}
    model.load_state_dict(values)
    return model.eval()


def computed(name: str, base: Any, model: Any) -> dict[str, Tensor]:
    """The weights that a float64 model computes with, each as its parameter is stored, by name in the report.

    Nothing is read from parameters. A layer that is linear gets unit vectors; the attention and the experts are
    asked for the weights that they use. The kernel of a grouped convolution is the dense one, (out, in, …): its
    entries between different groups are zero unless the adapter makes them something else.
    """
    kind, layer = KINDS[name], model.base_model.model.layer
    inner = layer.get_base_layer()
    if isinstance(inner, nn.MultiheadAttention):
        found = _attention_weights(model, inputs_of(name, base).double())
        return dict(zip(kind.weights, found, strict=True))
    if isinstance(inner, (Stack, Matrix)):
        model(inputs_of(name, base).double())
        return {key: inner.read[key.rpartition(".")[2]] for key in kind.weights}
    with torch.no_grad():
        if isinstance(inner, nn.Embedding):
            scale = float(getattr(inner, "embed_scale", 1.0))
            return {next(iter(kind.weights)): layer(torch.arange(inner.num_embeddings)) / scale}
        if isinstance(inner, (nn.Linear, Conv1D)):
            size = inner.in_features if isinstance(inner, nn.Linear) else inner.nx
            rows = layer(torch.eye(size, dtype=torch.float64)) - layer(torch.zeros(1, size, dtype=torch.float64))
            return {next(iter(kind.weights)): rows if isinstance(inner, Conv1D) else rows.mT}
    return {next(iter(kind.weights)): _kernel(layer, inner)}


def _attention_weights(model: Any, x: Tensor) -> list[Tensor]:
    """in_proj and out_proj as the attention function gets them."""
    forward = nn.functional.multi_head_attention_forward
    seen: list[Tensor] = []

    def attention(*args: Any, **kwargs: Any) -> Any:
        seen.extend((args[5].detach().clone(), args[11].detach().clone()))
        return forward(*args, **kwargs)

    # with gradients the attention has one path, which takes the weights as arguments
    with torch.enable_grad(), mock.patch.object(nn.functional, "multi_head_attention_forward", attention):
        model(x.clone().requires_grad_())
    return seen


def _kernel(layer: Any, conv: Any) -> Tensor:
    """The dense kernel (out, in, …) of a convolution, from one pixel of its output for each single input."""
    size = [2 * k + 3 for k in conv.kernel_size]
    x = torch.zeros(1, conv.in_channels, *size, dtype=torch.float64)
    pixel = [n // 2 // s for n, s in zip(layer(x).shape[2:], conv.stride, strict=True)]

    def at_pixel(x: Tensor) -> Tensor:
        return layer(x)[(0, slice(None), *pixel)]  # type: ignore[no-any-return]

    with torch.enable_grad():
        jacobian = torch.autograd.functional.jacobian(at_pixel, x, vectorize=True)[:, 0]
    before = [
        (k - 1) // 2 if conv.padding == "same" else p
        for k, p in zip(conv.kernel_size, conv.padding if conv.padding != "same" else conv.kernel_size, strict=True)
    ]
    windows = [
        slice(at * s - p, at * s - p + k)
        for at, s, p, k in zip(pixel, conv.stride, before, conv.kernel_size, strict=True)
    ]
    kernel: Tensor = jacobian[(slice(None), slice(None), *windows)].clone()
    jacobian[(slice(None), slice(None), *windows)] = 0.0
    assert not jacobian.any(), "the output reads pixels outside of the kernel"
    return kernel


def rounded_deficit(W: Tensor, rank: int, scaling: float, dtype: torch.dtype) -> float:
    """Energy deficit of exact factors that are rounded to a dtype, and 2 % for the choice of vectors in a cluster.

    Rounding to bfloat16 alone leaves 2e-6 to 3e-6, depending on where the values of A are between powers of two, and
    more where a matrix is so small that A has few of them.
    """
    _, S, Vh = torch.linalg.svd(W, full_matrices=False)
    A = (S[:rank, None] / scaling).sqrt() * Vh[:rank]
    return 1.02 * energy_deficit(W, A.to(dtype))


def within_groups(kernel: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """The kernel (out, in/groups, …) in a dense one (out, in, …), and the dense one with zeros in its place."""
    outside = kernel.clone()
    blocks = [rows.chunk(groups, dim=1)[index] for index, rows in enumerate(outside.chunk(groups))]
    inside = torch.cat(blocks)
    for block in blocks:
        block.zero_()
    return inside, outside
