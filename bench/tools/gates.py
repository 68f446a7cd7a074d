"""What the compiled kernels must look like, for ``python -m bench compiled``: a line per kernel.

No kernel may spill. The number of MMA instructions in a main loop follows from the tile and the number of products, so
that a loop that was compiled to other instructions, or to more of them, is found without a list of counts.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Gate:
    """What every variant of a kernel must be compiled to.

    Attributes:
        products: products of tiles in a step of the main loop; 0 where tensor cores multiply nothing.
        step: constant of the kernel that is the inner dimension of these products.
        columns: constants that are the widths of the tiles of columns.
        depth: inner dimension of one MMA instruction: 16 for 16-bit operands, 8 for TF32.
        conversions: layout conversions in loops.
        wide: whether global memory is read and written by 16 bytes.
        blocks: blocks per multiprocessor, at least: one computes while another waits.
        alone: targets on which one block is enough if it has ``ALONE_WARPS`` warps.
    """

    products: int = 0
    step: str = "BLOCK_INNER"
    columns: tuple[str, ...] = ("BLOCK_COLS",)
    depth: int = 16
    conversions: int = 0
    wide: bool = True
    blocks: int = 2
    alone: tuple[str, ...] = ()


# Warps that a block needs to be alone on a multiprocessor: two for each of the four schedulers.
ALONE_WARPS = 8
# Targets whose MMA instructions are counted. On sm_100 some are issued ahead of the loop.
COUNTED = ("sm_80", "sm_90", "sm_120")

# Widths of a tile of a panel.
TILES = ("BLOCK_COLS", "BLOCK_MORE")
GATES = {
    "transpose_cast .*": Gate(),
    "subtract_lowrank_ (bf16 bf16|fp16 fp16) .*": Gate(products=1, step="BLOCK_RANK"),
    "subtract_lowrank_ bf16 fp32 .*": Gate(products=6, step="BLOCK_RANK"),
    "subtract_lowrank_ fp32 fp32 .*": Gate(),
    "sum_of_squares .*": Gate(wide=False),  # it stores one number
    "split": Gate(),
    # their products are float32's, without tensor cores; reductions and transposes in the loops are conversions
    "inverse_cholesky": Gate(conversions=7, wide=False),
    "eigh.diagonalize 32 1": Gate(conversions=3, wide=False, blocks=4),
    "eigh.diagonalize (32|64) 12": Gate(conversions=3, wide=False, blocks=1),
    "eigh.update .*": Gate(),
    "r?matmul bf16 (16|32|64) x1.*": Gate(products=1, columns=TILES),
    # A tile of more columns is there to read W once. Its accumulators, up to 128 registers, leave room for one block,
    # whose two warps per scheduler and stages of asynchronous copies do for a second one. Where MMA instructions take
    # their operands from registers, this begins with 128 columns.
    "r?matmul bf16 128 x1.*": Gate(products=1, columns=TILES, alone=("sm_80", "sm_120")),
    "r?matmul bf16 (160|192|256) x1": Gate(products=1, columns=TILES, blocks=1),
    # A step waits for its products, to add them to the total, so that another block has to fill the tensor cores. A
    # block is alone on sm_120, which has less than half of the shared memory of the others, and on sm_100, where the
    # sum of a step comes from tensor memory to registers beside the total.
    "r?matmul bf16 .* x2.*": Gate(products=2, columns=TILES, alone=("sm_100", "sm_120")),
    "r?matmul bf16 .* x3.*": Gate(products=3, columns=TILES),
    "(gram|change) .* x3.*": Gate(products=6, alone=("sm_80", "sm_100", "sm_120")),
    "r?matmul (fp16|fp32) .* tf32( masked)?": Gate(products=1, columns=TILES, depth=8),
    "r?matmul (fp16|fp32) .* tf32x3( masked)?": Gate(products=3, columns=TILES, depth=8),
}
# Shared memory of a block on AMD's targets, from the CDNA 3 and CDNA 4 instruction set manuals.
SHARED_BYTES = {"gfx942": 64 << 10, "gfx950": 160 << 10}


def gate_of(kernel: str) -> Gate:
    """The gate of a kernel; every kernel needs one."""
    found = [gate for pattern, gate in GATES.items() if re.fullmatch(pattern, kernel)]
    if len(found) != 1:
        raise LookupError(f"{len(found)} lines of GATES match the kernel {kernel!r}; exactly one should")
    return found[0]


def mma_instructions(gate: Gate, target: str, constants: dict[str, Any], warps: int) -> int:
    """MMA instructions of a warp in a step of the main loop: 64 × n × depth on sm_90, 16 × 8 × depth otherwise."""
    if not gate.products:
        return 0
    rows, inner = int(constants["BLOCK_ROWS"]), int(constants[gate.step])
    widths = [int(constants[name]) for name in gate.columns]
    depth = gate.products * inner // gate.depth
    if target == "sm_90":
        return max(1, rows // 64 // (warps // 4)) * sum(math.ceil(width / 256) for width in widths) * depth
    return rows * sum(widths) // (16 * 8 * warps) * depth


def failures(report: Any, constants: dict[str, Any], warps: int) -> list[str]:
    """In what the report of a compiled Triton kernel does not meet its gate."""
    gate = gate_of(report.kernel)
    found = [f"{report.spills} bytes are spilled"] if report.spills else []
    if report.target in SHARED_BYTES:
        if report.shared_bytes > SHARED_BYTES[report.target]:
            found.append(f"{report.shared_bytes} bytes of shared memory, {SHARED_BYTES[report.target]} at most")
        return found
    if report.conversions > gate.conversions:
        found.append(f"{report.conversions} layout conversions in loops, at most {gate.conversions} expected")
    if gate.wide and not (report.wide_loads and report.wide_stores):
        found.append(f"{report.wide_loads} loads and {report.wide_stores} stores of 16 bytes")
    blocks = 1 if report.target in gate.alone and warps >= ALONE_WARPS else gate.blocks
    if report.blocks < blocks:
        found.append(f"{report.blocks} blocks per multiprocessor, at least {blocks} expected")
    expected = mma_instructions(gate, report.target, constants, warps)
    if report.target in COUNTED and report.mma != expected:
        found.append(f"{report.mma} MMA instructions in loops, {expected} expected")
    if report.target == "sm_90" and report.mma != report.warpgroup_mma:
        found.append(f"{report.mma - report.warpgroup_mma} MMA instructions are not a warpgroup's")
    return found
