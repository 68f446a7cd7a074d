"""Energies of lower ranks, and the rank that keeps a share of the energy, from the singular values of a report.

A layer's report has σ̂₁ ≥ … ≥ σ̂_r and the captured energy e = Σ_{i≤r} σ̂ᵢ²/‖W‖_F². Hence ‖W‖_F² = Σσ̂²/e, and the first
k ≤ r triplets capture the share e·Σ_{i≤k} σ̂ᵢ²/Σ_{i≤r} σ̂ᵢ²: no second decomposition is needed. Of the triplets beyond
r only the total share 1 − e is known. Any rank captures all of a zero matrix.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from ..adapter.patterns import matches
from .layer import LayerReport, frobenius_squared
from .names import Place, row_labels, split_names


def energy_of_all(layers: Sequence[LayerReport]) -> float:
    """Captured share of the energy of all weights together, ΣΣσ̂²/Σ‖W‖_F²; 1 if all are zero or there is no layer."""
    whole = sum(frobenius_squared(layer) for layer in layers)
    captured = sum(max(1, len(layer.parts)) * float(layer.singular_values.double().square().sum()) for layer in layers)
    return captured / whole if whole > 0 else 1.0


def cumulative_energy(layer: LayerReport) -> Tensor:
    """Share of ‖W‖_F² that the first k triplets capture, for k = 1 … r: (r,) float64, ascending to e."""
    return layer.certificate.energy * _cumulative_share(layer)


def least_rank(layer: LayerReport, share: float, of: Literal["captured", "whole"] = "captured") -> int | None:
    """The least rank k ≤ r whose triplets hold a share of the energy.

    Args:
        layer: report of the layer.
        share: q, 0 < q ≤ 1.
        of: "captured" for q of the energy captured at rank r, "whole" for q of ‖W‖_F².

    Returns:
        k, or None if rank r holds less than ``share`` of the whole. For a layer of several matrices the k of the one
        that needs most.

    Raises:
        ValueError: the share is out of range.
    """
    check_share(share)
    if layer.parts:
        of_parts = [least_rank(part, share, of) for part in layer.parts]
        return None if None in of_parts else max(rank for rank in of_parts if rank is not None)
    held = _cumulative_share(layer) if of == "captured" else cumulative_energy(layer)
    rank = int(torch.searchsorted(held, torch.tensor(share, dtype=torch.float64))) + 1
    return rank if rank <= layer.rank else None


def least_ranks(layers: Sequence[LayerReport], share: float) -> list[int]:
    """For each layer, the least rank that keeps a share of its captured energy.

    Raises:
        ValueError: the share is out of range.
    """
    return [least_rank(layer, share) or layer.rank for layer in layers]


def check_share(share: float) -> None:
    """Refuse a number that is not a share of the energy.

    Raises:
        ValueError: the number is not above 0 and at most 1.
    """
    if not 0 < share <= 1:
        raise ValueError(f"a share of the energy must be above 0 and at most 1, as in 0.9; got {share}")


def suggestion(layers: Sequence[LayerReport], share: float) -> str:
    """One line: the rank that keeps ``share`` of the captured energy in every layer, in the median, and by projection.

    Raises:
        ValueError: the share is out of range, or there is no layer.
    """
    check_share(share)
    if not layers:
        raise ValueError("no layer was initialized, so there is no rank to suggest")
    percent = f"{100 * share:g} %"
    ranks = least_ranks(layers, share)
    text = f"{percent} of the captured energy is kept by rank {max(ranks)} in every layer"
    if len(layers) > 1:
        text += f", {sorted(ranks)[len(ranks) // 2]} in the median"
        projections = projection_ranks(layers, ranks)
        least, most = min(projections, key=projections.__getitem__), max(projections, key=projections.__getitem__)
        if projections[least] < projections[most]:
            text += f" (from {projections[least]} in {least} to {projections[most]} in {most})"
    reached = [rank for layer in layers if (rank := least_rank(layer, share, "whole")) is not None]
    if not reached:
        return f"{text}; {percent} of the whole energy is not reached"
    return (
        f"{text}; {percent} of the whole energy is reached in {len(reached)} of {len(layers)}, by rank {max(reached)}"
    )


def projection_ranks(layers: Sequence[LayerReport], ranks: Sequence[int]) -> dict[str, int]:
    """The largest of the layers' ranks in each projection, over its depths."""
    most: dict[str, int] = {}
    for label, rank in zip(row_labels(split_names(layer.name for layer in layers)), ranks, strict=True):
        most[label] = max(rank, most.get(label, 0))
    return most


def peft_pattern(layers: Sequence[LayerReport], values: Sequence[float]) -> tuple[float, dict[str, float]]:
    """PEFT's ``rank_pattern`` or ``alpha_pattern`` that gives each projection the largest value of its layers.

    Each key matches all layers of one projection and no other layer, so the order of the keys does not matter.

    Args:
        layers: at least one.
        values: one for each layer.

    Returns:
        The largest value, which is the default, and the key and value of each projection below it.
    """
    names = [layer.name for layer in layers]
    members: defaultdict[Place, set[str]] = defaultdict(set)
    most: dict[Place, float] = {}
    for name, place, value in zip(names, split_names(names), values, strict=True):
        any_depth = place if place.depth is None else place._replace(depth=0)
        members[any_depth].add(name)
        most[any_depth] = max(value, most.get(any_depth, value))
    largest = max(most.values())
    lower = {place: value for place, value in most.items() if value < largest}
    return largest, {_pattern_key(place, members[place], names): value for place, value in lower.items()}


def _pattern_key(place: Place, members: set[str], names: Sequence[str]) -> str:
    """The shortest end of a projection's name that matches its layers and no other; the full name if none does."""
    parts = [re.escape(part) for part in place.projection.split(".") if part]
    depth = [] if place.depth is None else ["[0-9]+"]
    full = ".".join([*(re.escape(part) for part in place.stack.split(".") if part), *depth, *parts])
    ends = [".".join(parts[start:]) for start in reversed(range(len(parts)))]
    for key in (*ends, full):
        # Dots stay unescaped, which reads better; the comparison rejects a key that matches another layer by them.
        if {name for name in names if matches(key, name)} == members:
            return key
    return f"^{full}"


def _cumulative_share(layer: LayerReport) -> Tensor:
    """Σ_{i≤k} σ̂ᵢ²/Σ_{i≤r} σ̂ᵢ² for k = 1 … r: (r,) float64, ascending to exactly 1."""
    sums = layer.singular_values.double().square().cumsum(0)
    return sums / sums[-1] if sums[-1] > 0 else torch.ones_like(sums)
