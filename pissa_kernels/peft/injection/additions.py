"""What may be added to a model whose weights are residuals: checked before PEFT changes anything."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from ...adapter.layers import lora_layers
from ...adapter.layouts import adapters_of
from ...adapter.names import module_name
from ..scope import Injection
from ..weights import forward, state
from ..weights.record import records
from ..weights.state import adapted_layers
from .targets import is_pissa

# Initializers of PEFT that subtract from the base weight, or replace it. MiCA, orthogonal and EVA leave it.
CHANGING = ("corda", "loftq", "lora_ga", "olora")


def changes_the_base(config: Any) -> str | None:
    """Name of the initializer of a ``LoraConfig`` that changes the base weight, PiSSA aside; None for the others."""
    init = getattr(config, "init_lora_weights", None)
    found = next((name for name in CHANGING if isinstance(init, str) and init.lower().startswith(name)), None)
    return "KaSA" if found is None and getattr(config, "kasa_config", None) is not None else found


def check_addition(model: nn.Module, adapter: str, config: Any, *, loading: bool) -> None:
    """Refuse an adapter that the layers of a model could not compute.

    Args:
        model: the base model, with its adapted layers.
        adapter: name of the new adapter.
        config: its config.
        loading: whether it comes from a file. PEFT's conversion loads an initial adapter that it never activates, so
            one that is only refused when it is activated may be loaded.

    Raises:
        ValueError: with the name of a layer.
    """
    for name, layer in lora_layers(model):
        if layer.merged and is_pissa(config) and layer.resolve_lora_variant(config=config) is not None:
            # any other adapter is initialized after PEFT has unmerged the model
            merged = ", ".join(map(repr, layer.merged_adapters))
            raise ValueError(f"layer {name!r}: the adapter {merged} is merged; call unmerge_adapter() first")
    for _, layer in adapted_layers(model):
        check_init(layer, adapter, config)
        if not loading and not is_pissa(config) and hasattr(config, "init_lora_weights"):
            variant = layer.resolve_lora_variant(config=config)
            if variant is not None:
                name = type(variant).__name__.removesuffix("Variant").removesuffix("Linear")
                raise ValueError(
                    f"{state.label(layer)}: the adapter {adapter!r} ({name}) computes with the stored weight, which is "
                    "a residual of PiSSA here. Use it in a model of its own"
                )


def check_init(layer: Any, adapter: str, config: Any) -> None:
    """Refuse an initializer that changes the base weight of a layer with initial factors.

    Raises:
        ValueError: with the name of the layer.
    """
    if (init := changes_the_base(config)) is not None:
        raise ValueError(
            f"{state.label(layer)}: init {init!r} of the adapter {adapter!r} changes the base weight, which is a "
            "residual of PiSSA here. Use it in a model of its own, or convert it to a plain LoRA there "
            "(save_pretrained with path_initial_model_for_weight_conversion) and load that"
        )


def check_active_variant(layer: Any, adapter: str) -> None:
    """Refuse a PiSSA adapter that would make the stored weight a residual under an active variant that reads it.

    Args:
        layer: a LoRA layer that gets the adapter.
        adapter: name of the new adapter.

    Raises:
        ValueError: with the name of the variant; :func:`pissa_kernels.checks.layer_context` adds the layer's.
    """
    active = [name for name in layer.active_adapters if name in layer.lora_variant and name != adapter]
    if active and not records(layer):
        raise ValueError(
            f"the adapter {active[0]!r} ({state.variant_name(layer, active[0])}) is active and computes with the "
            f"stored weight, of which the adapter {adapter!r} makes a residual. Use it in a model of its own"
        )


@contextlib.contextmanager
def removed_on_failure(model: nn.Module, adapter: str, injection: Injection | None = None) -> Iterator[None]:
    """Context after whose failure a model that has adapters is as it was, to the bit.

    Layers that only the new adapter has are bare modules again. A model without adapters, and one that has layers with
    an adapter of this name, keep the layers that are initialized: a second call does the rest.

    Args:
        model: the model.
        adapter: name of the new adapter.
        injection: the call that adds it, with copies of the weights that it changes.
    """
    layers = [layer for _, layer in lora_layers(model)]
    before = [(layer, records(layer), layer.active_adapter, forward.is_attached(layer)) for layer in layers]
    undone = bool(layers) and not any(adapter in adapters_of(layer) for layer in layers)
    if injection is not None:
        injection.is_undone = undone
    try:
        yield
    except BaseException:
        if undone:
            if injection is not None:
                injection.undo()
            for _, layer in lora_layers(model):
                layer.delete_adapter(adapter)
            for layer, kept, active, attached in before:
                layer.set_adapter(active)
                forward.reset(layer, kept, attached)
        raise


def check_only_ours(model: nn.Module, configs: Mapping[str, Any]) -> None:
    """Refuse a model in which something besides this package's subtractions has changed the base.

    Args:
        model: the base model, with its adapted layers.
        configs: config of each adapter.

    Raises:
        ValueError: with the name of the layer.
    """
    for name, layer in lora_layers(model):
        for adapter in adapters_of(layer):
            config: Any = configs.get(adapter)
            init = changes_the_base(config)
            if init is not None or (is_pissa(config) and not records(layer)):
                raise ValueError(
                    f"layer {name!r}: the adapter {adapter!r} (init {init or config.init_lora_weights!r}) has changed "
                    "the base weight without a record of the original one. Load the base model again, and add only "
                    "adapters that were made under patch_peft()"
                )
    for adapter, config in configs.items():
        kind = getattr(config, "bias", "none")
        if kind != "none":
            raise ValueError(
                f"layer {_with_bias(model, kind)!r}: the adapter {adapter!r} trains its bias (bias={kind!r}), and PEFT "
                "keeps no original of it. Use bias='none', or a second copy of the base model"
            )

    for name, parameter in model.named_parameters():
        if parameter.requires_grad and not _is_of_an_adapter(name):
            raise ValueError(
                f"layer {module_name(name).rpartition('.')[0]!r}: its {name.rpartition('.')[2]} is trained "
                "(requires_grad), and nothing keeps the original of it. Freeze it, use modules_to_save, or a second "
                "copy of the base model"
            )


def _is_of_an_adapter(name: str) -> bool:
    """Whether a parameter is not one of the base model's."""
    from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING

    return any(mark in name for mark in (*PEFT_TYPE_TO_PREFIX_MAPPING.values(), "modules_to_save", "trainable_tokens"))


def _with_bias(model: nn.Module, kind: str) -> str:
    """The first module whose bias is trained."""
    if kind == "all":
        biases = (name.rpartition(".")[0] for name, _ in model.named_parameters() if name.endswith("bias"))
        return module_name(next(biases, "")).removesuffix(".base_layer")
    return next((name for name, layer in lora_layers(model) if layer.bias is not None), "")
