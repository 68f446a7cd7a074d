"""Measurements of a model with a LoRA adapter against the original model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..adapter.layers import lora_layers
from ..numerics import exact_arithmetic, reconstruction

SENTENCES = [
    "The principal components of a weight matrix carry most of its energy.",
    "A frozen residual keeps the output of the model where it was.",
]


def model_inputs(model: Any, tokenizer: Any) -> dict[str, Tensor]:
    """A batch of :data:`SENTENCES`, or of random tokens if there is no tokenizer."""
    if tokenizer is not None:
        padded = tokenizer.pad_token is not None  # without padding, a batch has one sentence
        tokens = tokenizer(SENTENCES if padded else SENTENCES[:1], padding=padded, return_tensors="pt")
        return {key: tokens[key] for key in ("input_ids", "attention_mask") if key in tokens}
    generator = torch.Generator().manual_seed(0)
    return {"input_ids": torch.randint(0, model.config.vocab_size, (2, 16), generator=generator)}


def model_output(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    """Logits, or the last hidden state, of a model without a head; float64."""
    with exact_arithmetic(model.device):
        output = model(**inputs)
    tensor: Tensor = output.logits if "logits" in output else output.last_hidden_state
    return tensor.double()


def relative_difference(expected: Tensor, found: Tensor) -> float:
    """‖found − expected‖_F / ‖expected‖_F."""
    return float((found - expected).norm() / expected.norm())


def captured_energies(original: Any, adapted: nn.Module) -> Tensor:
    """‖W·V̂‖_F² of each layer in float64, for an orthonormal basis V̂ of the rows of its A."""
    energies = []
    for name, layer in lora_layers(adapted):
        weight = original.get_submodule(name).weight.detach().double()
        A = layer.lora_A["default"].weight.detach().double()
        view = weight.mT if layer.fan_in_fan_out else weight
        energies.append((view @ torch.linalg.qr(A.mT)[0]).square().sum())
    return torch.stack(energies)


def worst_reconstruction(original: Any, adapted: nn.Module) -> float:
    """Largest :func:`pissa_kernels.numerics.reconstruction` of any layer."""
    worst = 0.0
    for name, layer in lora_layers(adapted):
        weight, residual = original.get_submodule(name).weight.detach(), layer.get_base_layer().weight.detach()
        if layer.fan_in_fan_out:
            weight, residual = weight.mT, residual.mT
        A, B = (factors["default"].weight.detach() for factors in (layer.lora_A, layer.lora_B))
        worst = max(worst, reconstruction(weight, residual, A, B, layer.scaling["default"]))
    return worst
