"""Where a LoRA layer of PEFT has its weight, and how it stores the factors of an adapter, for each kind of layer.

A weight is a stack of P matrices (out, in), of which PEFT's forward pass adds g·s·B·A to each:

==================  =====================================  =============  ===============================  =====
layer               parameter                              P              A, B as PEFT stores them         g
==================  =====================================  =============  ===============================  =====
Linear              ``weight`` (out, in)                   1              (r, in), (out, r)                1
Conv1D              ``weight`` (in, out)                   1              (r, in), (out, r)                1
Embedding           ``weight`` (in, out), in tokens        1              (r, in), (out, r)                1
Conv1d, 2d, 3d      ``weight`` (out, c/G, k…), in = c·k/G  G, the groups  (P·r, c, k…), (out, r, 1…)       1
MultiheadAttention  ``in_proj_weight`` (3·d, d)            1              (r, in), (out, r)                1
its ``out_proj``    ``weight`` (d, d)                      1              (r, in), (out, r)                1 or 2
a parameter         (out, in)                              1              (r, in), (out, r)                1
a stack             (E, out, in), or (E, in, out)          E              (E·r, in), (out, r·E), as in     1
                                                                          :mod:`.stacks`
==================  =====================================  =============  ===============================  =====

PEFT's rank of a convolution is that of all its groups together, P·r.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ..runtime.shards import ShardedStack, sharded_stack
from . import stacks
from .attention import is_projection, projection_gain


class Layout:
    """One matrix: ``nn.Linear`` and transformers' ``Conv1D``.

    Args:
        layer: a ``LoraLayer``.

    Attributes:
        parameter: name of the parameter that the adapter is of.
        by_output: whether the layer adds B·A·x to the output of the module that it wraps. Otherwise the module computes
            with another weight while it is called.
        is_matrix: whether the parameter has to be one matrix.
        keys: what PEFT's names of the parameters A and B end in.
    """

    parameter = "weight"
    by_output = True
    is_matrix = True
    keys = ("lora_A.weight", "lora_B.weight")

    def __init__(self, layer: Any) -> None:
        self.layer = layer

    @property
    def is_linear(self) -> bool:
        """Whether the layer is of an ``nn.Linear`` or a ``Conv1D``."""
        return type(self) is Layout

    @property
    def module(self) -> Any:
        """The module that has the parameter."""
        return self.layer.get_base_layer()

    @property
    def weight(self) -> Any:
        """The parameter, read every time: PEFT and accelerate may replace it."""
        return getattr(self.module, self.parameter)

    @property
    def transposed(self) -> bool:
        """Whether the matrices are stored (in, out)."""
        return bool(self.layer.fan_in_fan_out)

    @property
    def parts(self) -> int:
        """P."""
        return 1

    @property
    def gain(self) -> int:
        """g."""
        return projection_gain() if is_projection(self.layer) else 1

    @property
    def adapters(self) -> Collection[str]:
        """Names of the adapters of the layer."""
        return self.layer.lora_A.keys()  # type: ignore[no-any-return]

    @property
    def scalings(self) -> Mapping[str, Any]:
        """g·s of each adapter."""
        scaling: Mapping[str, Any] = self.layer.scaling
        return scaling if self.gain == 1 else {name: self.gain * value for name, value in scaling.items()}

    def rank(self, adapter: str) -> int:
        """r of each matrix."""
        return int(self.layer.r[adapter])

    def factors(self, adapter: str) -> tuple[Any, Any]:
        """The parameters A and B of an adapter."""
        return self.layer.lora_A[adapter].weight, self.layer.lora_B[adapter].weight

    def stack(self, weight: Tensor) -> Tensor:
        """A weight, as it is stored, as (P, out, in), or (P, in, out) if transposed: a view where there is one."""
        return weight.unsqueeze(0)

    def sharded(self, weight: Any, local: Tensor) -> ShardedStack:
        """What this process holds of the matrices of a weight, as they are stored.

        Args:
            weight: a ``DTensor``.
            local: its local tensor, or another one of that shape; the blocks are views of it.

        Raises:
            ValueError: a placement that divides no matrix into blocks.
        """
        return sharded_stack(weight, local)

    @contextlib.contextmanager
    def writable(self, weight: Tensor) -> Iterator[Tensor]:
        """Context in which :meth:`stack` of a weight can be written to. A copy is written back at its end."""
        stack = self.stack(weight)
        yield stack
        if stack.untyped_storage().data_ptr() != weight.untyped_storage().data_ptr():
            weight.copy_(stack.reshape(weight.shape))

    def matrices(self, weight: Tensor) -> Tensor:
        """A weight, as it is stored, as (P, out, in)."""
        stack = self.stack(weight)
        return stack.mT if self.transposed else stack

    def shape(self, weight: Tensor) -> tuple[int, int]:
        """(out, in) of each matrix of a weight."""
        m, n = weight.shape[-2:]
        return (n, m) if self.transposed else (m, n)

    def joined(self, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
        """Factors (P, r, in) and (P, out, r) as PEFT stores them."""
        return A[0], B[0]

    def split(self, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
        """Factors as PEFT stores them as (P, r, in) and (P, out, r)."""
        return A.unsqueeze(0), B.unsqueeze(0)

    def product(self, x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        """What factors, as PEFT stores them, in the dtype of the computation, add to the output for an input x.

        Only where the layer adds to the output.
        """
        return functional.linear(functional.linear(x.to(A.dtype), A), B)


class _Embedding(Layout):
    keys = ("lora_embedding_A", "lora_embedding_B")

    @property
    def transposed(self) -> bool:
        return True

    @property
    def adapters(self) -> Collection[str]:
        return self.layer.lora_embedding_A.keys()  # type: ignore[no-any-return]

    def factors(self, adapter: str) -> tuple[Any, Any]:
        return self.layer.lora_embedding_A[adapter], self.layer.lora_embedding_B[adapter]

    def product(self, x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        output = functional.linear(functional.embedding(x, A.mT), B)
        scale = self.layer._get_embed_scale()
        return output if scale is None else output * scale.to(output)


class _Convolution(Layout):
    is_matrix = False

    @property
    def transposed(self) -> bool:
        return False

    @property
    def parts(self) -> int:
        return int(self.module.groups)

    def rank(self, adapter: str) -> int:
        return super().rank(adapter) // self.parts

    def stack(self, weight: Tensor) -> Tensor:
        return weight.reshape(self.parts, *self.shape(weight))

    def sharded(self, weight: Any, local: Tensor) -> ShardedStack:
        divided = [placement for placement in weight.placements if not placement.is_replicate()]
        if self.parts > 1 or any(placement.dim % weight.ndim for placement in divided) or not local.is_contiguous():
            raise ValueError(
                f"a convolution with {self.parts} groups is sharded as {weight.placements}; PiSSA takes one group, "
                "divided along its output channels. Initialize it before the model is sharded"
            )
        return sharded_stack(weight, local.view(len(local), -1), self.shape(weight))

    def shape(self, weight: Tensor) -> tuple[int, int]:
        return len(weight) // self.parts, math.prod(weight.shape[1:])

    def joined(self, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
        parts, rank, _ = A.shape
        channels, *kernel = self.module.weight.shape[1:]
        # lora_A has no groups: each filter reads all channels, and is zero outside of those of its group
        filters = A.new_zeros(parts, rank, parts, channels, *kernel)
        index = torch.arange(parts, device=A.device)
        filters[index, :, index] = A.reshape(parts, rank, channels, *kernel)
        ones = (1,) * len(kernel)
        return filters.reshape(parts * rank, parts * channels, *kernel), B.reshape(-1, rank, *ones)

    def split(self, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
        parts = self.parts
        filters = A.reshape(parts, -1, parts, A[0].numel() // parts)
        index = torch.arange(parts, device=A.device)
        return filters[index, :, index], B.reshape(parts, len(B) // parts, -1)

    def product(self, x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        base, convolve = self.module, self.layer.conv_fn
        return convolve(  # type: ignore[no-any-return]
            convolve(x.to(A.dtype), A, stride=base.stride, padding=base.padding), B, groups=base.groups
        )


class _Attention(Layout):
    parameter = "in_proj_weight"
    by_output = False

    @property
    def transposed(self) -> bool:
        return False


class _Parameter(Layout):
    by_output = False
    is_matrix = False

    @property
    def parameter(self) -> str:  # type: ignore[override]
        return str(self.layer.parameter_name)

    @property
    def transposed(self) -> bool:
        return self.weight.ndim == 3 and not self.layer._did_swap_in_out_features

    @property
    def parts(self) -> int:
        return int(self.layer.num_experts)

    def stack(self, weight: Tensor) -> Tensor:
        return weight if weight.ndim == 3 else weight.unsqueeze(0)

    def joined(self, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
        return stacks.packed(A, B)

    def split(self, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
        return stacks.unpacked(A, B, self.parts)


def layout_of(layer: Any) -> Layout:
    """The layout of a LoRA layer, by its class in PEFT."""
    kind: Any = type(layer)
    return _layout_of(kind)(layer)


@functools.lru_cache(maxsize=256)
def _layout_of(kind: Any) -> type[Layout]:
    """The layout of a class of LoRA layers."""
    from peft.tuners.lora import layer as classes

    kinds: tuple[tuple[Any, type[Layout]], ...] = (
        (classes.Embedding, _Embedding),
        (classes._ConvNd, _Convolution),
        (classes.MultiheadAttention, _Attention),
        (classes.ParamWrapper, _Parameter),
    )
    return next((layout for cls, layout in kinds if issubclass(kind, cls)), Layout)


def adapters_of(layer: Any) -> Collection[str]:
    """Names of the adapters of a LoRA layer."""
    return layout_of(layer).adapters
