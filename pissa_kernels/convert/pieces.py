"""Where a checkpoint has the matrices of a stack, such as fused experts: in one tensor, or one or more an expert.

The manifest of a residual checkpoint tells it, by the tensor's key: {"layer": name, "transposed": bool}, and "experts"
of a tensor that holds all of them, or "expert" and "rows" of one that holds rows [start, stop) of one matrix, such as
the gate of a layer that has gate and up above one another.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from .layer import Layer


@dataclass(frozen=True)
class Piece:
    """One tensor with matrices of a stack.

    Attributes:
        key: its key.
        transposed: whether it is stored (in, out).
        expert: index of the matrix that it belongs to; None for all of them, (E, out, in).
        rows: the rows of that matrix that it holds; None for all.
    """

    key: str
    transposed: bool
    expert: int | None = None
    rows: tuple[int, int] | None = None

    def shape(self, layer: Layer) -> tuple[int, ...]:
        """Shape of the tensor of a layer."""
        out, width = layer.shape
        if self.rows is not None:
            out = self.rows[1] - self.rows[0]
        matrix = (width, out) if self.transposed else (out, width)
        return matrix if self.expert is not None else (layer.packing.experts, *matrix)

    def matrices(self, tensor: Tensor) -> Iterator[tuple[int, Tensor]]:
        """Views of its matrices, (rows, in), with their indices."""
        stack = tensor[None] if self.expert is not None else tensor
        for index, matrix in enumerate(stack, start=self.expert or 0):
            yield index, matrix.mT if self.transposed else matrix

    def rows_of(self, B: Tensor) -> Tensor:
        """The rows of a matrix's B (out, r) that belong to this tensor."""
        return B if self.rows is None else B[slice(*self.rows)]


def pieces_of(targets: Mapping[str, Mapping[str, Any]]) -> dict[str, list[Piece]]:
    """The tensors of each stack in a manifest's targets, by the layer's name."""
    found: dict[str, list[Piece]] = defaultdict(list)
    for key, about in targets.items():
        if "expert" in about or "experts" in about:
            rows = about.get("rows")
            piece = Piece(key, about["transposed"], about.get("expert"), None if rows is None else (rows[0], rows[1]))
            found[about["layer"]].append(piece)
    return dict(found)


def check_complete(pieces: Sequence[Piece], layer: Layer) -> None:
    """Refuse tensors that do not hold every row of every matrix of a layer once.

    Raises:
        ValueError: the message has the expert and its rows.
    """
    out, experts = layer.shape[0], layer.packing.experts
    if [piece.expert for piece in pieces] == [None]:
        return
    held: dict[int, list[tuple[int, int]]] = {index: [] for index in range(experts)}
    for piece in pieces:
        if piece.expert not in held:
            raise ValueError(f"{piece.key!r} has expert {piece.expert}, and the adapter has {experts}")
        held[piece.expert].append(piece.rows or (0, out))
    for index, rows in held.items():
        ends = [0, *(stop for _, stop in sorted(rows))]
        if [start for start, _ in sorted(rows)] != ends[:-1] or ends[-1] != out:
            found = ", ".join(f"{start} to {stop}" for start, stop in sorted(rows)) or "none"
            raise ValueError(
                f"of expert {index}, the checkpoint has the rows {found}; accepted is each row of 0 to {out} once"
            )
