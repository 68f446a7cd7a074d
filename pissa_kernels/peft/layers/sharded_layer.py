"""A layer whose weight several processes hold in blocks: tensor parallelism, FSDP2's ``fully_shard``."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ...checks import layer_context
from ...factors import Factors
from ...pissa import principal_factors_of_stack, subtract_from_blocks_
from ...report import LayerReport
from ...runtime.shards import ShardedStack, is_sharded, on_mesh, taken
from ...svd.cost import workspace
from ...svd.machines import machine_of
from ..weights import state
from ..weights.record import places_of
from ..weights.tensor_parallel import check_plan, make_whole, plan_of
from .joint import JointJob
from .layer import LayerJob


class ShardedJob(JointJob):
    """The job of one layer whose weight is a ``DTensor``. Its methods are called by all processes of the mesh."""

    @property
    def weight(self) -> Any:
        """The weight, a ``DTensor``."""
        return self.layout.weight.data

    @functools.cached_property
    def held(self) -> ShardedStack:
        """What this process holds of the weight, as it is stored."""
        return self.layout.sharded(self.weight, self.weight.to_local())

    @property
    def is_sharded(self) -> bool:
        return True

    @property
    def is_batched(self) -> bool:
        return False

    @property
    def is_view(self) -> bool:
        return True

    def workspace(self, device: torch.device, batch: int = 1) -> int:
        m, n = self.shape
        machine = machine_of(self.held.matrices[0].block) if self.held.matrices else device.type
        return workspace(m, n, self.recipe.rank, self.recipe.niter, machine=machine, batch=batch)

    def backup(self) -> Callable[[], object]:
        local = self.weight.to_local()
        values = local.to("cpu", copy=True)
        return lambda: local.copy_(values)

    def original(self) -> Tensor:
        """The part of W that this process holds."""
        return state.without_initial(self.weight, self.layer)

    def fingerprint(self, local: Tensor | None = None) -> Tensor:
        """The elements of :func:`pissa_kernels.peft.weights.record.fingerprint` of the whole weight."""
        return taken(self.weight, places_of(self.weight.shape), local)

    def _decomposed(
        self,
        weight: Tensor,
        dtype: torch.dtype,
        device: torch.device | None = None,
        budget: int | None = None,
    ) -> list[Factors]:
        """A and B of each matrix of the stack, in every process.

        Args:
            weight: the ``DTensor``, or a local tensor in the place of its own.
            dtype: that stores A and B.
            device, budget: not used: the weight is decomposed where its mesh has it.
        """
        local = on_mesh(weight) if is_sharded(weight) else weight.to(self.weight.device_mesh.device_type)
        stack = self.layout.sharded(self.weight, local)
        return principal_factors_of_stack(stack.mT if self.transposed else stack, self.recipe, dtype, self.part_label)

    def agree(self, failure: Exception | None) -> None:
        self.held.everywhere.agree(failure)

    def subtract(self, factors: Sequence[Factors], first: int = 0, *, undo: bool = False) -> None:
        A, B = [each.lora_A for each in factors], [each.lora_B for each in factors]
        scaling = -self.recipe.scaling if undo else self.recipe.scaling
        subtract_from_blocks_(self.held, A, B, scaling, self.transposed)

    def run(self, device: torch.device | None = None, budget: int | None = None) -> LayerReport:
        with layer_context(self.label):
            needed = self.workspace(torch.device(self.weight.device_mesh.device_type))
            if budget is not None and any(self.held.everywhere.gather(needed > budget)):
                raise ValueError(
                    f"the SVD needs {needed:,} bytes beyond the model in a process, more than the budget of "
                    f"{budget:,}; pass a memory_budget of at least {needed:,}"
                )
        return super().run()


def sharded_job(job: LayerJob) -> ShardedJob:
    """The job for a layer whose weight is sharded.

    Raises:
        ValueError: a placement that divides no matrix into blocks, or a layer of which PEFT computes with the parts
            that a process holds as if they were the whole.
    """
    found = ShardedJob(**{name: getattr(job, name) for name in LayerJob.__dataclass_fields__})
    check_plan(job.layer, job.weight)
    assert found.held.total == job.parts  # and the placements are not refused
    if job.adapter in job.layer.lora_variant and plan_of(job.layer) is not None:
        raise ValueError(
            f"{state.variant_name(job.layer, job.adapter)} takes norms from the weight, of which tensor parallelism "
            "leaves each process a part. Leave the option out"
        )
    if job.layout.is_linear:
        out_features, in_features = found.shape
        make_whole(job.layer, job.adapter, in_features, out_features)
    return found
