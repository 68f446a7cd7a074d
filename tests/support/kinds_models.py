"""Tiny transformers models beside a PiSSA adapter: the weights that PEFT merges, and outputs against float64."""

from __future__ import annotations

import copy
from typing import Any

import peft
import torch
from torch import Tensor, nn

from .kinds import stacked, stacked_transposed
from .kinds_operations import off
from .reference import ROUNDOFF, energy_deficit, optimal_energies


def logits(model: Any, length: int = 12) -> Tensor:
    """What a language model makes of two rows of tokens, in its dtype."""
    ids = torch.arange(2 * length).reshape(2, length) % 90
    with torch.no_grad():
        return model(input_ids=ids).logits  # type: ignore[no-any-return]


def exact_logits(base: Any) -> Tensor:
    """The same in float64, for parameters as the dtype has them."""
    double = copy.deepcopy(base).double()
    if hasattr(double.config, "num_experts_per_tok"):
        double.set_experts_implementation("eager")  # the grouped products have no float64
    return logits(double)


def tolerance(base: Any) -> float:
    """Three times what rounding in the dtype of the base does to its output, and no less than a roundoff."""
    return 3 * max(off(exact_logits(base), logits(base)), ROUNDOFF[base.dtype])


def targets(base: Any, model: Any, adapter: str = "default") -> dict[str, Tensor]:
    """What the adapter adds to each weight, as PEFT merges it in float64, by the weight's name.

    Args:
        base: the base model, untouched.
        model: the adapted one, which is not changed.
    """
    config = copy.deepcopy(model.peft_config[adapter])
    config.init_lora_weights, config.inference_mode = False, False
    alone = peft.get_peft_model(copy.deepcopy(base).double(), config)
    state = {key: value.double() for key, value in model.state_dict().items()}
    zeros = {key: torch.zeros_like(value) for key, value in state.items() if "lora_" not in key}
    alone.load_state_dict(state | zeros)  # buffers are not persistent in the models of these tests
    merged = alone.merge_and_unload().state_dict()
    return {key: value for key, value in merged.items() if value.any()}


def matrices(base: nn.Module, name: str, weight: Tensor) -> list[Tensor]:
    """The matrices (out, in) of a weight, given the name of its parameter."""
    if weight.ndim == 2:
        return [weight]
    owner = base.get_submodule(name.rpartition(".")[0])
    return (stacked_transposed if getattr(owner, "is_transposed", False) else stacked)(weight)


def largest_deficit(base: nn.Module, name: str, change: Tensor, rank: int) -> float:
    """The largest energy deficit over the matrices of a weight, of the rows that its adapter spans."""
    exact = matrices(base, name, base.get_parameter(name).detach().double())
    changes = matrices(base, name, change)
    deficits = []
    for W, added in zip(exact, changes, strict=True):
        factors = torch.linalg.svd(added, full_matrices=False)
        assert factors.S[rank:].sum() <= 1e-12 * factors.S[0], name
        deficits.append(energy_deficit(W, factors.Vh[:rank], optimal_energies(W)))
    return max(deficits)
