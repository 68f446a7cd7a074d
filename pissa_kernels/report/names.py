"""A layer's stack, depth and projection, parsed from its dotted name."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from .layer import LayerReport


class Place(NamedTuple):
    """A layer's name, "model.layers.3.self_attn.q_proj", in three parts.

    Attributes:
        stack: the part before the depth, "model.layers"; empty if there is no depth.
        depth: index of the block, 3; None if the name has none, as in "lm_head".
        projection: the part after the depth, "self_attn.q_proj", or the whole name if there is no depth.
    """

    stack: str
    depth: int | None
    projection: str


class Grid(NamedTuple):
    """A model's layers by projection and depth.

    Attributes:
        projections: labels of the projections, in the order of the layers.
        depths: the depths, ascending; last None, if there are layers without a depth.
        layers: the layers, by (projection, depth).
    """

    projections: list[str]
    depths: list[int | None]
    layers: dict[tuple[str, int | None], LayerReport]

    def of(self, projection: str) -> list[tuple[int | None, LayerReport]]:
        """(depth, layer) pairs of one projection, in order of depth."""
        return [(depth, self.layers[projection, depth]) for depth in self.depths if (projection, depth) in self.layers]


def split_names(names: Iterable[str]) -> list[Place]:
    """The parts of each name, in order.

    The depth is the first integer in the dotted name that differs between names with the same prefix. If no integer
    differs, as in a model of one block, the depth is the first integer. A name that ends with its depth, as in an
    ``nn.Sequential``, has an empty projection.
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
    """A label for each place: its projection, or its stack if the projection is empty.

    If there are several stacks, the part in which they differ precedes the projection. A label that would repeat at the
    same depth gets a number, " (2)", because one layer would hide the other in a picture.
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
        ValueError: there is no layer.
    """
    if not layers:
        raise ValueError("no layer was initialized, so there is nothing to show")
    places = split_names(layer.name for layer in layers)
    labels = row_labels(places)
    depths = sorted({place.depth for place in places if place.depth is not None})
    no_depth = [None] if any(place.depth is None for place in places) else []
    keys = [(label, place.depth) for label, place in zip(labels, places, strict=True)]
    return Grid(list(dict.fromkeys(labels)), [*depths, *no_depth], dict(zip(keys, layers, strict=True)))


def _integers(path: Sequence[str]) -> list[int]:
    return [index for index, part in enumerate(path) if part.isascii() and part.isdigit()]


def _distinct_parts(stacks: Sequence[str]) -> list[str]:
    """The stacks without their common prefix and suffix; a stack of which nothing would remain stays whole."""
    paths = [stack.split(".") for stack in stacks]
    shortest = min(map(len, paths), default=0)
    head = next((i for i in range(shortest) if len({path[i] for path in paths}) > 1), shortest)
    tail = next((i for i in range(shortest - head) if len({path[-1 - i] for path in paths}) > 1), shortest - head)
    cut = [".".join(path[head : len(path) - tail]) for path in paths]
    return [part or stack for part, stack in zip(cut, stacks, strict=True)]
