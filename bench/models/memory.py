"""Peak memory of one ``get_peft_model``, the adapter included, measured in a fresh process on the CPU."""

from __future__ import annotations

import contextlib
import dataclasses
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from ..harness import fresh
from ..harness.resident import peak_of
from .injection import Injection
from .llama import Base, ModelCase, targets


@contextlib.contextmanager
def saved_weights(base: Base) -> Iterator[Path]:
    """A file with the weights of a base model."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "weights.pt"
        torch.save(base.pristine, path)
        yield path


def peak_extra_mib(provider: str, case: ModelCase, weights: Path) -> float | None:
    """MiB that the provider adds to the process at its peak; None where the system cannot measure it.

    Raises:
        subprocess.CalledProcessError: the fresh process failed; ``stderr`` contains its traceback.
    """
    return fresh.call(measure, provider, dataclasses.asdict(case), str(weights))


def measure(provider: str, fields: dict[str, Any], weights: str) -> float | None:
    """The part of :func:`peak_extra_mib` in the fresh process: warm up on a small model, then run once."""
    case = ModelCase(**fields)
    small = Base(ModelCase(layers=1, width=512, inner=1536, rank=min(case.rank, 16), dtype=case.dtype))
    Injection(small, provider).run()
    base = Base.__new__(Base)
    base.case, base.model, base.adapted = case, case.build(), None
    for name, module in targets(base.model):
        module.weight.data.copy_(torch.load(weights, mmap=True, weights_only=True)[name])
    return peak_of(Injection(base, provider).run)
