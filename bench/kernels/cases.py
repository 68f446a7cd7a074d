"""One verb on one weight; its providers are the backends that support it, and equivalent expressions in torch."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from pissa_kernels import ops
from pissa_kernels.ops import dispatch

from ..harness.dtypes import DTYPES

SCALING = 0.5
PRODUCTS = ("matmul", "rmatmul", "normal")
Call = Callable[[Tensor], object]


@dataclass(frozen=True)
class VerbCase:
    """A verb, a weight, and the verb's other arguments.

    Attributes:
        verb: name of a function in :mod:`pissa_kernels.ops`.
        shape: shape of the weight as it is stored.
        dtype: dtype of the weight: "bf16", "fp16" or "fp32".
        target: dtype of the transpose; "" for other verbs.
        columns: columns of a product's panel, or the rank of a subtraction; 0 for a transpose.
        fan_in_fan_out: whether the weight of a subtraction is stored (in, out).
    """

    verb: str
    shape: tuple[int, int]
    dtype: str = "bf16"
    target: str = ""
    columns: int = 0
    fan_in_fan_out: bool = False

    @property
    def name(self) -> str:
        detail = self.target or (f"r{self.columns}" if self.verb == "subtract_lowrank_" else f"k{self.columns}")
        layout = "-conv1d" if self.fan_in_fan_out else ""
        return f"{self.verb}-{self.shape[0]}x{self.shape[1]}-{self.dtype}-{detail}{layout}"

    @property
    def bytes(self) -> int:
        """Least memory traffic: each operand read once, each result written once."""
        m, n = self.shape
        weight = m * n * DTYPES[self.dtype].itemsize
        if self.verb == "transpose_cast":
            return weight + m * n * DTYPES[self.target].itemsize
        if self.verb == "subtract_lowrank_":
            return 2 * weight + 4 * self.columns * (m + n)
        panels = {"matmul": n + m, "rmatmul": m + n, "normal": 2 * n + m}[self.verb]
        return weight + 4 * self.columns * panels

    @property
    def result_dtype(self) -> torch.dtype:
        """Dtype of the verb's result."""
        if self.verb == "transpose_cast":
            return DTYPES[self.target]
        return DTYPES[self.dtype] if self.verb == "subtract_lowrank_" else torch.float32

    def providers(self, device: str) -> list[str]:
        """Names of the providers on a device; nothing is drawn or run."""
        weight = torch.empty(self.shape, dtype=DTYPES[self.dtype], device=device)
        return list(self.calls(weight, weight, weight))

    def inputs(self, device: str) -> tuple[Tensor, Tensor, Tensor]:
        """The weight, the panel or B, and A; drawn on the CPU, so that they are the same on every device."""
        generator = torch.Generator().manual_seed(0)
        m, n = self.shape
        weight = torch.randn(m, n, generator=generator).to(DTYPES[self.dtype])
        out_features, in_features = (n, m) if self.fan_in_fan_out else (m, n)
        rows = {"subtract_lowrank_": out_features, "rmatmul": m}.get(self.verb, n)
        left = torch.randn(rows, self.columns, generator=generator)
        right = torch.randn(self.columns, in_features, generator=generator)
        return weight.to(device), left.to(device), right.to(device)

    def exact(self, weight: Tensor, left: Tensor, right: Tensor) -> tuple[Tensor, ...]:
        """The result in float64; for ``normal`` both results."""
        W = weight.double()
        if self.verb == "transpose_cast":
            return (W.mT,)
        if self.verb == "subtract_lowrank_":
            product = left.double() @ right.double()
            return (W - SCALING * (product.mT if self.fan_in_fan_out else product),)
        if self.verb == "rmatmul":
            return (W.mT @ left.double(),)
        Y = W @ left.double()
        return (Y,) if self.verb == "matmul" else (Y, W.mT @ Y)

    def calls(self, weight: Tensor, left: Tensor, right: Tensor) -> dict[str, Call]:
        """Calls by provider: "ours csrc", "ours triton", "ours torch" where supported, and "torch …" expressions."""
        ours = {
            f"ours {name}": self._forced(name, left, right)
            for name, reasons in ops.unsupported_reasons(self.verb, weight).items()
            if not reasons
        }
        return ours | self._torch_expressions(weight, left, right)

    def _forced(self, backend: str, left: Tensor, right: Tensor) -> Call:
        def call(weight: Tensor) -> object:
            with forced(backend):
                if self.verb == "transpose_cast":
                    return ops.transpose_cast(weight, DTYPES[self.target])
                if self.verb == "subtract_lowrank_":
                    return ops.subtract_lowrank_(weight, left, right, SCALING, self.fan_in_fan_out)
                return getattr(ops, self.verb)(weight, left)

        return call

    def _torch_expressions(self, weight: Tensor, left: Tensor, right: Tensor) -> dict[str, Call]:
        if self.verb == "transpose_cast":
            target = DTYPES[self.target]
            return {
                "torch empty.copy_(W.mT)": lambda W: W.new_empty(W.mT.shape, dtype=target).copy_(W.mT),
                "torch W.to(dtype).mT.contiguous()": lambda W: W.to(target).mT.contiguous(),
                "torch W.mT.contiguous().to(dtype)": lambda W: W.mT.contiguous().to(target),
            }
        if self.verb == "subtract_lowrank_":

            def as_peft_does(W: Tensor) -> object:
                product = (left @ right).mT if self.fan_in_fan_out else left @ right
                W.copy_((W.float() - SCALING * product).to(W.dtype))
                return W

            return {"torch (W.float() - s·B@A).to(dtype)": as_peft_does}
        products: dict[str, Call] = {"matmul": lambda W: W.float() @ left, "rmatmul": lambda W: W.float().mT @ left}
        if self.verb == "normal":
            return {"torch W.float() twice": lambda W: (Y := W.float() @ left, W.float().mT @ Y)}
        found = {"torch W.float() @ X": products[self.verb]}
        if weight.is_cuda and weight.dtype == torch.bfloat16:
            found["torch cuBLAS on three bf16 pieces"] = self._cublas(left)
        return found

    def _cublas(self, panel: Tensor) -> Call:
        """One product of the weight with the panel's three bf16 pieces side by side, its result in float32."""

        def call(W: Tensor) -> object:
            first = panel.bfloat16()
            second = (panel - first).bfloat16()
            third = (panel - first - second).bfloat16()
            A = W if self.verb == "matmul" else W.mT
            side_by_side = torch.mm(A, torch.cat([first, second, third], dim=1), out_dtype=torch.float32)
            return side_by_side.view(len(A), 3, -1).sum(1)

        return call


