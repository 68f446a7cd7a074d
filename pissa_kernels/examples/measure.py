"""Measurements of a model with a LoRA adapter against the original model."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..adapter.layers import lora_layers
from ..numerics import UNIT_ROUNDOFF, exact_arithmetic, reconstruction

# Errors that the bound on a model's outputs allows, in unit roundoffs for each layer.
ROUNDOFFS = 8

Outputs = dict[str, Tensor]


def model_outputs(model: Any, inputs: Mapping[str, Any]) -> Outputs:
    """Every floating-point tensor that a forward pass returns, by its name in the output; float64.

    Raises:
        ValueError: there is none.
    """
    with exact_arithmetic(model.device), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # some models draw random numbers in evaluation mode too
        output = model(**inputs)
    found = dict(_floating("output", output))
    if not found:
        raise ValueError(f"{type(model).__name__} returns no floating-point tensor that could be compared")
    return found


def _floating(name: str, value: Any) -> Iterator[tuple[str, Tensor]]:
    """The tensors in an output; caches of keys and values, which are objects of their own, are left out."""
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield name, value.double()
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _floating(str(key) if name == "output" else f"{name}.{key}", item)
    elif isinstance(value, (tuple, list)):
        for index, item in enumerate(value):
            yield from _floating(f"{name}.{index}", item)


def outputs_and_calls(model: nn.Module, inputs: Mapping[str, Any]) -> tuple[Outputs, set[str]]:
    """As :func:`model_outputs`, and the names of the modules that the forward pass calls."""
    called: set[str] = set()
    handles = [
        module.register_forward_pre_hook(lambda *_, name=name: called.add(name))
        for name, module in model.named_modules()
    ]
    try:
        return model_outputs(model, inputs), called
    finally:
        for handle in handles:
            handle.remove()


def largest_difference(expected: Outputs, found: Outputs) -> float:
    """Largest :func:`relative_difference` of any tensor; Inf where tensors are missing, or not finite in other places.

    Models write −Inf into scores on purpose, so elements that are not finite have to be the same.
    """
    if expected.keys() != found.keys():
        return math.inf
    worst = 0.0
    for name, tensor in expected.items():
        other, finite = found[name], tensor.isfinite()
        if tensor.shape != other.shape or not torch.equal(tensor[~finite].nan_to_num(), other[~finite].nan_to_num()):
            return math.inf
        difference = relative_difference(tensor[finite], other[finite])
        if not math.isfinite(difference):  # 0/0 for a tensor of zeros
            difference = 0.0 if torch.equal(tensor[finite], other[finite]) else math.inf
        worst = max(worst, difference)
    return worst


def rounding_allowed(model: Any, names: Sequence[str], inputs: Mapping[str, Any], expected: Outputs) -> float:
    """How far outputs move if each of these linear layers is off by 8 unit roundoffs; largest of four seeds.

    The layer computes with a weight whose elements are off by that, in random directions, and rounds its result. In a
    model whose layers keep relative errors, the errors add like a random walk to 8 unit roundoffs times the square root
    of the number of layers. Where small differences grow (routers that choose among experts, normalizations of values
    that are nearly constant, many layers), only the model itself can tell.

    Args:
        model: the original model.
        names: its layers that are adapted.
        inputs: of the forward pass.
        expected: outputs without the errors.
    """
    moved = 0.0
    for seed in range(4):
        disturb = _disturbing(torch.Generator().manual_seed(seed))
        handles = [model.get_submodule(name).register_forward_hook(disturb, with_kwargs=True) for name in names]
        try:
            moved = max(moved, largest_difference(expected, model_outputs(model, inputs)))
        finally:
            for handle in handles:
                handle.remove()
    return moved


def _disturbing(generator: torch.Generator) -> Callable[[Any, tuple[Any, ...], dict[str, Any], Tensor], Tensor]:
    """A hook that adds, to what a linear layer returns, what errors of random signs in its weight add."""

    def disturb(layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
        weight, values = layer.weight, args[0] if args else next(iter(kwargs.values()))
        signs = 2 * torch.randint(0, 2, weight.shape, generator=generator).to(weight) - 1
        error = weight * signs
        added = values.to(weight.dtype) @ (error.mT if isinstance(layer, nn.Linear) else error)
        disturbed: Tensor = output.float() + ROUNDOFFS * UNIT_ROUNDOFF[weight.dtype] * added.float()
        return disturbed.to(output.dtype)

    return disturb


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
