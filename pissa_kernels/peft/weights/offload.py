"""Weights that accelerate has offloaded: the module holds an empty parameter, its hook knows where the values are.

``cpu_offload`` and ``device_map`` put the parameters of a module on the meta device and keep the values in a map that
belongs to the module's hook. A weight in memory can be changed there, and the next forward pass loads what is there
then. A weight on disk cannot: the folder, or the checkpoint, belongs to the user.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ...adapter.layers import lora_layers


@contextlib.contextmanager
def resident(model: nn.Module, adapter: str | None = None) -> Iterator[None]:
    """Context in which offloaded parameters are the tensors in memory that hold their values.

    Nothing is copied. What is written to such a parameter is what the next forward pass loads. Parameters on disk stay
    on the meta device.

    Args:
        model: the model.
        adapter: name of an adapter that PEFT creates in the context, on the CPU. It is moved to the devices on which
            the hooks execute its layers.
    """
    empty = [
        (module, key, parameter, values)
        for module in model.modules()
        for key, parameter in module._parameters.items()
        if parameter is not None and parameter.is_meta and (values := values_of(module, key)) is not None
    ]
    for module, key, parameter, values in empty:
        module._parameters[key] = nn.Parameter(values, requires_grad=parameter.requires_grad)
    try:
        yield
    finally:
        for module, key, parameter, values in empty:
            held: Any = module._parameters[key]
            if held.data_ptr() != values.data_ptr():
                values.copy_(held.detach())
            parameter.requires_grad_(held.requires_grad)
            module._parameters[key] = parameter
        if adapter is not None and empty:
            _execute_with_base(model, adapter)


def values_of(module: nn.Module, key: str) -> Tensor | None:
    """The tensor in memory that holds the values of an offloaded parameter; None where there is none.

    Args:
        module: the module that owns the parameter.
        key: name of the parameter in it.
    """
    hook = _hook_of(module)
    parameter = module._parameters.get(key)
    if hook is None or parameter is None or type(parameter) is not nn.Parameter:
        return None
    found = _in_memory(hook.weights_map, key)
    plain = type(found) in (Tensor, nn.Parameter) and (found.shape, found.dtype) == (parameter.shape, parameter.dtype)
    return found.detach() if plain else None


def is_offloaded(module: nn.Module) -> bool:
    """Whether accelerate loads the parameters of a module for each of its forward passes."""
    return _hook_of(module) is not None


def loads_children(module: nn.Module) -> bool:
    """Whether accelerate loads the parameters of all modules inside a module together (``preload_module_classes``)."""
    return any(hook.place_submodules for hook in _offloading(module))


def _hook_of(module: nn.Module) -> Any:
    """The hook whose values the forward pass of a module uses: the last one that offloads its own parameters."""
    return next((hook for hook in reversed(list(_offloading(module))) if not hook.place_submodules), None)


def _offloading(module: nn.Module) -> Iterator[Any]:
    from accelerate.hooks import AlignDevicesHook

    waiting = [getattr(module, "_hf_hook", None)]
    while waiting:
        hook = waiting.pop(0)
        if isinstance(hook, AlignDevicesHook) and hook.offload and hook.weights_map is not None:
            yield hook
        waiting[:0] = getattr(hook, "hooks", ())  # a SequentialHook


def _in_memory(values: Any, key: str) -> Any:
    """The value of a key if it is in memory; a weight on disk is not read."""
    from accelerate.utils import OffloadedWeightsLoader
    from accelerate.utils.offload import PrefixedDataset

    while isinstance(values, PrefixedDataset):
        key, values = f"{values.prefix}{key}", values.dataset
    if isinstance(values, OffloadedWeightsLoader):
        values = values.state_dict
    if isinstance(values, dict):
        return values.get(key)
    if key not in values:
        return None
    first, second = values[key], values[key]  # another kind of map: the same memory each time, or read from a file
    return first if isinstance(first, Tensor) and first.data_ptr() == second.data_ptr() else None


def _execute_with_base(model: nn.Module, adapter: str) -> None:
    """Move an adapter to the devices on which its offloaded layers compute."""
    for _, layer in lora_layers(model):
        hook = _hook_of(layer.get_base_layer())
        if hook is None or hook.execution_device is None:
            continue
        for name in layer.adapter_layer_names:
            factors = getattr(layer, name, None)
            if not isinstance(factors, (nn.ModuleDict, nn.ParameterDict)) or adapter not in factors:
                continue
            values = factors[adapter]
            held = list(values.parameters()) if isinstance(values, nn.Module) else [values]
            for parameter in held:
                if not parameter.is_meta:
                    parameter.data = parameter.data.to(_device(hook.execution_device))


def _device(device: Any) -> torch.device:
    return torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
