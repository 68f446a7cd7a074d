"""The layers that the demo adapts: linear layers that PiSSA can initialize, with a reason for each of the others."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from ..adapter.patterns import has_name
from ..checkpoint.options import ALL_LINEAR, check_expression, is_expression
from ..checks import check_weight
from ..peft.injection.targets import check_target
from ..peft.notices import Notices
from ..peft.weights.ties import Ties


@dataclass
class Choice:
    """Arguments of PEFT's ``LoraConfig``.

    Attributes:
        target_modules: names, or a regular expression.
        exclude_modules: a regular expression; None where nothing is left out.
        left_out: why each layer is left out, by its name.
    """

    target_modules: str | list[str]
    exclude_modules: str | None = None
    left_out: dict[str, str] = field(default_factory=dict)


def choose_layers(model: Any, target_modules: str | Sequence[str], called: Collection[str]) -> Choice:
    """Names for PEFT. Of "all-linear", the layers that PiSSA refuses are left out; other names are taken as they are.

    Args:
        model: the model.
        target_modules: names, a regular expression, or "all-linear", which may stand beside names.
        called: names of the modules that a forward pass of the model calls.

    Raises:
        ValueError: a name that no module has, or no layer is left.
    """
    asked = (target_modules,) if isinstance(target_modules, str) else tuple(target_modules)
    named = [name for name in asked if name != ALL_LINEAR]
    if len(asked) == 1 and is_expression(asked[0]):
        check_expression(asked[0])
        return Choice(asked[0])
    modules = [name for name, _ in model.named_modules()]
    for name in named:
        if not any(has_name(name, module) for module in modules):
            raise ValueError(f"no module of {type(model).__name__} is named {name!r}, which --target-modules asks for")
    if ALL_LINEAR not in asked:
        return Choice(named)
    linear = linear_layers(model)
    left_out = refused_layers(model, linear, called)
    taken = [name for name in linear if name not in left_out]
    left_out |= _fused_experts(model)
    left_out = {name: reason for name, reason in left_out.items() if not any(has_name(other, name) for other in named)}
    if not taken + named:
        reason = f": {next(iter(left_out.values()))}" if left_out else ""
        raise ValueError(
            f"{type(model).__name__} has no linear layer that PiSSA could initialize{reason}; for other kinds of "
            "layers, use PEFT's init_lora_weights=True"
        )
    exclude = f"(?:{'|'.join(map(re.escape, left_out))})" if left_out else None  # names alone would match longer ones
    return Choice(taken + named, exclude, left_out)


def linear_layers(model: Any) -> list[str]:
    """Names of the linear layers but the output layer, as PEFT's "all-linear"."""
    from transformers.pytorch_utils import Conv1D

    output = model.get_output_embeddings()
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, Conv1D)) and module is not output
    ]


def refused_layers(model: Any, names: Iterable[str], called: Collection[str]) -> dict[str, str]:
    """Layers that PiSSA cannot initialize, or whose adapter would not be part of what the model computes; with reasons.

    Args:
        model: the model.
        names: names of linear layers.
        called: as for :func:`choose_layers`. A layer that is not called although another module reads its weight under
            some condition is refused: in this model, the condition seems to hold.
    """
    import peft
    from peft.tuners.lora import LoraModel

    config = peft.LoraConfig(init_lora_weights="pissa")
    # PEFT refuses layers of Mamba whose weights fused kernels read
    compatible = getattr(LoraModel, "_check_target_module_compatiblity", lambda *_: None)
    ties, refused = Ties(model), {}
    for name in names:
        layer, notices = model.get_submodule(name), Notices()
        try:
            check_target(model, config, name, layer, None, notices)
            if notices.read_elsewhere and name not in called:
                raise ValueError("another module reads its weight, and the forward pass does not call the layer")
            compatible(None, config, model, name.rpartition(".")[2])
            if "weight" not in layer._parameters:
                raise ValueError("its weight is computed from other parameters")
            if other := ties.of(layer):
                raise ValueError(f"its weight is tied to {other}")
            check_weight(layer.weight)
        except (TypeError, ValueError) as error:
            refused[name] = str(error).removeprefix(f"layer {name!r}: ").partition(". Leave")[0]
    return refused


def _fused_experts(model: nn.Module) -> dict[str, str]:
    return {
        name: f"{type(module).__name__} keeps the weights of all experts in one parameter"
        for name, module in model.named_modules()
        if type(module).__name__.endswith("Experts")
        and any(parameter.ndim == 3 for parameter in module.parameters(recurse=False))
    }


def without_fused(choice: Choice, adapted: Collection[str]) -> Choice:
    """The choice without the names that PEFT takes for those of fused experts, as of shared experts beside them.

    Args:
        choice: the choice.
        adapted: names of the linear layers that PEFT adapts for it.
    """
    targets = list(choice.target_modules)
    reasons = {name: "PEFT takes its name for that of fused experts" for name in targets if name not in adapted}
    return Choice([name for name in targets if name in adapted], choice.exclude_modules, choice.left_out | reasons)
