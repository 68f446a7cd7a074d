"""The linear layers of well-known models."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Projections:
    """Linear layers of a decoder.

    Attributes:
        layers: number of decoder layers.
        hidden: width of queries and outputs.
        keys: width of keys and values.
        inner: width of the MLP.
    """

    layers: int
    hidden: int
    keys: int
    inner: int

    @property
    def shapes(self) -> dict[tuple[int, int], int]:
        """Number of weights (out, in) of each shape."""
        found: dict[tuple[int, int], int] = {}
        for shape, count in (
            ((self.hidden, self.hidden), 2),
            ((self.keys, self.hidden), 2),
            ((self.inner, self.hidden), 2),
            ((self.hidden, self.inner), 1),
        ):
            found[shape] = found.get(shape, 0) + count * self.layers
        return found

    @property
    def bytes(self) -> int:
        """Bytes of all weights in 16 bits."""
        return sum(2 * m * n * count for (m, n), count in self.shapes.items())


MODELS = {
    "llama-2-7b": Projections(layers=32, hidden=4096, keys=4096, inner=11008),
    "llama-3-8b": Projections(layers=32, hidden=4096, keys=1024, inner=14336),
    "mistral-7b": Projections(layers=32, hidden=4096, keys=1024, inner=14336),
    "llama-2-70b": Projections(layers=80, hidden=8192, keys=1024, inner=28672),
    "llama-3.1-405b": Projections(layers=126, hidden=16384, keys=1024, inner=53248),
}
