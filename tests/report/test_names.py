"""Depth and projection from the dotted names of several architectures."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pissa_kernels.report.names import Place, arrange, row_labels, split_names

from ..support.reports import LLAMA, layer, llama


@pytest.mark.parametrize(
    ("stack", "projection"),
    [
        ("model.layers", "self_attn.q_proj"),
        ("encoder.layer", "attention.self.query"),
        ("transformer.h", "attn.c_attn"),
        ("model.0.layers", "mlp.experts.7.w1"),  # before the depth an integer that never varies, after it one that does
        ("layers", "q"),
        ("", "q"),  # an nn.Sequential of blocks
        ("blocks", ""),  # the numbered modules themselves
    ],
)
def test_a_stack_of_blocks(stack: str, projection: str) -> None:
    names = [".".join(filter(None, (stack, str(depth), projection))) for depth in (0, 1, 11)]
    assert split_names(names) == [Place(stack, depth, projection) for depth in (0, 1, 11)]


def test_names_without_a_depth() -> None:
    assert split_names(["lm_head", "bert.pooler.dense", "Linear", "fc1"]) == [
        Place("", None, "lm_head"),
        Place("", None, "bert.pooler.dense"),
        Place("", None, "Linear"),
        Place("", None, "fc1"),
    ]
    assert split_names([]) == []


def test_the_depth_of_a_single_block() -> None:
    assert split_names(["model.layers.0.q", "model.layers.0.k"]) == [
        Place("model.layers", 0, "q"),
        Place("model.layers", 0, "k"),
    ]


def test_the_stacks_of_t5_are_distinguished() -> None:
    names = [f"{stack}.block.{depth}.layer.0.SelfAttention.q" for stack in ("encoder", "decoder") for depth in (0, 1)]
    places = split_names([*names, "lm_head"])
    assert [place.depth for place in places] == [0, 1, 0, 1, None]
    assert row_labels(places) == ["encoder: layer.0.SelfAttention.q"] * 2 + [
        "decoder: layer.0.SelfAttention.q",
        "decoder: layer.0.SelfAttention.q",
        "lm_head",
    ]


def test_one_stack_needs_no_prefix() -> None:
    assert row_labels(split_names(["h.0.q", "h.1.q", "lm_head"])) == ["q", "q", "lm_head"]
    labels = row_labels(split_names(["layers.0.q", "layers.1.q", "vision.layers.0.q", "vision.layers.1.q"]))
    assert labels == ["layers: q", "layers: q", "vision: q", "vision: q"]


def test_equal_names_do_not_hide_each_other() -> None:
    grid = arrange([layer("Linear", energy=energy) for energy in (0.1, 0.2, 0.3)])
    assert grid.projections == ["Linear", "Linear (2)", "Linear (3)"]
    assert [grid.layers[name, None].certificate.energy for name in grid.projections] == [0.1, 0.2, 0.3]


def test_grid() -> None:
    grid = arrange(llama(3, extra=["lm_head"]).layers)
    assert grid.projections == [*LLAMA, "lm_head"]
    assert grid.depths == [0, 1, 2, None]
    assert [depth for depth, _ in grid.of("mlp.up_proj")] == [0, 1, 2]
    assert [entry.name for _, entry in grid.of("lm_head")] == ["lm_head"]
    with pytest.raises(ValueError, match="no layer"):
        arrange([])


parts = st.one_of(st.integers(0, 20).map(str), st.text("abc_", min_size=1, max_size=4))


@given(st.lists(st.lists(parts, min_size=1, max_size=6).map(".".join), max_size=8))
def test_the_parts_make_up_the_name(names: list[str]) -> None:
    places = split_names(names)
    for name, (stack, depth, projection) in zip(names, places, strict=True):
        pieces = [stack, "" if depth is None else str(depth), projection]
        assert ".".join(piece for piece in pieces if piece) == name
        assert (depth is None) == (not any(part.isdigit() for part in name.split(".")))
    labels = row_labels(places)
    assert all(labels)
    keys = list(zip(labels, [place.depth for place in places], strict=True))
    if len(set(names)) == len(names):
        assert len(set(keys)) == len(keys), "no layer hides another"


@given(st.text(), st.text())
def test_any_names_are_accepted(one: str, other: str) -> None:
    assert len(row_labels(split_names([one, other]))) == 2
