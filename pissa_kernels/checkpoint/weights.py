"""What is decomposed: the weight of a linear layer, or each matrix of a stack, with its places in the files."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch

from ..adapter.names import factor_key
from ..factors import Recipe
from ..files.header import Header, TensorInfo


@dataclass(frozen=True)
class LinearWeight:
    """The weight of a linear layer.

    Attributes:
        name: name of its layer in the model.
        shard, info: file and place of the tensor.
        transposed: whether it is stored (in, out), as in transformers' ``Conv1D``.
    """

    name: str
    shard: str
    info: TensorInfo
    transposed: bool

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        m, n = self.info.shape
        return (n, m) if self.transposed else (m, n)

    @property
    def dtype(self) -> torch.dtype:
        dtype = self.info.torch_dtype
        assert dtype is not None  # others are refused, or left as they are
        return dtype

    @property
    def label(self) -> str:
        """The layer in messages."""
        return f"layer {self.name!r}, weight {self.info.shape}"


@dataclass(frozen=True)
class Target(LinearWeight):
    """One weight that becomes a residual.

    Attributes:
        recipe: rank, scaling, initializer and seed.
    """

    recipe: Recipe

    @property
    def keys(self) -> tuple[str, str]:
        """Keys of A and B in the adapter's file."""
        return factor_key(self.name, "A"), factor_key(self.name, "B")

    @property
    def factors(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """Shapes of A, (r, in), and B, (out, r)."""
        out, columns = self.shape
        return (self.recipe.rank, columns), (out, self.recipe.rank)


@dataclass(frozen=True)
class Piece:
    """Rows of one matrix of a stack, where a file has them.

    Attributes:
        shard, info: file and place in the source; of one matrix, if the tensor is the whole stack.
        rows: the first row, and the one after the last, on the out side of the matrix.
    """

    shard: str
    info: TensorInfo
    rows: tuple[int, int]


@dataclass(frozen=True)
class Expert:
    """One matrix of a stack.

    Attributes:
        stack: its layer.
        index: e, its number.
    """

    stack: Stack
    index: int

    @property
    def name(self) -> str:
        return f"{self.stack.name}[{self.index}]"

    @property
    def pieces(self) -> tuple[Piece, ...]:
        """What it consists of, from the first row to the last."""
        return self.stack.pieces[self.index]

    @property
    def recipe(self) -> Recipe:
        return self.stack.recipe

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return self.stack.shape

    @property
    def dtype(self) -> torch.dtype:
        return self.stack.dtype

    @property
    def transposed(self) -> bool:
        return self.stack.transposed

    @property
    def stored(self) -> tuple[int, int]:
        """The shape in the file."""
        m, n = self.shape
        return (n, m) if self.transposed else (m, n)

    @property
    def label(self) -> str:
        """The matrix in messages."""
        return f"layer {self.name!r}, weight {self.stored}"

    def places(self, headers: Mapping[str, Header]) -> list[tuple[str, TensorInfo]]:
        """File and place of every piece in the result, whose shards have these headers."""
        infos = [(piece.shard, headers[piece.shard].tensors[piece.info.name]) for piece in self.pieces]
        return [(shard, info.matrix(self.index)) for shard, info in infos] if self.stack.fused else infos


@dataclass(frozen=True, eq=False)
class Stack:
    """A layer of several matrices of one shape, such as the experts of a block, each of which becomes a residual.

    Attributes:
        name: name of the parameter in the model, as in "model.layers.0.mlp.experts.gate_up_proj".
        module: what PEFT calls the wrapped module, as in "model.layers.0.mlp.experts.base_layer".
        shape: (out, in) of each matrix.
        dtype: of the tensors.
        transposed: whether the file has each matrix (in, out).
        fused: whether one tensor of the file is the whole stack.
        pieces: of each matrix.
        recipe: rank, scaling, initializer and seed.
    """

    name: str
    module: str
    shape: tuple[int, int]
    dtype: torch.dtype
    transposed: bool
    fused: bool
    pieces: tuple[tuple[Piece, ...], ...]
    recipe: Recipe

    @property
    def experts(self) -> Iterator[Expert]:
        """Its matrices, in order."""
        return (Expert(self, index) for index in range(len(self.pieces)))

    @property
    def keys(self) -> tuple[str, str]:
        """Keys of the packed A and B in the adapter's file."""
        return factor_key(self.module, "A"), factor_key(self.module, "B")

    @property
    def label(self) -> str:
        """The layer in messages."""
        return f"layer {self.name!r}, {len(self.pieces)} weights of {self.shape}"

    @property
    def nbytes(self) -> int:
        return sum(piece.info.nbytes for pieces in self.pieces for piece in pieces)

    @property
    def factors(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """Shapes of the packed A, (r·E, in), and B, (out, r·E)."""
        (out, columns), rank = self.shape, self.recipe.rank * len(self.pieces)
        return (rank, columns), (out, rank)
