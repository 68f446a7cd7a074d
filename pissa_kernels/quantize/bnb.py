"""The formats of bitsandbytes: NF4 and FP4 in blocks, and int8 by rows (Dettmers et al., arXiv 2305.14314, 2208.07339).

The codes are those that its layers make and read: bitsandbytes does the arithmetic, or csrc does it to the same bits.
"""

from __future__ import annotations

import copy
import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..ops import dispatch

# Blocks of the scales that double quantization makes, which bitsandbytes fixes.
NESTED_BLOCK = 256
# bitsandbytes stores what belongs to the codes as JSON. Padding it gives it a size that does not depend on its numbers.
STATE_BYTES = 256
# Elements that are quantized at a time on a CPU, where bitsandbytes takes four to five float32 copies of them.
CHUNK_ELEMENTS = 1 << 18
# Largest block that bitsandbytes' kernel for AVX-512 takes; for others it compiles a function for each shape.
LARGEST_KERNEL_BLOCK = 1024
MAX_8BIT = 127.0
STORAGE_DTYPES = (torch.uint8, torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True)
class FourBit:
    """NF4 or FP4.

    Attributes:
        kind: "nf4" or "fp4".
        block: elements that share a scale.
        double: whether the scales are quantized too, to 8 bits.
        storage: dtype as which a checkpoint stores the codes.
    """

    kind: str = "nf4"
    block: int = 64
    double: bool = False
    storage: torch.dtype = torch.uint8

    @property
    def name(self) -> str:
        return f"{self.kind}, blocks of {self.block}{', double quantization' if self.double else ''}"

    def quantize(self, weight: Tensor, dtype: torch.dtype) -> PackedFourBit:
        """Quantize a weight (m, n) float32 that a layer dequantizes to ``dtype``."""
        functional = _functional()
        self.layout((weight.shape[0], weight.shape[1]))
        codes, scales = self._blocks(weight.flatten())
        offset, nested = None, None
        if self.double:
            # in float64, because a sum in float32 depends on the number of threads
            offset = scales.mean(dtype=torch.float64).float()
            scales, nested = functional.quantize_blockwise(scales - offset, blocksize=NESTED_BLOCK)
        code = functional.get_4bit_type(self.kind, device=weight.device)
        state = functional.QuantState(scales, weight.shape, code, self.block, self.kind, dtype, offset, nested)
        return PackedFourBit(codes.view(self.storage)[:, None], state)

    def _blocks(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """Codes (n/2,) uint8 and scales of values (n,), by csrc where it makes the codes of bitsandbytes."""
        table = _table(self.kind) if values.device.type == "cpu" and _has_kernel(values) else None
        if table is not None:
            return _kernel(values, self.block, *table)
        elements = len(values)
        codes = torch.empty(elements // 2, dtype=torch.uint8, device=values.device)
        scales = torch.empty(-(-elements // self.block), dtype=torch.float32, device=values.device)
        size = CHUNK_ELEMENTS if values.device.type == "cpu" else elements  # a multiple of every block
        for start, chunk in zip(range(0, elements, size), torch.split(values, size), strict=True):
            found, of_chunk = _functional().quantize_4bit(chunk, blocksize=self.block, quant_type=self.kind)
            codes[start // 2 :][: len(found)] = found.flatten()
            scales[start // self.block :][: len(of_chunk.absmax)] = of_chunk.absmax
        return codes, scales

    def layout(self, shape: tuple[int, int]) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Dtype and shape of each tensor that a checkpoint stores."""
        elements = shape[0] * shape[1]
        if elements % (2 * self.storage.itemsize):
            raise ValueError(f"{self.kind} packs pairs of values into {self.storage}, and the weight has {elements}")
        blocks = -(-elements // self.block)
        layout: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
            "weight": (self.storage, (elements // 2 // self.storage.itemsize, 1)),
            "weight.absmax": (torch.uint8 if self.double else torch.float32, (blocks,)),
            "weight.quant_map": (torch.float32, (16,)),
            f"weight.quant_state.bitsandbytes__{self.kind}": (torch.uint8, (STATE_BYTES,)),
        }
        if self.double:
            layout["weight.nested_absmax"] = (torch.float32, (-(-blocks // NESTED_BLOCK),))
            layout["weight.nested_quant_map"] = (torch.float32, (256,))
        return layout

    def unpack(self, tensors: Mapping[str, Tensor]) -> PackedFourBit:
        """The weight whose tensors a checkpoint holds."""
        functional = _functional()
        statistics = {key: value for key, value in tensors.items() if key != "weight"}
        try:
            state = functional.QuantState.from_dict(dict(statistics), device=tensors["weight"].device)
        except (AssertionError, AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
            raise ValueError(f"its quantization state is damaged: {type(error).__name__} {error}") from None
        return PackedFourBit(tensors["weight"], state)


@dataclass(frozen=True, eq=False)
class PackedFourBit:
    """A weight in NF4 or FP4.

    Attributes:
        codes: (m·n/2, 1), two codes in a byte.
        state: bitsandbytes' ``QuantState``: scales, and the dtype to dequantize to.
    """

    codes: Tensor
    state: Any

    @property
    def shape(self) -> tuple[int, int]:
        m, n = self.state.shape
        return m, n

    def dequantize(self) -> Tensor:
        """The values (m, n)."""
        functional, state = _functional(), self.state
        scales, block, elements = state.absmax, state.blocksize, state.shape.numel()
        if state.nested:
            scales = functional.dequantize_blockwise(scales, state.state2) + state.offset
        if block > LARGEST_KERNEL_BLOCK:
            pieces = block // LARGEST_KERNEL_BLOCK
            scales, block = scales.repeat_interleave(pieces)[: -(-elements // LARGEST_KERNEL_BLOCK)], block // pieces
        # The kernel for AVX-512 takes one scale for up to 32 elements of a row, even if a block ends among them. Rows
        # of one block each have no such place.
        rows = (1, elements) if elements % block else (elements // block, block)
        flat = torch.ops.bitsandbytes.dequantize_4bit(self.codes, scales, block, state.quant_type, rows, state.dtype)
        values: Tensor = flat.view(state.shape)
        return values

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint stores."""
        found: dict[str, Tensor] = {"weight": self.codes}
        for key, value in self.state.as_dict(packed=True).items():
            # JSON may end in spaces
            found[f"weight.{key}"] = _padded(value) if key.startswith("quant_state.") else value
        return found


@dataclass(frozen=True)
class EightBit:
    """int8 with a scale for each row, as ``Linear8bitLt`` has it."""

    @property
    def name(self) -> str:
        return "int8, a scale for each row"

    def quantize(self, weight: Tensor, dtype: torch.dtype) -> PackedEightBit:
        """Quantize a weight (m, n) float32. bitsandbytes rounds it to float16; its layers compute with the codes."""
        functional, (m, n) = _functional(), weight.shape
        codes = torch.empty(m, n, dtype=torch.int8, device=weight.device)
        scales = torch.empty(m, dtype=torch.float32, device=weight.device)
        rows = max(1, CHUNK_ELEMENTS // n) if weight.device.type == "cpu" else m
        for start in range(0, m, rows):
            half = weight[start : start + rows].to(torch.float16)
            if not bool(half.isfinite().all()):
                raise ValueError("int8 rounds the weight to float16 first, whose range it exceeds")
            codes[start : start + rows], scales[start : start + rows], _ = functional.int8_vectorwise_quant(half)
        return PackedEightBit(codes, scales)

    def layout(self, shape: tuple[int, int]) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Dtype and shape of each tensor that a checkpoint stores."""
        return {
            "weight": (torch.int8, shape),
            "SCB": (torch.float32, (shape[0],)),
            "weight_format": (torch.uint8, ()),
        }

    def unpack(self, tensors: Mapping[str, Tensor]) -> PackedEightBit:
        """The weight whose tensors a checkpoint holds."""
        if tensors["SCB"].shape != tensors["weight"].shape[:1]:
            raise ValueError(f"SCB has shape {tuple(tensors['SCB'].shape)}, not one value for each row")
        return PackedEightBit(tensors["weight"], tensors["SCB"])


@dataclass(frozen=True, eq=False)
class PackedEightBit:
    """A weight in int8.

    Attributes:
        codes: (m, n) int8.
        scales: (m,) float32, the largest absolute value of each row.
    """

    codes: Tensor
    scales: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        m, n = self.codes.shape
        return m, n

    def dequantize(self) -> Tensor:
        """The values (m, n), float32."""
        return self.codes.float().mul_((self.scales / MAX_8BIT)[:, None])

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint stores; format 0 is by rows."""
        return {
            "weight": self.codes,
            "SCB": self.scales,
            "weight_format": torch.zeros((), dtype=torch.uint8),
        }


def _has_kernel(values: Tensor) -> bool:
    return dispatch.select("sum_of_squares", values.view(1, 1, -1)) == "csrc"


def _kernel(values: Tensor, block: int, midpoints: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
    """:func:`pissa_kernels.ops.csrc.quantize_blocks`, once the library is loaded."""
    found: tuple[Tensor, Tensor] = dispatch.load("csrc").quantize_blocks(values, block, midpoints, codes)
    return found


@functools.cache
def _table(kind: str) -> tuple[Tensor, Tensor] | None:
    """Midpoints and codes with which csrc makes the codes of bitsandbytes; None if this version makes others.

    The two are compared on values of all sizes, on the midpoints themselves, and on a last block that is shorter.
    """
    functional, block = _functional(), 64
    values = functional.get_4bit_type(kind, device="cpu").float()
    order = values.argsort()
    midpoints = (values[order[:-1]] + values[order[1:]]) / 2
    generator = torch.Generator().manual_seed(0)
    sizes = torch.logspace(-44, 37, 4096 // block, dtype=torch.float64)[:, None]
    sample = (sizes * torch.randn(len(sizes), block, generator=generator, dtype=torch.float64).tanh()).float()
    exact = torch.cat([midpoints, values, torch.zeros(block - len(midpoints) - len(values))])
    sample = torch.cat([sample.flatten(), exact, 3.7 * exact, torch.zeros(block), sample.flatten()[-block // 2 - 2 :]])
    found = _kernel(sample, block, midpoints, order.to(torch.uint8))
    codes, state = functional.quantize_4bit(sample, blocksize=block, quant_type=kind)
    same = torch.equal(found[0], codes.flatten()) and torch.equal(found[1], state.absmax)
    return (midpoints, order.to(torch.uint8)) if same else None


def _padded(state: Tensor) -> Tensor:
    """bitsandbytes' JSON, in its shortest form, padded to :data:`STATE_BYTES`."""
    text = json.dumps(json.loads(bytes(state.tolist())), separators=(",", ":")).encode()
    if len(text) > STATE_BYTES:
        raise ValueError(f"the quantization state takes {len(text)} bytes, more than {STATE_BYTES}")
    return torch.frombuffer(bytearray(text.ljust(STATE_BYTES)), dtype=torch.uint8)


def _functional() -> Any:
    """``bitsandbytes.functional``."""
    try:
        import bitsandbytes.functional
    except ImportError as error:
        raise ModuleNotFoundError(
            f"quantized weights need bitsandbytes ({error}): pip install 'pissa-kernels[quantize]'", name="bitsandbytes"
        ) from None
    return bitsandbytes.functional


def standard_state(codes: Tensor, state: Any) -> PackedFourBit:
    """Codes and state in the order of a checkpoint, from those that a forward pass on a CPU may have packed otherwise.

    On CPUs with AVX512-BF16, bitsandbytes replaces the codes by others in the order of its kernel, and the scales by
    bfloat16 ones, at the first forward pass in evaluation mode. Nothing of the layer is changed here.
    """
    if not getattr(state, "packing_format_for_cpu", False):
        return PackedFourBit(codes, state)
    functional = _functional()
    scales = state.absmax.T.reshape(-1).float()  # they are transposed, besides
    state = copy.copy(state)
    state.original_nested = False  # the scales were rounded to bfloat16, and double quantization would round them again
    codes, state = functional._convert_weight_packed_for_cpu_inverse(codes, state)
    state.absmax, state.nested, state.state2, state.offset = scales, False, None, None
    return PackedFourBit(codes, state)
