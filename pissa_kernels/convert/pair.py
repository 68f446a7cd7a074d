"""A trained adapter and its initial adapter, read one layer at a time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from ..adapter.patterns import same
from ..checks import layer_context
from ..files.header import read_tensor
from .adapter import AdapterFile, find_initial, read_adapter
from .lowrank import FactorPair


@dataclass(frozen=True)
class AdapterPair:
    """Two adapters with the same layers, ranks and scalings, and the descriptors of their open files.

    Where a ``pissa_initial.safetensors`` lacks an embedding, that was initialized as plain LoRA: the product of its
    factors started from 0.
    """

    trained: AdapterFile
    initial: AdapterFile
    trained_descriptor: int
    initial_descriptor: int

    def read(self, name: str) -> FactorPair:
        """Read the factors of one layer, of each of its matrices.

        Raises:
            OSError: reading failed.
            ValueError: a factor has NaN or Inf.
        """
        trained, initial = self.trained.layers[name], self.initial.layers.get(name)
        A, B = (read_tensor(self.trained_descriptor, info) for info in (trained.A, trained.B))
        if initial is None:
            A0, B0 = torch.zeros_like(A), torch.zeros_like(B)
        else:
            A0, B0 = (read_tensor(self.initial_descriptor, info) for info in (initial.A, initial.B))
        factors = FactorPair(*trained.packing.split(A, B), *trained.packing.split(A0, B0))
        if not factors.finite():
            raise ValueError(
                f"a factor has NaN or Inf in {self.trained.path} or {self.initial.path}; take an earlier checkpoint"
            )
        return factors


@contextmanager
def open_pair(trained: Path, initial: Path) -> Iterator[AdapterPair]:
    """Open both adapters, and close their files at the end.

    Args:
        trained: folder for :func:`pissa_kernels.convert.adapter.read_adapter`.
        initial: folder for :func:`pissa_kernels.convert.adapter.find_initial`.

    Raises:
        FileNotFoundError: an adapter does not exist.
        ValueError: an adapter is damaged, or the two differ in layers, ranks, shapes or scalings.
    """
    second = find_initial(initial)
    first = read_adapter(trained, second.known)
    _check_same_layers(first, second)
    with first.path.open("rb") as trained_file, second.path.open("rb") as initial_file:
        yield AdapterPair(first, second, trained_file.fileno(), initial_file.fileno())


def _check_same_layers(trained: AdapterFile, initial: AdapterFile) -> None:
    plain = {name for name, layer in trained.layers.items() if layer.embedding and not initial.config}
    for adapter, other in ((trained, initial), (initial, trained)):
        if missing := [name for name in adapter.layers if name not in other.layers and name not in plain]:
            raise ValueError(
                f"layer {missing[0]!r} is in {adapter.path} but not in {other.path} ({len(missing)} such layers); "
                "accepted is an initial adapter with the same layers"
            )
    for name, layer in trained.layers.items():
        first = initial.layers.get(name, layer)
        parts = layer.packing.parts, first.packing.parts
        with layer_context(f"layer {name!r}"):
            for what, found, expected, equal in (
                ("rank", layer.rank, first.rank, layer.rank == first.rank),
                ("number of matrices", *parts, parts[0] == parts[1]),
                ("shape", layer.shape, first.shape, layer.shape == first.shape),
                ("kernel", layer.packing.kernel, first.packing.kernel, layer.packing.kernel == first.packing.kernel),
                ("scaling", layer.factor, first.factor, same(layer.factor, first.factor)),
            ):
                if not equal:
                    raise ValueError(
                        f"{what} {found} in {trained.path}, but {expected} in {initial.path}; accepted is an initial "
                        "adapter with the same settings"
                    )
