"""Figures as SVG elements that can stand side by side in one HTML page."""

from __future__ import annotations

import re
from io import StringIO
from typing import Any
from xml.etree import ElementTree

# A reference to an element of the same document, as in href="#a" and clip-path="url(#a)".
_REFERENCE = re.compile(r"(?:^|\burl\()#([^)]+)")
# What says when and with what a figure was drawn, and a rule that would hold for the whole page.
_NOT_OF_THE_PICTURE = ("metadata", "style")
# A user's matplotlibrc must not turn glyphs into a font that the reader may lack, nor images into files of their own.
_SELF_CONTAINED = {"svg.fonttype": "path", "svg.image_inline": True}


def svg_element(figure: Any, prefix: str, label: str) -> str:
    """A figure as an ``<svg>`` element, the same text for the same figure.

    matplotlib names elements by numbers that start anew in each figure, and by random ones. Here only those keep an id
    that something refers to, counted from ``prefix``-0.

    Args:
        figure: a ``matplotlib.figure.Figure``.
        prefix: of all ids; pictures of different prefixes do not refer to one another's elements.
        label: what a screen reader says in place of the picture.
    """
    root = _parsed(figure)
    ids = {element.attrib.get("id") for element in root.iter()}
    used = [name for element in root.iter() for value in element.attrib.values() for name in _REFERENCE.findall(value)]
    names = {old: f"{prefix}-{index}" for index, old in enumerate(dict.fromkeys(used)) if old in ids}

    def renamed(match: re.Match[str]) -> str:
        return match[0].replace(match[1], names.get(match[1], match[1]))

    for element in root.iter():
        own = element.attrib.pop("id", None)
        for key, value in element.attrib.items():
            element.set(key, _REFERENCE.sub(renamed, value))
        if own in names:
            element.set("id", names[own])
    root.set("role", "img")
    root.set("aria-label", label)
    return ElementTree.tostring(root, encoding="unicode")


def _parsed(figure: Any) -> ElementTree.Element:
    """The figure's SVG without namespaces, which HTML knows by itself, and without all that is not drawn."""
    from matplotlib import rc_context

    buffer = StringIO()
    with rc_context(_SELF_CONTAINED):
        figure.savefig(buffer, format="svg")
    # A comment repeats each text of the picture, and a layer's name may have characters that XML forbids.
    root = ElementTree.fromstring(re.sub("<!--.*?-->", "", buffer.getvalue(), flags=re.DOTALL))
    for element in root.iter():
        element.tag = _local(element.tag)
        element.attrib = {_local(key): value for key, value in element.attrib.items()}
    for parent in list(root.iter()):
        for child in [child for child in parent if child.tag in _NOT_OF_THE_PICTURE]:
            parent.remove(child)
    return root


def _local(name: str) -> str:
    return name.rpartition("}")[2]
