"""What several processes check of the SVD of a weight that they hold in blocks; run by ``test_sharded.py``."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from functools import cache, partial
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import _StridedShard
from torch.utils._python_dispatch import TorchDispatchMode

import pissa_kernels as pk
from pissa_kernels.factors import tolerance
from pissa_kernels.runtime import shards
from pissa_kernels.svd import fixed, sharded_products, sharded_steps

from ..support.reference import EPS, ROUNDOFF, energy_deficit, realistic, singular_values, true_residual, with_spectrum
from ..support.together import raises_everywhere, same_everywhere, together

RANK = 16
TOL = tolerance(torch.bfloat16)


def divided(W: Tensor, placements: list[Any], shape: tuple[int, ...] | None = None) -> Any:
    """A ``DTensor`` of a weight that every process has."""
    mesh = init_device_mesh("cpu", shape or (dist.get_world_size(),))
    return distribute_tensor(W, mesh, placements, src_data_rank=None)


def layouts() -> Iterator[tuple[list[Any], tuple[int, ...]]]:
    """Placements, and the mesh that they are of."""
    world = dist.get_world_size()
    for placement in (Shard(0), Shard(1), _StridedShard(0, split_factor=2), _StridedShard(1, split_factor=2)):
        yield [placement], (world,)
    yield [Replicate()], (world,)
    if world == 4:
        for pair in itertools.permutations((Shard(0), Shard(1), Replicate()), 2):
            yield list(pair), (2, 2)
        yield [Shard(0), Shard(0)], (2, 2)
        yield [_StridedShard(0, split_factor=2), Shard(0)], (2, 2)


@cache
def of_one_process(W: Tensor, rank: int, niter: int | None) -> pk.TruncatedSVD:
    return pk.truncated_svd(W, rank, niter=niter)


def check(W: Tensor, D: Any, rank: int = RANK, niter: int | None = None) -> pk.TruncatedSVD:
    """The triplets, held against float64 and against those of one process."""
    found, alone = pk.truncated_svd(D, rank, niter=niter), of_one_process(W, rank, niter)
    same_everywhere(*found[:3])
    assert (found.U.shape, found.Vh.shape) == ((W.shape[0], rank), (rank, W.shape[1]))
    exact = singular_values(W)[:rank]
    assert true_residual(W, *found[:3]) <= (found.certificate.residual + 30 * EPS) * float(exact[0])
    assert found.certificate.converged == alone.certificate.converged
    assert abs(found.certificate.energy - alone.certificate.energy) <= 2e-7
    if niter is None:
        assert float((found.S - exact).abs().max()) <= 30 * EPS * float(exact[0])
        assert energy_deficit(W, found.Vh) <= 1e-6
    products = [(svd.U * svd.S).double() @ svd.Vh.double() for svd in (found, alone)]
    gap = float(exact[-1]) / float(exact[0])
    assert float((products[0] - products[1]).abs().max()) <= 30 * EPS * float(exact[0]) / gap
    return found


@together(2, 3, 4)
def check_every_layout() -> None:
    """Tall, wide and small; the rows and columns that 3 and 4 do not divide among them."""
    for shape, dtype in (((301, 1201), torch.bfloat16), ((1450, 1310), torch.float32), ((130, 97), torch.float16)):
        W = realistic(*shape, seed=1).to(dtype)
        for placements, mesh in layouts():
            check(W, divided(W, placements, mesh))


@together(3)
def check_blocks_without_rows() -> None:
    W = realistic(200, 4, seed=2).float()
    check(W, divided(W, [Shard(1)]), rank=2)
    W = realistic(5, 90, seed=2).float()
    check(W, divided(W.repeat(1, 1), [_StridedShard(0, split_factor=4)]), rank=2)


@together(2)
def check_other_accuracies_ranks_and_scales() -> None:
    W = realistic(700, 600, seed=3).float()
    for niter in (0, 4):
        check(W, divided(W, [Shard(0)]), niter=niter)
    for rank in (1, 300, 600):
        check(W, divided(W, [Shard(1)]), rank=rank)
    for scale in (1e-30, 1e30):
        for placement in (Shard(0), Shard(1)):
            check(W * scale, divided(W * scale, [placement]))
    wide = realistic(1300, 1250, seed=3).float() * 1e20
    check(wide, divided(wide, [Shard(0)]))


@together(2)
def check_defaults_of_the_caller() -> None:
    W = realistic(301, 201, seed=1).float()
    expected = pk.truncated_svd(W, 8)
    D = divided(W, [Shard(0)])
    for dtype in (torch.float64, torch.bfloat16):
        torch.set_default_dtype(dtype)
        try:
            found = pk.truncated_svd(D, 8)
        finally:
            torch.set_default_dtype(torch.float32)
        same_everywhere(*found[:3])
        assert float((found.S - expected.S).abs().max()) <= 30 * EPS * float(expected.S[0])
    with torch.device("meta"):
        assert float((pk.truncated_svd(D, 8).S - expected.S).abs().max()) <= 30 * EPS * float(expected.S[0])


@together(2)
def check_deficient_and_zero_matrices() -> None:
    low = with_spectrum(400, 300, torch.tensor([3.0, 2.0, 1.0])).float()
    for W in (low, torch.zeros(400, 300)):
        for placement in (Shard(0), Shard(1)):
            found = pk.truncated_svd(divided(W, [placement]), 8)
            same_everywhere(*found[:3])
            assert float(((found.U * found.S) @ found.Vh - W).abs().max()) <= 1e-5
            for vectors in (found.U.mT, found.Vh):
                assert float((vectors @ vectors.mT - torch.eye(8)).abs().max()) <= 1e-5


@together(2, 3, 4)
def check_the_schedule_of_gpus() -> None:
    """On CPU tensors: each layout against float64 and against the schedule of one process."""
    for shape, dtype in (((420, 351), torch.bfloat16), ((333, 460), torch.float32), ((130, 97), torch.bfloat16)):
        W = realistic(*shape, seed=7).to(dtype)
        exact = singular_values(W)[:RANK]
        for placements, mesh in layouts():
            D = divided(W, placements, mesh)
            with mock.patch.object(fixed, "DEVICES", ("cpu",)):
                found, alone = pk.truncated_svd(D, RANK, tol=TOL), pk.truncated_svd(W, RANK, tol=TOL)
            assert found.certificate.method == alone.certificate.method == "fixed"
            assert found.certificate.converged
            assert found.certificate.passes == alone.certificate.passes
            same_everywhere(*found[:3])
            assert energy_deficit(W, found.Vh) <= TOL
            assert float((found.S - exact).abs().max()) <= 3 * TOL * float(exact[0])
            assert true_residual(W, *found[:3]) <= found.certificate.residual * float(exact[0])
            assert float((found.S - alone.S).abs().max()) <= 3 * TOL * float(exact[0])


@together(2)
def check_the_schedule_where_it_falls_short() -> None:
    """A weight that it does not solve is solved by itself; NaN is refused; a failure reaches every process."""
    W = with_spectrum(400, 300, torch.tensor([3.0, 2.0, 1.0])).float()
    with mock.patch.object(fixed, "DEVICES", ("cpu",)):
        found = pk.truncated_svd(divided(W, [Shard(0)]), 8)
        assert found.certificate.method != "fixed"
        assert float(((found.U * found.S) @ found.Vh - W).abs().max()) <= 1e-5
        broken = realistic(400, 300, seed=7).float()
        broken[-1, 0] = torch.nan
        raises_everywhere(partial(pk.truncated_svd, divided(broken, [Shard(0)]), 8), ValueError, "NaN")
        failing = dist.get_rank() == 1
        original = sharded_steps.ShardedBody._computed

        def computed(body: Any, shape: Any, weights: Any, dtype: Any, compute: Any) -> Tensor:
            def fails() -> Tensor:
                raise torch.OutOfMemoryError("no memory left")

            return original(body, shape, weights, dtype, fails if failing else compute)

        D = divided(realistic(400, 300, seed=7).float(), [Shard(0)])
        with mock.patch.object(sharded_steps.ShardedBody, "_computed", computed):
            raises_everywhere(partial(pk.truncated_svd, D, 8), RuntimeError, "no memory left")
        assert pk.truncated_svd(D, 8).certificate.method == "fixed"


@together(3)
def check_decompose() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        for fan_in_fan_out, placement, inplace in itertools.product((False, True), (Shard(0), Shard(1)), (False, True)):
            W = realistic(200, 137, seed=6).to(dtype)
            D = divided(W, [placement])
            found = pk.decompose(D, 8, scaling=2.0, fan_in_fan_out=fan_in_fan_out, inplace=inplace)
            alone = pk.decompose(W, 8, scaling=2.0, fan_in_fan_out=fan_in_fan_out)
            whole = found.residual.full_tensor()
            assert found.residual.placements == D.placements
            assert torch.equal(D.full_tensor(), whole if inplace else W)
            same_everywhere(found.lora_A, found.lora_B, found.singular_values, whole)
            largest = float(alone.singular_values[0])
            u = ROUNDOFF[dtype]
            product = 2 * found.lora_B.double() @ found.lora_A.double()
            total = whole.double() + (product.mT if fan_in_fan_out else product)
            assert float((total - W).abs().max()) <= u * float(whole.abs().max()) + 20 * EPS * largest
            assert float((whole.double() - alone.residual.double()).abs().max()) <= (u / 2 + 30 * EPS) * largest


@together(2, 4)
def check_refusals_reach_every_process() -> None:
    rank, world = dist.get_rank(), dist.get_world_size()
    for place, value, found in (((0, 0), torch.nan, "NaN"), ((-1, -1), torch.inf, "Inf")):
        for placement in (Shard(0), Shard(1)):
            W = torch.randn(60, 50, generator=torch.Generator().manual_seed(0))
            W[place] = value
            raises_everywhere(partial(pk.truncated_svd, divided(W, [placement]), 4), ValueError, found)
    D = divided(realistic(1300, 1250, seed=3).float(), [Shard(0)])
    original = sharded_products.Blocks._body
    calls = 0

    def failing(blocks: Any, verb: str, dtype: torch.dtype) -> Any:
        nonlocal calls
        calls += 1
        if calls > 5:
            raise torch.OutOfMemoryError("no memory left")
        return original(blocks, verb, dtype)

    requests: list[str] = []
    request = sharded_products.Blocks.request

    def requested(blocks: Any, verb: str, *args: Any, **kwargs: Any) -> Tensor:
        requests.append(verb)
        return request(blocks, verb, *args, **kwargs)

    for failed in range(world):
        calls = 0
        requests.clear()
        with (
            mock.patch.object(sharded_products.Blocks, "request", requested),
            mock.patch.object(sharded_products.Blocks, "_body", failing if rank == failed else original),
        ):
            raises_everywhere(partial(pk.truncated_svd, D, RANK), RuntimeError, "no memory left")
        assert len(requests) < 30, requests  # it does not go on to a full SVD
    assert pk.truncated_svd(D, RANK).certificate.converged  # and nothing is out of step


class Largest(TorchDispatchMode):
    """The elements of the largest tensor that an operation makes."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for each in made if isinstance(made, (list, tuple)) else [made]:
            if type(each) is Tensor:  # a DTensor promises the elements of all processes
                self.elements = max(self.elements, each.untyped_storage().nbytes() // each.element_size())
        return made


@together(4)
def check_no_process_makes_more_than_a_block_or_panels() -> None:
    m, n = 2100, 2000
    for placements in ([Shard(0)], [Shard(1)]):
        local = divided(realistic(m, n, seed=4).float(), placements).to_local().clone()
        mesh = init_device_mesh("cpu", (4,))
        D = shards_as_dtensor(local, mesh, placements, (m, n))
        with Largest() as largest:
            found = pk.truncated_svd(D, RANK)
        assert found.certificate.method == "krylov"
        # the basis of Krylov has up to 256 columns and two blocks; a quarter of the weight is 1,050,000 elements
        assert largest.elements <= max(local.numel(), (256 + 64) * (m + n)), (placements, largest.elements)
        assert largest.elements < m * n // 2


def shards_as_dtensor(local: Tensor, mesh: Any, placements: list[Any], shape: tuple[int, int]) -> Any:
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(local, mesh, placements, run_check=False, shape=torch.Size(shape), stride=(shape[1], 1))


@together(2, 3)
def check_traffic_is_that_of_panels() -> None:
    """Counted for each product, for two weights of which one has four times the rows."""
    n, k = 600, 8
    for placements, of_normal in (([Shard(0)], lambda m: 2 * n), ([Shard(1)], lambda m: 2 * n + m)):
        for m in (700, 2800):
            D = divided(realistic(m, n, seed=5).float(), placements)
            stack = shards.sharded_stack(D, D.to_local())
            blocks = sharded_products.Blocks(stack.matrices[0])
            over = stack.matrices[0].over_both, stack.matrices[0].over_columns
            counted = {"apply": n + m, "adjoint": m + n, "normal": of_normal(m)}
            for verb, rows in counted.items():
                before = sum(each.bytes_moved for each in over)
                if over[0].is_first:
                    panel = torch.ones(m if verb == "adjoint" else n, k)
                    blocks.request(verb, 3, panel)
                    blocks.request(sharded_products.STOP)
                else:
                    blocks.serve()
                moved = sum(each.bytes_moved for each in over) - before
                headers = 2 * 4 * 8
                assert moved == 4 * k * rows + headers, (placements, verb, moved)
