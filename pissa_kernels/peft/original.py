"""The model as it was before PiSSA."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from ..adapter.layers import lora_layers
from ..adapter.layouts import layout_of
from .guards.guard import protect_layer
from .injection.additions import check_only_ours
from .patch import reopened
from .weights import forward, known
from .weights.record import records
from .weights.state import adapted_layers


@contextlib.contextmanager
def original_model(peft_model: Any) -> Iterator[Any]:
    """Context in which a PiSSA model computes what its base model did before the initialization.

    The adapters are disabled, and each adapted layer computes W_res·x + s·B₀·(A₀·x), which is W·x to the rounding of
    its dtype. PEFT's ``disable_adapter()`` does the same in a model that was made under the hook; this context checks
    first that the original is known. So a reference policy for DPO or GRPO needs no second model::

        with pk.original_model(model), torch.no_grad():
            reference = model(**batch).logits

    No parameter is changed, so a graph that waits for its backward pass stays valid. The model may be compiled. From
    the first such pass on, the initial factors are kept on the devices on which the layers compute.

    Args:
        peft_model: made by PEFT, or by transformers' or diffusers' ``add_adapter``, under
            :func:`pissa_kernels.patch_peft`, or copied or unpickled from such a model.

    Yields:
        The same model.

    Raises:
        ValueError: no layer of the model was initialized by this package; an adapter is merged into the weights;
            another initializer has changed a base weight, a bias is trained, or other code has changed a weight.

    Examples:
        >>> import copy, peft, torch
        >>> import pissa_kernels as pk
        >>> base = torch.nn.Sequential(torch.nn.Linear(48, 64), torch.nn.ReLU(), torch.nn.Linear(64, 8))
        >>> config = peft.LoraConfig(r=4, target_modules=["0"], init_lora_weights="pissa")
        >>> with pk.patch_peft():
        ...     model = peft.get_peft_model(copy.deepcopy(base), config)
        >>> layer = model.base_model.model[0]
        >>> layer.lora_A["default"].weight.data *= 2.0  # instead of training
        >>> x = torch.ones(1, 48)
        >>> with torch.no_grad():
        ...     bool(torch.allclose(model(x), base(x), atol=1e-5))
        False
        >>> with torch.no_grad(), pk.original_model(model):
        ...     bool(torch.allclose(model(x), base(x), atol=1e-5))
        True
    """
    layers = list(adapted_layers(peft_model))
    if not layers:
        raise ValueError(
            "no layer of this model was initialized by pissa_kernels, so its original weights are not known; make or "
            "load it under patch_peft()"
        )
    merged = [name for name, layer in lora_layers(peft_model) if layer.merged]
    if merged:
        raise ValueError(f"an adapter is merged into layer {merged[0]!r} and {len(merged) - 1} more; unmerge it first")
    check_only_ours(peft_model, getattr(peft_model, "peft_config", {}))
    for _, layer in layers:
        known.check_known(layer)
    _attach(layer for _, layer in layers)
    with _disabled(peft_model):
        yield peft_model


def _attach(layers: Iterator[Any]) -> None:
    """Prepare layers that were unpickled from a version whose layers had no hook."""
    late = False
    for layer in layers:
        if not forward.is_attached(layer):
            late |= forward.attach(layer)
            protect_layer(layer, functools.partial(reopened, records(layer)[0].report.seed))
        forward.factors_on(layer, layout_of(layer).weight.device)  # once, also for compiled passes
    if late:
        torch.compiler.reset()  # a compiled layer does not look for new hooks


@contextlib.contextmanager
def _disabled(model: nn.Module) -> Iterator[None]:
    """Context in which all adapters are disabled.

    As PEFT's ``disable_adapter()``, which a model without a ``PeftModel`` does not have, and which fails where the last
    active adapter was deleted. Afterwards every layer and every ``requires_grad`` is as it was.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    kinds = (BaseTunerLayer, AuxiliaryTrainingWrapper)
    enabled: list[Any] = [each for each in model.modules() if isinstance(each, kinds) and not each.disable_adapters]
    trained = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    for module in enabled:
        module.enable_adapters(False)
    try:
        yield
    finally:
        for module in enabled:
            module.enable_adapters(True)
        for parameter, requires_grad in trained:
            parameter.requires_grad_(requires_grad)
