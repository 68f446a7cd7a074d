"""One weight, and how several processes hold it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..initializers.suites import real_like


@dataclass(frozen=True)
class Case:
    """A weight that is divided evenly along one dimension.

    Attributes:
        processes: number of processes, each with one thread.
        dim: the divided dimension, 0 as FSDP2 does it or 1.
        shape: (out, in).
        rank: r.
        dtype: of the weight.
        spectrum: that of a weight of all-MiniLM-L6-v2, stretched.
    """

    processes: int
    dim: int
    shape: tuple[int, int]
    rank: int
    dtype: str = "bf16"
    spectrum: str = "real-like"

    @property
    def name(self) -> str:
        size = f"{self.shape[0]}x{self.shape[1]}"
        return f"shards-{self.processes}-dim{self.dim}-{size}-{self.spectrum}-r{self.rank}-{self.dtype}"

    def weight(self) -> Tensor:
        """The whole weight."""
        return real_like("shards", self.shape, self.rank).weight()


SHAPES = (4096, 4096), (2048, 5632)
CASES = tuple(
    Case(processes, dim, shape, rank)
    for processes in (2, 4)
    for shape in SHAPES
    for rank in (16, 128)
    for dim in (0, 1)
)
