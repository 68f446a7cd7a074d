"""What the singular values of a report say about the rank that a model needs.

Of each layer the report has σ̂₁ ≥ … ≥ σ̂_r and the captured energy e = Σ_{i≤r} σ̂ᵢ²/‖W‖_F². So ‖W‖_F² = Σσ̂²/e, and the
first k ≤ r triplets capture e·Σ_{i≤k} σ̂ᵢ²/Σ_{i≤r} σ̂ᵢ² of it: what rank k would have captured is known for every k ≤ r
without another decomposition. Beyond r nothing is known but what is left, 1 − e. A zero matrix captures everything at
any rank.
"""

from __future__ import annotations

import re
import statistics
from collections import defaultdict
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from .layer import LayerReport
from .names import Place, row_labels, split_names


def frobenius_squared(layer: LayerReport) -> float:
    """‖W‖_F² = Σσ̂²/e; 0 for a zero matrix."""
    captured = float(layer.singular_values.double().square().sum())
    energy = layer.certificate.energy
    return captured / energy if energy > 0 else captured  # a share that has underflowed says nothing


def energy_of_all(layers: Sequence[LayerReport]) -> float:
    """Captured share of the energy of all weights together, ΣΣσ̂²/Σ‖W‖_F²; 1 where all are zero or there is none."""
    whole = sum(frobenius_squared(layer) for layer in layers)
    captured = sum(float(layer.singular_values.double().square().sum()) for layer in layers)
    return captured / whole if whole > 0 else 1.0


def cumulative_energy(layer: LayerReport) -> Tensor:
    """(r,) float64, ascending: entry k−1 is the share of ‖W‖_F² that the first k triplets capture; the last is e."""
    return layer.certificate.energy * _cumulative_share(layer)


def least_rank(layer: LayerReport, share: float, of: Literal["captured", "whole"] = "captured") -> int | None:
    """The least rank k ≤ r whose triplets hold a share of the energy.

    Args:
        layer: its rank r and its singular values.
        share: q, 0 < q ≤ 1.
        of: "captured", q of what r captures; "whole", q of ‖W‖_F².

    Returns:
        k, or None where r does not reach ``share`` of the whole.

    Raises:
        ValueError: a share out of range.
    """
    check_share(share)
    held = _cumulative_share(layer) if of == "captured" else cumulative_energy(layer)
    rank = int(torch.searchsorted(held, torch.tensor(share, dtype=torch.float64))) + 1
    return rank if rank <= layer.rank else None


def check_share(share: float) -> None:
    """Refuse what is no share.

    Raises:
        ValueError: not above 0 and at most 1.
    """
    if not 0 < share <= 1:
        raise ValueError(f"a share of the energy is above 0 and at most 1, as in 0.9; got {share}")


def suggestion(layers: Sequence[LayerReport], share: float) -> str:
    """One line: the rank that keeps ``share`` of what was captured in every layer, in the median, by projection.

    Raises:
        ValueError: a share out of range, or no layer.
    """
    check_share(share)
    if not layers:
        raise ValueError("no layer was initialised, so there is no rank to suggest")
    percent = f"{100 * share:g} %"
    ranks = [least_rank(layer, share) or layer.rank for layer in layers]
    text = f"{percent} of the captured energy is kept by rank {max(ranks)} in every layer"
    if len(layers) > 1:
        text += f", {statistics.median_high(ranks)} in the median"
        projections = projection_ranks(layers, ranks)
        least, most = min(projections, key=projections.__getitem__), max(projections, key=projections.__getitem__)
        if projections[least] < projections[most]:
            text += f" (from {projections[least]} in {least} to {projections[most]} in {most})"
    whole = [least_rank(layer, share, "whole") for layer in layers]
    reached = [rank for rank in whole if rank is not None]
    if not reached:
        return f"{text}; {percent} of the whole energy is not reached"
    return (
        f"{text}; {percent} of the whole energy is reached in {len(reached)} of {len(layers)}, by rank {max(reached)}"
    )


def projection_ranks(layers: Sequence[LayerReport], ranks: Sequence[int]) -> dict[str, int]:
    """The largest of the layers' ranks for each projection, over its depths."""
    most: dict[str, int] = {}
    for label, rank in zip(row_labels(split_names(layer.name for layer in layers)), ranks, strict=True):
        most[label] = max(rank, most.get(label, 0))
    return most


def peft_pattern(layers: Sequence[LayerReport], values: Sequence[float]) -> tuple[float, dict[str, float]]:
    """PEFT's ``rank_pattern`` or ``alpha_pattern`` that gives each projection the largest value of its layers.

    PEFT gives a module the value of the first key that, as a regular expression, matches the end of its name, from a
    dot on. Each key here matches all layers of one projection and no other, so that their order does not matter.

    Args:
        layers: at least one.
        values: one for each layer.

    Returns:
        The largest value, which is for those that no key matches, and the lower ones by key.
    """
    names = [layer.name for layer in layers]
    members: defaultdict[Place, set[str]] = defaultdict(set)
    most: dict[Place, float] = {}
    for name, place, value in zip(names, split_names(names), values, strict=True):
        everywhere = place if place.depth is None else place._replace(depth=0)
        members[everywhere].add(name)
        most[everywhere] = max(value, most.get(everywhere, value))
    largest = max(most.values())
    lower = {place: value for place, value in most.items() if value < largest}
    return largest, {_pattern_key(place, members[place], names): value for place, value in lower.items()}


def _pattern_key(place: Place, members: set[str], names: Sequence[str]) -> str:
    """The shortest end of the projection that tells its layers from all others, or all of their name."""
    parts = [re.escape(part) for part in place.projection.split(".") if part]
    depth = [] if place.depth is None else ["[0-9]+"]
    whole = ".".join([*(re.escape(part) for part in place.stack.split(".") if part), *depth, *parts])
    ends = [".".join(parts[start:]) for start in reversed(range(len(parts)))]
    for key in (*ends, whole):
        # PEFT's own rule. The dots are left as they are, which reads better: whether the key is exact is seen here.
        if {name for name in names if re.match(rf"(.*\.)?({key})$", name)} == members:
            return key
    return f"^{whole}"


def _cumulative_share(layer: LayerReport) -> Tensor:
    """(r,) float64, ascending to exactly 1: Σ_{i≤k} σ̂ᵢ²/Σ_{i≤r} σ̂ᵢ²."""
    sums = layer.singular_values.double().square().cumsum(0)
    return sums / sums[-1] if sums[-1] > 0 else torch.ones_like(sums)
