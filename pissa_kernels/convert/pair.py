"""A trained adapter and the one that it was trained from, of which one layer is read at a time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ..adapter.patterns import same
from ..files.header import read_tensor
from .adapter import AdapterFile, find_initial, read_adapter
from .lowrank import FactorPair


@dataclass(frozen=True)
class Pair:
    """Two adapters of the same layers, ranks and scalings, and the open files that their factors are in."""

    trained: AdapterFile
    initial: AdapterFile
    descriptors: tuple[int, int]

    def read(self, name: str) -> FactorPair:
        """The factors of one layer.

        Raises:
            OSError: reading failed.
            ValueError: a value is NaN or Inf.
        """
        mine, its = self.descriptors
        layer, first = self.trained.layers[name], self.initial.layers[name]
        factors = FactorPair(
            A=read_tensor(mine, layer.A),
            B=read_tensor(mine, layer.B),
            A0=read_tensor(its, first.A),
            B0=read_tensor(its, first.B),
        )
        if not factors.finite():
            raise ValueError(f"layer {name!r} has NaN or Inf in {self.trained.path} or {self.initial.path}")
        return factors


@contextmanager
def open_pair(trained: Path, initial: Path) -> Iterator[Pair]:
    """Both adapters, as long as their files are open.

    Args:
        trained: the folder of :func:`pissa_kernels.convert.adapter.read_adapter`.
        initial: that of :func:`pissa_kernels.convert.adapter.find_initial`.

    Raises:
        FileNotFoundError: one is missing.
        ValueError: one is damaged, or they do not belong together.
    """
    adapter, first = read_adapter(trained), find_initial(initial)
    _check_alike(adapter, first)
    with adapter.path.open("rb") as mine, first.path.open("rb") as its:
        yield Pair(adapter, first, (mine.fileno(), its.fileno()))


def _check_alike(trained: AdapterFile, initial: AdapterFile) -> None:
    for one, other in ((trained, initial), (initial, trained)):
        if missing := [name for name in one.layers if name not in other.layers]:
            raise ValueError(
                f"layer {missing[0]!r} is in {one.path} and not in {other.path} ({len(missing)} such layers); accepted "
                "is an initial adapter of the same layers"
            )
    for name, layer in trained.layers.items():
        first = initial.layers[name]
        for what, mine, its, equal in (
            ("rank", layer.rank, first.rank, layer.rank == first.rank),
            ("shape", layer.shape, first.shape, layer.shape == first.shape),
            ("scaling", layer.scaling, first.scaling, same(layer.scaling, first.scaling)),
        ):
            if not equal:
                raise ValueError(
                    f"layer {name!r} has {what} {mine} in {trained.path} and {its} in {initial.path}; accepted is an "
                    "initial adapter of the same settings"
                )
