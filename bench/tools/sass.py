"""What a compiled kernel consists of: instructions of its SASS, loops of its TTGIR, and what it leaves of an SM.

nvdisasm and cuobjdump are part of Triton's package.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import triton

# Multiply-accumulate instructions of tensor cores: of a warp, of a warpgroup (sm_90), and of sm_100.
MMA = re.compile(r"[HI]MMA|HGMMA|UTC\w*MMA")
WIDE_LOADS = re.compile(r"(LDG|LDGSTS)\.E\S*\.(128|256)")
WIDE_STORES = re.compile(r"STG\.E\S*\.(128|256)")
BARRIER = re.compile(r"BAR\.SYNC")
OPCODE = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z]\S*)")
LABEL = re.compile(r"\s*(\.L_x_\d+):")
BRANCH = re.compile(r"\bBRA\b.*`\((\.L_x_\d+)\)")


@dataclass(frozen=True)
class Multiprocessor:
    """What the blocks on one multiprocessor share, from the CUDA programming guide's table of compute capabilities."""

    shared_bytes: int
    threads: int
    blocks: int
    registers: int = 65536


MULTIPROCESSORS = {
    "sm_80": Multiprocessor(164 << 10, 2048, 32),
    "sm_90": Multiprocessor(228 << 10, 2048, 32),
    "sm_100": Multiprocessor(228 << 10, 2048, 32),
    "sm_120": Multiprocessor(100 << 10, 1536, 24),
}
WARP = 32
# Registers are allocated to a warp in units of this many per thread; shared memory has this much more per block.
REGISTER_UNIT = 8
RESERVED_BYTES = 1024


@dataclass(frozen=True)
class Code:
    """Instructions of one kernel.

    Attributes:
        registers: per thread.
        stack_bytes: per thread; spilled registers are there.
        shared_bytes: static shared memory.
        mma: MMA instructions in loops.
        warpgroup_mma: how many of these are a warpgroup's.
        barriers: BAR.SYNC in loops.
        wide_loads: loads of 16 bytes or more from global memory.
        wide_stores: stores of as much.
    """

    registers: int
    stack_bytes: int
    shared_bytes: int
    mma: int
    warpgroup_mma: int
    barriers: int
    wide_loads: int
    wide_stores: int


def kernels(cubin: Path) -> Iterator[tuple[str, Code]]:
    """The kernels of a cubin, by name."""
    usage = _run(triton.knobs.nvidia.cuobjdump.path, "-res-usage", str(cubin))
    disassembly = _run(triton.knobs.nvidia.nvdisasm.path, "-c", str(cubin))
    for name, registers, stack, shared in re.findall(r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+)", usage):
        section = re.search(
            rf"^\.text\.{re.escape(name)}:\n(.*?)(?=^\.text\.|\Z)", disassembly, re.DOTALL | re.MULTILINE
        )
        assert section is not None, f"no code of {name} in nvdisasm's output"
        yield name, count(section[1].splitlines(), int(registers), int(stack), int(shared))


def count(lines: list[str], registers: int, stack_bytes: int, shared_bytes: int) -> Code:
    """The figures of one kernel, from the lines of its disassembly and its resources."""
    found = [(index, match[1]) for index, line in enumerate(lines) if (match := OPCODE.search(line))]
    inside = set().union(*loops(lines))
    looped = [opcode for index, opcode in found if index in inside]
    mma = [opcode for opcode in looped if MMA.match(opcode)]
    return Code(
        registers,
        stack_bytes,
        shared_bytes,
        mma=len(mma),
        warpgroup_mma=sum(opcode.startswith("HGMMA") for opcode in mma),
        barriers=sum(bool(BARRIER.match(opcode)) for opcode in looped),
        wide_loads=sum(bool(WIDE_LOADS.match(opcode)) for _, opcode in found),
        wide_stores=sum(bool(WIDE_STORES.match(opcode)) for _, opcode in found),
    )


def loops(lines: list[str]) -> list[range]:
    """The lines of each loop: from a label to a branch back to it. The endless branch after the kernel is not one."""
    labels: dict[str, int] = {}
    found = []
    for index, line in enumerate(lines):
        if label := LABEL.match(line):
            labels[label[1]] = index
        elif (branch := BRANCH.search(line)) and index - labels.get(branch[1], index) > 2:
            found.append(range(labels[branch[1]], index + 1))
    return found


def looped_conversions(ttgir: str) -> int:
    """Layout conversions inside of the loops of a kernel's TTGIR."""
    found, depth = 0, 0
    opened: list[int] = []  # the depths of the loops around a line
    for line in ttgir.splitlines():
        body = re.sub(r"loc\(.*|\{[^{}]*\}", "", line)  # without locations and attributes, whose braces open no block
        if opened and "ttg.convert_layout" in body:
            found += 1
        if re.search(r"\bscf\.(for|while)\b", body):
            opened.append(depth)
        depth += body.count("{") - body.count("}")
        while opened and depth <= opened[-1] and "}" in body:
            opened.pop()
    return found


def blocks_per_multiprocessor(target: str, registers: int, shared_bytes: int, warps: int) -> int:
    """How many blocks of a kernel are on a multiprocessor at a time."""
    limits = MULTIPROCESSORS[target]
    threads = warps * WARP
    rounded = -(-registers // REGISTER_UNIT) * REGISTER_UNIT
    return min(
        limits.registers // (rounded * threads),
        limits.shared_bytes // (shared_bytes + RESERVED_BYTES),
        limits.threads // threads,
        limits.blocks,
    )


def _run(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout
