"""Every GPU kernel compiles for every target, without a GPU, to code that meets its gate; and the gates can fail."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest

pytest.importorskip("triton")

from bench.tools import gates, sass
from bench.tools.compiled import HEADERS, Report

# Compiled outside: this process may have imported triton with its interpreter.
ENVIRONMENT = os.environ | {"TRITON_INTERPRET": "0"}
OFFSETS = """
from bench.tools.compiled import TARGETS, compiled
from bench.tools.variants import variants
for variant in variants():
    if "bf16" in variant.name:
        print("KERNEL", variant.name)
        print(compiled(variant, TARGETS["sm_90"]).asm["ttir"])
"""
# The tile of 64 rows and 8 warps that Triton gives two layouts of the accumulator.
DEFECT = """
from dataclasses import replace
from bench.tools import gates
from bench.tools.compiled import report
from bench.tools.variants import variants
variant = next(variant for variant in variants() if variant.name == "subtract_lowrank_ bf16 fp32 r16")
tile = {"BLOCK_ROWS": 64, "BLOCK_COLS": 128, "BLOCK_RANK": 32}
variant = replace(variant, constants=variant.constants | tile, options=variant.options | {"num_warps": 8})
print(gates.failures(report(variant, "sm_90"), variant.constants, 8))
"""
PRODUCTS = """
from bench.tools.compiled import TARGETS, compiled
from bench.tools.variants import variants
for variant in variants():
    if "matmul" in variant.name and ("192" in variant.name or " 64 " in variant.name):
        print("KERNEL", variant.name)
        print(compiled(variant, TARGETS["sm_90"]).asm["ttgir"])
"""
CODE = """
        /*0000*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
.L_x_1:
        /*0010*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
.L_x_0:
        /*0020*/              @!P1 HGMMA.64x64x16.F32.BF16 R24, gdesc[UR8], R24 ;
        /*0030*/                   LDGSTS.E.BYPASS.128 [R5], [R2.64] ;
        /*0040*/               @P0 BRA `(.L_x_0) ;
        /*0050*/                   HMMA.16816.F32.BF16 R4, R8, R10, R4 ;
        /*0060*/                   BRA `(.L_x_1) ;
        /*0070*/                   STG.E.128 desc[UR4][R2.64], R4 ;