@contextlib.contextmanager
def forced(backend: str) -> Iterator[None]:
    """Set ``PISSA_KERNELS_BACKEND`` within the block."""
    before = os.environ.get(dispatch.VARIABLE)
    os.environ[dispatch.VARIABLE] = backend
    try:
        yield
    finally:
        if before is None:
            del os.environ[dispatch.VARIABLE]
        else:
            os.environ[dispatch.VARIABLE] = before


LLAMA, GATE, SMALL = (4096, 4096), (11008, 4096), (1024, 1024)
CASES = (
    *(VerbCase("transpose_cast", LLAMA, *dtypes) for dtypes in (("bf16", "fp32"), ("bf16", "bf16"), ("fp32", "bf16"))),
    VerbCase("transpose_cast", GATE, "bf16", "fp32"),
    VerbCase("transpose_cast", SMALL, "bf16", "fp32"),
    *(VerbCase("subtract_lowrank_", LLAMA, "bf16", columns=rank) for rank in (16, 64, 128, 512)),
    VerbCase("subtract_lowrank_", LLAMA, "fp32", columns=16),
    VerbCase("subtract_lowrank_", LLAMA, "bf16", columns=16, fan_in_fan_out=True),
    VerbCase("subtract_lowrank_", GATE, "bf16", columns=16),
    VerbCase("subtract_lowrank_", SMALL, "bf16", columns=16),
    *(VerbCase(verb, LLAMA, "bf16", columns=columns) for verb in PRODUCTS for columns in (16, 32, 96)),
    *(VerbCase(verb, GATE, "bf16", columns=32) for verb in PRODUCTS),
    VerbCase("matmul", LLAMA, "fp32", columns=16),
    VerbCase("matmul", LLAMA, "fp16", columns=16),
    VerbCase("matmul", SMALL, "bf16", columns=16),
)
