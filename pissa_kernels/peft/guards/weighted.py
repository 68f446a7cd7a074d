"""``add_weighted_adapter`` on a model whose weights are residuals.

PEFT combines the products s_j·B_j·A_j, or the factors themselves. Those of PiSSA adapters hold the principal part of
the weight, so the combination needs initial factors of its own: Σ w_j·s_j·B_j0·A_j0. Then it computes Σ w_j·ΔW_j.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ...adapter.layers import lora_layers
from ...adapter.layouts import adapters_of, layout_of
from ..injection.additions import removed_on_failure
from ..weights import forward, known, state
from ..weights.record import InitRecord, of_adapter
from ..weights.state import adapted_layers
from .replaced_method import Guard, Reopen

# PEFT combines the products, so that those of the initial factors can be combined alike.
EXACT = ("cat", "svd")
# PEFT combines what ``get_delta_weight`` returns, which may be ΔW_j itself.
OF_CHANGES = ("ties_svd", "dare_linear_svd", "dare_ties_svd", "magnitude_prune_svd")
# Singular values of the combined initial factors, relative to the largest, that are round-off of float32.
ROUNDOFF = 1e-6
NO_SEED = -1  # of factors that no seed gives


def add_weighted_adapter(tuner: Any, reopen: Reopen, *args: Any, **kwargs: Any) -> None:
    """``LoraModel.add_weighted_adapter``: the new adapter computes the weighted changes of the others.

    Raises:
        ValueError: a combination that has no such meaning for PiSSA adapters, or a variant that computes with the
            stored weight. Nothing has changed.
    """
    method = type(tuner).add_weighted_adapter
    call = inspect.signature(method).bind(tuner, *args, **kwargs)
    call.apply_defaults()
    adapters, weights, name, kind = (
        call.arguments[key] for key in ("adapters", "weights", "adapter_name", "combination_type")
    )
    layers = [layer for _, layer in adapted_layers(tuner)]
    ours = [layer for layer in layers if any(of_adapter(layer, adapter) for adapter in adapters)]
    if name in tuner.peft_config or not set(adapters) <= tuner.peft_config.keys():
        method(tuner, *args, **kwargs)  # PEFT returns, or refuses
        return
    for layer in ours:
        _check(layer, adapters, kind)
    if any(layer.merged for layer in layers):
        tuner.unmerge_adapter()  # as PEFT does when it adds the adapter, but before the deltas are replaced
    config = tuner.peft_config[adapters[0]]
    init = config.init_lora_weights
    config.init_lora_weights = True  # the new adapter's config is a copy, and its values are written afterwards
    try:
        with reopen(), removed_on_failure(tuner.model, name), _changes(ours if kind in OF_CHANGES else ()):
            method(tuner, *args, **kwargs)
    except BaseException:
        tuner.peft_config.pop(name, None)
        raise
    finally:
        config.init_lora_weights = init
    if ours:
        _as_configured(tuner, name)
    if kind in OF_CHANGES and len(adapters) > 1:
        return
    for layer in ours:
        if name in adapters_of(layer):
            forward.remember(layer, _combined(layer, adapters, weights, name))
            # saved with its initial factors, and loaded with them
            tuner.peft_config[name].init_lora_weights = "pissa"


def _as_configured(tuner: Any, name: str) -> None:
    """Give the combination the scaling and the rank that its config says.

    PEFT takes its scaling for 1; with rsLoRA it is √r. And it may leave factors of a lower rank, with which a saved
    adapter could not be loaded.
    """
    for _, layer in lora_layers(tuner):
        layout = layout_of(layer)
        if name in layout.adapters:
            A, B = layout.factors(name)
            lacking = layer.r[name] - A.shape[0]
            A.data = torch.cat([A.data, A.new_zeros(lacking, A.shape[1])])
            B.data = torch.cat([B.data / float(layer.scaling[name]), B.new_zeros(B.shape[0], lacking)], dim=1)


def _check(layer: Any, adapters: Sequence[str], kind: str) -> None:
    layout = layout_of(layer)
    if not (layout.is_matrix and layout.by_output and layout.gain == 1):
        raise ValueError(
            f"{state.label(layer)}: PEFT combines the factors of a {type(layer).__name__} without regard to how they "
            "are packed. Leave the layer out of adapters that are combined, or convert each of them to a plain LoRA"
        )
    if len(adapters) > 1 and kind not in EXACT + OF_CHANGES:
        raise ValueError(
            f"{state.label(layer)}: combination_type={kind!r} combines A and B themselves, which hold the principal "
            "part of the weight in a PiSSA adapter; use 'svd' or 'cat'"
        )
    variants = [adapter for adapter in adapters if adapter in layer.lora_variant]
    if variants:
        raise ValueError(
            f"{state.label(layer)}: the adapter {variants[0]!r} ({state.variant_name(layer, variants[0])}) is more "
            "than a product B·A and cannot be combined with others"
        )


def _combined(layer: Any, adapters: Sequence[str], weights: Sequence[float], name: str) -> InitRecord:
    """Record of the new adapter: its initial factors are Σ w_j·s_j·B_j0·A_j0, and nothing more is subtracted."""
    layout, found, scaling = layout_of(layer), state.terms(layer), float(layer.scaling[name])
    totals = [0.0] * len(found.factors)
    for adapter, weight in zip(adapters, weights, strict=True):
        if adapter in found.groups:
            totals[found.groups[adapter]] += float(weight) * float(layer.scaling[adapter])
    used = [(A.float(), B.float(), total) for (A, B), total in zip(found.factors, totals, strict=True)]
    lora_A = torch.cat([A for A, _, _ in used])
    lora_B = torch.cat([total / scaling * B for _, B, total in used], dim=1)
    lora_A, lora_B, singular_values = _of_rank(lora_A, lora_B, len(layout.factors(name)[0]))
    first = next(record for adapter in adapters if (record := of_adapter(layer, adapter)) is not None)
    product = known.sampled(state.values(layer), (lora_A, lora_B), layout)
    report = replace(
        first.report,
        rank=lora_A.shape[0],
        scaling=scaling,
        singular_values=singular_values * scaling,
        seed=NO_SEED,
        seconds=0.0,
    )
    after = (first.before.double() - scaling * product).float()
    return InitRecord(name, lora_A, lora_B, report, first.before, after, shared=True)


def _of_rank(lora_A: Tensor, lora_B: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """The same product B·A with factors of this rank, or of its own if that is higher; and its singular values."""
    Q_B, R_B = torch.linalg.qr(lora_B.double())
    Q_A, R_A = torch.linalg.qr(lora_A.double().mT)
    U, S, Vh = torch.linalg.svd(R_B @ R_A.mT)
    own = int((ROUNDOFF * S[0] < S).sum()) if len(S) else 0
    root, kept = S[:own].sqrt(), max(rank, own)
    A, B = lora_A.new_zeros(kept, lora_A.shape[1]), lora_B.new_zeros(lora_B.shape[0], kept)
    A[:own], B[:, :own] = root[:, None] * (Q_A @ Vh[:own].mT).mT, (Q_B @ U[:, :own]) * root
    return A, B, _padded(S[:own], kept)


def _padded(values: Tensor, length: int) -> Tensor:
    """Values followed by zeros, in float32."""
    padded = torch.zeros(length)
    padded[: len(values)] = values
    return padded


@contextlib.contextmanager
def _changes(layers: Sequence[Any]) -> Iterator[None]:
    """Context in which ``get_delta_weight`` of the layers returns ΔW_j."""
    for layer in layers:
        layer.__dict__["get_delta_weight"] = Guard(layer, _change)
    try:
        yield
    finally:
        for layer in layers:
            del layer.__dict__["get_delta_weight"]


def _change(layer: Any, adapter: str) -> Tensor:
    delta: Tensor = type(layer).get_delta_weight(layer, adapter).clone()
    found = state.terms(layer)
    if adapter in found.groups:
        factors = found.factors[found.groups[adapter]]
        state.add_(delta, [factors], [-float(layer.scaling[adapter])], layout_of(layer))
    return delta
