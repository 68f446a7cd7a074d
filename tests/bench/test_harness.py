"""What all benchmarks share: the float64 reference, interleaved timing, memory of a fresh process, rows on disk."""

from __future__ import annotations

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("peft")

from bench.harness import fresh, gate, timing
from bench.harness.paths import ROOT
from bench.harness.rows import read_rows
from bench.initializers import memory
from bench.initializers.cases import Case
from bench.initializers.providers import PROVIDERS

pytestmark = pytest.mark.usefixtures("own_cache")


def test_deficit_of_a_skipped_triplet_is_the_energy_it_lacks():
    weight = torch.diag(torch.tensor([4.0, 3.0, 2.0, 1.0], dtype=torch.float64))
    rows = torch.eye(4)[[0, 2]] * torch.tensor([[3.0], [0.1]])
    assert gate.subspace_deficit(weight, rows, 25.0) == pytest.approx((9 - 4) / 25, abs=1e-12)


def test_reference_is_the_spectrum_and_is_cached_by_content(monkeypatch):
    weight = Case("x", (160, 200), 4, dtype="fp32", spectrum="flat").weight()
    exact = torch.linalg.svdvals(weight.double())
    found = gate.reference(weight)
    torch.testing.assert_close(found.squares, exact.square(), rtol=1e-10, atol=1e-12)
    assert found.optimum(4) == pytest.approx(float(exact[:4].square().sum()), rel=1e-12)
    monkeypatch.setattr(torch.linalg, "eigvalsh", lambda matrix: pytest.fail("computed again"))
    assert torch.equal(gate.reference(weight.clone()).squares, found.squares)
    with pytest.raises(pytest.fail.Exception, match="computed again"):
        gate.reference(weight + 1e-3)


def test_timing_is_interleaved_and_slow_subjects_are_repeated_less(monkeypatch):
    log = []
    clock = [0.0]
    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock[0])

    def subject(name, seconds):
        def run():
            log.append(name)
            clock[0] += seconds

        return SimpleNamespace(restore=lambda: log.append(f"restore {name}"), run=run)

    subjects = {"fast": subject("fast", 0.2), "slow": subject("slow", timing.SLOW_SECONDS + 1)}
    # the fast one met another process in its first run
    times = timing.interleaved(subjects, dict.fromkeys(subjects, timing.SLOW_SECONDS + 2), 5, "cpu")
    assert (times["fast"].repeats, times["slow"].repeats) == (5, timing.SLOW_REPEATS)
    assert (times["fast"].median_ms, times["slow"].min_ms) == pytest.approx((200, 6000))
    assert log[::2] == [f"restore {name}" for name in log[1::2]]
    rounds = ["fast", "slow"] * (1 + timing.SLOW_REPEATS) + ["fast"] * (5 - timing.SLOW_REPEATS)
    assert log[1::2] == rounds


HUNGRY = """
import torch
from bench.initializers.memory import measure
class Hungry:
    pins = []
    def prepare(self, weight, rank, fan_in_fan_out): return self
    def run(self):
        {body}
        self.pins.append(torch.ones(1000))
print(measure(Hungry(), torch.zeros(8, 8), 1, False))
"""


# What the warm-up leaves behind would serve the second run: freed small blocks below a pinned one, which glibc keeps,
# and, where large blocks share the heap, holes that are too small for the next one and stay resident beside it.
SMALL_BLOCKS = "blocks = [torch.ones(16 << 10) for _ in range(256)]"


GROWING_BLOCKS = "for mib in range(8, 17, 2): self.pins.append(torch.ones(1000)); torch.ones(mib << 18)"


@pytest.mark.slow
@pytest.mark.parametrize("body", [SMALL_BLOCKS, GROWING_BLOCKS])
def test_memory_is_neither_hidden_nor_inflated_by_the_allocator(body):
    child = subprocess.run(
        [sys.executable, "-c", HUNGRY.format(body=body)],
        cwd=ROOT,
        env=os.environ | fresh.MALLOC,
        capture_output=True,
        text=True,
        check=True,
    )
    if child.stdout.strip() == "None":
        pytest.skip("this system does not let a process reset its VmHWM")
    assert float(child.stdout) == pytest.approx(16, abs=2)


@pytest.mark.slow
def test_memory_of_a_provider_in_its_own_process():
    weight = Case("x", (1024, 1024), 16).weight()
    peak = memory.peak_extra_mib(PROVIDERS["peft pissa_niter_4"], weight, 16, False)
    if peak is None:
        pytest.skip("this system does not let a process reset its VmHWM")
    # a float32 copy and a float32 residual of 4 MiB each are the least that PEFT's code holds at once
    assert 8 <= peak < 64


def test_lines_that_are_not_rows_are_refused(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"case": "c"}\n')
    with pytest.raises(ValueError, match="line 1"):
        read_rows(path)
