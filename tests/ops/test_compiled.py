"""Every GPU kernel compiles for every target, without a GPU: no spills, wide accesses, 64-bit offsets."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys

import pytest

pytest.importorskip("triton")

# Compiled outside: this process may have imported triton with its interpreter.
ENVIRONMENT = os.environ | {"TRITON_INTERPRET": "0"}
OFFSETS = """
from bench.tools.compiled import TARGETS, compiled, variants
for variant in variants():
    if "16" in variant.name:
        print("KERNEL", variant.name)
        print(compiled(variant, TARGETS["sm_90"]).asm["ttir"])
"""


@pytest.mark.slow
def test_the_table_of_every_kernel_and_target() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "bench", "compiled"], capture_output=True, text=True, check=False, env=ENVIRONMENT
    )
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [re.split(r"\s{2,}", line.strip()) for line in done.stdout.splitlines()[2:]]
    targets = {row[1] for row in rows}
    assert targets == {"sm_80", "sm_90", "sm_100", "sm_120", "gfx942", "gfx950"}
    for name, target, registers, spilled, _, loads, stores, _ in rows:
        assert int(spilled) == 0, (name, target)
        assert 0 < int(registers) <= 512, (name, target)
        if target.startswith("sm_") and ".cu" not in name:
            assert int(loads) > 0, (name, target)
            assert int(stores) > 0, (name, target)
    if shutil.which("nvcc"):
        # a file has kernels for unaligned weights, too
        wide = {(row[0].split()[0], row[1]) for row in rows if ".cu" in row[0] and int(row[5]) and int(row[6])}
        files = ("transpose_cast.cu", "subtract_lowrank.cu")
        assert wide == {(file, target) for file in files for target in targets if target.startswith("sm_")}


@pytest.mark.slow
def test_offsets_into_a_weight_are_64_bit() -> None:
    done = subprocess.run([sys.executable, "-c", OFFSETS], capture_output=True, text=True, check=True, env=ENVIRONMENT)
    kernels = done.stdout.split("KERNEL ")[1:]
    assert len(kernels) > 8
    for text in kernels:
        name = text.splitlines()[0]
        # arithmetic on tensors of pointers to the weight's type
        offsets = re.findall(r"tt\.addptr .*: tensor<\w+x!tt\.ptr<bf16>>, tensor<\w+x(i\d+)>", text)
        if "bf16" in name:
            assert offsets, name
            # in a group, the offset along the inner dimension is below 2³¹ where it is contiguous
            assert offsets[0] == "i64" if "grouped" in name else set(offsets) == {"i64"}, (name, offsets)
