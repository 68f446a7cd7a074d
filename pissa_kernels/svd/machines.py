"""What the cost model knows of the machines: a handful of constants per kind of device and instruction set."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .. import ops
from ..ops import isa

# Small operations of one CholeskyQR2 with its projections.
PANEL_CALLS = 50
# Elements of a weight that stays in the last cache from one product to the next.
CACHED_ELEMENTS = 1 << 23


@dataclass(frozen=True)
class Machine:
    """Constants of a kind of device, as ``python -m bench calibrate`` measures them.

    Attributes:
        flops: float32 operations per second in products of panels.
        products: operations per second in a product of a weight with a panel.
        gram: operations per second in a Gram matrix of a weight.
        read: seconds to read one element of a weight in such a product.
        read_memory: the same for weights of more than :data:`CACHED_ELEMENTS`; 0 where it is no longer.
        call: seconds for one small operation: its launch, or its overhead in C++ and Python.
        eigh: coefficients (n, n², n³) of the seconds for ``eigh`` in float32.
        min_block: columns of the narrowest Krylov block worth considering.
        narrow_calls: small operations of one Krylov step with a block of at most eight columns.
    """

    flops: float
    products: float
    gram: float
    read: float
    call: float
    eigh: tuple[float, float, float]
    min_block: int = 16
    narrow_calls: int = PANEL_CALLS
    read_memory: float = 0.0

    def eigenproblem(self, n: int) -> float:
        """Seconds for ``eigh`` of an n×n matrix."""
        linear, square, cube = self.eigh
        return linear * n + square * n**2 + cube * n**3

    def product(self, m: int, n: int, columns: int) -> float:
        """Seconds for a product of an m×n weight with a panel."""
        read = self.read if m * n <= CACHED_ELEMENTS else max(self.read, self.read_memory)
        return read * m * n + 2 * m * n * columns / self.products + self.call


AVX2_EIGH, AVX512_EIGH = (0.0, 3.3e-8, 5e-11), (8e-7, 2e-8, 5.5e-11)
MACHINES = {
    # two threads of an AMD EPYC with AVX2: products in torch, and in csrc. Without csrc, operations wait for the
    # interpreter's lock.
    "cpu": Machine(flops=1.5e11, products=1.5e11, gram=1.5e11, read=2e-10, call=1e-5, eigh=AVX2_EIGH),
    "cpu avx2": Machine(
        flops=1.5e11,
        products=1.5e11,
        gram=1.5e11,
        read=4.7e-11,
        call=6e-6,
        eigh=AVX2_EIGH,
        min_block=4,
        narrow_calls=12,
        read_memory=8e-11,
    ),
    # one thread of an Intel Xeon with AMX. Tiles have 16 columns.
    "cpu avx512": Machine(
        flops=1.5e11, products=1.5e11, gram=1.7e11, read=8e-11, call=5e-6, eigh=AVX512_EIGH, min_block=8
    ),
    "cpu amx": Machine(flops=1.5e11, products=3.8e11, gram=1.2e12, read=7e-11, call=5e-6, eigh=AVX512_EIGH),
    # the same with SSE2; products run in torch unless csrc is forced
    "cpu generic": Machine(
        flops=1.5e11, products=1.9e10, gram=1.7e11, read=0.0, call=5e-6, eigh=AVX512_EIGH, min_block=8
    ),
    # estimated for an H100, for weights that the fixed schedule does not solve: float32 without TF32 at 40 TFLOP/s,
    # 2 bytes per element at 2 TB/s, cuSOLVER's syevd
    "cuda": Machine(flops=4e13, products=4e13, gram=4e13, read=1.2e-12, call=1e-5, eigh=(2e-5, 0.0, 2e-11)),
}


def machine_of(weight: Tensor) -> str:
    """The key of :data:`MACHINES` for products with this weight; a device type that is no key counts as a GPU."""
    device = weight.device.type
    if device != "cpu" or ops.backend("normal", weight) != "csrc":
        return device
    name = isa.current()
    return "cpu avx512" if name == "amx" and weight.dtype != torch.bfloat16 else f"cpu {name}"
