"""Parameters of a model that share memory, and modules that it holds in several places."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from ...runtime.shards import is_sharded


class Ties:
    """An index of a model's parameters by their memory, built for the first module that is asked for.

    A weight that a model uses in two modules must not become a residual: the second module has no adapter. Parameters
    share memory if they are the same object (transformers' tied embeddings, also while DeepSpeed ZeRO-3 keeps an empty
    partition), or if their bytes overlap.

    Args:
        model: the model, indexed in its state at that time.
        replicated: whether the model repeats layers that share their weights (``layer_replication``).

    Attributes:
        kept: tells by the name of a module whether PEFT keeps its adapter equal to that of the embedding
            (``ensure_weight_tying``).
    """

    def __init__(
        self, model: nn.Module, *, replicated: bool = False, kept: Callable[[str], bool] = lambda name: False
    ) -> None:
        self.replicated, self.kept = replicated, kept
        self._model: nn.Module | None = model
        # by parameter id: all parameters connected to it through shared memory, in the model's order
        self._groups: dict[int, list[tuple[nn.Module, str, str]]] = defaultdict(list)
        # by module id: every module that holds it, and the attribute
        self._holders: dict[int, list[tuple[nn.Module, str]]] = defaultdict(list)
        # keeps the parameters alive, so that no id is reused while the index exists
        self._parameters: list[Tensor] = []

    def _build(self) -> None:
        # PEFT prepares a model, and replicates its layers, before it asks for the first one
        if self._model is None:
            return
        extents: dict[torch.device, list[tuple[int, int, int]]] = defaultdict(list)
        for name, module in self._model.named_modules():
            for attribute, child in module._modules.items():
                if child is not None:
                    self._holders[id(child)].append((module, attribute))
            for key, parameter in module._parameters.items():
                if parameter is None or parameter.is_meta:
                    continue
                if id(parameter) not in self._groups:
                    self._parameters.append(parameter)
                    stored = parameter.to_local() if is_sharded(parameter) else parameter.data
                    plain = type(stored) is Tensor and stored.layout == torch.strided
                    if plain and stored.numel():
                        extents[stored.device].append((*extent(stored), id(parameter)))
                self._groups[id(parameter)].append((module, key, name))
        for spans in extents.values():
            self._join_overlapping(sorted(spans))
        self._model = None

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
        """Name of another parameter that shares memory with ``module``'s, except in modules that are kept; or None."""
        found = (name for _, _, name in self.others(module, key))
        return next((name for name in found if not self.kept(name.rpartition(".")[0])), None)

    def others(self, module: nn.Module, key: str = "weight") -> Iterator[tuple[nn.Module, str, str]]:
        """The other parameters that share memory with ``module``'s: the module of each, its name in it, and its name.

        A module that the model holds in several places is one module.
        """
        self._build()
        for other, other_key, name in self._groups.get(id(getattr(module, key)), ()):
            if other is not module or other_key != key:
                yield other, other_key, f"{name}.{other_key}"

    def holders(self, module: nn.Module) -> list[tuple[nn.Module, str]]:
        """Every module that holds ``module`` as a child, and the attribute."""
        self._build()
        return self._holders.get(id(module), [])


def extent(tensor: Tensor) -> tuple[int, int]:
    """Address of a tensor's first byte, and the address after its last."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    start = tensor.data_ptr()
    return start, start + (last + 1) * tensor.element_size()
