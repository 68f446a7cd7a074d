"""What is done to models of one layer: adapted, trained, and their outputs against those of the base in float64."""

from __future__ import annotations

import copy
from typing import Any

import peft
import torch
from torch import Tensor

import pissa_kernels as pk

from .kinds import build, inputs_of, lora_config
from .reference import ROUNDOFF


def patched(name: str, base: Any, rank: int = 4, **changes: Any) -> tuple[Any, Any]:
    """A copy of the base with a PiSSA adapter, and the report."""
    with pk.patch_peft() as report:
        model = peft.get_peft_model(copy.deepcopy(base), lora_config(name, rank, **changes))
    return model.eval(), report


def output(name: str, model: Any) -> Tensor:
    """What a model, adapted or not, makes of the kind's inputs, in its dtype."""
    with torch.no_grad():
        return model(_inputs(name, model.dtype))  # type: ignore[no-any-return]


def _inputs(name: str, dtype: torch.dtype) -> Tensor:
    return inputs_of(name, build(name, dtype))


def exact_output(name: str, base: Any) -> Tensor:
    """The output of the base in float64, for the inputs as its dtype has them."""
    x = inputs_of(name, base)
    with torch.no_grad():
        return copy.deepcopy(base).double()(x.double() if x.is_floating_point() else x)  # type: ignore[no-any-return]


def off(expected: Tensor, found: Tensor) -> float:
    """Relative distance, in float64."""
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def allowed(name: str, base: Any) -> float:
    """Bound of the error of an adapted model's output.

    The base rounds its product once. An adapted layer rounds its stored weight, its two terms, and their sum. A lookup
    in a table is exact, so what counts there is the roundoff of the dtype.
    """
    return 3 * max(off(exact_output(name, base), output(name, base)), ROUNDOFF[base.dtype])


def train(name: str, model: Any, steps: int = 3) -> Tensor:
    """Some steps of gradient descent, each by a twentieth of a parameter's norm; the output afterwards."""
    x = _inputs(name, model.dtype)
    trained = {key: each for key, each in model.named_parameters() if each.requires_grad}
    target = torch.randn(model(x).shape, generator=torch.Generator().manual_seed(2))
    for _ in range(steps):
        loss = (model(x).float() - target).square().mean()
        gradients = torch.autograd.grad(loss, list(trained.values()))
        with torch.no_grad():
            for (key, parameter), gradient in zip(trained.items(), gradients, strict=True):
                assert gradient.isfinite().all(), key
                assert gradient.any(), f"{key} does not learn"
                parameter -= 0.05 * parameter.norm() / gradient.norm() * gradient
    return output(name, model)
