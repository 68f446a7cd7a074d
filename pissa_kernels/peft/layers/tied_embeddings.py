"""Tied embeddings under ``ensure_weight_tying``: one weight, one residual, and adapters that share their memory.

PEFT gives the head that has the embedding's weight E (vocabulary, dim) the transposed factors of the embedding,
A = B_Eᵀ and B = A_Eᵀ. So W_res + s·B·A is E in both places.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple

from torch import nn

from ...adapter.layers import lora_layers
from ...adapter.layouts import layout_of
from ...adapter.patterns import has_name, same
from ...checks import layer_context
from ...report import LayerReport
from ..weights.forward import remember
from ..weights.record import of_adapter
from ..weights.state import label_of


class Follower(NamedTuple):
    """A layer with the weight of another one, which it follows.

    Attributes:
        layer: its LoRA layer.
        adapter: name of the adapter.
        name: name of the layer in the model.
    """

    layer: Any
    adapter: str
    name: str


def is_tied(config: Any, name: str | None) -> bool:
    """Whether PEFT gives a module the factors of the embedding whose weight it has."""
    return name is not None and any(
        has_name(entry, name) for entry in getattr(config, "target_modules_to_tie", None) or ()
    )


def follow(followers: list[Follower], model: nn.Module) -> Iterator[LayerReport]:
    """Give layers the transposed initial factors of the embedding, once that is initialized.

    Args:
        followers: the layers.
        model: the model.

    Raises:
        ValueError: an embedding of other settings, or none with an adapter. Only the embedding is initialized then.
    """
    for layer, adapter, name in followers:
        layout = layout_of(layer)
        owners = (other for _, other in lora_layers(model) if layout_of(other).weight is layout.weight)
        owner = next((other for other in owners if other is not layer and of_adapter(other, adapter) is not None), None)
        with layer_context(label_of(layer, name)):
            if owner is None:
                continue
            first = of_adapter(owner, adapter)
            assert first is not None
            scaling = float(layout.scalings[adapter])
            factors, others = layout.factors(adapter), layout_of(owner).factors(adapter)
            if not same(scaling, first.report.scaling) or factors[0].shape != others[1].mT.shape:
                raise ValueError(
                    "it shares its weight with the embedding (ensure_weight_tying) but not its rank or alpha. Give "
                    "both the same rank_pattern and alpha_pattern"
                )
            for factor, other in zip(factors, reversed(others), strict=True):
                if not factor.is_meta:
                    factor.data = other.data.mT
            report = replace(first.report, name=name, shape=layout.shape(layout.weight), seconds=0.0)
            record = replace(
                first,
                lora_A=first.lora_B.mT.contiguous(),
                lora_B=first.lora_A.mT.contiguous(),
                report=report,
                before=first.before.clone(),  # tensors that share memory cannot be saved together
                after=first.after.clone(),
            )
            remember(layer, record)
            yield report
