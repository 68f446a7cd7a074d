"""Where a layer is in its model, read off its dotted name."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from .layer import LayerReport


class Place(NamedTuple):
    """Stack, depth and projection of a layer, as in "model.layers" · 3 · "self_attn.q_proj".

    A name without a depth ("lm_head") is all projection: its stack is empty and its depth None.
    """

    stack: str
    depth: int | None
    projection: str


class Grid(NamedTuple):
    """A model's layers by projection and depth.

    Attributes:
        projections: labels, in the order of the layers.
        depths: ascending; None, for layers without a depth, comes last.
        layers: by (projection, depth).
    """

    projections: list[str]
    depths: list[int | None]
    layers: dict[tuple[str, int | None], LayerReport]

    def of(self, projection: str) -> list[tuple[int | None, LayerReport]]:
        """The depths and layers of one projection, ascending."""
        return [(depth, self.layers[projection, depth]) for depth in self.depths if (projection, depth) in self.layers]


def split_names(names: Iterable[str]) -> list[Place]:
    """The place of each name, in order.

    The depth is the first integer of the dotted path that takes more than one value among the names that are the same
    up to it; where none does (a model of one block), the first integer. The stack is what comes before it, the
    projection what comes after. A name that ends in an integer (``nn.Sequential``'s) has an empty projection.
    """
    paths = [name.split(".") for name in names]
    values: defaultdict[tuple[str, ...], set[str]] = defaultdict(set)
    for path in paths:
        for index in _integers(path):
            values[tuple(path[:index])].add(path[index])
    places = []
    for path in paths:
        integers = _integers(path)
        varying = [index for index in integers if len(values[tuple(path[:index])]) > 1]
        if not integers:
            places.append(Place("", None, ".".join(path)))
            continue
        index = (varying or integers)[0]
        places.append(Place(".".join(path[:index]), int(path[index]), ".".join(path[index + 1 :])))
    return places


def row_labels(places: Sequence[Place]) -> list[str]:
    """What to call each place's projection, or its stack where it has none.

    Where there are several stacks, with the part of the stack that tells it from the others. Two places of the same
    label and depth would hide one another in a picture; the second gets " (2)".
    """
    stacks = list(dict.fromkeys(place.stack for place in places if place.depth is not None))
    short = dict(zip(stacks, _distinct_parts(stacks), strict=True))
    labels, seen = [], defaultdict[tuple[str, "int | None"], int](int)
    for place in places:
        label = place.projection or place.stack or "layer"
        if place.depth is not None and len(stacks) > 1 and place.projection:
            label = f"{short[place.stack]}: {label}"
        seen[label, place.depth] += 1
        count = seen[label, place.depth]
        labels.append(label if count == 1 else f"{label} ({count})")
    return labels


def arrange(layers: Sequence[LayerReport]) -> Grid:
    """The layers by projection and depth.

    Raises:
        ValueError: there is none.
    """
    if not layers:
        raise ValueError("no layer was initialised, so there is nothing to show")
    places = split_names(layer.name for layer in layers)
    labels = row_labels(places)
    depths = sorted({place.depth for place in places if place.depth is not None})
    without = [None] if any(place.depth is None for place in places) else []
    keys = [(label, place.depth) for label, place in zip(labels, places, strict=True)]
    return Grid(list(dict.fromkeys(labels)), [*depths, *without], dict(zip(keys, layers, strict=True)))


def _integers(path: Sequence[str]) -> list[int]:
    return [index for index, part in enumerate(path) if part.isascii() and part.isdigit()]


def _distinct_parts(stacks: Sequence[str]) -> list[str]:
    """The stacks without the parts that all begin and end with; a stack that would vanish stays whole."""
    paths = [stack.split(".") for stack in stacks]
    shortest = min(map(len, paths), default=0)
    head = next((i for i in range(shortest) if len({path[i] for path in paths}) > 1), shortest)
    tail = next((i for i in range(shortest - head) if len({path[-1 - i] for path in paths}) > 1), shortest - head)
    cut = [".".join(path[head : len(path) - tail]) for path in paths]
    return [part or stack for part, stack in zip(cut, stacks, strict=True)]