.L_x_2:
        /*0080*/                   BRA `(.L_x_2);
"""
TTGIR = """
#loc = loc("kernel.py":1:0)
  tt.func @kernel(%a: !tt.ptr<bf16> {tt.divisibility = 16 : i32}) attributes {noinline = false} {
    %0 = ttg.convert_layout %x : tensor<1xf32, #a> -> tensor<1xf32, #b> loc(#loc)
    %1 = scf.for %i = %c0 to %n step %c1 iter_args(%t = %z) -> (tensor<1xf32>) : i32 {
      %2 = ttg.convert_layout %t : tensor<1xf32, #a> -> tensor<1xf32, #b> loc("x"({not a block})))
      %3 = scf.if %p -> (tensor<1xf32>) {
        %4 = ttg.convert_layout %2 : tensor<1xf32, #b> -> tensor<1xf32, #a>
        scf.yield %4 : tensor<1xf32>
      } else {
        scf.yield %2 : tensor<1xf32>
      }
      scf.yield %3 : tensor<1xf32>
    } {tt.num_stages = 2 : i32}
    %5 = ttg.convert_layout %1 : tensor<1xf32, #a> -> tensor<1xf32, #b>
    tt.return
  }
"""


def compiled(*arguments: str) -> list[dict[str, str]]:
    """The table that the command prints, which must succeed."""
    command = [sys.executable, "-m", "bench", "compiled", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=ENVIRONMENT)
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
    table, _, total = done.stdout.rpartition("\n\n")
    rule = table.splitlines()[1]
    columns = [match.span() for match in re.finditer("-+", rule)]
    rows = [[line[start:stop].strip() for start, stop in columns] for line in table.splitlines()[2:]]
    assert total.startswith(f"{len(rows)} kernels in ")
    return [dict(zip(HEADERS, row, strict=True)) for row in rows]


@pytest.mark.slow
def test_every_kernel_meets_its_gate_on_two_targets() -> None:
    rows = compiled("--targets", "sm_80", "sm_90")
    for row in rows:
        assert int(row["spilled bytes"]) == 0, row
        assert 0 < int(row["registers"]) <= 255, row
        assert int(row["blocks per SM"]) >= 1, row
    if shutil.which("nvcc"):
        # a file has kernels for unaligned weights, too
        files = [row for row in rows if ".cu" in row["kernel"]]
        wide = {
            (row["kernel"].split()[0], row["target"])
            for row in files
            if int(row["16-byte loads"]) and int(row["stores"])
        }
        names = ("transpose_cast.cu", "subtract_lowrank.cu")
        assert wide == {(name, target) for name in names for target in ("sm_80", "sm_90")}


@pytest.mark.slow
def test_some_kernels_meet_their_gates_on_every_target() -> None:
    kernels = (
        r"^(transpose_cast bf16 fp32|subtract_lowrank_ bf16 (bf16 r128|fp32 r16)|sum_of_squares bf16"
        r"|matmul bf16 16 x1|rmatmul bf16 192 x1|matmul bf16 64 x3 masked|matmul fp32 64 tf32|split)$"
    )
    rows = compiled("--only", kernels)
    assert {row["target"] for row in rows} == {"sm_80", "sm_90", "sm_100", "sm_120", "gfx942", "gfx950"}
    assert all(int(row["spilled bytes"]) == 0 and int(row["registers"]) > 0 for row in rows)


@pytest.mark.slow
def test_a_gate_catches_a_tile_with_two_layouts() -> None:
    done = subprocess.run([sys.executable, "-c", DEFECT], capture_output=True, text=True, check=True, env=ENVIRONMENT)
    assert "layout conversions in loops" in done.stdout
    assert "MMA instructions in loops, 12 expected" in done.stdout


@pytest.mark.slow
def test_offsets_into_a_weight_are_64_bit() -> None:
    done = subprocess.run([sys.executable, "-c", OFFSETS], capture_output=True, text=True, check=True, env=ENVIRONMENT)
    kernels = done.stdout.split("KERNEL ")[1:]
    assert len(kernels) > 8
    for text in kernels:
        name = text.splitlines()[0]
        # arithmetic on tensors of pointers to the weight's type
        found = re.findall(r"tt\.addptr .*: tensor<(\w+)x!tt\.ptr<bf16>>, tensor<\w+x(i\d+)>", text)
        # in a panel, offsets are those within a block of rows, which is not as high as a block of the weight
        offsets = [size for shape, size in found if "matmul" not in name or shape.startswith("128x")]
        assert offsets, name
        assert set(offsets) == {"i64"}, (name, offsets)


def test_instructions_are_counted_in_loops() -> None:
    code = sass.count(CODE.splitlines(), registers=40, stack_bytes=0, shared_bytes=0)
    # the outer loop has both MMA instructions; the endless branch at the end is no loop
    assert (code.mma, code.warpgroup_mma, code.barriers) == (2, 1, 1)
    assert (code.wide_loads, code.wide_stores) == (2, 1)
    assert [len(loop) for loop in sass.loops(CODE.splitlines())] == [4, 8]


def test_conversions_are_counted_in_loops() -> None:
    assert sass.looped_conversions(TTGIR) == 2


@pytest.mark.parametrize(
    ("target", "registers", "shared_bytes", "warps", "blocks"),
    [
        ("sm_90", 80, 36864, 8, 3),  # by registers
        ("sm_90", 81, 0, 8, 2),  # 88 are allocated
        ("sm_80", 32, 55 << 10, 4, 2),  # by shared memory, of which each block needs 1 KiB more
        ("sm_120", 32, 0, 8, 6),  # by threads
        ("sm_90", 16, 0, 1, 32),
    ],
)
def test_blocks_per_multiprocessor(target: str, registers: int, shared_bytes: int, warps: int, blocks: int) -> None:
    assert sass.blocks_per_multiprocessor(target, registers, shared_bytes, warps) == blocks


TILE = {"BLOCK_ROWS": 128, "BLOCK_COLS": 64, "BLOCK_RANK": 32}
GOOD = Report(
    "subtract_lowrank_ bf16 bf16 r128",
    "sm_90",
    registers=80,
    spills=0,
    shared_bytes=36864,
    mma=2,
    warpgroup_mma=2,
    conversions=0,
    barriers=2,
    wide_loads=13,
    wide_stores=4,
    blocks=3,
    seconds=1.0,
)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"spills": 8}, "8 bytes are spilled"),
        ({"mma": 3, "warpgroup_mma": 3}, "3 MMA instructions in loops, 2 expected"),
        ({"mma": 16, "warpgroup_mma": 0}, "16 MMA instructions are not a warpgroup's"),
        ({"target": "sm_80", "mma": 8}, "8 MMA instructions in loops, 16 expected"),
        ({"conversions": 1}, "1 layout conversions in loops, at most 0 expected"),
        ({"wide_loads": 0}, "0 loads and 4 stores of 16 bytes"),
        ({"blocks": 1}, "1 blocks per multiprocessor, at least 2 expected"),
        ({"target": "gfx942", "spills": 4}, "4 bytes are spilled"),
        ({"target": "gfx942", "shared_bytes": 81920}, "81920 bytes of shared memory, 65536 at most"),
    ],
)
def test_a_report_that_misses_its_gate_says_in_what(changes: dict[str, object], words: str) -> None:
    assert gates.failures(GOOD, TILE, 8) == []
    assert words in gates.failures(replace(GOOD, **changes), TILE, 8)  # type: ignore[arg-type]


PRODUCT = {"BLOCK_ROWS": 128, "BLOCK_INNER": 64, "BLOCK_COLS": 128, "BLOCK_MORE": 64}
FLOATS = {"BLOCK_ROWS": 64, "BLOCK_INNER": 32, "BLOCK_COLS": 64, "BLOCK_MORE": 0}


@pytest.mark.parametrize(
    ("kernel", "target", "constants", "warps", "instructions"),
    [
        ("matmul bf16 192 x1", "sm_90", {}, 8, 8),  # of 64 rows and a warpgroup, for two tiles of columns
        ("rmatmul bf16 192 x1", "sm_80", {}, 8, 96),
        ("matmul bf16 64 x1", "sm_90", {"BLOCK_COLS": 64, "BLOCK_MORE": 0}, 4, 8),
        ("matmul bf16 64 x2 masked", "sm_90", {"BLOCK_COLS": 64, "BLOCK_MORE": 0}, 8, 8),
        ("matmul bf16 64 x3", "sm_120", {"BLOCK_INNER": 32, "BLOCK_COLS": 64, "BLOCK_MORE": 0}, 4, 96),
        ("matmul fp16 64 tf32", "sm_90", FLOATS, 4, 4),
        ("rmatmul fp32 16 tf32x3 masked", "sm_80", FLOATS | {"BLOCK_COLS": 16}, 4, 24),
    ],
)
def test_instructions_follow_from_the_tile(
    kernel: str, target: str, constants: dict[str, int], warps: int, instructions: int
) -> None:
    tile = PRODUCT | constants
    assert gates.mma_instructions(gates.gate_of(kernel), target, tile, warps) == instructions
    warpgroup = instructions if target == "sm_90" else 0
    good = replace(GOOD, kernel=kernel, target=target, mma=instructions, warpgroup_mma=warpgroup)
    assert gates.failures(good, tile, warps) == []
    assert gates.failures(replace(good, mma=instructions + 1, warpgroup_mma=warpgroup + 1), tile, warps) != []


@pytest.mark.parametrize(
    ("kernel", "target", "warps", "enough"),
    [
        ("matmul bf16 192 x1", "sm_90", 8, 1),
        ("matmul bf16 128 x1", "sm_80", 8, 1),
        ("matmul bf16 128 x1", "sm_90", 8, 2),
        ("matmul bf16 64 x2", "sm_90", 8, 2),
        ("matmul bf16 64 x2", "sm_120", 8, 1),
        ("matmul bf16 32 x2", "sm_120", 4, 2),
    ],
)
def test_blocks_that_the_design_needs(kernel: str, target: str, warps: int, enough: int) -> None:
    for blocks in range(3):
        found = gates.failures(replace(GOOD, kernel=kernel, target=target, blocks=blocks), PRODUCT, warps)
        assert any("blocks per multiprocessor" in message for message in found) == (blocks < enough)


def test_a_kernel_without_a_gate_is_an_error() -> None:
    with pytest.raises(LookupError, match="0 lines of GATES match the kernel 'new kernel'"):
        gates.gate_of("new kernel")


@pytest.mark.slow
def test_accumulators_of_exact_products_are_restarted() -> None:
    done = subprocess.run([sys.executable, "-c", PRODUCTS], capture_output=True, text=True, check=True, env=ENVIRONMENT)
    kernels = done.stdout.split("KERNEL ")[1:]
    assert len(kernels) > 8
    for text in kernels:
        name = text.splitlines()[0]
        loop = re.search(r"scf\.for .*?scf\.yield", text, re.DOTALL)
        assert loop is not None, name
        panels = 2 if " 192 " in name else 1  # of 128 and of 64 columns
        passes = {"x1": 1, "tf32": 1, "x2": 2, "x3": 3, "tf32x3": 3}[name.split()[3]]
        carried = re.findall(r"%(\w+) = %cst\w*", loop[0].splitlines()[0])  # the totals, which begin with zero
        products = re.findall(r"ttng\.warp_group_dot \S+ \S+ %(\w+)", loop[0])
        additions = re.findall(r"arith\.addf .*tensor<128x|arith\.addf .*tensor<64x", loop[0])
        assert len(products) == passes * panels, name
        assert "ttg.convert_layout" not in loop[0], name
        if passes == 1:  # each product accumulates into a total
            assert set(products) <= set(carried), name
        else:  # none does: the totals are additions in float32
            assert not set(products) & set(carried), name
            assert len(additions) >= panels, name
