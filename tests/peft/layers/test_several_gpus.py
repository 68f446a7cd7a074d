"""Layers divided among GPUs by their times, and the GPUs that a caller names."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import pissa_kernels as pk
from pissa_kernels.factors import Recipe
from pissa_kernels.peft.layers import batches, several_gpus
from pissa_kernels.peft.layers.layer import LayerJob
from pissa_kernels.peft.layers.several_gpus import devices_of, divide
from pissa_kernels.svd import cost

from ...support.gpus import GPUS, Gpus
from ...support.jobs import CPU, Net, jobs_of

PLENTY = 1 << 40
Shares = dict[torch.device, list[Any]]


class FakeJob:
    """A layer without a weight.

    Args:
        cost: seconds.
        place: device of its weight.
        size: bytes of workspace.
    """

    parts = 1

    def __init__(self, cost: int, place: torch.device = CPU, size: int = 0) -> None:
        self.cost, self.size = cost, size
        self.weight = SimpleNamespace(device=place, nbytes=0)

    def workspace(self, device: torch.device, batch: int = 1) -> int:
        return self.size


def divided(jobs: Sequence[FakeJob], count: int, budgets: Sequence[int] = (PLENTY,) * 8) -> Shares:
    devices = [torch.device("cuda", index) for index in range(count)]
    with mock.patch.object(several_gpus, "seconds", lambda job, device: job.cost):
        return divide(jobs, devices, lambda device: budgets[device.index])  # type: ignore[arg-type]


def makespan(shares: Shares) -> int:
    return max(sum(job.cost for job in share) for share in shares.values())


COSTS = st.integers(1, 100)


@given(st.lists(COSTS, min_size=1, max_size=7), st.integers(2, 3))
def test_the_last_gpu_is_done_within_four_thirds_of_the_best_division(costs: list[int], count: int) -> None:
    """Graham 1969: the longest first takes at most 4/3 − 1/(3·count) of the optimum, here found by trying all."""
    best = min(
        max(sum(cost for cost, place in zip(costs, places, strict=True) if place == device) for device in range(count))
        for places in itertools.product(range(count), repeat=len(costs))
    )
    assert 3 * count * makespan(divided(list(map(FakeJob, costs)), count)) <= (4 * count - 1) * best


@given(st.lists(st.tuples(COSTS, st.sampled_from([None, 0, 1, 2, 3])), min_size=1, max_size=60), st.integers(1, 4))
def test_no_layer_is_lost_or_moved_and_gpus_with_layers_of_their_own_get_fewer(
    layers: list[tuple[int, int | None]], count: int
) -> None:
    jobs = [FakeJob(cost, CPU if place is None else torch.device("cuda", place)) for cost, place in layers]
    shares = divided(jobs, count)
    assert Counter(id(job) for share in shares.values() for job in share) == Counter(map(id, jobs))
    for device, share in shares.items():
        assert [jobs.index(job) for job in share] == sorted(jobs.index(job) for job in share)
        for job in share:
            assert job.weight.device in (device, CPU)
            assert job.weight.device == device or device.index < count
    named = {device: share for device, share in shares.items() if device.index < count}
    if streamed := [job.cost for job in jobs if job.weight.device == CPU]:
        own = [sum(job.cost for job in share if job.weight.device != CPU) for share in named.values()]
        mean = sum(job.cost for share in named.values() for job in share) / count
        assert makespan(named) <= max(*own, 0, mean + max(streamed))


def test_a_gpu_that_is_busy_with_layers_of_its_own_gets_none() -> None:
    jobs = [FakeJob(2), FakeJob(9, GPUS[1]), FakeJob(3), FakeJob(4, GPUS[2]), FakeJob(1)]
    shares = divided(jobs, 2)
    assert shares == {GPUS[0]: [jobs[0], jobs[2], jobs[4]], GPUS[1]: [jobs[1]], GPUS[2]: [jobs[3]]}


def test_without_devices_every_layer_stays() -> None:
    jobs = [FakeJob(2), FakeJob(9, GPUS[1])]
    assert divided(jobs, 0) == {CPU: jobs[:1], GPUS[1]: jobs[1:]}


def test_a_layer_goes_where_it_fits_and_otherwise_where_it_misses_least() -> None:
    jobs = [FakeJob(5, size=90), FakeJob(4, size=50), FakeJob(3, size=90), FakeJob(2, size=300)]
    shares = divided(jobs, 3, budgets=(60, 100, 10))
    assert shares == {GPUS[0]: [jobs[1]], GPUS[1]: [jobs[0], jobs[2], jobs[3]]}


# Llama-2-7B: rows and columns, and how many there are in a layer
SHAPES = [(4096, 4096)] * 4 + [(11008, 4096)] * 2 + [(4096, 11008)]


class Projection(FakeJob):
    """A bfloat16 weight of a real model, without memory for it."""

    transposed, layout = False, None

    def __init__(self, shape: tuple[int, int], rank: int = 16) -> None:
        super().__init__(0)
        self.shape, self.recipe = shape, Recipe(rank)
        self.weight = SimpleNamespace(
            device=CPU, nbytes=2 * shape[0] * shape[1], shape=shape, stride=lambda: (shape[1], 1), dtype=torch.bfloat16
        )

    def workspace(self, device: torch.device, batch: int = 1) -> int:
        return cost.workspace(*self.shape, self.recipe.rank, None, machine="cuda", batch=batch)


@pytest.mark.parametrize("count", [2, 3, 4, 8])
def test_a_real_model_is_divided_evenly_and_equal_shapes_stay_batches(count: int) -> None:
    jobs: list[Any] = [Projection(shape) for _ in range(32) for shape in SHAPES]
    devices = [torch.device("cuda", index) for index in range(count)]
    shares = divide(jobs, devices, lambda device: 40 << 30)
    sizes = [sum(job.weight.nbytes for job in share) for share in shares.values()]
    assert len(sizes) == count
    assert max(sizes) <= 1.05 * sum(sizes) / count
    for device, share in shares.items():
        planned = batches.plan_batches(share, device, 40 << 30)
        assert len(planned) == len({job.shape for job in share})  # one batch of each shape
        assert len(share) >= 2 * len(planned)


def test_times_of_layers() -> None:
    def seconds(shape: tuple[int, int], rank: int) -> float:
        return several_gpus.seconds(Projection(shape, rank), GPUS[0])  # type: ignore[arg-type]

    small, large = seconds((4096, 4096), 16), seconds((11008, 4096), 16)
    assert large == seconds((4096, 11008), 16) == pytest.approx(11008 / 4096 * small)
    assert small < seconds((4096, 4096), 128) < seconds((4096, 4096), 512)  # the last without the fixed schedule
    job: Any = Projection((4096, 4096))
    job.weight.device = GPUS[0]
    assert small - several_gpus.seconds(job, GPUS[0]) == pytest.approx(2 * 2 * 4096**2 / several_gpus.COPIED_BYTES)
    job.parts = 8  # a stack of experts
    assert several_gpus.seconds(job, GPUS[0]) == pytest.approx(8 * cost.seconds(4096, 4096, 16, None, machine="cuda"))


def test_estimates_are_within_a_factor_of_two_of_times_on_an_h200() -> None:
    """Kernels for all projections of Llama-2-7B: 0.12 s at rank 16, 0.45 s at rank 128 (docs/what-has-run-where.md)."""
    for rank, measured in ((16, 0.12), (128, 0.45)):
        estimate = 32 * sum(cost.seconds(*shape, rank, None, machine="cuda") for shape in SHAPES)
        assert measured / 2 <= estimate <= 2 * measured


# Names


def test_names_of_devices(gpus: Gpus) -> None:
    assert devices_of(None) == ()
    assert devices_of("cuda") == devices_of(["cuda"]) == devices_of(torch.device("cuda:0")) == GPUS[:1]
    assert devices_of(["cuda:2", torch.device("cuda", 0), "cuda:1"]) == (GPUS[2], GPUS[0], GPUS[1])
    assert devices_of("cpu") == devices_of(("cpu",)) == (CPU,)


@pytest.mark.parametrize(
    ("named", "error", "message"),
    [
        ([], ValueError, r"device=\[\] names no device; name one or more GPUs, or pass None for no streaming"),
        (("cuda", "cuda:0"), ValueError, r"device=\['cuda', 'cuda:0'\] names cuda:0 twice; name each device once"),
        (["cuda:1", "cuda:0", "cuda:1"], ValueError, r"device=\['cuda:1', .* names cuda:1 twice; .*"),
        (["cpu", "cpu"], ValueError, r"device=\['cpu', 'cpu'\] names cpu twice; .*"),
        (["cuda:0", "cpu"], ValueError, r"device=\['cuda:0', 'cpu'\] mixes kinds of devices; name GPUs of one kind.*"),
        (["cuda:0", "cuda:7"], RuntimeError, "device='cuda:7' cannot be used: CUDA error: invalid device ordinal"),
        (["cuda:0", "no such device"], RuntimeError, "device='no such device' cannot be used: .*"),
    ],
)
def test_devices_that_are_refused(named: Any, error: type[Exception], message: str, gpus: Gpus) -> None:
    with pytest.raises(error, match=rf"^{message}$") as refused:
        pk.patch_peft(device=named)
    assert "\n" not in str(refused.value)


def test_several_devices_without_batches_are_refused(gpus: Gpus) -> None:
    with pytest.raises(ValueError, match="batch=False"):
        pk.patch_peft(device=["cuda:0", "cuda:1"], batch=False)


def test_real_layers_are_divided() -> None:
    jobs: list[LayerJob] = jobs_of(Net())
    shares = divide(jobs, GPUS, lambda device: PLENTY)
    assert [len(share) for share in shares.values()] == [3, 3, 2]
    assert divide(jobs, GPUS[:1], lambda device: pytest.fail("one device needs no budget")) == {GPUS[0]: jobs}
