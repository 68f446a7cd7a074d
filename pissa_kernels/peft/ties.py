"""Parameters of a model that share memory."""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import Tensor, nn


class Ties:
    """An index of a model's parameters by their memory, built once for all layers.

    A weight that a model uses in two places must not become a residual: the second place has no adapter. Parameters
    share memory if they are the same object (transformers' tied embeddings, also while DeepSpeed ZeRO-3 keeps an empty
    partition), or if their bytes overlap.

    Args:
        model: the model, indexed in its current state. A module that is registered twice counts twice.
    """

    def __init__(self, model: nn.Module) -> None:
        # by parameter id: all parameters connected to it through shared memory, in the model's order
        self._groups: dict[int, list[tuple[nn.Module, str, str]]] = defaultdict(list)
        # keeps the parameters alive, so that no id is reused while the index exists
        self._parameters: list[Tensor] = []
        extents: dict[torch.device, list[tuple[int, int, int]]] = defaultdict(list)
        for name, module in model.named_modules(remove_duplicate=False):
            for key, parameter in module._parameters.items():
                if parameter is None or parameter.is_meta:
                    continue
                if id(parameter) not in self._groups:
                    self._parameters.append(parameter)
                    if parameter.numel() and parameter.layout == torch.strided:
                        extents[parameter.device].append((*extent(parameter), id(parameter)))
                self._groups[id(parameter)].append((module, key, name))
        for spans in extents.values():
            self._join_overlapping(sorted(spans))

    def _join_overlapping(self, spans: list[tuple[int, int, int]]) -> None:
        reached, last = 0, 0
        for start, stop, parameter in spans:
            if start < reached:
                group = self._groups[last]
                group.extend(self._groups[parameter])
                self._groups[parameter] = group
            else:
                last = parameter
            reached = max(reached, stop)

    def of(self, module: nn.Module, key: str = "weight") -> str | None:
        """Name of another parameter that shares memory with ``module``'s, or None."""
        own = True
        for other, other_key, name in self._groups.get(id(getattr(module, key)), ()):
            if own and other is module and other_key == key:
                own = False  # a second entry is the same module under another name
            else:
                return f"{name}.{other_key}"
        return None


def extent(tensor: Tensor) -> tuple[int, int]:
    """Address of a tensor's first byte, and the address after its last."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    start = tensor.data_ptr()
    return start, start + (last + 1) * tensor.element_size()
