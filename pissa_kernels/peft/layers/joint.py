"""Layers that several processes initialize together: all of them, or none."""

from __future__ import annotations

import abc
import functools
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...checks import layer_context
from ...factors import Factors
from ...report import LayerReport
from ...runtime.connected import Connected, connected
from .layer import LayerJob


class JointJob(LayerJob, abc.ABC):
    """The job of one layer, which several processes run at the same time. They agree after steps that may fail."""

    @abc.abstractmethod
    def agree(self, failure: Exception | None) -> None:
        """Fail in every process if one has failed."""

    def write(
        self,
        factors: Sequence[Factors],
        began: float,
        *,
        dtype: torch.dtype | None = None,
        residual: Tensor | None = None,
    ) -> LayerReport:
        assert residual is None
        before = self.fingerprint()
        failure: Exception | None = None
        subtracted = False
        with self.restored_on_failure():
            try:
                joined = self.joined(factors)
                kept = self.kept(factors, dtype or self.weight.dtype, joined)
                self.set_adapter(*joined)
                self.subtract(factors)
                subtracted = True
            except Exception as error:
                failure = error
            try:
                self.agree(failure)
            except Exception:
                if subtracted:
                    self.subtract(factors, undo=True)
                raise
        return self.record(kept, before, self.fingerprint(), time.perf_counter() - began, self.weight.dtype)


class GatheredJob(JointJob):
    """The job of a layer whose weight DeepSpeed's ZeRO-3 has gathered, so that every process has all of it.

    The first one decomposes it. All processes might, in the same time; but they need not find the same bits, and share
    the cores where they run on CPUs. DeepSpeed keeps the residual of the first process.
    """

    @functools.cached_property
    def group(self) -> Connected:
        """The processes among which the weight is partitioned."""
        found = connected(getattr(self.layout.weight, "ds_process_group", None))
        assert found is not None
        return found

    def agree(self, failure: Exception | None) -> None:
        self.group.agree(failure)

    def _decomposed(self, *args: Any, **kwargs: Any) -> list[Factors]:
        found: list[Factors] = []
        failure: Exception | None = None
        try:
            if self.group.first:
                with layer_context(self.label):
                    found = super()._decomposed(*args, **kwargs)
        except Exception as error:
            failure = error
        self.agree(failure)
        # on the CPU: a pickled tensor of a GPU would come to the GPU of the same index
        return self.group.share([_on_cpu(factors) for factors in found])


def _on_cpu(factors: Factors) -> Factors:
    tensors = (factors.lora_A, factors.lora_B, factors.singular_values)
    A, B, S = (tensor.cpu() for tensor in tensors)
    return Factors(A, B, S, factors.certificate)


def is_gathered(weight: Any) -> bool:
    """Whether DeepSpeed's ZeRO-3 partitions a parameter, which it has gathered for now."""
    group = connected() if hasattr(weight, "ds_id") else None
    return group is not None and group.world > 1
