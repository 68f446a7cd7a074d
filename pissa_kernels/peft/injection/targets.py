"""What a PiSSA adapter cannot be created for: checked before PEFT wraps a module, with what to do instead."""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import nn

from ...adapter.readers import reader_of, reading
from ...checks import asks_for_pissa, layer_context
from ..notices import Notices
from ..weights.offload import is_offloaded, loads_children

# Variants of LoRA under which W_res + s·B·A computes what W does.
KEEPING = frozenset(("use_dora", "velora_config"))
# Variants of versions of PEFT that do not mark them.
VARIANTS = frozenset(("alora_invocation_tokens", "arrow_config", "kasa_config", "monteclora_config", "use_bdlora"))


def is_pissa(config: Any) -> bool:
    """Whether a ``LoraConfig`` asks for PiSSA."""
    return asks_for_pissa(getattr(config, "init_lora_weights", None))


def check_options(config: Any) -> None:
    """Refuse a variant of LoRA that does not compute W·x at the start.

    Raises:
        ValueError: with the name of the option.
    """
    for option in dataclasses.fields(config):
        is_variant = option.metadata.get("is_lora_variant") or option.name in VARIANTS
        if is_variant and option.name not in KEEPING and getattr(config, option.name):
            raise ValueError(
                f"init_lora_weights={config.init_lora_weights!r} cannot be combined with {option.name}: the layer "
                "would compute with the residual instead of the weight. Leave the option out, or use "
                "init_lora_weights=True"
            )


def check_target(
    model: nn.Module, config: Any, name: str, target: nn.Module, parameter: str | None, notices: Notices
) -> None:
    """Refuse a module whose adapter would not be part of what the model computes.

    Args:
        model: the model that PEFT adapts.
        config: the ``LoraConfig``.
        name: name of the module in the model, with the parameter's where one is targeted.
        target: the module, or the LoRA layer that gets another adapter.
        parameter: name of a parameter of the module (``target_parameters``); None for the module.
        notices: collects what is only warned of.

    Raises:
        ValueError: with the name of the layer.
    """
    base: Any = base_of(target)
    with layer_context(f"layer {name!r}"):
        if parameter is None:
            _check_readers(model, name, notices)
        _check_place(model, name, base, config)
        if config.use_dora and getattr(base, "groups", 1) > 1:
            raise ValueError(
                f"DoRA in PEFT takes its norms from another matrix where a {type(base).__name__} has groups, here "
                f"{base.groups}. Leave out use_dora, or the layer, as with exclude_modules=[{name!r}]"
            )
        if weight_of(base, parameter) is None:
            raise ValueError(f"{type(base).__name__} has no weight that PiSSA could initialize; leave it out")


def base_of(target: Any) -> nn.Module:
    """The module that holds the weight."""
    return target.get_base_layer() if hasattr(target, "get_base_layer") else target  # type: ignore[no-any-return]


def weight_of(base: Any, parameter: str | None) -> Any:
    """The parameter of a module that PEFT adapts; None if there is none.

    Args:
        base: the module.
        parameter: name of the parameter (``target_parameters``); None for the one of its kind of module.
    """
    kind = "in_proj_weight" if isinstance(base, nn.MultiheadAttention) else "weight"
    return getattr(base, parameter or kind, None)


def _check_readers(model: nn.Module, name: str, notices: Notices) -> None:
    reader = reader_of(model, name)
    if reader is None:
        return
    if not reader.always:
        notices.read_elsewhere.append(f"layer {name!r} (read by {reader.owner})")
        return
    attention = name.rpartition(".")[0]
    other = f", or adapt the attention itself, target_modules=[{attention!r}]" if reader.is_attention else ""
    raise ValueError(f"{reading(reader)}. Leave the layer out, as with exclude_modules=[{name!r}]{other}")


def _check_place(model: nn.Module, name: str, base: nn.Module, config: Any) -> None:
    """Refuse a weight that something around the layer moves in and out of it."""
    module = model
    for part in name.split("."):
        if type(module).__name__ == "FullyShardedDataParallel":
            raise ValueError(
                "the model is wrapped in FullyShardedDataParallel, which keeps the weight in a flat parameter. "
                "Initialize PiSSA first, and wrap the model afterwards"
            )
        if loads_children(module):
            raise ValueError(
                "accelerate loads the weight together with the module around it (preload_module_classes), which finds "
                "no weight under the names that PEFT gives. Initialize PiSSA first, and offload the model afterwards"
            )
        child = module._modules.get(part)
        module = module if child is None else child
    if config.use_dora and is_offloaded(base):
        raise ValueError(
            "DoRA reads the weight in its own forward pass, while accelerate has it offloaded. Leave out use_dora, or "
            "load the model without offload"
        )
