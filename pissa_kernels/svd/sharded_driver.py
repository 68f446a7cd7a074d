"""The triplets of weights that several processes hold in blocks: the schedule of GPUs, or one weight after another."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence

import torch

from ..numerics import exact_arithmetic
from ..runtime.shards import Shard, ShardedStack
from . import fixed, sharded_steps
from .cost import DENSE_FALLBACK_WIDTH
from .driver import by_plan, of_solution
from .machines import machine_of
from .result import TruncatedSVD
from .sharded import serving

# Sharded matrices that go through the schedule together at most: more of them save no time.
LARGEST_BATCH = 32


def solve_sharded(shard: Shard, rank: int, *, tol: float, niter: int | None, seed: int) -> TruncatedSVD | None:
    """:func:`pissa_kernels.truncated_svd` of a weight that several processes hold. Checks no argument.

    All of them call this. The first decides and does what is done with panels; the others multiply their blocks for it
    (:mod:`pissa_kernels.svd.sharded`). So nothing depends on whether their arithmetic is the same, bit by bit.

    Args:
        shard: what this process holds of the weight.
        rank, tol, niter, seed: as for :func:`pissa_kernels.truncated_svd`.

    Returns:
        The triplets in the first process, None in the others.

    Raises:
        ValueError, RuntimeError: of any of the processes, in all of them.
    """
    with exact_arithmetic(shard.block.device), serving(shard) as operator:
        if operator is None:
            return None
        # a matrix of n² elements is no larger than a panel where n is small
        formed = operator.shape[1] <= DENSE_FALLBACK_WIDTH
        return by_plan(operator, machine_of(shard.block), rank, tol, niter, seed, formed=formed)


def solve_stack(
    stack: ShardedStack,
    rank: int,
    *,
    tol: float,
    niter: int | None,
    seed: int,
    context: Callable[[int], contextlib.AbstractContextManager[object]] = lambda part: contextlib.nullcontext(),
) -> list[TruncatedSVD]:
    """The triplets of the matrices of a sharded stack that this process has a part of, in all processes that have one.

    Args:
        stack: what this process holds.
        rank, tol, niter, seed: as for :func:`pissa_kernels.truncated_svd`.
        context: what an error of a matrix passes through, by its index in the stack.

    Raises:
        ValueError, RuntimeError: of any of the processes, in all of them.
    """
    found: list[TruncatedSVD | None] = []
    failure: Exception | None = None
    try:
        if stack.replicas.is_first:  # replicas hold the same, and one of them solves it
            by_schedule = _sharded_by_schedule(stack.matrices, rank, tol, seed)
            for part, matrix, svd in zip(stack.parts, stack.matrices, by_schedule, strict=True):
                with context(part):
                    if svd is None:
                        svd = solve_sharded(matrix, rank, tol=tol, niter=niter, seed=seed)
                    found.append(svd)
    except Exception as error:
        failure = error
    stack.everywhere.agree(failure)
    found = found or [None] * len(stack.matrices)
    return [_shared(svd, matrix, rank, stack) for svd, matrix in zip(found, stack.matrices, strict=True)]


def _sharded_by_schedule(matrices: Sequence[Shard], rank: int, tol: float, seed: int) -> list[TruncatedSVD | None]:
    """:func:`pissa_kernels.svd.driver.solve_batch` of sharded weights; None for the same ones in all processes."""
    if not matrices or not fixed.runs_on(matrices[0].block.device, matrices[0].shape, rank):
        return [None] * len(matrices)
    wide = matrices[0].shape[0] < matrices[0].shape[1]
    with exact_arithmetic(matrices[0].block.device):
        tall = [matrix.mT if wide else matrix for matrix in matrices]
        return [
            svd
            for first in range(0, len(tall), LARGEST_BATCH)
            for svd in of_solution(
                sharded_steps.solve(tall[first : first + LARGEST_BATCH], rank, tol=tol, seed=seed), wide, tol
            )
        ]


def _shared(svd: TruncatedSVD | None, matrix: Shard, rank: int, stack: ShardedStack) -> TruncatedSVD:
    """The triplets of the first process."""
    (m, n), device = matrix.shape, matrix.block.device
    factors = [torch.empty(shape, dtype=torch.float32, device=device) for shape in ((m, rank), (rank,), (rank, n))]
    if svd is not None:
        factors = [factor.contiguous() for factor in svd[:3]]
    certificate = svd.certificate if svd is not None else None
    for processes in (matrix.over_both, stack.replicas):
        certificate = processes.share(certificate)
        for factor in factors:
            processes.broadcast_(factor)
    assert certificate is not None
    U, S, Vh = factors
    return TruncatedSVD(U, S, Vh, certificate)
